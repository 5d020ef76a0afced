"""trl's SFTTrainer with the model cut over the processes: `PipelineSFTTrainer`.

Problem: SFTTrainer gives the model a forward with a fused head, which returns numbers for each
token in place of logits by a backward of its own, so that a capture would lose the head's gradient;
and it counts tokens and entropies where the loss is computed. Idea: the pipeline runs the model's
own forward, and what the fused head would have returned is computed from the logits, on the last
stage. After a step, what its microbatches gave is put together batch by batch, and trl's own code
counts it, on every process.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from stagewise.integrations.stand_in import Called, StandIn, once
from stagewise.integrations.transformers import PipelineMixin
from stagewise.integrations.unsupported import refuse_in_trl

_FUSED, _IGNORED = "fused_lm_head", -100
_COUNTS = "SFTTrainer's numbers"


class PipelineSFTTrainer(PipelineMixin, SFTTrainer):
    """trl's SFTTrainer, with the model's layers spread over the processes; see PipelineTrainer.

    Losses and what is logged are SFTTrainer's. The last stage holds the logits of one microbatch,
    which SFTTrainer's fused head computes piece by piece.

    Raises:
        UsageError: the SFTConfig asks for what a pipeline cannot do: see the message.
    """

    _metrics: dict[str, Any]  # trl's own
    _total_train_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parts: dict[int, FusedCausalLMOutput] = {}  # of the step that runs, by microbatch
        self._part: int | None = None  # the microbatch whose loss is computed
        super().__init__(*args, **kwargs)
        refuse_in_trl(self)
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        vars(base).pop("forward")  # the fused head

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return trl's loss, of the logits."""
        return super().compute_loss(StandIn(self.model, self._of(model)), inputs, *args, **kwargs)

    def _of(self, model: Callable[..., Any]) -> Callable[[Called], object]:
        """Return what answers calls of the model with its fused head by those of `model`."""
        found: list[Any] = []

        def answer(called: Called) -> object:
            is_fused, labels = called.pop(_FUSED, False), called.pop("labels", None)
            if not found:  # asked for logits too, it has the same arguments
                found.append(model(**called))
            if not is_fused:
                return found[0]
            output = _as_fused(found[0], labels)
            if self._part is not None:
                self._parts.setdefault(self._part, pytree.tree_map(_kept, output))
            return output

        return answer

    def loss_of_microbatch(self, output: object, target: Mapping[str, Any]) -> Tensor:
        """Compute a microbatch's part of the loss, and keep what is counted later."""
        with self._uncounted():
            self._part = int(target["index"][0])
            try:
                return super().loss_of_microbatch(output, target)
            finally:
                self._part = None

    def _halves(self, *args: Any) -> bool:
        with self._uncounted():
            return super()._halves(*args)

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Compute losses inside that leave trl's numbers as they are."""
        before = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in self._metrics}
        try:
            yield
        finally:
            self._metrics, self._total_train_tokens = before

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Keep the batch, or run the update's batches and count them."""
        self._parts, batches = {}, [*self._update, inputs]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._update:
            self._count(batches)
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Let trl's step call the pipeline, or count what the pipeline evaluates."""
        self._parts = {}
        found = super().prediction_step(model, inputs, *args, **kwargs)
        if found[1] is None:  # only the loss, which the last stage has computed
            self._count([inputs])
        return found

    def _count(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Let trl count what the microbatches of `batches` gave; collective."""
        assert self.pipe is not None
        every: dict[int, FusedCausalLMOutput] = {}
        for own in self.pipe.ranks.gather(self._parts, _COUNTS):
            every |= own
        parts = iter([output for _, output in sorted(every.items())])
        for batch in map(self._prepare_inputs, batches):
            its: list[FusedCausalLMOutput] = []
            while sum(len(each.label_mask) for each in its) < len(batch["input_ids"]):
                its.append(next(parts))
            answer = once(_joined(its, self.args.device), "compute_loss")
            SFTTrainer.compute_loss(self, StandIn(self.model, answer), dict(batch))


def _as_fused(output: Any, labels: Tensor) -> FusedCausalLMOutput:
    """Return what the fused head returns, of a model's output with logits."""
    exact = torch.promote_types(output.logits.dtype, torch.float32)
    logits, labels = output.logits[:, :-1].to(exact), labels[:, 1:].to(output.logits.device)
    mask = labels != _IGNORED
    every = logits.log_softmax(-1)
    chosen = labels.clamp(min=0)
    with torch.no_grad():
        entropy = -(every.exp() * every).sum(-1)
        is_top1 = logits.argmax(-1) == chosen
    log_probs = every.gather(-1, chosen[..., None])[..., 0].masked_fill(~mask, 0)
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / mask.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=entropy.masked_fill(~mask, 0),
        is_top1=is_top1 & mask,
        label_mask=mask,
        aux_loss=getattr(output, "aux_loss", None),
    )


def _kept(value: Tensor) -> Tensor:
    return value.detach().cpu()


def _joined(parts: Sequence[FusedCausalLMOutput], device: torch.device) -> FusedCausalLMOutput:
    """Return what the fused head would have returned for the parts' whole batch."""
    columns = {each.name: [getattr(part, each.name) for part in parts] for each in fields(parts[0])}
    return FusedCausalLMOutput(
        **{
            name: (torch.cat(column) if column[0].dim() else torch.stack(column).mean()).to(device)
            for name, column in columns.items()
            if column[0] is not None
        }
    )
