"""How many UTF-8 bytes of a text each of its tokens stands for.

    "Hi 鎏" with the dummy prefix        ▁   Hi   ▁   <0xE9>  <0x8E>  <0x8F>
                                         0    2   1        1       1       1

The bytes are those of the text as it was given, so they sum to its length whatever the tokenizer: the space that
SentencePiece puts in front is 0 bytes, a token for a byte is 1, and <unk> is all that it stands for. What a normalizer
removes or changes is charged to the token that follows it, or at the end of the text to the last one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from colossal_llama2.errors import RunError

# As many at a time, since numpy makes indices of 8 bytes of them.
TOKENS_AT_A_TIME = 1 << 20


class TextBytes:
    """The bytes of tokens, for one serialized SentencePiece model."""

    def __init__(self, content: bytes):
        """`content` is that of tokenizer.model."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        model = ModelProto.FromString(content)
        kind, normalizer = model.SentencePiece, model.normalizer_spec
        types = np.array([piece.type for piece in model.pieces])
        self._is_byte = types == kind.BYTE
        self._is_unknown = types == kind.UNKNOWN
        lengths = [len(piece.piece.replace("▁", " ").encode()) for piece in model.pieces]
        self._lengths = np.array(lengths, np.int32)
        self._lengths[self._is_byte] = 1
        self._lengths[self._is_unknown | (types == kind.CONTROL)] = 0
        # With such a normalizer a text is what its pieces spell, but for the space in front.
        self._is_spelt = normalizer.escape_whitespaces and not (
            normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
        )

    def of_tokens(
        self, text: str, ids: Sequence[int], *, has_prefix: bool, parts: Iterable[tuple[str, Any]]
    ) -> np.ndarray:
        """(tokens,) int32: the bytes of `text` that each of its tokens stands for, which sum to those of the text.

        Args:
            ids: what the encoder makes of the text; `has_prefix` if it puts a space before.
            parts: the text as it is encoded, in one part or in more, each with its SentencePieceProcessor. They are
                asked for if the ids alone do not say it.

        Raises:
            RunError: the tokens are of another encoder, and differ.
        """
        tokens = np.asarray(ids, np.int32)
        lengths = self._spelt_lengths(tokens)
        if has_prefix and lengths is not None and len(lengths):
            lengths[0] -= 1
        # U+2581 in a text is 3 bytes, but spelt as the space that it stands for in a piece.
        if lengths is not None and lengths.sum() == len(text.encode()):
            return lengths
        found = np.zeros(len(tokens), np.int32)
        start = 0
        for part, processor in parts:
            lengths = self._by_offsets(part, tokens[start:], processor)
            found[start : start + len(lengths)] = lengths
            start += len(lengths)
        if start != len(tokens):
            raise RunError(_other_ids(text))
        return found

    def _spelt_lengths(self, tokens: np.ndarray) -> np.ndarray | None:
        """The bytes that the pieces spell; None if that cannot be what the tokens stand for."""
        if not self._is_spelt:
            return None
        lengths = np.empty(len(tokens), np.int32)
        for start in range(0, len(tokens), TOKENS_AT_A_TIME):
            some = tokens[start : start + TOKENS_AT_A_TIME].astype(np.int64)
            if self._is_unknown[some].any():
                return None
            lengths[start : start + TOKENS_AT_A_TIME] = self._lengths[some]
        return lengths

    def _by_offsets(self, text: str, tokens: np.ndarray, processor) -> np.ndarray:
        """The same from the places that SentencePiece reports, which takes it another encoding.

        `tokens` may go on beyond those of the text.
        """
        from sentencepiece.sentencepiece_pb2 import SentencePieceText

        # `out_type` and this format are the same in all releases of the package.
        pieces = SentencePieceText.FromString(processor.encode(text, out_type="serialized_proto")).pieces
        ends = np.array([piece.end for piece in pieces], np.int64)
        tokens = tokens[: len(ends)]
        if len(ends) != len(tokens) or any(piece.id != token for piece, token in zip(pieces, tokens, strict=True)):
            raise RunError(_other_ids(text))
        if not len(ends):
            return np.zeros(0, np.int64)
        lengths = self._with_single_bytes(np.diff(ends, prepend=0), tokens)
        lengths[-1] += len(text.encode()) - ends[-1]
        return lengths

    def _with_single_bytes(self, lengths: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """SentencePiece reports a character spelt in bytes at its last byte: here each byte has its own."""
        is_byte = self._is_byte[tokens]
        starts = np.flatnonzero(is_byte & ~np.append(False, is_byte[:-1]))
        stops = np.flatnonzero(is_byte & ~np.append(is_byte[1:], False)) + 1
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            # More than a byte for each: a normalizer has removed something before them.
            more = lengths[start:stop].sum() - (stop - start)
            if more >= 0:
                lengths[start:stop] = 1
                lengths[start] += more
        return lengths


def _other_ids(text: str) -> str:
    return (
        f"kitoken encodes a text otherwise than SentencePiece, {text[:60]!r}; uninstall kitoken "
        "and give the same command again"
    )
