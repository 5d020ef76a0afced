"""Gradient scaling for fp16, agreed between the stages."""

from typing import Any

import torch

from stagewise.errors import UsageError
from stagewise.pipeline.pipeline import Pipeline


class GradScaler(torch.amp.GradScaler):
    """A `torch.amp.GradScaler` that skips a step on all ranks if any rank finds inf or nan.

    After each `pipe.step` the ranks agree once, on all gradients: if one is inf or nan, every
    optimizer on every rank skips its step. So ranks may have different optimizers, and a rank
    without parameters may omit `unscale_` and `step`, but not `update`.

    Args:
        pipe: the Pipeline whose gradients are scaled; every rank makes its own scaler and the same
            calls.
        options: those of `torch.amp.GradScaler`, such as `init_scale`.

    Example:
        >>> import torch, stagewise
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> plan = stagewise.Plan(balance=(1, 1), schedule="1f1b", num_microbatches=2)
        >>> pipe = stagewise.Pipeline(model, plan, loss=torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        >>> scaler = stagewise.GradScaler(pipe)
        >>> x, y = torch.ones(8, 4), torch.zeros(8, 1)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     loss = pipe.step(x, target=y, loss_scale=scaler.get_scale())
        >>> scaler.unscale_(optimizer)
        >>> norm = pipe.clip_grad_norm_(1.0)
        >>> _ = scaler.step(optimizer)
        >>> scaler.update()
    """

    def __init__(self, pipe: Pipeline, **options: float | int | bool) -> None:
        if not isinstance(pipe, Pipeline):
            raise UsageError(
                f"GradScaler takes the Pipeline, so that all stages skip a step together, but got "
                f"a {type(pipe).__name__}; write stagewise.GradScaler(pipe)"
            )
        super().__init__(pipe.device.type, **options)  # type: ignore[arg-type]
        self._pipe = pipe
        if self.is_enabled():
            self._lazy_init_scale_growth_tracker(pipe.device)
            pipe.overflow.is_wanted = True

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Like torch's; every rank calls this, even one without an optimizer."""
        overflow = self._pipe.overflow
        if self.is_enabled():
            overflow.before_collective()
            states: dict[int, dict[str, Any]] = self._per_optimizer_states
            if states or not any(p.requires_grad for p in self._pipe.module.parameters()):
                found = torch.full((), float(overflow.found), device=self._pipe.device)
                states[id(overflow)]["found_inf_per_device"] = {self._pipe.device: found}
            overflow.end_round()
        super().update(new_scale)

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        own = any(bool(flag) for flag in found.values())
        known = [p for group in optimizer.param_groups for p in group["params"]]
        anywhere = self._pipe.overflow.ask(known, found=own)
        return {
            device: torch.full_like(found_inf, anywhere or own)
            for device in [*found, found_inf.device]
        }
