"""The verses that the recipe `translation.py` learns from, in English and Spanish.

The texts are the King James Version and Reina-Valera 1909, from Debian's sword-text-kjv and
sword-text-sparv. Both count verses alike, so equal positions in the two files are one verse. The
form is the SWORD project's zText: per testament a table of entries (block, start, length), a table
of blocks (start, length, uncompressed length), and the blocks, compressed by zlib; text is OSIS.
"""

import re
import struct
import zlib
from pathlib import Path

SWORD = Path("/usr/share/sword/modules/texts/ztext")
ENGLISH, SPANISH = "engKJV2006eb", "spaRV1909eb"

Verse = tuple[str, str]  # in English and in Spanish


def verses() -> list[Verse]:
    """The verses that both have, in the books' order."""
    pairs = []
    for testament in ("ot", "nt"):
        pairs += zip(*(entries(module, testament) for module in (ENGLISH, SPANISH)), strict=True)
    return [(english, spanish) for english, spanish in pairs if english and spanish]


def entries(module: str, testament: str) -> list[str]:
    """A testament's entries as plain text; headings are empty."""
    paths = [SWORD / module / f"{testament}.{ending}" for ending in ("bzv", "bzs", "bzz")]
    if not all(path.is_file() for path in paths):
        raise FileNotFoundError(
            f"this recipe reads the Bible in two languages, and there is no {SWORD / module}; "
            "run: apt-get install sword-text-kjv sword-text-sparv"
        )
    places, block_places, compressed = (path.read_bytes() for path in paths)
    blocks = [
        zlib.decompress(compressed[start : start + length])
        for start, length, _ in struct.iter_unpack("<III", block_places)
    ]
    return [
        plain(blocks[block][start : start + length].decode()) if length else ""
        for block, start, length in struct.iter_unpack("<IIH", places)
    ]


def plain(osis: str) -> str:
    """The text without footnotes, titles and marks."""
    text = re.sub(r"<(note|title)\b[^>]*(?<!/)>.*?</\1>", "", osis, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", "", text).split())
