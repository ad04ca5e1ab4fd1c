"""Read the file of new pieces, {"piece": "你好"} on each line, and refuse invalid ones with file:line.

For a byte-level BPE, a line may also give a part of characters by its bytes, as {"bytes": "e4bd"}.
"""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama2.encoding.bpe_model import SPACE
from colossal_llama2.encoding.byte_level_file import spelled, spelled_bytes
from colossal_llama2.encoding.byte_level_tokens import can_occur, characters_in
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import read_jsonl

MAX_PIECE_CHARACTERS = 64
# The control characters (Unicode category Cc), including tabs and line breaks.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Column separators of tables.
SEPARATORS = "\t,;"


@dataclass(frozen=True)
class NewPieces:
    """The content of a file of new pieces. `wanted` are those that the source lacks, each once, in file order.

    They are spelled as in the source's vocabulary: with "▁" for a space, or byte by byte ("Ġ" for a space).
    """

    asked: int
    duplicates: int
    already_pieces: int
    wanted: list[str]


def read_new_pieces(
    path: Path, *, known: Collection[str], special_tokens: Collection[str], is_byte_level: bool = False
) -> NewPieces:
    """Read and check a file of new pieces. `known` are the source's pieces of text, including user-defined ones.

    Raises:
        UserError: a line is invalid (with file:line of the first), or the file is missing or empty.
    """
    if not path.is_file():
        raise UserError(f'--expand_tokens_file {path} is not a file; give a jsonl file of {{"piece": "..."}} lines')
    known = frozenset(known)
    check = (_ByteLevelCheck if is_byte_level else _Check)(known, special_tokens)
    unique: dict[str, None] = {}
    asked = 0
    for piece in _pieces_of(path, check):
        unique[piece] = None
        asked += 1
    if not asked:
        raise UserError(f'--expand_tokens_file {path} holds no pieces; give a jsonl file of {{"piece": "..."}} lines')
    wanted = [piece for piece in unique if piece not in known]
    return NewPieces(
        asked=asked, duplicates=asked - len(unique), already_pieces=len(unique) - len(wanted), wanted=wanted
    )


def _pieces_of(path: Path, check: "_Check") -> Iterator[str]:
    for line in read_jsonl(path, explain=_explanation):
        if line.record is not None:
            try:
                yield check.piece_of(line.record)
            except ValueError as error:
                raise UserError(f"{line.where}: {error}")


def _explanation(line: bytes) -> str | None:
    """What a line is if it looks like a list of words instead of a JSON object, and what to write; None otherwise."""
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        return None
    if text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) or (value is None and text.startswith("[")):
        words = [word for word in value or () if isinstance(word, str)]
        return f"this is a JSON list; {_form(*words[:1])}"
    if isinstance(value, str):
        return f"this is a JSON string; {_form(value)}"
    separator = next((character for character in SEPARATORS if character in text), None)
    if separator:
        return f"this is a line of a table; {_form(text.split(separator)[0])}, without the other columns"
    return f"this is a plain list of words; {_form(text)}"


def _form(word: str = "...") -> str:
    """What to write for a word."""
    word = word.strip(" \"'")[:MAX_PIECE_CHARACTERS].replace(" ", SPACE)
    return f"each line must be one JSON object, such as {json.dumps({'piece': word or '...'}, ensure_ascii=False)}"


def _words_of(record: dict) -> list[str]:
    """What may be the piece of a record without "piece": its first text, or the first key of a vocabulary."""
    texts = [value for value in record.values() if isinstance(value, str)]
    return texts or [key for key, value in record.items() if isinstance(value, (int, float))]


def _refuse_two_keys(record: dict) -> None:
    if "piece" in record and "bytes" in record:
        raise ValueError(
            'this line has both "piece" and "bytes"; a line gives one new piece, by its text or by its bytes, so '
            "remove one of them"
        )


class SpecialTokens:
    """Special and other added tokens, which no piece may contain, because tokenizers split a text at these first."""

    def __init__(self, tokens: Collection[str]):
        listed = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, listed)) if listed else "(?!)")
        self._first_characters = frozenset(token[0] for token in listed)

    def found_in(self, text: str) -> str | None:
        """The first of the tokens in a text; None if there is none."""
        if self._first_characters.isdisjoint(text):
            return None
        found = self._pattern.search(text)
        return found[0] if found else None


class _Check:
    """Checks pieces."""

    def __init__(self, known: Collection[str], special_tokens: Collection[str]):
        self._known, self._special_tokens = known, SpecialTokens(special_tokens)

    def piece_of(self, record: dict) -> str:
        """The piece of one record. Raises ValueError with what is wrong and what is allowed."""
        _refuse_two_keys(record)
        if "bytes" in record and "piece" not in record:
            raise ValueError(
                'parts of characters ("bytes") are for byte-level tokenizers, and the source is a SentencePiece model; '
                "remove the line"
            )
        piece = self._text_of(record)
        if piece in self._known:
            return piece
        if " " in piece:
            raise ValueError(f'"piece" is {piece!r}, which contains a space; write a space as {SPACE} (U+2581)')
        unknown = next((found for found in CONTROL.findall(piece) if found not in self._known), None)
        if unknown:
            raise ValueError(
                f'"piece" is {piece!r}, which contains the control character {unknown!r}, and the source tokenizer '
                "has no piece for it; remove the line"
            )
        self._refuse_special(piece, f'"piece" is {piece!r}')
        return piece

    def _text_of(self, record: dict) -> str:
        if "piece" not in record:
            raise ValueError(f'no "piece" in this line; {_form(*_words_of(record)[:1])}')
        piece = record["piece"]
        if not isinstance(piece, str):
            raise ValueError(f'"piece" is {piece!r:.80}, which is not a string; write {{"piece": "..."}}')
        if not piece:
            raise ValueError('"piece" is empty; remove the line')
        if len(piece) > MAX_PIECE_CHARACTERS:
            raise ValueError(f'"piece" has {len(piece)} characters, at most {MAX_PIECE_CHARACTERS} are allowed')
        return piece

    def _refuse_special(self, piece: str, given: str) -> None:
        """Refuse a text with a special token. `given` is how messages name it."""
        found = self._special_tokens.found_in(piece)
        if found == piece:
            raise ValueError(f"{given}, a special token of the source tokenizer; remove the line")
        if found:
            raise ValueError(
                f"{given}, which contains the special token {found!r} of the source tokenizer, "
                "at which tokenizers split a text first; remove the line"
            )


class _ByteLevelCheck(_Check):
    """The same for a byte-level BPE, whose vocabulary spells bytes: a space may be written as it is."""

    def piece_of(self, record: dict) -> str:
        """The token of one record, as the vocabulary spells it. Raises ValueError as the base class."""
        _refuse_two_keys(record)
        if "bytes" in record and "piece" not in record:
            text, token = self._from_bytes(record["bytes"])
            given = f'"bytes" is {record["bytes"]!r:.80}'
        else:
            text = self._text_of(record).replace(SPACE, " ")
            token = spelled(text)
            given = f'"piece" is {text!r}'
        if token in self._known:
            return token
        unknown = next((found for found in CONTROL.findall(text) if spelled(found) not in self._known), None)
        if unknown:
            raise ValueError(
                f"{given}, which contains the control character {unknown!r}, and the source tokenizer has no token for "
                "it; remove the line"
            )
        self._refuse_special(text, given)
        return token

    def _from_bytes(self, value: Any) -> tuple[str, str]:
        """The token that bytes in hexadecimal spell, and their text, without parts of characters at its ends."""
        try:
            content = bytes.fromhex(value)
        except (TypeError, ValueError):
            content = b""
        if not content:
            raise ValueError(f'"bytes" is {value!r:.80}; write bytes in hexadecimal, such as {{"bytes": "e4bd"}}')
        if not can_occur(content):
            raise ValueError(f'"bytes" is {value!r:.80}, which is in no UTF-8 text; remove the line')
        length = characters_in(content)
        if length > MAX_PIECE_CHARACTERS:
            raise ValueError(f'"bytes" has {length} characters, at most {MAX_PIECE_CHARACTERS} are allowed')
        return content.decode(errors="ignore"), spelled_bytes(content)
