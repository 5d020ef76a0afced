"""What `training_step` changes of the LightningModule, beside the model that is cut.

Problem: it runs once for each microbatch, on the last stage only, so a counter would count
microbatches there and nothing elsewhere. Idea: note numbers, tensors and the lengths of collections
before a batch, and compare. What was None or missing before (a cache) may be set.
"""

from collections.abc import Collection

import torch
from lightning.pytorch import LightningModule
from torch import nn

from stagewise.errors import UsageError

HeldState = dict[str, tuple[object, object]]  # by path: a value, kept alive, and what to compare

_HIDDEN = frozenset(vars(LightningModule()))


def state_beside(module: nn.Module, cut: nn.Module) -> HeldState:
    """Return what `module` and its parts hold beside `cut`, torch and Lightning."""
    inside = {id(each) for each in cut.modules()}
    return {
        f"{path}.{name}".lstrip("."): (value, token)
        for path, part in module.named_modules()
        if id(part) not in inside
        for name, value in {**vars(part), **part._buffers}.items()
        if name not in _HIDDEN and (token := _token(value)) is not None
    }


def _token(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, bool | int | float | str):
        return repr(value)
    return len(value) if isinstance(value, list | dict | set | tuple) else None


def paths_changed(before: HeldState, after: HeldState) -> list[str]:
    """Return the paths of what was there before and has changed."""
    return [
        path for path, (_, token) in before.items() if path in after and after[path][1] != token
    ]


def refuse_changed(paths: Collection[str]) -> None:
    """Raise UsageError if training_step has changed what lies at `paths`."""
    if paths:
        raise UsageError(
            f"training_step changes {', '.join(sorted(paths)[:5])} of the LightningModule, but it "
            "runs once for each microbatch, and on the last stage only; change it in "
            "on_train_batch_start or on_train_batch_end, which run once a batch on every process, "
            "log numbers with self.log, or make it part of the model"
        )
