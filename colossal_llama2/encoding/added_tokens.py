"""The tokens that transformers adds beyond the pieces of a SentencePiece model."""

from collections.abc import Iterator
from pathlib import Path

from colossal_llama2.encoding.file_names import ADDED_TOKENS_FILE, CONFIG_FILE, FAST_FILE
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import read_json


def read_added_tokens(folder: Path, num_pieces: int) -> dict[str, int]:
    """The tokens that transformers adds beyond the `num_pieces` of SentencePiece, with their ids, in order of id.

    Raises:
        UserError: two files disagree about an id, or the ids do not follow the pieces without a gap.
    """
    found: dict[str, int] = {}
    for token, index in _listed_added_tokens(folder):
        if index >= num_pieces and found.setdefault(token, index) != index:
            raise UserError(f"{folder} has two ids for the added token {token!r}: {found[token]} and {index}; keep one")
    found = dict(sorted(found.items(), key=lambda item: item[1]))
    if list(found.values()) != list(range(num_pieces, num_pieces + len(found))):
        raise UserError(
            f"the added tokens of {folder} have the ids {sorted(found.values())}, which do not follow its "
            f"{num_pieces} pieces without a gap; add the tokens again with transformers' add_tokens"
        )
    return found


def _listed_added_tokens(folder: Path) -> Iterator[tuple]:
    try:
        for token, index in _unchecked_added_tokens(folder):
            if not isinstance(token, str) or not isinstance(index, int):
                raise TypeError(f"{token!r} with the id {index!r}")
            yield token, index
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the added tokens of {folder} cannot be read ({error!r}); copy its tokenizer files again")


def _unchecked_added_tokens(folder: Path) -> Iterator[tuple]:
    config = read_json(folder / CONFIG_FILE)
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        yield token["content"], int(index)
    if (folder / ADDED_TOKENS_FILE).is_file():
        yield from read_json(folder / ADDED_TOKENS_FILE).items()
    if (folder / FAST_FILE).is_file():
        for token in read_json(folder / FAST_FILE).get("added_tokens", []):
            yield token["content"], token["id"]
