"""A module's buffers as they were before a step that may have to be repeated."""

import torch
from torch import nn


class KeptBuffers:
    """Copies of a module's buffers, made anew only of those that have changed."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}  # version, copy
        self._module: nn.Module | None = None

    def keep(self, module: nn.Module) -> None:
        """Copy the buffers of `module`."""
        before, self._kept, self._module = self._kept, {}, module
        for name, buffer in module.named_buffers():
            version = 0 if buffer.is_inference() else buffer._version
            old = before.get(name)
            same = old is not None and old[0] is buffer and old[1] == version
            copy = old[2] if old is not None and same else buffer.detach().clone()
            self._kept[name] = buffer, version, copy

    def settle(self) -> None:
        """The step is over: nothing is put back any more."""
        self._module = None

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the buffers their values before the step, unless that is over."""
        if self._module is not None:
            for name, buffer in self._module.named_buffers():
                buffer.copy_(self._kept[name][2])
