"""Byte-level BPE in a few lines of Python, to compare with: it shares no code with the package or with `tokenizers`."""

import json
from pathlib import Path

import regex

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def parts_of(text: str, kind: str) -> list[bytes]:
    """What the pre-tokenizer of LLaMA-3, or of SmolLM2, which divides digits first, makes of a text."""
    stretches = [text] if kind == "llama3" else regex.findall(r"\p{N}|\P{N}+", text)
    pattern = LLAMA_3 if kind == "llama3" else GPT_2
    return [part.encode() for stretch in stretches for part in regex.findall(pattern, stretch)]


def byte_of(character: str) -> int:
    """The byte that GPT-2 spells as a character: printable ones as themselves, the others from U+0100 on, in order."""
    others = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
    return others[ord(character) - 0x100] if ord(character) >= 0x100 else ord(character)


class PlainBpe:
    """Ids by merges of tokenizer.json, without `ignore_merges`, which must not matter."""

    def __init__(self, folder: Path, kind: str):
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        self.kind = kind
        self.ids = {
            bytes(map(byte_of, token)): index for token, index in model["vocab"].items() if not token.startswith("<|")
        }
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        self.ranks = {tuple(bytes(map(byte_of, half)) for half in pair): rank for rank, pair in enumerate(pairs)}

    def rank_of(self, left: bytes, right: bytes) -> int | None:
        """The place of a pair in the list of merges; the lowest is merged first."""
        return self.ranks.get((left, right))

    def merged(self, symbols: list[bytes]) -> list[bytes]:
        """Merge neighbours, lowest rank first and leftmost among equals, until none can be merged."""
        while True:
            ranks = [self.rank_of(left, right) for left, right in zip(symbols, symbols[1:], strict=False)]
            known = [(rank, place) for place, rank in enumerate(ranks) if rank is not None]
            if not known:
                return symbols
            place = min(known)[1]
            symbols = [*symbols[:place], symbols[place] + symbols[place + 1], *symbols[place + 2 :]]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; bytes without a token are dropped."""
        single = [[bytes([byte]) for byte in part] for part in parts_of(text, self.kind)]
        known = [[byte for byte in part if byte in self.ids] for part in single]
        return [self.ids[symbol] for part in known for symbol in self.merged(part)]


class RankedBpe(PlainBpe):
    """As tiktoken merges: two neighbours merge if their concatenation is a token, lowest id first."""

    def rank_of(self, left: bytes, right: bytes) -> int | None:
        """The id of the concatenation."""
        return self.ids.get(left + right)
