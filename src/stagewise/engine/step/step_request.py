"""A call, as it was asked for on one rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stagewise.batch.markers import along
from stagewise.engine.stage.work import Mode, Observer, Scaling
from stagewise.errors import UsageError

UNSCALED = Scaling()
CALLS = {Mode.TRAIN: "step", Mode.EVALUATE: "evaluate", Mode.PREDICT: "predict"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """The batch's marks say where samples lie, `batch_dim` where they lie else and in outputs.

    Outputs are kept where some rank wants them. `objection` is what the caller has against the
    call already, of which the other ranks must hear.
    """

    mode: Mode
    step_index: int = 0
    inputs: object = None
    target: object = None
    keywords: Mapping[str, object] = field(default_factory=dict)
    outputs_on: Sequence[int] = ()  # ranks
    scaling: Scaling = UNSCALED
    batch_dim: int = 0
    observe: Observer | None = None
    objection: UsageError | None = None

    def marked(self) -> "Request":
        """With marks where samples lie along `batch_dim`."""
        return replace(
            self,
            inputs=along(self.inputs, self.batch_dim),
            target=along(self.target, self.batch_dim),
            keywords={name: along(part, self.batch_dim) for name, part in self.keywords.items()},
        )

    @property
    def call(self) -> str:
        """The caller's name for it."""
        return CALLS[self.mode]
