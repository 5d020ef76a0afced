"""What users of other libraries write out of habit, answered with the name that it has here.

Python's own answer, "unexpected keyword argument 'chunks'", is right and helps nobody.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

# Arguments of torch.distributed.pipelining, torchgpipe, fairscale, DeepSpeed and Trainer.
ARGUMENTS = {
    "activation_checkpointing": "recompute",
    "chunks": "num_microbatches",
    "checkpoint": "recompute",
    "criterion": "loss",
    "devices": "num_devices",
    "gradient_accumulation_steps": "num_microbatches",
    "gradient_checkpointing": "recompute",
    "labels_key": "target",
    "loss_fn": "loss",
    "micro_batches": "num_microbatches",
    "microbatches": "num_microbatches",
    "n_microbatches": "num_microbatches",
    "num_chunks": "num_microbatches",
    "n_stages": "num_stages",
    "num_pipeline_stages": "num_stages",
    "split_points": "balance",
    "targets": "target",
}
SCHEDULES = {  # without case and punctuation
    "1f1bschedule": "1f1b",
    "dapple": "1f1b",
    "interleaved1f1b": "interleaved",
    "interleavedzerobubble": "zb_v",
    "loopedbfs": "breadth_first",
    "pipedream": "1f1b",
    "pipedreamflush": "1f1b",
    "zbh1": "zb_h1",
    "zbvzerobubble": "zb_v",
    "zerobubble": "zb_h1",
}
OF_PLAN = (
    "balance",
    "memory_bytes",
    "num_devices",
    "num_microbatches",
    "num_stages",
    "recompute",
    "replicas",
    "schedule",
)

CALLS = (
    "pipe.step(inputs, target=target) runs all microbatches forward and backward and returns the "
    "loss, pipe.predict(inputs) returns the outputs"
)
PARTS = "pipe.plan has its balance and num_microbatches, pipe.module this rank's cells"
ATTRIBUTES = {
    "forward": CALLS,
    "backward": "pipe.step(inputs, target=target) has run it: gradients are in .grad",
    **dict.fromkeys(
        ("to", "cuda", "cpu"),
        "give Pipeline the devices of its stages: devices=['cuda:0', 'cuda:1']",
    ),
    **dict.fromkeys(("partitions", "balance", "chunks"), PARTS),
    "devices": "pipe.device is this rank's; under torchrun device r is rank r's",
    "save_pretrained": "call pipe.save_checkpoint(folder), and config.save_pretrained(folder)",
}

Callee = TypeVar("Callee", bound=Callable[..., object])


def in_our_words(callee: Callee) -> Callee:
    """Let a function or class answer an unknown keyword argument with the one that is meant."""
    if isinstance(callee, type):
        callee.__init__ = _answering(callee.__init__, callee.__name__)  # type: ignore[misc]
        return callee
    return _answering(callee, callee.__name__)  # type: ignore[return-value]


def _answering(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> Any:
        for unknown in kwargs.keys() - known.keys():
            refuse_argument(name, unknown, known)
        return function(*args, **kwargs)

    return call


def refuse_argument(callee: str, unknown: str, known: Iterable[str]) -> NoReturn:
    """Raise TypeError that says what `unknown` is called here, if that can be guessed."""
    meant, remedy = meant_argument(unknown, known, likeness=0.7), ""
    if meant is not None and meant in known:
        remedy = f"; write {meant}=" if meant != unknown else ""
    elif meant is not None:
        which = "" if meant == unknown else f"here it is {meant}, which "
        remedy = f"; {which}stagewise.plan(...) and Plan(...) take{' it' * (meant == unknown)}"
    raise TypeError(f"{callee}() got an unexpected keyword argument {unknown!r}{remedy}")


def meant_argument(unknown: str, known: Iterable[str], likeness: float = 0.8) -> str | None:
    """Return the argument that `unknown` stands for in another library, or is a typo of."""
    if meant := ARGUMENTS.get(unknown):
        return meant
    close = difflib.get_close_matches(unknown, [*known, *OF_PLAN], n=1, cutoff=likeness)
    return close[0] if close else None


def meant_schedule(unknown: str, known: Iterable[str]) -> str | None:
    """Return the schedule that another library calls `unknown`, or of which it is a typo."""
    plain = "".join(filter(str.isalnum, unknown.lower())).removeprefix("schedule")
    names = {"".join(filter(str.isalnum, name)): name for name in known}
    if meant := SCHEDULES.get(plain) or names.get(plain):
        return meant
    close = difflib.get_close_matches(plain, names, n=1, cutoff=0.6)
    return names[close[0]] if close else None


class Answers:
    """What a Pipeline does not have, with what takes its place."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            in_our_words(cls)

    if not TYPE_CHECKING:  # it would hide mistakes from type checkers

        def __getattr__(self, name):
            said = f"{type(self).__name__!r} object has no attribute {name!r}"
            remedy = f"; {ATTRIBUTES[name]}" if name in ATTRIBUTES else ""
            raise AttributeError(said + remedy)

        def __call__(self, *_, **__):
            raise TypeError(f"a {type(self).__name__} is no function: {CALLS}")

        def __getitem__(self, _):
            raise TypeError(f"a {type(self).__name__} is no sequence of layers; {PARTS}")

        def __len__(self):
            return self[:]

        def __bool__(self):
            return True
