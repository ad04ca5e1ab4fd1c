"""SentencePiece's ids from kitoken, about three times as fast, for tokenizers on which both are certain to agree.

SentencePiece repeatedly merges the two neighbours with the best score, over the whole text. kitoken first splits the
text before each run of spaces ("▁"), keeps a part that is a piece unchanged, and merges in the other parts by rank.
Both give the same ids if

- "▁" occurs only at the beginning of pieces, so that no merge crosses a split;
- SentencePiece encodes the text of every piece to that piece; then it does so in every text (`closure` shows why);
- every character of a piece is a piece, so that merges lead to each piece and kitoken ranks it by its score;
- no two pieces have the same score: SentencePiece would decide by position and kitoken by id. In LLaMA-2, runs of
  spaces do, but every shorter run leads to them, so the results are equal. This is tested on runs of spaces;
- only merges decide: no normalizer, bytes for unknown characters, no user-defined pieces.

This holds for LLaMA-2's tokenizer, and for its extensions by init_tokenizer.py without `--piece_scores zero` and
`--closure off`. For any other tokenizer, `fastest_class` returns SentencePiece itself.
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.encoding.sentencepiece_file import no_dummy_prefix, sentencepiece_file

if TYPE_CHECKING:
    from kitoken import Kitoken

SPACE = "▁"
# The longest run of spaces on which both are compared, many times the longest piece.
SPACES_TRIED = 200


class FastEncoder(SentencePieceEncoder):
    """The same with kitoken, for tokenizers for which `fastest_class` returns it."""

    @cached_property
    def _fast(self) -> "Kitoken":
        from kitoken import Kitoken

        return Kitoken.from_sentencepiece(self._content)

    @cached_property
    def _fast_continuation(self) -> "Kitoken":
        from kitoken import Kitoken

        return Kitoken.from_sentencepiece(self._content + no_dummy_prefix())

    def _encode(self, texts: Sequence[str], *, dummy_prefix: bool) -> list[list[int]]:
        fast = self._fast if dummy_prefix else self._fast_continuation
        return fast.encode_all(list(texts), False)


def fastest_class(tokenizer_dir: str | Path) -> type[SentencePieceEncoder]:
    """FastEncoder if it is exact for a tokenizer; SentencePieceEncoder if that is in doubt or kitoken is missing.

    Takes a tenth of a second. Raises UserError as `SentencePieceEncoder` does.
    """
    encoder = SentencePieceEncoder(tokenizer_dir)
    if importlib.util.find_spec("kitoken") is None:
        return SentencePieceEncoder
    pieces = _merged_pieces(tokenizer_dir)
    if not pieces:
        return SentencePieceEncoder
    texts = [piece.replace(SPACE, " ") for piece in pieces] + [" " * count for count in range(SPACES_TRIED)]
    ids = encoder.encode(texts, dummy_prefix=False)
    is_reached = all(len(own) == 1 for own in ids[: len(pieces)])
    is_exact = is_reached and FastEncoder(tokenizer_dir).encode(texts, dummy_prefix=False) == ids
    return FastEncoder if is_exact else SentencePieceEncoder


def _merged_pieces(tokenizer_dir: str | Path) -> list[str]:
    """Single characters and the pieces that merges make; empty if anything but merges decides, or merges can tie."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    model = ModelProto.FromString(sentencepiece_file(tokenizer_dir).read_bytes())
    kind, trainer, normalizer = model.SentencePiece, model.trainer_spec, model.normalizer_spec
    is_plain = (
        trainer.model_type == TrainerSpec.BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and normalizer.name == "identity"
        and normalizer.escape_whitespaces
        and not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces)
    )
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    is_plain = is_plain and {type_ for *_, type_ in pieces} <= {kind.NORMAL, kind.BYTE, kind.CONTROL, kind.UNKNOWN}
    scores = {piece: score for piece, score, type_ in pieces if type_ == kind.NORMAL}
    counts = Counter(score for piece, score in scores.items() if len(piece) > 1)
    has_ties = any(counts[score] > 1 and len(piece) > 1 and piece.strip(SPACE) for piece, score in scores.items())
    is_closed = scores.keys() >= set("".join(scores)) and not any(SPACE in piece.lstrip(SPACE) for piece in scores)
    return list(scores) if is_plain and is_closed and not has_ties else []
