"""Failures: how a failing rank keeps the others from blocking, or says why it cannot.

A rank that fails in an instruction walks through the rest of its program without computing: it
sends a placeholder for each message it owes, so that no peer blocks; afterwards all ranks agree
on the outcome (`engine.step.agreement`). `LOST` stands for a value that will never arrive.
"""

import enum
import traceback
from dataclasses import dataclass
from typing import Final

import torch

from stagewise.engine.watch.now import NOW
from stagewise.errors import CellError, PeerError, StagewiseError
from stagewise.schedule import Instruction, Message

# In messages of plain RuntimeErrors: c10's CPU allocator, CUDA and its libraries, NCCL, MPS.
_NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
)


class Lost(enum.Enum):
    """The one value LOST."""

    LOST = enum.auto()


LOST: Final = Lost.LOST


@dataclass(frozen=True)
class Failure:
    """Why a rank stopped computing, and in which instruction (None: before the first)."""

    instruction: Instruction | None
    error: StagewiseError
    out_of_memory: bool

    @staticmethod
    def of(
        error: Exception,
        instruction: Instruction | None,
        device: torch.device | None,
        within: str = "",
    ) -> "Failure":
        """Wrap `error` with its place, `within` a stage; drop the tensors that a lack of memory
        keeps alive.
        """
        no_memory = is_out_of_memory(error)
        if no_memory:
            let_go(error)
        if isinstance(error, StagewiseError):
            return Failure(instruction, error, no_memory)
        where = f"the batch could not be prepared ({NOW.here(NOW.kind)})"
        if instruction is not None:
            of = f"{within} of " if within else ""
            where = (
                f"{of}stage {instruction.stage} failed on microbatch {instruction.microbatch} "
                f"(instruction {instruction}, device {device}{NOW.beside()})"
            )
        named = CellError(f"{where}: {type(error).__name__}: {error}")
        named.__cause__ = error
        return Failure(instruction, named, no_memory)


def unreadable(message: Message, why: str) -> PeerError:
    """Return what to raise if other bytes come than the sender of `message` has sent before it."""
    error = PeerError(
        f"what rank {message.destination} receives from rank {message.source} as {message} cannot "
        f"be read ({why}): an earlier message between them was lost or damaged; resume from the "
        "last checkpoint, and check the network if it happens again"
    )
    error.is_first = True
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error`, or its cause, is a device running out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def let_go(error: BaseException | None) -> None:
    """Clear the local variables of the frames in the traceback of `error`."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
