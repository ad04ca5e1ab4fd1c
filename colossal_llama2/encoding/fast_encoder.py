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
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.encoding.safe_cuts import BETWEEN_PIECES
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.encoding.sentencepiece_file import no_dummy_prefix

if TYPE_CHECKING:
    from kitoken import Kitoken

SPACE = "▁"
SPACE_INSIDE = re.compile(f"[^{SPACE}{BETWEEN_PIECES}]{SPACE}")
# The longest run of spaces on which both are compared, many times the longest piece.
SPACES_TRIED = 200


class FastEncoder(SentencePieceEncoder):
    """The same with kitoken, for tokenizers for which `fastest_class` returns it."""

    @cached_property
    def _fast(self) -> "Kitoken":
        return _kitoken(self.content)

    def _encode(self, texts: Sequence[str], *, dummy_prefix: bool) -> list[list[int]]:
        # The dummy prefix is a space before a text that is not empty, so that one loaded model is enough for both.
        if dummy_prefix and self._adds_prefix:
            return self._fast.encode_all([text and f" {text}" for text in texts], False)
        return self._fast.encode_all(list(texts), False)


@lru_cache(maxsize=1)
def _kitoken(content: bytes) -> "Kitoken":
    """A tokenizer.model without the dummy prefix, loaded once for all encoders of this process."""
    from kitoken import Kitoken

    return Kitoken.from_sentencepiece(content + no_dummy_prefix())


def fastest_class(tokenizer_dir: str | Path) -> type[SentencePieceEncoder]:
    """FastEncoder if it is exact for a tokenizer; SentencePieceEncoder if that is in doubt or kitoken is missing.

    Takes a tenth of a second. Raises UserError as `SentencePieceEncoder` does.
    """
    encoder = SentencePieceEncoder(tokenizer_dir)
    if importlib.util.find_spec("kitoken") is None:
        return SentencePieceEncoder
    pieces = _merged_pieces(encoder)
    if not pieces:
        return SentencePieceEncoder
    texts = [piece.replace(SPACE, " ") for piece in pieces] + [" " * count for count in range(SPACES_TRIED)]
    ids = encoder.encode(texts, dummy_prefix=False)
    is_reached = all(len(own) == 1 for own in ids[: len(pieces)])
    is_exact = is_reached and FastEncoder(tokenizer_dir).encode(texts, dummy_prefix=False) == ids
    return FastEncoder if is_exact else SentencePieceEncoder


def _merged_pieces(encoder: SentencePieceEncoder) -> list[str]:
    """Single characters and the pieces that merges make; empty if anything but merges decides, or merges can tie."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    model = ModelProto.FromString(encoder.content)
    kind, trainer, normalizer = model.SentencePiece, model.trainer_spec, model.normalizer_spec
    is_plain = (
        trainer.model_type == TrainerSpec.BPE
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and normalizer.name == "identity"
        and normalizer.escape_whitespaces
        and not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces)
    )
    types = [entry.type for entry in model.pieces]
    is_plain = is_plain and set(types) <= {kind.NORMAL, kind.BYTE, kind.CONTROL, kind.UNKNOWN}
    entries = zip(encoder.pieces, encoder.scores, types, strict=True)
    scores = {piece: score for piece, score, type_ in entries if type_ == kind.NORMAL}
    counts = Counter(score for piece, score in scores.items() if len(piece) > 1)
    tied = {score for score, count in counts.items() if count > 1}
    has_ties = any(score in tied and len(piece) > 1 and piece.strip(SPACE) for piece, score in scores.items())
    is_closed = scores.keys() >= set("".join(scores)) and not SPACE_INSIDE.search(BETWEEN_PIECES.join(scores))
    return list(scores) if is_plain and is_closed and not has_ties else []
