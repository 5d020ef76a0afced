"""Failures: how a rank that fails keeps the others going, or tells why it cannot.

A rank that fails in an instruction goes through the rest of its program without computing, and
sends something in place of every message, so that no peer waits; afterwards all ranks agree
(`engine.step.agreement`). `LOST` stands for a value that will never come.
"""

import enum
import traceback
from dataclasses import dataclass
from typing import Final

import torch

from stagewise.errors import CellError, StagewiseError
from stagewise.schedule import Instruction

_NO_MEMORY = "can't allocate memory"  # c10's CPU allocator raises a plain RuntimeError


class Lost(enum.Enum):
    """The one value LOST."""

    LOST = enum.auto()


LOST: Final = Lost.LOST


@dataclass(frozen=True)
class Failure:
    """Why a rank stopped computing, and in which instruction; None: before the first."""

    instruction: Instruction | None
    error: StagewiseError
    out_of_memory: bool

    @staticmethod
    def of(
        error: Exception, instruction: Instruction | None, device: torch.device | None
    ) -> "Failure":
        """The failure that `error` is, named by its place; without memory, it holds no tensors."""
        no_memory = is_out_of_memory(error)
        if no_memory:
            _let_go(error)
        if isinstance(error, StagewiseError):
            return Failure(instruction, error, no_memory)
        where = "the batch could not be prepared"
        if instruction is not None:
            where = (
                f"stage {instruction.stage} failed on microbatch {instruction.microbatch} "
                f"(instruction {instruction}, device {device})"
            )
        named = CellError(f"{where}: {type(error).__name__}: {error}")
        named.__cause__ = error
        return Failure(instruction, named, no_memory)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is that a device has no more memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and _NO_MEMORY in str(error):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def _let_go(error: BaseException | None) -> None:
    """Drop the local variables of the frames that `error` went through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
