"""The parts of a model that one rank each computes when it generates.

A block of a list of layers is one, and so is every module outside these lists that has parameters,
such as an embedding or the head.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stagewise.errors import ModelError

Function = Callable[..., Any]
Form = tuple[bool | None, ...] | None  # of a tuple, where its tensors are; None for a tensor alone


@dataclass(eq=False)
class Stack:
    """A list of blocks, and the module around it, whose forward calls them in order."""

    around: nn.Module
    blocks: list["Unit"] = field(default_factory=list)


@dataclass(eq=False)
class Unit:
    """A module that one rank computes; `owners` hold all its values."""

    path: str
    module: nn.Module
    stack: Stack | None = None
    index: int = 0
    owners: Sequence[int] = ()

    def names(self) -> list[str]:
        """Return the names of its parameters in the model."""
        return [f"{self.path}.{name}" for name, _ in self.module.named_parameters()]

    def stand_in(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor like its output, of NaN where another rank has values."""
        if self.stack is not None:
            return hidden
        kinds = [*self.module.modules()]
        if not hidden.is_floating_point():
            widths = [m.embedding_dim for m in kinds if isinstance(m, nn.Embedding)]
            shape = *hidden.shape, widths[0] if widths else 1
            return torch.full((), torch.nan, dtype=dtype, device=hidden.device).expand(shape)
        widths = [m.out_features for m in kinds if isinstance(m, nn.Linear)]
        if not widths:
            return hidden
        empty = torch.full((), torch.nan, dtype=dtype, device=hidden.device)
        return empty.expand(*hidden.shape[:-1], widths[-1])


@dataclass(frozen=True)
class Agreed:
    """What the ranks of a Pipeline have told each other about units, by path and form of a call."""

    forms: dict[Hashable, Form] = field(default_factory=dict)  # of blocks' outputs
    moves: dict[Hashable, tuple[int, ...]] = field(default_factory=dict)  # leaves that travel


def units_of(model: nn.Module) -> tuple[list[Stack], list[Unit]]:
    """Return a model's lists of blocks and all its units; ModelError if it has no such form."""
    stacks: dict[int, Stack] = {}
    units = list(_found(model, "", stacks, set()))
    if not stacks:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks that ranks could share when it "
            "generates; save the model, and generate in one process"
        )
    return list(stacks.values()), units


def _found(
    module: nn.Module, path: str, stacks: dict[int, Stack], seen: set[int]
) -> Iterator[Unit]:
    lists = any(_is_stack(inner) for inner in module.modules())
    if not lists:
        if id(module) not in seen and any(True for _ in module.parameters()):
            seen.add(id(module))
            yield Unit(path, module)
        return
    if any(p is not None for p in module._parameters.values()):
        raise ModelError(
            f"{path or type(module).__name__} has parameters beside its list of blocks, which no "
            "rank alone could use; save the model, and generate in one process"
        )
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if not _is_stack(child):
            yield from _found(child, inner, stacks, seen)
            continue
        stack = stacks.setdefault(id(module), Stack(module))
        for index, block in enumerate(child.children()):
            stack.blocks.append(Unit(f"{inner}.{index}", block, stack, index))
            yield stack.blocks[-1]


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
