"""Suggest `cells=` for a model that cannot be captured, after trying it.

Candidates are lists of modules that forward calls once each, in both modes, and the outermost
modules that it calls once. The first that matches the plain model on a few samples wins.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress

import torch
from torch import nn

from stagewise.errors import ModelError
from stagewise.model.replay.capture_cells import replayed
from stagewise.model.verify.other_sizes import first_samples
from stagewise.model.verify.situation import kept

_TRIES = 5
_LISTS = (nn.ModuleList, nn.Sequential)


def with_way_out(error: ModelError, model: nn.Module, example: Mapping[str, object]) -> ModelError:
    """Return `error` with a `cells=` that works, or the reason why none does."""
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return ModelError(
            f"{error}; or build it on a real device and name the modules to use as cells, whose "
            "code then runs unchanged: stagewise.plan(..., cells=[...])"
        )
    few = first_samples(example) or dict(example)
    failed = ""
    for patterns in cells_to_try(model, few):
        try:
            replayed(model, patterns, (), few)
        except Exception as other:
            failed = failed or f" (cells={patterns}: {type(other).__name__}: {other})"
        else:
            return ModelError(
                f"{error}; or name the modules to use as cells, so that their code and the code "
                f"around them runs unchanged: stagewise.plan(..., cells={patterns})"
            )
    return ModelError(
        f"{error}. Naming modules as cells was also tried, and does not work for this model{failed}"
    )


def cells_to_try(model: nn.Module, example: Mapping[str, object]) -> list[list[str]]:
    """Return candidates, the likeliest first."""
    once = _called_once(model, example)
    lists = [f"{path}.*" for path in _lists(model, once)]
    outer = _compressed(model, list(_outermost(model, "", once)))
    layers = [p for p in outer if p.endswith("*") or not isinstance(_at(model, p), nn.RNNBase)]
    found = [lists, *([one] for one in lists), outer, layers]
    kept_apart: list[list[str]] = []
    for patterns in found:
        if patterns and patterns not in kept_apart and (len(patterns) > 1 or "*" in patterns[0]):
            kept_apart.append(patterns)
    return kept_apart[:_TRIES]


def _at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def _called_once(model: nn.Module, example: Mapping[str, object]) -> set[str]:
    """Return the modules that a call of the model calls once, in either mode."""
    found: list[set[str]] = []
    for training in (True, False):
        counts: Counter[str] = Counter()
        with ExitStack() as hooks, suppress(Exception), kept(model, training), torch.no_grad():
            for path, module in model.named_modules():
                count = _CountCalls(counts, path)
                hooks.callback(module.register_forward_pre_hook(count).remove)
            model(**example)
        found.append({path for path, count in counts.items() if path and count == 1})
    return set.intersection(*found)


class _CountCalls:
    """A hook that counts the calls of the module at `path`."""

    def __init__(self, counts: Counter[str], path: str) -> None:
        self._counts, self._path = counts, path

    def __call__(self, module: nn.Module, args: object) -> None:
        self._counts[self._path] += 1


def _lists(model: nn.Module, once: set[str]) -> Iterator[str]:
    """Yield the outermost lists of two or more modules that are each called once."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not path or not isinstance(module, _LISTS) or len(module) < 2:
            continue
        if path.startswith(tuple(inside)):
            continue
        if all(f"{path}.{name}" in once for name, _ in module.named_children()):
            inside.append(f"{path}.")
            yield path


def _outermost(model: nn.Module, path: str, once: set[str]) -> Iterator[str]:
    """Yield the outermost modules that are called once and contain no list of such."""
    for name, child in _at(model, path).named_children():
        inner = f"{path}.{name}" if path else name
        holds = any(other.startswith(f"{inner}.") for other in _lists(model, once))
        if inner in once and not holds and not isinstance(child, _LISTS):
            yield inner
        else:
            yield from _outermost(model, inner, once)


def _compressed(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Replace `layers.0, layers.1` by `layers.*` if these are all."""
    found: dict[str, None] = {}
    for path in paths:
        above = path.rpartition(".")[0]
        children = [f"{above}.{name}" for name, _ in _at(model, above).named_children()]
        whole = above and isinstance(_at(model, above), _LISTS) and set(children) <= set(paths)
        found[f"{above}.*" if whole else path] = None
    return list(found)
