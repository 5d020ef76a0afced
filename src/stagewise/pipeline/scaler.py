"""Gradient scaling for fp16, agreed between the stages."""

import torch

from stagewise.pipeline.pipeline import Pipeline


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` that skips a step on every rank where any rank finds inf or nan.

    Args:
        pipe: whose gradients are scaled; every rank makes its own scaler and the same calls.
        options: those of `torch.amp.GradScaler`, as `init_scale`.

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
        super().__init__(pipe.device.type, **options)  # type: ignore[arg-type]
        self._pipe = pipe
        if self.is_enabled():
            self._lazy_init_scale_growth_tracker(pipe.device)

    def _unscale_grads_(
        self,
        optimizer: torch.optim.Optimizer,
        inv_scale: torch.Tensor,
        found_inf: torch.Tensor,
        allow_fp16: bool,
    ) -> dict[torch.device, torch.Tensor]:
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        anywhere = self._pipe.any(any(bool(flag) for flag in found.values()))
        return {
            device: torch.full_like(found_inf, anywhere) for device in [*found, found_inf.device]
        }
