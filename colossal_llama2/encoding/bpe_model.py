"""Read a SentencePiece BPE model file, append pieces to it, and find pieces that SentencePiece never produces.

New pieces are appended as bytes, without a protobuf object for each: a million pieces take a second.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.encoding.file_names import MODEL_FILE
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.encoding.sentencepiece_file import sentencepiece_file
from colossal_llama2.errors import UserError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

SPACE = "▁"
# Tags (field number and wire type) of a ModelProto's pieces, and of a piece's text and score.
PIECES_TAG, PIECE_TAG, SCORE_TAG = b"\x0a", b"\x0a", b"\x15"
FLOAT32_BITS = 24
TEXTS_AT_A_TIME = 100_000


@dataclass(frozen=True)
class BpeModel:
    """The content of a tokenizer.model: `pieces` in order of id, and the `scores` of those that merges can make.

    `lowest_merge` is the lowest score of a piece of two or more characters. Scores of single characters have no effect,
    and in some models they are all a sentinel (-1e9), near which float32 cannot represent distinct new scores.
    """

    content: bytes
    pieces: list[str]
    scores: dict[str, float]
    lowest_merge: float
    user_defined: list[str]
    has_identity_normalizer: bool

    @classmethod
    def read(cls, folder: Path) -> "BpeModel":
        """The model of a tokenizer folder. Raises UserError if it is missing or not a BPE model."""
        proto = read_model(folder)
        kind = proto.SentencePiece
        merged = (kind.NORMAL, kind.UNUSED)
        scores = {p.piece: p.score for p in proto.pieces if p.type in (*merged, kind.USER_DEFINED)}
        merges = [p.score for p in proto.pieces if p.type in merged and len(p.piece) > 1]
        normalizer = proto.normalizer_spec
        return cls(
            content=sentencepiece_file(folder).read_bytes(),
            pieces=[p.piece for p in proto.pieces],
            scores=scores,
            lowest_merge=min(merges, default=0.0),
            user_defined=[p.piece for p in proto.pieces if p.type == kind.USER_DEFINED],
            has_identity_normalizer=not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces),
        )


def read_model(folder: Path) -> "ModelProto":
    """The SentencePiece ModelProto of a tokenizer folder. Raises UserError if it is missing or not a BPE model."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    # SentencePiece detects better than protobuf whether a file is one of its models.
    SentencePieceEncoder(folder)
    path = sentencepiece_file(folder)
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path} is not a SentencePiece model; copy LLaMA-2's {MODEL_FILE} again")
    kind = model.trainer_spec.model_type
    if kind != TrainerSpec.BPE:
        name = TrainerSpec.ModelType.Name(kind).capitalize()
        raise UserError(f"{path} is a {name} model; only BPE models, such as LLaMA-2's, can be extended")
    return model


def scores_below(lowest: float, count: int) -> list[float]:
    """`count` decreasing scores below `lowest`, each a different float32.

    The step is 1 if float32 represents every whole number in that range; otherwise it is twice the distance between
    neighbouring values there: scores_below(-2.5, 3) -> [-4.0, -5.0, -6.0].
    """
    start = math.floor(lowest)
    step = max(1.0, 2.0 ** (math.frexp(abs(start) + count)[1] - FLOAT32_BITS + 1))
    return [start - step * index for index in range(1, count + 1)]


def with_pieces(content: bytes, pieces: Sequence[str], scores: Sequence[float]) -> bytes:
    """A serialized ModelProto with `pieces` appended to its own, byte for byte as protobuf would write it."""
    end = _end_of_pieces(content)
    records = bytearray()
    for piece, score in zip(pieces, scores, strict=True):
        text = piece.encode()
        record = PIECE_TAG + _varint(len(text)) + text + SCORE_TAG + struct.pack("<f", score)
        records += PIECES_TAG + _varint(len(record)) + record
    return content[:end] + records + content[end:]


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _end_of_pieces(content: bytes) -> int:
    """The offset at which the last piece of a serialized ModelProto ends; 0 if it has none."""
    position = end = 0
    while position < len(content):
        tag, position = _read_varint(content, position)
        wire_type = tag & 7
        if wire_type == 0:
            _, position = _read_varint(content, position)
        elif wire_type == 2:
            size, position = _read_varint(content, position)
            position += size
        else:
            position += {1: 8, 5: 4}[wire_type]
        if tag == PIECES_TAG[0]:
            end = position
    return end


def _read_varint(content: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def plain_processor(content: bytes) -> "SentencePieceProcessor":
    """SentencePiece with a model's merges but without its normalizer, so that the text of a piece stays unchanged."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec

    # Protobuf merges two concatenated messages: each field set here replaces the model's.
    plain = NormalizerSpec(
        name="identity", precompiled_charsmap=b"", add_dummy_prefix=False, remove_extra_whitespaces=False
    )
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(content + ModelProto(normalizer_spec=plain).SerializeToString())
    return processor


def unreachable(content: bytes, pieces: Sequence[str]) -> list[str]:
    """The `pieces` of a model that SentencePiece's merges never make, found by encoding each of them.

    The model's normalizer is not applied; see `altered_by_normalizer`.
    """
    processor = plain_processor(content)
    found = []
    for start in range(0, len(pieces), TEXTS_AT_A_TIME):
        batch = list(pieces[start : start + TEXTS_AT_A_TIME])
        ids = processor.encode(batch, num_threads=1)
        found += [piece for piece, own in zip(batch, ids, strict=True) if len(own) != 1]
    return found


def altered_by_normalizer(model: BpeModel, pieces: Iterable[str]) -> list[str]:
    """The pieces that never occur after the model's normalizer, which may turn "Ａ" into "A" or drop spaces."""
    from sentencepiece import SentencePieceProcessor

    if model.has_identity_normalizer:
        return []
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.content)
    # Inside a text, because spaces at its ends may be dropped.
    return [piece for piece in pieces if piece not in processor.normalize(f"x{piece.replace(SPACE, ' ')}x")]


def merges(pieces: Sequence[str], scores: Sequence[float], can_merge: Iterable[str]) -> list[tuple[str, str]]:
    """The merges that transformers derives from a SentencePiece BPE, best first (`generate_merges` in its converter).

    Each split of a piece into two pieces is a merge; pieces that cannot merge, such as "<0x0A>", are in none:

        merges(["a", "b", "c", "ab", "abc"], [-3, -4, -5, -1, -2], ...) -> [("a", "b"), ("ab", "c")]
    """
    known = frozenset(can_merge)
    by_score = sorted(zip(scores, pieces, strict=True), key=lambda entry: -entry[0])
    found: list[tuple[str, str]] = []
    for _, group in groupby(by_score, key=lambda entry: entry[0]):
        splits = [
            (piece[:index], piece[index:])
            for _, piece in group
            if piece in known
            for index in range(1, len(piece))
            if piece[:index] in known and piece[index:] in known
        ]
        splits.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
        found += splits
    return found
