"""The tokens of a tokenizer that a template can spell out: special and other added tokens."""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2.encoding.added_tokens import read_added_tokens
from colossal_llama2.encoding.byte_level_encoder import ByteLevelEncoder
from colossal_llama2.encoding.byte_level_file import ByteLevelModel
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.encoding.file_names import CONFIG_FILE, FAST_FILE
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.encoding.sentencepiece_file import control_pieces
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import read_json
from colossal_llama2.storage.input_files import is_regular

# The texts of marks by id, where there are none besides those of the encoder.
NO_NAMES: Mapping[int, str] = {}


class Mark(NamedTuple):
    """A token that is found in a text before the text is divided into pieces.

    Attributes:
        is_special: it is never made from what a user writes.
        strips_left, strips_right: white space before or after it belongs to it.
    """

    id: int
    is_special: bool = True
    strips_left: bool = False
    strips_right: bool = False


class Marks:
    """All of a tokenizer's."""

    def __init__(self, marks: Mapping[str, Mark]):
        self._marks = dict(marks)

    @classmethod
    def of(cls, folder: str | Path, encoder: Encoder) -> "Marks":
        """Those of a folder, whose encoder this is. Raises UserError if its files are damaged."""
        if isinstance(encoder, ByteLevelEncoder):
            return cls(_listed(ByteLevelModel.read(folder).settings.get("added_tokens") or (), folder))
        assert isinstance(encoder, SentencePieceEncoder)
        marks = {piece: Mark(index) for piece, index in control_pieces(encoder.content).items()}
        for text, index in read_added_tokens(Path(folder), encoder.vocab_size).items():
            marks[text] = Mark(index)
        config, fast = Path(folder, CONFIG_FILE), Path(folder, FAST_FILE)
        # The flags are in one of these, or in both.
        flags = _listed((read_json(fast).get("added_tokens") or ()) if is_regular(fast) else (), folder)
        listed = (read_json(config).get("added_tokens_decoder") or {}) if is_regular(config) else {}
        flags |= _listed([{**entry, "id": int(index)} for index, entry in listed.items()], folder)
        return cls({text: flags.get(text, mark)._replace(id=mark.id) for text, mark in marks.items()})

    def __getitem__(self, text: str) -> Mark:
        return self._marks[text]

    @property
    def names(self) -> dict[int, str]:
        """The text of each mark, by id."""
        return {mark.id: text for text, mark in self._marks.items()}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds every mark in a text; of those that begin at one place, the longest."""
        return _any_of(self._marks)

    @property
    def special_characters(self) -> list[str]:
        """Special tokens of one character."""
        return sorted(text for text, mark in self._marks.items() if mark.is_special and len(text) == 1)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """The same for special ones."""
        return _any_of(text for text, mark in self._marks.items() if mark.is_special)


def _any_of(texts: Any) -> re.Pattern[str]:
    ordered = sorted(texts, key=len, reverse=True)
    # Without any text, what never matches.
    return re.compile("|".join(map(re.escape, ordered)) if ordered else r"(?!)")


def _listed(entries: Any, folder: str | Path) -> dict[str, Mark]:
    """The marks in a list of added tokens, as tokenizer.json and tokenizer_config.json have it."""
    found = {}
    for entry in entries:
        if entry.get("single_word"):
            raise UserError(
                f"{folder}: the added token {entry['content']!r} is only found as a single word (single_word), which "
                "chat templates are not read with; give a tokenizer without such tokens"
            )
        found[entry["content"]] = Mark(
            entry["id"], bool(entry.get("special")), bool(entry.get("lstrip")), bool(entry.get("rstrip"))
        )
    return found
