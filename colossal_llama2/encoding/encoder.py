"""Load a tokenizer folder: for encoding alone (`Encoder`, SentencePiece) or for transformers (`load_tokenizer`)."""

import hashlib
import textwrap
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama2.encoding.folder_files import TEMPLATES_FOLDER, check_tokenizer_files, own_file_arguments
from colossal_llama2.encoding.safe_cuts import SafeCuts, is_long
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import read_json
from colossal_llama2.storage.given_paths import hub_cure
from colossal_llama2.storage.input_files import is_regular
from colossal_llama2.storage.unpickling_guard import unpickling_refused

if TYPE_CHECKING:
    import numpy as np

MODEL_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
# Files that hold no token id: they are copied as they are. The last one is a folder.
COPIED_FILES = (SPECIAL_TOKENS_FILE, "chat_template.jinja", "chat_template.json", TEMPLATES_FOLDER)
TOKENIZER_FILES = (MODEL_FILE, FAST_FILE, CONFIG_FILE, ADDED_TOKENS_FILE, *COPIED_FILES)
PADDING_SIDE = "right"
PAD_TOKENS = ("unk", "eos")


class Encoder:
    """Text to token ids and back with SentencePiece alone: starts in milliseconds, and pickles as its path.

    `tokenizer_dir` is a folder that holds tokenizer.model. `bos_id`, `eos_id` and `unk_id` are the ids of <s>, </s> and
    <unk>, `vocab_size` is the number of SentencePiece pieces (tokens that transformers adds beyond them are not among
    them). Raises UserError if the folder or the file is missing, is no SentencePiece model, or has no <s> or </s>.
    """

    def __init__(self, tokenizer_dir: str | Path):
        self._tokenizer_dir = tokenizer_dir
        path = sentencepiece_file(tokenizer_dir)
        self._content = path.read_bytes()
        self._processor = _processor(self._content, path)
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        self.vocab_size: int = self._processor.get_piece_size()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f"{path} has no <s> or no </s>, which mark where documents begin and end; "
                "give a tokenizer with both, such as LLaMA-2's"
            )

    @cached_property
    def _continuation_processor(self):
        """A second processor: whether a text is given SentencePiece's leading "▁" is a property of the loaded model."""
        return _processor(self._content + no_dummy_prefix(), sentencepiece_file(self._tokenizer_dir))

    def encode(self, texts: list[str], *, dummy_prefix: bool = True) -> list[list[int]]:
        """Token ids of each text, without <s> and </s>, on one thread.

        Special tokens in a text stay text: "<s>" on a web page is three characters, never id 1. With
        `dummy_prefix=False` a text is encoded as the continuation of an earlier one, without the leading "▁":

            encode(["人工智能"])                      -> [[▁, 人工, 智能]]
            encode(["人工智能"], dummy_prefix=False)  -> [[人工, 智能]]

        A lone surrogate in a text is not UTF-8 and raises UnicodeEncodeError. A text that `is_long` is encoded
        in parts (see `parts`), which bounds the memory that SentencePiece takes beside the ids.
        """
        if not any(map(is_long, texts)):
            return self._encode(texts, dummy_prefix=dummy_prefix)
        others = iter(self._encode([text for text in texts if not is_long(text)], dummy_prefix=dummy_prefix))
        return [
            self.encode_long(text, dummy_prefix=dummy_prefix).tolist() if is_long(text) else next(others)
            for text in texts
        ]

    def encode_long(self, text: str, *, dummy_prefix: bool = True) -> "np.ndarray":
        """(tokens,) int32: the ids that `encode` gives for the text, in a tenth of the memory of a list."""
        import numpy as np

        ids = array("i")
        for number, part in enumerate(self._parts(text)):
            ids.fromlist(self._encode([part], dummy_prefix=dummy_prefix and number == 0)[0])
        return np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32)

    def _parts(self, text: str) -> Iterator[str]:
        return self._safe_cuts.parts_of(text) if is_long(text) else iter([text])

    def _encode(self, texts: list[str], *, dummy_prefix: bool) -> list[list[int]]:
        processor = self._processor if dummy_prefix else self._continuation_processor
        # One thread: whoever has much text runs one Encoder in each of several processes.
        return processor.encode(list(texts), num_threads=1)

    @cached_property
    def _safe_cuts(self) -> SafeCuts:
        return SafeCuts(self._content)

    def decode(self, ids: Iterable[int], *, dummy_prefix: bool = True) -> str:
        """The text of token ids, without <s>, </s> and, with `dummy_prefix`, the leading space that `encode` adds."""
        processor = self._processor if dummy_prefix else self._continuation_processor
        return processor.decode([int(token) for token in ids])

    def bytes_of_tokens(self, text: str, ids: Sequence[int], *, dummy_prefix: bool = True) -> "np.ndarray":
        """(tokens,) int32: how many UTF-8 bytes of `text` each of its tokens stands for; they sum to all of them.

        `ids` is what `encode` gives for the text and the same `dummy_prefix`. See `text_bytes`.
        """
        has_prefix = dummy_prefix and self._adds_prefix
        parts = (
            (part, self._processor if dummy_prefix and number == 0 else self._continuation_processor)
            for number, part in enumerate(self._parts(text))
        )
        return self._text_bytes.of_tokens(text, ids, has_prefix=has_prefix, parts=parts)

    @cached_property
    def _text_bytes(self):
        from colossal_llama2.encoding.text_bytes import TextBytes

        return TextBytes(self._content)

    @cached_property
    def _adds_prefix(self) -> bool:
        """Whether the model puts "▁" before a text; any text that does not begin with one shows it."""
        return self._processor.id_to_piece(self._processor.encode("a")[0]).startswith("▁")

    def __reduce__(self):
        return type(self), (self._tokenizer_dir,)


def load_tokenizer(path: str | Path, *, pad_token: str = "unk"):
    """The transformers tokenizer of a local folder or of a Hugging Face name, padding on the right.

    `pad_token` says which token pads: "unk" or "eos". A folder is read from disk alone, and code that comes with a
    tokenizer is never run. Raises UserError if there is no tokenizer, or if it lacks the token that should pad.
    """
    if pad_token not in PAD_TOKENS:
        raise ValueError(f"pad_token is {pad_token!r}, one of {PAD_TOKENS} allowed")
    from transformers import AutoTokenizer

    is_folder = Path(path).is_dir()
    # A Hugging Face name is NAME or OWNER/NAME; anything else can only be meant as a folder.
    if not is_folder and (Path(path).exists() or Path(path).is_absolute() or len(Path(path).parts) > 2):
        raise UserError(f"{path} is not a folder; give the folder of a tokenizer, with tokenizer.model in it")
    if is_folder:
        check_tokenizer_files(path)
    try:
        with unpickling_refused(offline=is_folder):
            tokenizer = AutoTokenizer.from_pretrained(
                path,
                local_files_only=is_folder,
                trust_remote_code=False,
                padding_side=PADDING_SIDE,
                **(own_file_arguments(path) if is_folder else {}),
            )
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot parse
        kind = "the folder" if is_folder else "the Hugging Face name (no such folder exists)"
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"no tokenizer can be loaded from {kind} {path} ({reason}); give a folder with tokenizer.model, "
            "tokenizer_config.json and special_tokens_map.json"
        )
    pad = getattr(tokenizer, f"{pad_token}_token")
    if pad is None:
        raise UserError(f"the tokenizer of {path} has no {pad_token} token to pad with; give one that has")
    tokenizer.pad_token = pad
    return tokenizer


def fingerprint(tokenizer_dir: str | Path) -> str:
    """SHA-256 of tokenizer.model in hexadecimal: equal for folders whose `Encoder` gives equal ids."""
    return hashlib.sha256(sentencepiece_file(tokenizer_dir).read_bytes()).hexdigest()


def puts_prefix_after_marks(tokenizer_dir: str | Path) -> bool:
    """Whether transformers puts "▁" before a text that follows a mark: "</s>Hi" becomes </s> ▁Hi, not </s> Hi.

    tokenizer.json decides, which AutoTokenizer loads: the Prepend normalizer of the one that LLaMA-2 ships does so. A
    folder without one is converted by `legacy` in its config, which is true where it is not said.
    """
    path = Path(tokenizer_dir, FAST_FILE)
    if path.is_file():
        processor = _processor(sentencepiece_file(tokenizer_dir).read_bytes(), path)
        mark = processor.id_to_piece(processor.eos_id())
        return load_fast(path).encode(f"{mark}a", add_special_tokens=False).tokens[1].startswith("▁")
    config = Path(tokenizer_dir, CONFIG_FILE)
    return not config.is_file() or read_json(config).get("legacy") is not False


def load_fast(path: str | Path):
    """The `tokenizers.Tokenizer` of a tokenizer.json. Raises UserError if it is damaged."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library knows no other class
        raise UserError(f"{path} cannot be read ({error}); copy it again from where the tokenizer comes from")


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


def read_added_tokens(folder: Path, num_pieces: int) -> dict[str, int]:
    """The tokens that transformers adds beyond the `num_pieces` of SentencePiece, with their ids, in order of id.

    Raises UserError if two files disagree about an id, or if the ids do not follow the pieces without a gap.
    """
    found: dict[str, int] = {}
    for token, index in _listed_added_tokens(folder):
        if index >= num_pieces and found.setdefault(token, index) != index:
            raise UserError(f"{folder} gives the added token {token!r} the ids {found[token]} and {index}; keep one")
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


def _processor(content: bytes, path: Path):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, OSError):
        raise UserError(f"{path} is not a SentencePiece model; copy LLaMA-2's {MODEL_FILE} again")
    if processor.get_piece_size() == 0:
        raise UserError(f"{path} is a SentencePiece model without pieces; copy LLaMA-2's {MODEL_FILE} again")
    return processor


def no_dummy_prefix() -> bytes:
    """A message to append to a serialized model: protobuf merges the two, so only this one setting changes."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec

    return ModelProto(normalizer_spec=NormalizerSpec(add_dummy_prefix=False)).SerializeToString()
