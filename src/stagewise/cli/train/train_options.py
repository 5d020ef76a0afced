"""The options of `stagewise train` alone, with their help."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import typer

from stagewise.errors import UsageError
from stagewise.mesh import PIPELINE_AXIS, MeshShape
from stagewise.training.workers.environment import launched, launched_by_us

Dashboard = Annotated[
    bool,
    typer.Option(
        "--dashboard",
        help="Serve a page that follows the run, to browsers on this machine only, and print its "
        "address. Needs plotly: pip install 'stagewise[page]'.",
    ),
]
Mesh = Annotated[
    str | None,
    typer.Option(
        metavar="AXIS=N,...",
        help="Run pipelines side by side: the axes of a torch DeviceMesh with their lengths, such "
        "as pp=2,dp_shard=2. pp is the pipeline's; dp... divide each batch; over dp_shard "
        "parameters are sharded. The recipe's parallelize(module, mesh, stage_index) uses others.",
        show_default=False,
    ),
]
Pipeline = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Devices of each pipeline: the axis pp of a mesh. [default: --devices divided by the "
        "others]",
        show_default=False,
    ),
]
Shard = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Divide each batch, and shard each stage, over this many ranks: the axis dp_shard.",
        show_default=False,
    ),
]
Tensor = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Ranks along the axis tp, over which the recipe's parallelize splits matrices.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Total number of steps (minibatches), such as 1000, including those before --resume. "
        "[default: one pass over the recipe's data]",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Directory for log and checkpoints. [default: runs/RECIPE, with a number appended if "
        "that exists]",
        show_default=False,
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Resume from a run's last checkpoint (give the run's directory) or from a certain "
        "checkpoint (its directory). The number of stages may change. auto: from the last one in "
        "--out, if there is one, for a command that a cluster may start again.",
        show_default=False,
    ),
]
Init = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Start from these values: a .safetensors file, a directory with model.safetensors or "
        "its shards and index (as Hugging Face's are), or a run or checkpoint of stagewise, "
        "without its optimizer.",
        show_default=False,
    ),
]
SavedPlan = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE",
        help="Use a plan written by `stagewise plan --json`, instead of measuring and of the "
        "options above.",
        show_default=False,
    ),
]
ValidateEvery = Annotated[
    int, typer.Option(min=0, metavar="STEPS", help="Steps between validations; 0 for none.")
]
Keep = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="How many of the last checkpoints to keep. The one with the lowest validation loss is "
        "kept as well.",
    ),
]
Record = Annotated[
    int,
    typer.Option(
        min=0,
        max=100,
        metavar="N",
        help="Record N steps, at most 100, with all that happens in them, after 8 steps and again "
        "every 100, in OUT/recording.json, for stagewise report; 0 for none.",
    ),
]
Log = Annotated[
    str,
    typer.Option(
        metavar="NAME,...",
        help="Pass the log's numbers on, as well: tensorboard (in OUT/tensorboard), wandb, mlflow, "
        "prometheus (in OUT/metrics.prom), or several with commas.",
        show_default=False,
    ),
]
Restarts = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="How often to start the workers again, from the newest checkpoint, when one fails. "
        "Under torchrun give its --max-restarts.",
    ),
]
Replace = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="How many killed workers to replace in the running run. Each worker keeps copies of "
        "its state after the last two steps in host memory that outlives it; a new worker finds "
        "them there, and at most two steps are repeated.",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A TOML file with any of these options, such as microbatches = 8; the command line "
        "overrides it. [default: the file with the recipe's name that ends in .toml, if there is "
        "one]",
        show_default=False,
    ),
]
NoConfig = Annotated[bool, typer.Option("--no-config", help="Read options from no file.")]
CheckpointEvery = Annotated[
    int, typer.Option(min=0, metavar="STEPS", help="Steps between checkpoints; 0 for none.")
]


@dataclass(frozen=True, kw_only=True)
class AskedMesh:
    """The options that ask for a mesh, and the number of all its ranks if that is given."""

    mesh: str | None = None
    pipeline: int | None = None
    shard: int | None = None
    tensor: int | None = None
    num_ranks: int | None = None

    def axes(self) -> dict[str, int]:
        """Return the axes, with that of the pipeline if it is known; none if no option is given."""
        short = {"pp": self.pipeline, "dp_shard": self.shard, "tp": self.tensor}
        axes = {name: length for name, length in short.items() if length is not None}
        if self.mesh is not None:
            if axes:
                raise UsageError(
                    f"--mesh {self.mesh} names all axes, but --pipeline, --shard or --tensor was "
                    "given too; leave those out"
                )
            axes = dict(MeshShape.of(self.mesh).axes)
        if self.num_ranks is not None and axes and PIPELINE_AXIS not in axes:
            length, rest = divmod(self.num_ranks, prod(axes.values()))
            if rest or not length:
                raise UsageError(
                    f"{self.num_ranks} devices cannot be divided into {prod(axes.values())} equal "
                    f"parts ({_words(axes)}); make --devices a multiple of {prod(axes.values())}"
                )
            axes = {PIPELINE_AXIS: length, **axes}
        return axes

    def shape(self, num_devices: int) -> MeshShape | None:
        """Return the mesh for a plan of so many devices; None if none is asked for, or of one rank.

        Raises UsageError if it does not fit the plan, or the number of all ranks.
        """
        axes = self.axes()
        if not axes:
            return None
        found = MeshShape.with_pipeline(axes, num_devices)
        if found.num_devices != num_devices:
            raise UsageError(
                f"the mesh {found} has {found.num_devices} devices along the pipeline, but the "
                f"plan needs {num_devices}; make {PIPELINE_AXIS} {num_devices} long, or change "
                "--stages, --replicas or --plan"
            )
        if self.num_ranks not in (None, found.num_ranks):
            raise UsageError(
                f"the mesh {found} needs {found.num_ranks} devices, but there are "
                f"{self.num_ranks}: make the product of its axes {self.num_ranks}, or give "
                f"--devices {found.num_ranks} (under torchrun: as many processes)"
            )
        return found if found.num_ranks > 1 else None


def check_replaced(mesh: MeshShape | None, *, adaptive: bool) -> None:
    """Raise UsageError if lost workers cannot be replaced."""
    if launched() and not launched_by_us():
        raise UsageError(
            "--replace-lost needs workers that stagewise train starts itself, because torchrun "
            "ends all when one dies; leave it out, or give torchrun --max-restarts"
        )
    if mesh is not None or adaptive:
        other = f"the mesh {mesh}" if mesh is not None else "--microbatches auto"
        raise UsageError(
            f"--replace-lost cannot be used with {other} yet; leave one of them out, or give "
            "--restarts, which goes on from the last checkpoint"
        )


def _words(axes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={length}" for name, length in axes.items())
