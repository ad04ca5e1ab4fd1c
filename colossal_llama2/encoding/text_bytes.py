"""Count how many UTF-8 bytes of a text each of its tokens stands for.

    "Hi 鎏" with the dummy prefix        ▁   Hi   ▁   <0xE9>  <0x8E>  <0x8F>
                                         0    2   1        1       1       1

The counts refer to the original text, so they sum to its length with any tokenizer: the space that SentencePiece puts
in front counts 0 bytes, a byte token 1, and <unk> everything that it replaces. Bytes that a normalizer removes or
changes are counted for the token after them, or at the end of the text for the last token.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama2.encoding.safe_cuts import BETWEEN_PIECES
from colossal_llama2.errors import RunError

if TYPE_CHECKING:
    from colossal_llama2.encoding.encoder import TokenIds

# Bounds memory: numpy makes an 8-byte index of each token.
TOKENS_AT_A_TIME = 1 << 20


class TextBytes:
    """The bytes of tokens for one SentencePiece model."""

    def __init__(self, content: bytes, pieces: Sequence[str]):
        """
        Args:
            content: the serialized tokenizer.model.
            pieces: all its pieces, by id.
        """
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        model = ModelProto.FromString(content)
        kind, normalizer = model.SentencePiece, model.normalizer_spec
        types = np.array([entry.type for entry in model.pieces])
        self._is_byte = types == kind.BYTE
        self._is_unknown = types == kind.UNKNOWN
        # With the space that "▁" stands for; in one string, because of its speed.
        spelled = BETWEEN_PIECES.join(pieces).replace("▁", " ").split(BETWEEN_PIECES)
        self._lengths = np.array(list(map(len, map(str.encode, spelled))), np.int32)
        self._lengths[self._is_byte] = 1
        self._lengths[self._is_unknown | (types == kind.CONTROL)] = 0
        # With such a normalizer, the pieces spell the text exactly, apart from the space in front.
        self._is_spelt = normalizer.escape_whitespaces and not (
            normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
        )

    def of_tokens(
        self, text: str, ids: "TokenIds", *, has_prefix: bool, parts: Iterable[tuple[str, Any]]
    ) -> np.ndarray:
        """(tokens,) int32: the bytes of `text` that each of its tokens stands for, which sum to those of the text.

        Args:
            ids: the encoder's ids of the text.
            has_prefix: whether the encoder puts a space before the text.
            parts: the text in one or more parts, as it is encoded, each with its SentencePieceProcessor. They are read
                only if the ids alone do not determine the bytes.

        Raises:
            RunError: SentencePiece encodes the text to other ids.
        """
        tokens = np.asarray(ids, np.int32)
        lengths = self._spelt_lengths(tokens)
        if has_prefix and lengths is not None and len(lengths):
            lengths[0] -= 1
        # U+2581 in a text has 3 bytes, but in a piece it stands for a space.
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
        """The bytes that the pieces spell; None if they do not determine what the tokens stand for."""
        if not self._is_spelt:
            return None
        lengths = np.empty(len(tokens), np.int32)
        for start in range(0, len(tokens), TOKENS_AT_A_TIME):
            some = tokens[start : start + TOKENS_AT_A_TIME].astype(np.int64)
            if self._is_unknown[some].any():
                return None
            lengths[start : start + TOKENS_AT_A_TIME] = self._lengths[some]
        return lengths

    def _by_offsets(self, text: str, tokens: np.ndarray, processor: Any) -> np.ndarray:
        """The same from the offsets that SentencePiece reports, for which it encodes the text again.

        `tokens` may continue beyond the text.
        """
        from sentencepiece.sentencepiece_pb2 import SentencePieceText

        # `out_type` and this format exist in all releases of the package.
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
        """Give each byte token one byte: SentencePiece reports a character in bytes at its last one."""
        is_byte = self._is_byte[tokens]
        starts = np.flatnonzero(is_byte & ~np.append(False, is_byte[:-1]))
        stops = np.flatnonzero(is_byte & ~np.append(is_byte[1:], False)) + 1
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            # More bytes than tokens: a normalizer has removed something before them.
            more = lengths[start:stop].sum() - (stop - start)
            if more >= 0:
                lengths[start:stop] = 1
                lengths[start] += more
        return lengths


def _other_ids(text: str) -> str:
    return (
        f"kitoken and SentencePiece encode a text differently, {text[:60]!r}; uninstall kitoken "
        "and run the same command again"
    )
