"""`generate`, for pipelines of models that have it."""

from typing import Any

import torch
from torch import nn

from stagewise.errors import ModelError, UsageError
from stagewise.pipeline.generation.bare_model import filled
from stagewise.pipeline.generation.prompts import check_prompts
from stagewise.pipeline.generation.shared_units import Agreed
from stagewise.pipeline.measuring import Measuring


class Generates(Measuring):
    """Continues prompts with a model of transformers."""

    _skeleton: nn.Module | None
    _agreed: Agreed
    _device: torch.device

    def generate(
        self, input_ids: torch.Tensor | None = None, *, lanes: int | None = None, **options: Any
    ) -> Any:
        """Return what transformers' `model.generate` does, on every rank; collective.

        Every layer's keys and values stay on the rank that has it; the rank with the logits chooses
        each token and tells the others. Greedy tokens are the plain model's.

        Args:
            input_ids: prompts of shape (batch, length), as the tokenizer pads them: on the left for
                a decoder, with `attention_mask`. The same on every rank.
            lanes: into how many parts to split the prompts, so that ranks work at the same time; by
                default one for each rank. Sampled tokens are the plain model's, with rank 0's seed,
                if there is one lane, which is then the default.
            options: those of transformers' `generate`: `attention_mask`, `max_new_tokens`,
                `do_sample`, `temperature`, `top_k`, `top_p`, `repetition_penalty`,
                `generation_config`, `num_beams` ... What needs the whole model in one process, such
                as `output_attentions`, is refused on several ranks.

        Raises:
            ModelError: the model has no `generate`, or is not a stack of blocks.
            UsageError: prompts that are no ids of the model's tokens, or longer than its positions;
                an option that several ranks cannot follow, or a pipeline on a mesh.
            PeerError: another rank failed by itself, such as by running out of memory; then no rank
                can make further calls.
        """
        model = self._generative(lanes)
        check_prompts(model, input_ids, options)
        self.overflow.before_collective()
        if input_ids is not None:
            options["inputs"] = input_ids
        here = {
            name: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for name, value in options.items()
        }
        own = self._own_by_all_names()
        if self.num_ranks == 1:
            here.setdefault("use_cache", True)
            with filled(model, own):
                return model.generate(**here)  # type: ignore[operator]
        from stagewise.pipeline.generation.generating import generate_on_ranks

        return generate_on_ranks(model, self._ranks, own, self._agreed, lanes, here)

    def _generative(self, lanes: int | None) -> nn.Module:
        """Return the model to generate with; raise unless it can be, and in such lanes."""
        if self._skeleton is None:
            raise ModelError(
                "the model has no generate; build the Pipeline from a model of transformers that "
                "has (AutoModelForCausalLM, ...ForSeq2SeqLM), or choose tokens from what "
                "pipe.predict(inputs) returns"
            )
        if lanes is not None and lanes < 1:
            raise UsageError(f"lanes={lanes} is not a positive number of parts of the prompts")
        if self._ranks.is_on_mesh:
            raise UsageError(
                "generate needs each layer whole on one rank, which a mesh does not promise; save "
                "the model with pipe.save_checkpoint(folder), and generate in a pipeline without "
                "mesh, or in one process"
            )
        return self._skeleton

    def _own_by_all_names(self) -> dict[str, torch.Tensor]:
        """Return this rank's tensors under every name that the plain model has for them."""
        module = self.module
        own: dict[str, torch.Tensor] = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        by_first = {self._first_names.get(name, name): tensor for name, tensor in own.items()}
        tied = {n: by_first[f] for n, f in self._first_names.items() if f in by_first}
        return {**tied, **own}
