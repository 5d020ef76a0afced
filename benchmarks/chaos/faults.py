"""The faults: where each strikes, and what must be said of it.

In `words`, {rank} and {step} stand for where it struck. A fault without words ends the run in an
orderly way, or not at all.
"""

from dataclasses import dataclass

_NAMED = ("rank {rank}", "step {step}", "struck by chaos")
_KILLED = ("rank {rank}", "SIGKILL")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault."""

    name: str
    place: str = ""  # where it strikes: see `recipe`
    how: str = ""  # what happens there: see `strike`
    words: tuple[str, ...] = ()  # all must be in what the user sees
    ends: bool = True  # whether the run ends by it
    hangs: bool = False  # only the watchdog can tell
    last_rank_only: bool = False
    damage: str = ""  # instead, what is done to the last checkpoint of a run: see `damage`
    in_loop: bool = False  # in a loop of one's own, of one rank: see `loop`

    @property
    def kills(self) -> bool:
        """Whether a worker is killed, without whom replicas go on."""
        return self.how in ("kill", "kill_soon")


FAULTS = (
    Fault(name="exception in forward", place="forward", how="raise", words=(*_NAMED, "cell")),
    Fault(name="exception in backward", place="backward", how="raise", words=_NAMED),
    Fault(name="exception in loss", place="loss", how="raise", words=_NAMED, last_rank_only=True),
    Fault(name="exception in data", place="data", how="raise", words=_NAMED),
    Fault(name="exception in optimizer", place="optimizer", how="raise", words=_NAMED),
    Fault(name="exception in schedule of rates", place="scheduler", how="raise", words=_NAMED),
    Fault(name="SIGKILL in forward", place="forward", how="kill", words=_KILLED),
    Fault(name="SIGKILL in backward", place="backward", how="kill", words=_KILLED),
    Fault(name="SIGKILL in optimizer", place="optimizer", how="kill", words=_KILLED),
    Fault(name="SIGKILL in data", place="data", how="kill", words=_KILLED),
    Fault(name="SIGKILL around a checkpoint", place="data", how="kill_soon", words=_KILLED),
    Fault(name="os._exit(0)", place="forward", how="exit", words=("rank {rank}",)),
    Fault(name="sys.exit", place="backward", how="interrupt", words=("rank {rank}",)),
    Fault(name="out of memory", place="forward", how="no_memory", words=("rank {rank}", "memory")),
    Fault(name="NaN in forward", place="forward", how="nan", words=("rank {rank}", "step {step}")),
    Fault(
        name="NaN in backward", place="backward", how="nan", words=("rank {rank}", "step {step}")
    ),
    Fault(
        name="NaN loss",
        place="loss",
        how="nan",
        words=("rank {rank}", "step {step}"),
        last_rank_only=True,
    ),
    Fault(name="disk full", place="data", how="few_bytes", words=("rank {rank}", "File too large")),
    Fault(name="lost message", place="forward", how="drop", words=("rank {rank}",), hangs=True),
    Fault(name="connections cut", place="forward", how="cut_links", words=("rank {rank}",)),
    Fault(name="SIGSTOP", place="forward", how="stop", words=("rank {rank}",), hangs=True),
    Fault(name="hang in forward", place="forward", how="hang", words=("rank {rank}",), hangs=True),
    Fault(name="hang in data", place="data", how="hang", words=("rank {rank}",), hangs=True),
    Fault(name="slow rank", place="forward", how="slow", ends=False),
    Fault(name="launcher killed", place="forward", how="kill_parent"),
    Fault(name="SIGTERM to the launcher", place="backward", how="end_parent"),
    Fault(name="last checkpoint truncated", damage="truncate"),
    Fault(name="a bit of the last checkpoint flipped", damage="flip"),
    Fault(name="a file of the last checkpoint missing", damage="remove"),
    Fault(name="garbage in the last checkpoint's description", damage="garbage"),
    *(
        Fault(name=f"{call}, others step", place="call", how=call, words=words, in_loop=True)
        for call, words in (
            ("predict", ("predict", "step")),
            ("evaluate", ("evaluate", "step")),
            ("clip_grad_norm_", ("clip_grad_norm_", "step")),
            ("save_checkpoint", ("save_checkpoint", "step")),
            ("smaller batch", ("rank",)),
            ("other batch", ("rank",)),
            ("total_samples", ("total_samples",)),
            ("loss_scale", ("loss_scale",)),
        )
    ),
)
