"""The recipe for a folder with a language model of transformers."""

RECIPE = '''"""Fine-tune the model of @FOLDER@: a recipe to start from.

Train it: stagewise train @FILE@ --stages 2
Write it: stagewise export RUN FOLDER, which `from_pretrained` reads
"""

from pathlib import Path

import torch
from torch import nn
from transformers import @AUTO@, AutoTokenizer

import stagewise

FOLDER = "@FOLDER@"
TEXT = Path(__file__)  # your text: the name of a file; this recipe itself, until you replace it
LENGTH, BATCH, LEARNING_RATE = 32, 8, 1e-4

tokenizer = AutoTokenizer.from_pretrained(FOLDER)  # exported with the model


def model():
    """The folder's model, unchanged; its cache is only for generating."""
    return @AUTO@.from_pretrained(FOLDER, use_cache=False)


def data(split):
    """Pieces of the text, each with the same piece one token on; the last tenth validates."""
    tokens = torch.tensor(tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"])
    rows = tokens.unfold(0, LENGTH + 1, LENGTH)
    kept = max(1, len(rows) // 10)
    rows = rows[:-kept] if split == "train" else rows[-kept:]
    return [(inputs_of(batch[:, :-1]), batch[:, 1:]) for batch in rows.split(BATCH)]


def inputs_of(tokens):
    """The arguments of the model; the mask is 0 where your rows are padded."""
    return stagewise.Arguments(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def loss(output, target):
    """Mean cross-entropy of the next token."""
    return nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())


def optimizer(parameters):
    """Weight decay for matrices only: two groups of parameters."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 1e-2},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


clip_grad_norm = 1.0  # the largest norm of all gradients together
'''
