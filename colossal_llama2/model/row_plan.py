"""Which of the source's embedding rows make each row of the target: a copy, or the mean of the rows of several tokens.

A new token replaces the tokens that the source's tokenizer has for the same text: they are its bag. A piece of a
byte-level BPE may be a part of a character, so its bag comes from its bytes, by the source's merges, without a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.encoding.added_tokens import read_added_tokens
from colossal_llama2.encoding.bpe_model import SPACE, read_model
from colossal_llama2.encoding.byte_level_encoder import ByteLevelEncoder
from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of
from colossal_llama2.encoding.registry import kind_of, load_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted


@dataclass(frozen=True)
class Rows:
    """How the target's rows are made from the source's: the first `kept` are copied, each later one is a mean.

    `bags[i]` lists the source rows whose mean is target row `kept + i`. A token that transformers added beyond the
    pieces moves after the new pieces: its bag is its old row, and `moved_ids` maps its old id to its new one. The last
    `padding` rows have no token.
    """

    kept: int
    bags: list[list[int]]
    new: int
    moved_ids: dict[int, int]
    padding: int = 0

    @property
    def tokens(self) -> int:
        """The number of rows with a token."""
        return self.kept + len(self.bags)

    @property
    def vocab_size(self) -> int:
        """The number of rows of the target's matrices."""
        return self.tokens + self.padding

    @property
    def new_ranges(self) -> list[list[int]]:
        """New target rows, as ascending [begin, end) ranges: all tokens from `kept` on, except those that moved."""
        borders = [self.kept - 1, *sorted(self.moved_ids.values()), self.tokens]
        between = zip(borders[:-1], borders[1:], strict=True)
        return [[before + 1, after] for before, after in between if before + 1 < after]


def plan_rows(source: Path, tokenizer: Path, *, source_rows: int) -> Rows:
    """The source rows of each target row.

    Args:
        source, tokenizer: the folders of both tokenizers.
        source_rows: the number of rows of the source's embedding.

    Raises:
        UserError: tokenizers and matrix do not belong together.
    """
    kinds = [kind_of(folder).encoder for folder in (source, tokenizer)]
    if kinds[0] is not kinds[1]:
        raise UserError(
            f"{tokenizer} holds a {kinds[1].name} tokenizer, and {source} a {kinds[0].name} one; give the folder that "
            "init_tokenizer.py wrote from this source"
        )
    plan = _plan_byte_level if kinds[0] is ByteLevelEncoder else _plan_sentencepiece
    return plan(source, tokenizer, source_rows)


def _plan_sentencepiece(source: Path, tokenizer: Path, source_rows: int) -> Rows:
    old = [piece.piece for piece in read_model(source).pieces]
    new = [piece.piece for piece in read_model(tokenizer).pieces]
    _check_extends(source, tokenizer, old=old, new=new)
    if source_rows < len(old):
        raise UserError(
            f"the embedding of {source} has {counted(source_rows, 'row')}, fewer than the {len(old)} pieces of its "
            "tokenizer; give the tokenizer that belongs to the model"
        )
    old_added = {token: index for token, index in read_added_tokens(source, len(old)).items() if index < source_rows}
    new_added = read_added_tokens(tokenizer, len(new))
    moved_ids = {old_added[token]: index for token, index in new_added.items() if token in old_added}
    # Pieces contain spaces as "▁". They are encoded without a dummy prefix, which would add one more.
    texts = [piece.replace(SPACE, " ") for piece in new[len(old) :]] + list(new_added)
    bags = load_encoder(source).encode(texts, dummy_prefix=False)
    for old_id, new_id in moved_ids.items():
        bags[new_id - len(old)] = [old_id]
    for text, bag in zip(texts, bags, strict=True):
        if not bag:
            raise UserError(f"{source} encodes {text!r} as nothing, so it gets no row; remove the piece")
    return Rows(kept=len(old), bags=bags, new=len(bags) - len(moved_ids), moved_ids=moved_ids)


def _check_extends(source: Path, tokenizer: Path, *, old: list[str], new: list[str]) -> None:
    for index, piece in enumerate(old):
        if index >= len(new) or new[index] != piece:
            found = repr(new[index]) if index < len(new) else "missing"
            raise UserError(
                f"{tokenizer} does not extend the tokenizer of {source}: piece {index} is {found}, {piece!r} expected; "
                "give the folder that init_tokenizer.py wrote from this source"
            )


# Byte-level BPE.


def _plan_byte_level(source: Path, tokenizer: Path, source_rows: int) -> Rows:
    """Ids of the source's tokens do not change, but added tokens may move, or be new anywhere.

    The first target row whose token is not that of the source's row with this number ends the copied ones.
    """
    old, new = ByteLevelModel.read(source), ByteLevelModel.read(tokenizer)
    if source_rows <= max(old.vocabulary.values()):
        raise UserError(
            f"the embedding of {source} has {counted(source_rows, 'row')}, fewer than the {len(old.vocabulary)} tokens "
            "of its tokenizer; give the tokenizer that belongs to the model"
        )
    _check_extends_byte_level(source, tokenizer, old=old, new=new)
    old_ids = {**old.vocabulary, **{text: index for text, index in old.added.items() if index < source_rows}}
    old_tokens = {index: token for token, index in old_ids.items()}
    new_ids = {**new.vocabulary, **new.added}
    new_tokens = {index: token for token, index in new_ids.items()}
    # Rows of the source without a token are left out at its end, and kept between its tokens.
    last = min(source_rows, max(old_tokens) + 1, new.size)
    kept = next((row for row in range(last) if new_tokens.get(row) != old_tokens.get(row)), last)
    _check_no_gap(tokenizer, new_tokens, kept, new.size)
    moved_ids = {old_ids[token]: new_ids[token] for token in new_ids if token in old_ids and new_ids[token] >= kept}
    origins = {row: [index] for index, row in moved_ids.items()}
    unknown = [row for row in range(kept, new.size) if row not in origins]
    bags = origins | _bags_of_new_tokens(source, old, new, [new_tokens[row] for row in unknown], unknown)
    ordered = [bags[row] for row in range(kept, new.size)]
    return Rows(kept=kept, bags=ordered, new=len(ordered) - len(moved_ids), moved_ids=moved_ids)


def _check_extends_byte_level(source: Path, tokenizer: Path, *, old: ByteLevelModel, new: ByteLevelModel) -> None:
    cure = "give the folder that init_tokenizer.py wrote from this source"
    for token, index in old.vocabulary.items():
        found = new.vocabulary.get(token, new.added.get(token))
        if found != index:
            raise UserError(
                f"{tokenizer} does not extend the tokenizer of {source}: the id of {token!r} is "
                f"{'missing' if found is None else found}, {index} expected; {cure}"
            )
    if new.merges[: len(old.merges)] != old.merges:
        ranks = range(len(old.merges))
        rank = next(rank for rank in ranks if old.merges[rank : rank + 1] != new.merges[rank : rank + 1])
        raise UserError(
            f"{tokenizer} does not extend the tokenizer of {source}: the merge of rank {rank} is not "
            f"{' '.join(old.merges[rank])!r}; {cure}"
        )


def _check_no_gap(tokenizer: Path, tokens: dict[int, str], begin: int, end: int) -> None:
    gap = next((index for index in range(begin, end) if index not in tokens), None)
    if gap is not None:
        raise UserError(
            f"the tokenizer of {tokenizer} has no token with the id {gap}, but one with {end - 1}; new tokens need ids "
            "without a gap, as init_tokenizer.py gives them"
        )


def _bags_of_new_tokens(
    source: Path, old: ByteLevelModel, new: ByteLevelModel, tokens: Sequence[str], rows: Sequence[int]
) -> dict[int, list[int]]:
    """The source ids of each token, by its row: by merges for a piece, and as a text for an added token."""
    plain = old.plain_tokenizer()
    found: dict[int, list[int]] = {}
    partial = []
    for token, row in zip(tokens, rows, strict=True):
        if token in new.added:
            pieces = [part for part, _ in plain.pre_tokenizer.pre_tokenize_str(token)]
        else:
            pieces = [token]
        merged = [part for piece in pieces for part in plain.model.tokenize(piece)]
        found[row] = [part.id for part in merged]
        length = len(token.encode() if token in new.added else bytes_of(token))
        if not merged:
            raise UserError(f"{source} encodes {token!r} as nothing, so it gets no row; remove the piece")
        if sum(len(part.value) for part in merged) != length:
            partial.append(token)
    if partial:
        logs.get_logger().warning(
            f"{source} has no tokens for some bytes of {counted(len(partial), 'new token')}, such as {partial[0]!r}; "
            "each row is the mean of its other bytes"
        )
    return found
