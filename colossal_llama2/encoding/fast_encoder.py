"""SentencePiece's ids from kitoken, about three times as fast, for tokenizers on which the two are sure to agree.

SentencePiece takes a text as a whole, and merges the best-scored two neighbours again and again. kitoken first splits
it before each run of spaces ("▁"), takes a part that is a piece as it is, and merges in the others by rank. That comes
to the same if

- "▁" stands nowhere in a piece but in front, so that no merge crosses a split;
- every piece is what SentencePiece makes of its own text: then it is made so in every text (`closure` says why);
- each character of a piece is a piece, so that a merge leads to each and kitoken ranks it by its score;
- no two pieces have one score, since SentencePiece then goes by position and kitoken by id. LLaMA-2 has such: runs of
  spaces, which every shorter run leads to, so that there both end alike. That is tried out;
- nothing but merges decides: no normalizer, bytes for unknown characters, no pieces that are defined by the user.

So it is for LLaMA-2's tokenizer and for what init_tokenizer.py makes of it, unless by `--piece_scores zero` or
`--closure off`. For any other, `fastest_class` returns SentencePiece itself.
"""

import importlib.util
from collections import Counter
from functools import cached_property
from pathlib import Path

from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder, no_dummy_prefix
from colossal_llama2.encoding.sentencepiece_file import sentencepiece_file

SPACE = "▁"
# Longest run of spaces on which both are compared, many times that of the longest piece.
SPACES_TRIED = 200


class FastEncoder(SentencePieceEncoder):
    """The same with kitoken, for tokenizers for which `fastest_class` returns it."""

    @cached_property
    def _fast(self):
        from kitoken import Kitoken

        return Kitoken.from_sentencepiece(self._content)

    @cached_property
    def _fast_continuation(self):
        from kitoken import Kitoken

        return Kitoken.from_sentencepiece(self._content + no_dummy_prefix())

    def _encode(self, texts: list[str], *, dummy_prefix: bool) -> list[list[int]]:
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
    """The pieces that merges make, and single characters; none if anything but merges decides, or merges can tie."""
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
