"""A recipe: Hugging Face's GPT-2, its own class unchanged, on Shakespeare's plays.

    pip install -e '.[huggingface]'    # transformers
    stagewise train examples/gpt2.py --stages 2

`GPT2LMHeadModel` is not a sequence of layers, so stagewise captures it and cuts it between its
blocks; embedding and head share one table at any cut. The weights are random. Text, batches and
loss are those of `shakespeare.py`, one token per byte.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import shakespeare
from shakespeare import CONTEXT, VOCABULARY, clip_grad_norm, data, optimizer
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions as Output

__all__ = ["clip_grad_norm", "data", "generate", "loss", "model", "optimizer"]

NUM_BLOCKS, WIDTH, NUM_HEADS, DROPOUT = 6, 192, 6, 0.1


def model() -> nn.Module:
    """2.7 million parameters, counting the tied embedding once."""
    if find_spec("transformers") is None:
        raise ModuleNotFoundError(
            "this recipe trains a model of transformers, which is not installed; run: "
            "pip install 'transformers>=5'"
        )
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_layer=NUM_BLOCKS,
        n_embd=WIDTH,
        n_head=NUM_HEADS,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=DROPOUT,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,  # the key-value cache is only for generating, and not a tensor
    )
    return GPT2LMHeadModel(config)


def loss(output: "Output", target: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; ln 256 = 5.55 is a uniform guess."""
    return shakespeare.loss(output.logits, target)


def generate(predict: Callable[[Tensor], "Output"]) -> str:
    """A sample of 300 bytes."""
    return shakespeare.generate(lambda tokens: predict(tokens).logits)
