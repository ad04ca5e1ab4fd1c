"""tokenizer.model: find it in a folder, and load it with SentencePiece."""

from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.encoding.file_names import MODEL_FILE
from colossal_llama2.errors import UserError
from colossal_llama2.storage.given_paths import hub_cure
from colossal_llama2.storage.input_files import is_regular

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def sentencepiece_file(tokenizer_dir: str | Path) -> Path:
    """Path of tokenizer.model in a tokenizer folder. Raises UserError if the folder or the file is missing."""
    folder = Path(tokenizer_dir)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder{hub_cure(str(tokenizer_dir))}; give the folder of a tokenizer, with "
            f"{MODEL_FILE} in it"
        )
    path = folder / MODEL_FILE
    if not is_regular(path):
        raise UserError(f"{folder} holds no {MODEL_FILE}; LLaMA-2 ships it beside its weights, copy it there")
    return path


def load_processor(content: bytes, path: Path) -> "SentencePieceProcessor":
    """The SentencePieceProcessor of a serialized model. Raises UserError, naming `path`, if it is damaged or empty."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, OSError):
        raise UserError(f"{path} is not a SentencePiece model; copy LLaMA-2's {MODEL_FILE} again")
    if processor.get_piece_size() == 0:
        raise UserError(f"{path} is a SentencePiece model without pieces; copy LLaMA-2's {MODEL_FILE} again")
    return processor


def control_pieces(content: bytes) -> dict[str, int]:
    """The ids of the pieces of a serialized model that stand for no text, such as <s>, </s> and <unk>."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    kind = ModelProto.SentencePiece
    pieces = ModelProto.FromString(content).pieces
    return {entry.piece: index for index, entry in enumerate(pieces) if entry.type in (kind.CONTROL, kind.UNKNOWN)}


def no_dummy_prefix() -> bytes:
    """Bytes to append to a serialized model that turn off the leading "▁": protobuf merges the two messages."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec

    return ModelProto(normalizer_spec=NormalizerSpec(add_dummy_prefix=False)).SerializeToString()
