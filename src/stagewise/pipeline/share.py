"""One rank's share of the model, with the interface and names of the plain module.

Problem: a rank holds some of the cells, but optimizers, checkpoints and logs refer to the whole.
Idea: every entry keeps its name in the plain model, so the ranks' shares together are the plain
model's, at any cut. Operations that span ranks (a norm, a checkpoint) are collective.
"""

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import NoReturn, Self

import torch
from torch import nn

from stagewise.checkpoints.loading import load
from stagewise.checkpoints.saving import save_shards
from stagewise.engine.gradients.clipping import clip_by_global_norm, clip_by_value
from stagewise.engine.gradients.overflow import Overflow
from stagewise.engine.gradients.shards import part_of_whole
from stagewise.engine.stage.stage import Stage
from stagewise.engine.transport.ranks import Ranks
from stagewise.errors import CheckpointError, StagewiseError
from stagewise.habits import Answers
from stagewise.model.chain import module_tree
from stagewise.model.tied_parameters import Tied, with_all_names
from stagewise.pipeline.build.whole_model import WholeModel


class Share(Answers):
    """The cells of this rank's stages, as one module."""

    def __init__(
        self,
        whole: WholeModel,
        stages: Mapping[int, Stage],
        ties: tuple[Tied, ...],
        ranks: Ranks,
    ) -> None:
        self.step_index = 0
        self.parameter_shapes = dict(whole.shapes)
        self.state_names = frozenset(whole.aliases)  # of the plain model's state_dict
        self.module = module_tree([cell for stage in stages.values() for cell in stage.cells])
        self._whole, self._ties, self._ranks = whole, ties, ranks
        self._first_names = {name: one.names[0] for one in ties for name in one.names}
        devices = [stage.device for stage in stages.values()]
        self._none = nn.Parameter(torch.empty(0, 0, device=devices[-1] if devices else "cpu"))
        self.overflow = Overflow(ranks, self.module.parameters, lambda: self.step_index)

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def num_ranks(self) -> int:
        return self._ranks.num_ranks

    @property
    def ranks(self) -> Ranks:
        return self._ranks

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of this rank's stages.

        If none of them requires a gradient, one without elements follows, since torch's optimizers
        refuse an empty list: `AdamW(p for p in pipe.parameters() if p.requires_grad)` works on
        every rank, whatever it holds.
        """
        trained = False
        for parameter in self.module.parameters():
            trained |= parameter.requires_grad
            yield parameter
        if not trained:
            yield self._none

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this rank's stages, by the plain model's names.

        A parameter that cells of several ranks use appears once on each of them, under its first
        name in the plain model, as `named_parameters()` yields it there.
        """
        for name, parameter in self.module.named_parameters():
            yield self._first_names.get(name, name), parameter

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the buffers of this rank's stages, by the plain model's names."""
        return self.module.named_buffers()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of this rank's stages; all ranks' together are the plain model's.

        Sharded parameters are DTensors, as torch.distributed.checkpoint takes them.
        """
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load this rank's share of the plain model's `state`; other ranks' entries are ignored.

        A whole tensor is sharded where this rank holds a part.
        Raises CheckpointError if one of this rank's entries is missing or has another shape.
        """
        state = with_all_names(state, self._ties)
        own = self.module.state_dict()
        wrong = [n for n, t in own.items() if n not in state or _shape(state[n]) != _shape(t)]
        if wrong:
            raise CheckpointError(
                f"the state lacks {len(wrong)} entries of this rank, or has them with another "
                f"shape: {', '.join(wrong[:5])}; load a state_dict of the same model"
            )
        self.module.load_state_dict(
            {name: _fitted(held, state[name]) for name, held in own.items()}
        )

    def load_checkpoint(
        self, path: str | PathLike[str], *, strict: bool = True, convert: bool = False
    ) -> None:
        """Load this rank's share of a checkpoint of the plain model; every rank calls this.

        `path` is a safetensors file, a directory with `model.safetensors` or with shards and
        `model.safetensors.index.json` (as Hugging Face's are), or a directory that
        `torch.distributed.checkpoint` wrote, the model alone or below "model" (such as a
        checkpoint of `stagewise train`). Only this rank's tensors are read.

        With `strict` the checkpoint must hold the model's entries and no others. A dtype other
        than the model's is an error, unless `convert`. Raises CheckpointError on every rank before
        anything is changed on any.
        """
        how = {"strict": strict, "convert": convert}
        load(path, self.state_dict(), self._whole.aliases, self._ranks, **how)

    def save_checkpoint(self, directory: str | PathLike[str]) -> None:
        """Write the model as safetensors shards with an index, each rank its own; collective.

        Hugging Face's tools and `load_checkpoint` read it, at any number of stages; other files in
        the directory are left alone. An earlier checkpoint there is replaced atomically at the
        end, so a crash leaves one of the two. All ranks must see the same file system. Raises
        CheckpointError on every rank.
        """
        save_shards(Path(directory), self.state_dict(), self._whole.aliases, self._ranks)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raise StagewiseError for copy, deepcopy and pickle: ties, ranks and calls are of one."""
        raise StagewiseError(
            f"a {type(self).__name__} cannot be copied or pickled, since it belongs to its ranks "
            "and its model's tensors; keep its values with save_checkpoint, or copy its "
            "state_dict(), and build another from a model and a plan (with state= for the values)"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear this rank's gradients."""
        self.module.zero_grad(set_to_none)

    def train(self, mode: bool = True) -> Self:
        """Put this rank's cells in training or eval mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Put this rank's cells in eval mode."""
        return self.train(False)

    def clip_grad_norm_(
        self,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """Scale gradients so that their global norm is at most `max_norm`; return the norm before.

        Bit for bit what `torch.nn.utils.clip_grad_norm_` does to the plain model, with its
        arguments. Collective.
        """
        self.overflow.before_collective()
        return clip_by_global_norm(
            [*self.named_parameters()],
            self._whole.dtypes,
            max_norm,
            self._ranks,
            float(norm_type),
            error_if_nonfinite=error_if_nonfinite,
            foreach=foreach,
        )

    def clip_grad_value_(self, max_value: float, foreach: bool | None = None) -> None:
        """Clamp every gradient's elements to [-max_value, max_value]; collective."""
        self._ranks.exchange((), f"clip_grad_value_({float(max_value)!r})")
        clip_by_value(self.parameters(), max_value, foreach=foreach)


def _fitted(held: object, entry: object) -> object:
    """Return this rank's part of an entry of which it holds a part."""
    if isinstance(held, torch.Tensor) and isinstance(entry, torch.Tensor):
        return part_of_whole(held, entry)
    return entry


def _shape(entry: object) -> torch.Size | None:
    """Return a tensor's shape; None for other state_dict entries (`get_extra_state`)."""
    return entry.shape if isinstance(entry, torch.Tensor) else None
