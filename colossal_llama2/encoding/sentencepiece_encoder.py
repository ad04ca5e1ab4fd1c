"""Text to token ids and back, with SentencePiece only."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.encoding.file_names import CONFIG_FILE, FAST_FILE, MODEL_FILE, TOKENIZER_FILES
from colossal_llama2.encoding.model_file_format import is_gguf, is_tiktoken
from colossal_llama2.encoding.safe_cuts import PART_CHARACTERS, SafeCuts
from colossal_llama2.encoding.sentencepiece_file import load_processor, no_dummy_prefix, sentencepiece_file
from colossal_llama2.encoding.transformers_tokenizer import load_fast
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import read_json

if TYPE_CHECKING:
    import numpy as np
    from sentencepiece import SentencePieceProcessor

    from colossal_llama2.encoding.encoder import TokenIds
    from colossal_llama2.encoding.text_bytes import TextBytes


class SentencePieceEncoder:
    """An `Encoder` with only SentencePiece, without transformers. It loads in milliseconds, and pickles as its path.

    `vocab_size` is the number of SentencePiece pieces; tokens that transformers adds beyond them are not counted.
    `content` is the serialized tokenizer.model.
    """

    name = "SentencePiece"
    bos_text = "<s>"
    eos_text = "</s>"
    has_dummy_prefix = True
    other_texts = "in folders of init_tokenizer.py only texts that begin with spaces differ, in other folders more may"
    files: tuple[str, ...] = TOKENIZER_FILES

    def __init__(self, tokenizer_dir: str | Path, part_characters: int = PART_CHARACTERS):
        """
        Args:
            tokenizer_dir: a folder with tokenizer.model.
            part_characters: a longer text is encoded in parts of this many characters.

        Raises:
            UserError: the folder or the file is missing, is not a SentencePiece model, or has no <s> or no </s>.
        """
        self._tokenizer_dir, self._part_characters = tokenizer_dir, part_characters
        path = sentencepiece_file(tokenizer_dir)
        self.content = path.read_bytes()
        self._processor = _shared_processor(self.content, path)
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        self.vocab_size: int = self._processor.get_piece_size()
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f"{path} has no <s> or no </s>, which mark the beginning and the end of documents; "
                "give a tokenizer with both, such as LLaMA-2's"
            )

    @classmethod
    def is_in(cls, folder: str | Path) -> bool:
        """Whether the folder holds tokenizer.model, and in no format of other tokenizers."""
        path = Path(folder, MODEL_FILE)
        return path.exists() and not is_tiktoken(path) and not is_gguf(path)

    @classmethod
    def fingerprint_of(cls, folder: str | Path) -> str:
        """SHA-256 of tokenizer.model in hexadecimal."""
        return hashlib.sha256(sentencepiece_file(folder).read_bytes()).hexdigest()

    @classmethod
    def puts_prefix_after_marks(cls, folder: str | Path) -> bool:
        """Whether transformers puts "▁" before a text that follows a mark: "</s>Hi" becomes </s> ▁Hi, not </s> Hi.

        tokenizer.json, which AutoTokenizer loads, decides: the Prepend normalizer of the one that LLaMA-2 ships does
        so. A folder without one is converted by `legacy` in its config, which is true if it is missing.
        """
        path = Path(folder, FAST_FILE)
        if path.is_file():
            processor = load_processor(sentencepiece_file(folder).read_bytes(), path)
            mark = processor.id_to_piece(processor.eos_id())
            return load_fast(path).encode(f"{mark}a", add_special_tokens=False).tokens[1].startswith("▁")
        config = Path(folder, CONFIG_FILE)
        return not config.is_file() or read_json(config).get("legacy") is not False

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokenizer.model in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pieces(self) -> list[str]:
        """All pieces by id. From a parsed ModelProto, they take three times as long."""
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    @property
    def scores(self) -> list[float]:
        """The score of each piece, by id."""
        return self._processor.get_score(list(range(self.vocab_size)))

    def is_long(self, text: str) -> bool:
        """Whether a text is encoded in parts."""
        return len(text) > self._part_characters

    @cached_property
    def _continuation_processor(self) -> "SentencePieceProcessor":
        """A second processor, because the leading "▁" before a text is a property of the loaded model."""
        return _shared_processor(self.content + no_dummy_prefix(), sentencepiece_file(self._tokenizer_dir))

    def problem_of(self, text: str) -> str | None:
        """None: characters that the model lacks become bytes or <unk>."""
        return None

    def encode(self, texts: Sequence[str], *, dummy_prefix: bool = True) -> list[list[int]]:
        """Token ids of each text, without <s> and </s>, on one thread.

        Special tokens in a text stay text: "<s>" on a web page is three characters, never id 1. With
        `dummy_prefix=False` a text is encoded as the continuation of an earlier one, without the leading "▁":

            encode(["人工智能"])                      -> [[▁, 人工, 智能]]
            encode(["人工智能"], dummy_prefix=False)  -> [[人工, 智能]]

        A lone surrogate in a text cannot be UTF-8 and raises UnicodeEncodeError. A text that `is_long` is encoded in
        parts (see `safe_cuts`), which bounds the memory that SentencePiece uses beside the ids.
        """
        if max(map(len, texts), default=0) <= self._part_characters:
            return self._encode(texts, dummy_prefix=dummy_prefix)
        others = iter(self._encode([text for text in texts if not self.is_long(text)], dummy_prefix=dummy_prefix))
        return [
            self.encode_long(text, dummy_prefix=dummy_prefix).tolist() if self.is_long(text) else next(others)
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
        return self._safe_cuts.parts_of(text, self._part_characters) if self.is_long(text) else iter([text])

    def _encode(self, texts: Sequence[str], *, dummy_prefix: bool) -> list[list[int]]:
        processor = self._processor if dummy_prefix else self._continuation_processor
        # One thread: much text is encoded by several processes with an encoder each.
        return processor.encode(list(texts), num_threads=1)

    @cached_property
    def _safe_cuts(self) -> SafeCuts:
        return SafeCuts(self.content, self.pieces)

    def decode(self, ids: Iterable[int], *, dummy_prefix: bool = True) -> str:
        """The text of token ids, without <s>, </s> and, with `dummy_prefix`, the leading space that `encode` adds."""
        processor = self._processor if dummy_prefix else self._continuation_processor
        return processor.decode([int(token) for token in ids])

    def bytes_of_tokens(self, text: str, ids: "TokenIds", *, dummy_prefix: bool = True) -> "np.ndarray":
        """(tokens,) int32: how many UTF-8 bytes of `text` each of its tokens stands for; they sum to all of them.

        `ids` is what `encode` returns for the text and the same `dummy_prefix`. See `text_bytes`.
        """
        has_prefix = dummy_prefix and self._adds_prefix
        parts = (
            (part, self._processor if dummy_prefix and number == 0 else self._continuation_processor)
            for number, part in enumerate(self._parts(text))
        )
        return self._text_bytes.of_tokens(text, ids, has_prefix=has_prefix, parts=parts)

    @cached_property
    def _text_bytes(self) -> "TextBytes":
        from colossal_llama2.encoding.text_bytes import TextBytes

        return TextBytes(self.content, self.pieces)

    @cached_property
    def _adds_prefix(self) -> bool:
        """Whether the model puts "▁" before a text, seen on a text that does not begin with a space."""
        return self._processor.id_to_piece(self._processor.encode("a")[0]).startswith("▁")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._tokenizer_dir, self._part_characters)


@lru_cache(maxsize=4)
def _shared_processor(content: bytes, path: Path) -> "SentencePieceProcessor":
    """The processor of a model, which all encoders of this process share: none of them changes it."""
    return load_processor(content, path)
