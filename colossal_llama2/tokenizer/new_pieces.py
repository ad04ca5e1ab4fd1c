"""Read the file of new pieces, {"piece": "你好"} a line, and refuse what can be no piece, with file:line."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Iterator, List

from colossal_llama2.errors import UserError
from colossal_llama2.files import read_jsonl
from colossal_llama2.tokenizer.bpe_model import SPACE

MAX_PIECE_CHARACTERS = 64
# What str.isspace() accepts, and the control characters (Unicode category Cc).
WHITESPACE_OR_CONTROL = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class NewPieces:
    """What a file asks for: `wanted` are the pieces that the source lacks, each once, in the order of the file."""

    asked: int
    duplicates: int
    already_pieces: int
    wanted: List[str]


def read_new_pieces(path: Path, *, known: Collection[str], special_tokens: Collection[str]) -> NewPieces:
    """Read and check a file of new pieces. `known` are the source's pieces.

    Raises UserError with file:line for the first line that is wrong, and for a file that is missing or empty.
    """
    if not path.is_file():
        raise UserError(f'--expand_tokens_file {path} is not a file; give a jsonl file of {{"piece": "..."}} lines')
    check = _Check(special_tokens)
    unique, asked = {}, 0
    for piece in _pieces_of(path, check):
        unique[piece] = None
        asked += 1
    if not asked:
        raise UserError(f'--expand_tokens_file {path} holds no pieces; give a jsonl file of {{"piece": "..."}} lines')
    known = frozenset(known)
    wanted = [piece for piece in unique if piece not in known]
    return NewPieces(
        asked=asked, duplicates=asked - len(unique), already_pieces=len(unique) - len(wanted), wanted=wanted
    )


def _pieces_of(path: Path, check: "_Check") -> Iterator[str]:
    for line in read_jsonl(path):
        if line.record is not None:
            try:
                yield check.piece_of(line.record)
            except ValueError as error:
                raise UserError(f"{line.where}: {error}")


class _Check:
    """What is allowed in a line, given the special tokens, which tokenizers cut out of a text before they merge."""

    def __init__(self, special_tokens: Collection[str]):
        tokens = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens)) if tokens else "(?!)")
        self._first_characters = frozenset(token[0] for token in tokens)

    def piece_of(self, record: dict) -> str:
        """The piece of one record. Raises ValueError with what is wrong and what is allowed."""
        if "piece" not in record:
            raise ValueError('no "piece" in this line; write {"piece": "..."}')
        piece = record["piece"]
        if not isinstance(piece, str):
            raise ValueError(f'"piece" is {piece!r:.80}, which is not a string; write {{"piece": "..."}}')
        if not piece:
            raise ValueError('"piece" is empty; remove the line')
        if len(piece) > MAX_PIECE_CHARACTERS:
            raise ValueError(f'"piece" has {len(piece)} characters, at most {MAX_PIECE_CHARACTERS} are allowed')
        if WHITESPACE_OR_CONTROL.search(piece):
            raise ValueError(
                f'"piece" is {piece!r}, which holds whitespace or a control character; '
                f"write a space as {SPACE} (U+2581)"
            )
        if not self._first_characters.isdisjoint(piece):
            self._refuse_special(piece)
        return piece

    def _refuse_special(self, piece: str) -> None:
        found = self._special.search(piece)
        if found and found[0] == piece:
            raise ValueError(f'"piece" is {piece!r}, a special token of the source tokenizer; remove the line')
        if found:
            raise ValueError(
                f'"piece" is {piece!r}, which holds the special token {found[0]!r} of the source tokenizer, '
                "and tokenizers cut that out first; remove the line"
            )
