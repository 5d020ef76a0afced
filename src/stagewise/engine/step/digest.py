"""Fingerprints of a batch's forms and values, so that ranks notice if theirs differ.

Problem: the first stage takes the inputs from its rank, the last one the targets from its own; if
the ranks drew different batches of the same shape, the model would silently learn nonsense.
Idea: a checksum of all bytes; of a large tensor the sum of its machine words, which does not depend
on the order of summing, and a checksum of some, since the sum does not see the order of samples.
"""

import functools
import hashlib
import re
import zlib

import torch

from stagewise.batch.values import ONE, take_apart
from stagewise.engine.stage.keywords import NOT_GIVEN
from stagewise.engine.stage.work import Work
from stagewise.model.forward.kernel_settings import KernelSettings

_WORD_BYTES, _CHECKED_BYTES = 8, 32768
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in an object's repr; differs between processes
Autocast = tuple[tuple[str, torch.dtype], ...]  # (device type, dtype) of each that is on


def digest(value: object) -> int:
    """Return a 56-bit digest of the values of all plain strided tensors in `value`."""
    hashed = hashlib.blake2b(digest_size=7)
    for tensor in take_apart(value)[0]:
        is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if not is_plain or tensor.layout is not torch.strided or tensor.is_meta:
            continue
        _add(tensor.detach().resolve_conj().resolve_neg().reshape(-1), hashed)
    return int.from_bytes(hashed.digest(), "big")


def _add(flat: torch.Tensor, hashed: "hashlib.blake2b") -> None:
    data = flat.contiguous().view(torch.uint8)
    if data.numel() > _CHECKED_BYTES:
        num_words, rest = divmod(data.numel(), _WORD_BYTES)
        words = data[: data.numel() - rest]
        if words.storage_offset() % _WORD_BYTES:
            words = words.clone()
        words = words.view(torch.int64)
        hashed.update(int(words.sum()).to_bytes(_WORD_BYTES, "big", signed=True))
        step = max(1, num_words * _WORD_BYTES // _CHECKED_BYTES)
        data = torch.cat(
            [words[::step].contiguous().view(torch.uint8), data[data.numel() - rest :]]
        )
    hashed.update(zlib.crc32(data.cpu().numpy().data).to_bytes(4, "big"))


def autocast_here() -> Autocast:
    """Return under which autocast this thread runs."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda", "mps", "xpu")
        if torch.is_autocast_enabled(kind)
    )


def signature_of(work: Work) -> int:
    """Return a number that is equal for calls whose messages have equal forms."""
    # Where a loss has weight 0, gradients are missing from the messages.
    missing = [(name, [not share for share in s]) for name, s in work.shares.items()]
    return fingerprint((work.signature, len(work.sizes), missing))


def mark_of(value: object) -> int:
    """Return a fingerprint of the forms of a part of the batch; NOT_GIVEN for None."""
    if value is None:
        return NOT_GIVEN
    tensors, structure = take_apart(value)
    forms = tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors)
    return _mark_of_one(forms) if structure is ONE else fingerprint((forms, structure))


@functools.lru_cache(maxsize=64)
def _mark_of_one(forms: tuple[object, ...]) -> int:
    return fingerprint((forms, ONE))


@functools.lru_cache(maxsize=64)
def mark_of_flags(flags: tuple[bool, ...], settings: Autocast | KernelSettings) -> int:
    """Return a fingerprint of both."""
    return fingerprint((flags, settings))


def fingerprint(value: object) -> int:
    """Return a 56-bit fingerprint, equal in every process (unlike `hash`)."""
    text = _ADDRESS.sub("", repr(value))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
