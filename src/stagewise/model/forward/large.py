"""Digests of containers and arrays that are too large to inspect item by item.

Of all of it, which takes as long as reading it; of even larger ones, of every k-th part.
"""

import hashlib
import itertools
import marshal
from array import array
from collections.abc import Collection, Mapping

import numpy as np

_MOST_ITEMS, _MOST_BYTES, _ROW = 1 << 16, 1 << 23, 64
_PLAIN_ITEMS = 2  # the marshal version that writes equal values equally, whatever their refcounts


def digest_of_items(value: Collection[object]) -> bytes:
    """Digest a list, tuple, dict or set: its items' values if they are plain, else their ids."""
    parts = [len(value).to_bytes(8, "big")]
    step = len(value) // _MOST_ITEMS + 1
    for items in (value, value.values()) if isinstance(value, Mapping) else (value,):
        some = [*itertools.islice(items, 0, None, step)]
        try:
            parts.append(marshal.dumps(some, _PLAIN_ITEMS))
        except ValueError:
            parts.append(array("Q", map(id, some)).tobytes())
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


def digest_of_array(
    value: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]",
) -> tuple[bytes, bool]:
    """Digest an array's numbers; also return whether all of them were included.

    Uses sums of rows and of columns, so that swapping two numbers changes it.
    """
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    words = flat[: flat.size // 8 * 8].view(np.uint64)
    step = flat.nbytes // _MOST_BYTES + 1
    some = words[::step]
    table = some[: some.size // _ROW * _ROW].reshape(-1, _ROW)
    hashed = hashlib.blake2b(digest_size=16)
    sums = table.sum(0, dtype=np.uint64), table.sum(1, dtype=np.uint64)
    for part in (*sums, some[table.size :], flat[words.nbytes :]):
        hashed.update(part.tobytes())
    return hashed.digest(), step == 1
