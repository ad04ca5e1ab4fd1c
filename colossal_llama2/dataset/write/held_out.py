"""Choose the documents that are held out as eval/, by a seeded hash of their normalized text: copies stay together.

The text is the target of a pre-training record, without its source, or the messages of a conversation up to its last
answer, without system texts. It is normalized by Unicode's NFKC_Casefold, and white space is removed. So these are the
same text, and all of them are on the same side:

    "Ｈello,  world"    "hello, world\\n"    "Hello, wo\\u00adrld"    {"source": "Greet.", "target": "Hello, world"}
"""

import hashlib
import sys
import unicodedata
from functools import lru_cache
from itertools import chain

import numpy as np

from colossal_llama2.dataset.layout.prepare_settings import Settings
from colossal_llama2.dataset.write.records import Row

# Ranges of Default_Ignorable_Code_Point, which Python's Unicode database lacks, without the format characters, which
# are the category Cf.
OTHER_IGNORABLE = (
    (0x34F, 0x34F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0),
    (0xE0100, 0xE01EF),
)


def is_held_out(row: Row, settings: Settings) -> bool:
    """Whether a checked record goes to eval/."""
    if not settings.has_eval:
        return False
    text = "\0".join(map(normalized, row.identity_texts))
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=settings.seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") < settings.eval_fraction * 2**64


def normalized(text: str) -> str:
    """The normalized text: folded, and without white space."""
    return "".join(folded(text).split())


def folded(text: str) -> str:
    """Unicode's NFKC_Casefold: one form of each character, in lower case, without invisible characters."""
    if text.isascii():
        return text.lower()
    codes = np.frombuffer(unicodedata.normalize("NFKC", text).encode("utf-32-le"), np.uint32)
    visible = codes[~_is_invisible()[codes]].tobytes().decode("utf-32-le")
    return unicodedata.normalize("NFKC", visible.casefold())


@lru_cache(maxsize=1)
def _is_invisible() -> np.ndarray:
    """(code points,) bool."""
    table = np.zeros(sys.maxunicode + 1, bool)
    # Tags are the only such characters above the second plane.
    codes = chain(range(0x20000), range(0xE0000, 0xE0080))
    table[[code for code in codes if unicodedata.category(chr(code)) == "Cf"]] = True
    for first, last in OTHER_IGNORABLE:
        table[first : last + 1] = True
    return table
