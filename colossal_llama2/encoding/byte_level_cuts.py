"""Where a long text can be cut so that a byte-level BPE gives the same ids for its parts as for the whole text.

Merges never cross a split of the pre-tokenizer. Its patterns match from left to right, so a cut is safe if no match can
contain the characters on both sides of it, and no match before it depends on what follows. Each pattern below is a
choice between runs of letters, digits, other characters or spaces, where at most the first character is of another kind
(" ?\\p{L}+"). So in every text that they divide

- no match contains a character that is not a space and a space after it ("word| word");
- no match contains a letter and a full stop or comma of Chinese after it ("字|，字"; the contractions of English begin
  with an apostrophe, and may follow letters in the same match);
- every space, and every letter, is in a match, so that there is a split at these places;
- only "\\s+(?!\\S)" looks ahead: at one character, behind spaces. The character before the cut is not a space.

Steps before the pattern match single kinds of characters (digits, line breaks, Chinese), and hold the same. For any
other pre-tokenizer no cut is known to be safe.
"""

import re
from typing import Any

from colossal_llama2.encoding.safe_cuts import TextCuts

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT_2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
LLAMA_4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
    " ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
# Patterns with a split at every such place, and patterns of single kinds of characters.
DIVIDING = (GPT_2, LLAMA_3, QWEN_2, LLAMA_4, DEEPSEEK_3)
OF_ONE_KIND = (r"\p{N}{1,3}", r"\p{N}", "[一-龥\u3040-ゟ゠-ヿ]+")
# The letters are such in every version of Unicode.
BEFORE_SPACE = re.compile(r"[\w.,;:!?，。、；：！？）」』”)\]]")
LETTER = re.compile(r"[A-Za-z\u4e00-\u9fa5]")
STOPS = "，。、；：！？"


class ByteLevelCuts(TextCuts):
    """The safe cuts of one pre-tokenizer."""

    def __init__(self, steps: list[dict[str, Any]]):
        """`steps` are those of `ByteLevelModel.steps`."""
        kinds = [_kind(step) for step in steps]
        self.can_cut = None not in kinds and "dividing" in kinds

    def _is_safe(self, before: str, after: str) -> bool:
        if after == " ":
            return BEFORE_SPACE.match(before) is not None
        return after in STOPS and LETTER.match(before) is not None


def _kind(step: dict[str, Any]) -> str | None:
    """Whether a step divides at each such place ("dividing"), never matters there ("neutral"), or neither (None)."""
    if step["type"] == "ByteLevel":
        return "dividing" if step.get("use_regex", True) else "neutral"
    if step["type"] == "Digits":
        return "neutral"
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if step["type"] != "Split" or step.get("behavior") != "Isolated" or step.get("invert"):
        return None
    return "dividing" if regex in DIVIDING else "neutral" if regex in OF_ONE_KIND else None
