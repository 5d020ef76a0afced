"""A call, as requested on one rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stagewise.batch.markers import along
from stagewise.engine.stage.work import Mode, Observer, Scaling
from stagewise.errors import UsageError

UNSCALED = Scaling()
CALLS = {Mode.TRAIN: "step", Mode.EVALUATE: "evaluate", Mode.PREDICT: "predict"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One call's arguments.

    `batch_dim` is the samples' dimension in outputs and in unmarked parts of the batch. `objection`
    is an error found before the call, which all ranks must hear of.
    """

    mode: Mode
    step_index: int = 0
    inputs: object = None
    target: object = None
    keywords: Mapping[str, object] = field(default_factory=dict)
    outputs_on: Sequence[int] = ()  # ranks that want the outputs
    scaling: Scaling = UNSCALED
    batch_dim: int = 0
    observe: Observer | None = None
    is_measured: bool = False  # nothing is examined that would take time
    objection: UsageError | None = None

    def marked(self) -> "Request":
        """Return the request with unmarked parts marked by `batch_dim`."""
        return replace(
            self,
            inputs=along(self.inputs, self.batch_dim),
            target=along(self.target, self.batch_dim),
            keywords={name: along(part, self.batch_dim) for name, part in self.keywords.items()},
        )

    @property
    def call(self) -> str:
        """The name of the caller's method."""
        return CALLS[self.mode]
