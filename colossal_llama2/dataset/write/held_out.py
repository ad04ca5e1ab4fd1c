"""Which documents are held out as eval/: a seeded hash of their normalized text decides, so copies stay together.

The text is what the model learns from: the target of a pre-training record, without its source, and the messages of a
conversation up to its last answer, without system texts. It is compared as Unicode's NFKC_Casefold has it, and without
any white space. So these are one text, and all of them are on the same side:

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

# Properties of Unicode that Python's database does not name: Default_Ignorable_Code_Point, but for the format
# characters, which are in the category Cf.
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
    """Whether the document of a checked record goes to eval/."""
    if not settings.has_eval:
        return False
    text = "\0".join(map(normalized, row.identity_texts))
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=settings.seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little") < settings.eval_fraction * 2**64


def normalized(text: str) -> str:
    """The text without the differences that do not make it another one."""
    return "".join(folded(text).split())


def folded(text: str) -> str:
    """Unicode's NFKC_Casefold: one form of each character, in lower case, and none that is invisible."""
    if text.isascii():
        return text.lower()
    codes = np.frombuffer(unicodedata.normalize("NFKC", text).encode("utf-32-le"), np.uint32)
    visible = codes[~_is_invisible()[codes]].tobytes().decode("utf-32-le")
    return unicodedata.normalize("NFKC", visible.casefold())


@lru_cache(maxsize=1)
def _is_invisible() -> np.ndarray:
    """For each code point."""
    table = np.zeros(sys.maxunicode + 1, bool)
    # The tags are the only such characters above the second plane.
    codes = chain(range(0x20000), range(0xE0000, 0xE0080))
    table[[code for code in codes if unicodedata.category(chr(code)) == "Cf"]] = True
    for first, last in OTHER_IGNORABLE:
        table[first : last + 1] = True
    return table
