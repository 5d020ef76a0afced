"""`generate` of transformers, with the model's blocks and their caches spread over ranks.

Problem: a generation loop calls the whole model for every token, with a key-value cache of all
layers. Idea: every rank runs the loop, and of every forward its own blocks, which fill the cache of
its own layers. Blocks of other ranks pass their input on, and note in the cache only how long it
is; the hidden states come from the rank before, and the logits go from the last rank to all, which
so choose the same tokens. One rank works at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from stagewise.errors import ModelError
from stagewise.pipeline.pipeline import Pipeline


def generate_on_ranks(model: Any, pipe: Pipeline, *args: Any, **kwargs: Any) -> Any:
    """Return what `model.generate` does, on every rank; collective.

    Raises ModelError for an encoder-decoder, or one that is not cut between its blocks.
    """
    kwargs.setdefault("use_cache", True)  # a trainer's model has it off
    mode = model.training
    model.eval()
    try:
        if pipe.num_ranks == 1:
            return model.generate(*args, **kwargs)
        torch.set_rng_state(pipe.ranks.broadcast(torch.get_rng_state(), 0).cpu())
        with _Spread(model, pipe).run():
            return model.generate(*args, **kwargs)
    finally:
        model.train(mode)


class _Spread:
    """A model whose own blocks run here."""

    def __init__(self, model: Any, pipe: Pipeline) -> None:
        self._model, self._pipe = model, pipe
        if model.config.is_encoder_decoder:
            raise ModelError(
                "only decoders generate on several ranks; save the model, and generate in one "
                "process"
            )
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        if not lists:
            raise ModelError(f"{type(model).__name__} has no list of blocks to generate with")
        sizes = [sum(p.numel() for p in each.parameters()) for each in lists]
        self._blocks = list(lists[sizes.index(max(sizes))])
        here = [[not p.is_meta for p in block.parameters()] for block in self._blocks]
        split = [index for index, own in enumerate(here) if any(own) and not all(own)]
        if pipe.any(bool(split)):
            raise ModelError(
                f"blocks {split} are cut in their midst, but each needs its cache on one rank; "
                "cut the model between its blocks: cells= with a path for each"
            )
        self._own = [index for index, own in enumerate(here) if all(own)]
        if pipe.any(not self._own):
            raise ModelError("a rank has no block of its own; give every stage one or more")
        self._dtype = next(pipe.parameters()).dtype

    @contextmanager
    def run(self) -> Iterator[None]:
        """Let the model's forward be this rank's part of it."""
        inside = {id(module) for block in self._blocks for module in block.modules()}
        replaced: list[tuple[nn.Module, Callable[..., Any]]] = []
        for index, block in enumerate(self._blocks):
            if index not in self._own:
                replaced.append((block, self._passing(index)))
        for module in self._model.modules():
            own = [p for p in module._parameters.values() if p is not None]
            if id(module) not in inside and any(p.is_meta for p in own):
                replaced.append((module, self._empty(module)))
        for module, forward in replaced:
            module.__dict__["forward"] = forward
        hooks = [self._model.register_forward_hook(self._with_logits)]
        first, last = self._blocks[self._own[0]], self._blocks[self._own[-1]]
        hooks.append(first.register_forward_pre_hook(self._receive, prepend=True))
        hooks.append(last.register_forward_hook(self._send))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, _ in replaced:
                del module.__dict__["forward"]

    def _hop(self, hidden: torch.Tensor | None, source: int) -> Any:
        return self._pipe.ranks.broadcast(hidden, source, [source + 1])

    def _receive(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        for source in range(self._pipe.rank):
            hidden = self._hop(None, source)
        return (hidden, *args[1:])

    def _send(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            raise ModelError(f"a {type(block).__name__} does not return its hidden states alone")
        for source in range(self._pipe.rank, self._pipe.num_ranks - 1):
            self._hop(output if source == self._pipe.rank else None, source)

    def _with_logits(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        last = self._pipe.num_ranks - 1
        output.logits = self._pipe.ranks.broadcast(output.logits, last)
        return output

    def _passing(self, index: int) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            noted = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            for value in (*args, *kwargs.values()):
                if isinstance(value, Cache):
                    value.update(noted, noted, index)
            return hidden

        return forward

    def _empty(self, module: nn.Module) -> Callable[..., Any]:
        def forward(value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if isinstance(module, nn.Embedding):
                shape = *value.shape, module.embedding_dim
            elif isinstance(module, nn.Linear):
                shape = *value.shape[:-1], module.out_features
            else:
                return value
            return torch.zeros(shape, dtype=self._dtype, device=value.device)

        return forward
