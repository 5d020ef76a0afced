"""What stands for a container or an array that is too large to be looked at item by item.

That is a digest of all of it, which takes time as reading it does; of what is larger still, of
every k-th part.
"""

import hashlib
import itertools
import marshal
from array import array
from collections.abc import Collection, Mapping

import numpy as np

_MOST_ITEMS, _MOST_BYTES, _ROW = 1 << 16, 1 << 23, 64
_PLAIN_ITEMS = 2  # the version of marshal that writes equal values alike, whoever else holds them


def digest_of_items(value: Collection[object]) -> bytes:
    """Of the items of a list, tuple, dict or set: their values where they are plain, else which
    objects they are."""
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
    """Of an array's numbers, and whether of all of them: two numbers that change places show, as
    sums are taken of rows and of columns."""
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
