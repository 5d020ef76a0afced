"""A number for the values of a batch, so that ranks notice that they hold different ones.

Problem: the first stage takes the inputs from its rank, the last one the targets from its own; if
the ranks drew different batches of one shape, the model learns nonsense in silence.
Idea: every value counts in a sum of machine words, which no order of summing changes; what a sum
cannot see, the order of samples, is in a sample of words, which is hashed.
"""

import hashlib

import torch

from stagewise.batch.values import take_apart

_WORD_BYTES, _SAMPLED_WORDS = 8, 4096
_FIRST_CALLS, _EVERY = 8, 16


def is_compared(num_calls: int) -> bool:
    """Whether a Pipeline's call compares values: the first ones, then now and then."""
    return num_calls < _FIRST_CALLS or num_calls % _EVERY == 0


def digest(value: object) -> int:
    """A 56-bit number of the values of all tensors in `value` whose memory is their values."""
    hashed = hashlib.blake2b(digest_size=7)
    for tensor in take_apart(value)[0]:
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if not is_plain or tensor.layout is not torch.strided or tensor.is_meta:
            continue
        _add(tensor.detach().resolve_conj().resolve_neg().reshape(-1), hashed)
    return int.from_bytes(hashed.digest(), "big")


def _add(flat: torch.Tensor, hashed: "hashlib.blake2b") -> None:
    data = flat.contiguous().view(torch.uint8)
    num_words = data.numel() // _WORD_BYTES
    hashed.update(data[num_words * _WORD_BYTES :].cpu().numpy().tobytes())
    data = data[: num_words * _WORD_BYTES]
    if data.storage_offset() % _WORD_BYTES:
        data = data.clone()
    words = data.view(torch.int64)
    hashed.update(int(words.sum()).to_bytes(_WORD_BYTES, "big", signed=True))
    step = max(1, num_words // _SAMPLED_WORDS)
    hashed.update(words[::step].cpu().numpy().tobytes())
