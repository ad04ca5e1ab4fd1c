"""Text to token ids and back with a byte-level BPE, the kind of LLaMA-3's and SmolLM2's tokenizers."""

import base64
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.encoding.byte_level_cuts import ByteLevelCuts
from colossal_llama2.encoding.byte_level_file import ByteLevelModel, byte_level_file, bytes_of, spelled_bytes
from colossal_llama2.encoding.file_names import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    COPIED_FILES,
    FAST_FILE,
    MODEL_FILE,
    SPECIAL_TOKENS_FILE,
)
from colossal_llama2.encoding.folder_files import check_tokenizer_files
from colossal_llama2.encoding.model_file_format import is_tiktoken, refuse_gguf
from colossal_llama2.encoding.safe_cuts import PART_CHARACTERS
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.storage.files import read_json
from colossal_llama2.storage.input_files import MIB, check_regular, is_regular
from colossal_llama2.storage.json_input import shown

if TYPE_CHECKING:
    import numpy as np

    from colossal_llama2.encoding.encoder import TokenIds

NO_MARK = -1
# The library holds some hundred bytes for each token of what it encodes at a time.
CHARACTERS_AT_A_TIME = 1 << 20
# UTF-8 has no other bytes.
UTF8_BYTES = {*range(0xC0), *range(0xC2, 0xF5)}
MOST_TIKTOKEN_BYTES = 64 * MIB
PARALLELISM = "TOKENIZERS_PARALLELISM"


class ByteLevelEncoder:
    """An `Encoder` with the `tokenizers` library, without transformers. It pickles as its path.

    bos_token and eos_token of its settings are the marks (see `marks_of`). They may be one token. Without a bos_token,
    bos_id is -1, and documents begin without a mark. `vocab_size` counts special and other added tokens too.
    """

    name = "byte-level BPE"
    files: tuple[str, ...] = (FAST_FILE, CONFIG_FILE, ADDED_TOKENS_FILE, *COPIED_FILES)
    has_dummy_prefix = False
    other_texts = "texts differ that spell out an added token, if it is not special"
    unk_id = NO_MARK

    def __init__(self, tokenizer_dir: str | Path, part_characters: int = PART_CHARACTERS):
        """
        Args:
            tokenizer_dir: a folder with tokenizer.json and tokenizer_config.json.
            part_characters: a longer text is encoded in parts of this many characters.

        Raises:
            UserError: the folder or a file is missing or damaged, it is not a byte-level BPE, or it names no eos_token.
        """
        self._tokenizer_dir, self._part_characters = tokenizer_dir, part_characters
        model = ByteLevelModel.read(tokenizer_dir)
        check_file_beside(model)
        check_settings(tokenizer_dir)
        self.bos_text, self.eos_text = marks_of(tokenizer_dir)
        self.bos_id, self.eos_id = mark_ids(model, self.bos_text, self.eos_text)
        self.vocab_size: int = model.size
        self.fingerprint: str = _digest(model, self.bos_id, self.eos_id)
        self._model = model.plain_tokenizer()
        self._cuts = ByteLevelCuts(model.steps)
        self._bytes = _bytes_by_id(model, {self.bos_id, self.eos_id})
        missing = sorted(UTF8_BYTES.intersection(model.missing_bytes))
        self._missing = re.compile(b"[" + re.escape(bytes(missing)) + b"]") if missing else None

    @classmethod
    def is_in(cls, folder: str | Path) -> bool:
        """Whether the folder holds tokenizer.json."""
        return Path(folder, FAST_FILE).exists()

    @classmethod
    def fingerprint_of(cls, folder: str | Path) -> str:
        """SHA-256 of the vocabulary, the merges, the pre-tokenizer, the added tokens, and the ids of both marks."""
        others = (Path(folder, name) for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE))
        paths = [byte_level_file(folder), *filter(is_regular, others)]
        # A file that has changed is read again.
        return _fingerprint(str(folder), tuple((str(path), path.stat().st_mtime_ns) for path in paths))

    @classmethod
    def puts_prefix_after_marks(cls, folder: str | Path) -> bool:
        """False: nothing is put before a text."""
        return False

    def is_long(self, text: str) -> bool:
        """Whether a text is encoded in parts."""
        return len(text) > self._part_characters

    def problem_of(self, text: str) -> str | None:
        """Why a text cannot be encoded: a byte of it has no token. None if it can."""
        # Also raises the error of a lone surrogate.
        content = text.encode()
        found = self._missing.search(content) if self._missing else None
        if found is None:
            return None
        place = len(content[: found.start()].decode(errors="ignore"))
        return (
            f"the character {ascii(text[place])} (U+{ord(text[place]):04X}) cannot be encoded: the tokenizer has no "
            f"token for its byte {found[0].hex().upper()}"
        )

    def encode(self, texts: Sequence[str], *, dummy_prefix: bool = True) -> list[list[int]]:
        """Token ids of each text, without marks, on one thread. `dummy_prefix` changes nothing.

        Special tokens in a text stay text: "<|eot_id|>" on a web page is several tokens, never LLaMA-3's mark. A lone
        surrogate cannot be UTF-8 and raises UnicodeEncodeError, a ValueError; so does a byte without a token, which the
        library would drop (see `problem_of`).
        """
        for text in texts:
            self._check(text)
        if max(map(len, texts), default=0) <= self._part_characters:
            return self._encode(texts)
        others = iter(self._encode([text for text in texts if not self.is_long(text)]))
        return [self.encode_long(text).tolist() if self.is_long(text) else next(others) for text in texts]

    def encode_long(self, text: str, *, dummy_prefix: bool = True) -> "np.ndarray":
        """(tokens,) int32: the ids that `encode` gives for the text, in a tenth of the memory of a list."""
        import numpy as np

        self._check(text)
        ids = array("i")
        for part in self._cuts.parts_of(text, self._part_characters):
            ids.fromlist(self._encode([part])[0])
        return np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32)

    def _check(self, text: str) -> None:
        problem = self.problem_of(text)
        if problem:
            raise ValueError(problem)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = []
        with _one_thread():
            for batch in _batches(texts):
                encodings = self._model.encode_batch_fast(batch, add_special_tokens=False)
                found += [encoding.ids for encoding in encodings]
        return found

    def decode(self, ids: Iterable[int], *, dummy_prefix: bool = True) -> str:
        """The text of token ids, without marks. Bytes that are no whole character, as at a cut, become U+FFFD."""
        return b"".join(self._bytes[int(token)] for token in ids).decode(errors="replace")

    def bytes_of_tokens(self, text: str, ids: "TokenIds", *, dummy_prefix: bool = True) -> "np.ndarray":
        """(tokens,) int32: how many UTF-8 bytes of `text` each of its tokens stands for; they sum to all of them."""
        import numpy as np

        lengths = self._lengths[np.asarray(ids, np.int64)]
        if lengths.sum() != len(text.encode()):
            raise RunError(f"these are not the tokens of the text {text[:60]!r}: they have {lengths.sum():,} bytes")
        return lengths

    @cached_property
    def _lengths(self) -> "np.ndarray":
        import numpy as np

        return np.array([len(content) for content in self._bytes], np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._tokenizer_dir, self._part_characters)


def marks_of(folder: str | Path) -> tuple[str, str]:
    """The texts of bos_token and eos_token; "" if there is no bos_token.

    Raises:
        UserError: there is no eos_token, or an entry is not a token.
    """
    bos, eos = named_marks(folder)
    if not eos:
        raise UserError(
            f"{Path(folder, CONFIG_FILE)} names no eos_token, which marks the end of documents; copy the file again "
            "from the original tokenizer, or add the entry"
        )
    return bos, eos


def named_marks(folder: str | Path) -> tuple[str, str]:
    """The same, with "" for a missing eos_token too.

    As in transformers: special_tokens_map.json replaces what tokenizer_config.json names, unless the latter has
    added_tokens_decoder; then special_tokens_map.json is ignored.

    Raises:
        UserError: an entry is not a token.
    """
    found: dict[str, str | None] = {}
    for name in (CONFIG_FILE, SPECIAL_TOKENS_FILE):
        path = Path(folder, name)
        settings = read_json(path) if is_regular(path) else {}
        for key in ("bos_token", "eos_token"):
            if key in settings:
                found[key] = _content(settings[key], key, path)
        if "added_tokens_decoder" in settings:
            break
    return found.get("bos_token") or "", found.get("eos_token") or ""


def _content(value: Any, key: str, path: Path) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str) or isinstance(value, dict) and content is None:
        raise UserError(f'{path}: {key} is {shown(value)}; a string, or an object with "content", is allowed, or null')
    return content


def mark_ids(model: ByteLevelModel, bos_text: str, eos_text: str) -> tuple[int, int]:
    """The ids of both marks; -1 for an empty bos_text. Raises UserError for a mark that is no token, or one of text."""
    ids = []
    merged = {left + right for left, right in model.merges}
    for key, text in (("bos_token", bos_text), ("eos_token", eos_text)):
        index = model.added.get(text, model.vocabulary.get(text))
        if text and index is None:
            raise UserError(
                f"{model.path} has no token {text!r}, the {key} of its {CONFIG_FILE} or {SPECIAL_TOKENS_FILE}; copy "
                "the files again from the original tokenizer"
            )
        if text in model.vocabulary and (len(text) == 1 or text in merged):
            raise UserError(
                f"{model.path.parent / CONFIG_FILE}: {key} is {text!r}, a token that occurs in text; give a special "
                f"token, one of added_tokens in {FAST_FILE}"
            )
        ids.append(NO_MARK if index is None else index)
    return ids[0], ids[1]


def changed_marks(source: str | Path, target: str | Path) -> dict[str, int | None]:
    """The ids of the target's marks that are not the source's, by "bos_token_id" and "eos_token_id"; None for no mark.

    Raises:
        UserError: the target's marks are missing or unusable.
    """
    old, new = named_marks(source), marks_of(target)
    if old == new:
        return {}
    ids = [None if index == NO_MARK else index for index in mark_ids(ByteLevelModel.read(target), *new)]
    marks = zip(("bos_token_id", "eos_token_id"), old, new, ids, strict=True)
    return {key: index for key, before, after, index in marks if before != after}


def check_settings(folder: str | Path) -> None:
    """Check the files beside tokenizer.json, which transformers reads when training begins.

    Raises:
        UserError: one of them is invalid, or an entry of tokenizer_config.json makes transformers put a space before
            every text.
    """
    check_tokenizer_files(folder)
    path = Path(folder, CONFIG_FILE)
    if is_regular(path) and read_json(path).get("add_prefix_space"):
        raise UserError(
            f"{path}: add_prefix_space puts a space before every text in transformers; set it to false, as SmolLM2's "
            "has it"
        )


def check_file_beside(model: ByteLevelModel) -> None:
    """Raise UserError if the folder has a tokenizer.model too, in a format for which it is ignored, of other tokens."""
    path = model.path.parent / MODEL_FILE
    refuse_gguf(path)
    if not is_tiktoken(path):
        return
    check_regular(path, max_bytes=MOST_TIKTOKEN_BYTES)
    for line in filter(None, path.read_bytes().splitlines()):
        token, _, rank = line.partition(b" ")
        try:
            index = model.vocabulary.get(spelled_bytes(base64.b64decode(token, validate=True)))
            is_same = index == int(rank)
        except ValueError:
            is_same = False
        if not is_same:
            raise UserError(
                f"{path} and {model.path.name} are of different tokenizers: {ascii(line[:60].decode('latin-1'))} is "
                "only in the first; remove the file that does not belong to the model"
            )


def _digest(model: ByteLevelModel, bos_id: int, eos_id: int) -> str:
    """The hash of what decides the ids, whatever order and layout tokenizer.json has."""
    steps = [{name: value for name, value in sorted(step.items()) if name != "trim_offsets"} for step in model.steps]
    steps[-1].setdefault("use_regex", True)
    content = {
        "vocabulary": sorted(model.vocabulary.items(), key=lambda item: item[1]),
        "merges": model.merges,
        "added": list(model.added.items()),
        "ignore_merges": model.ignore_merges,
        "steps": [sorted(step.items()) for step in steps],
        "marks": [bos_id, eos_id],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@lru_cache(maxsize=8)
def _fingerprint(folder: str, files: tuple[tuple[str, int], ...]) -> str:
    """The fingerprint of a folder. `files` are those that decide it, with their times."""
    model = ByteLevelModel.read(folder)
    return _digest(model, *mark_ids(model, *marks_of(folder)))


def _bytes_by_id(model: ByteLevelModel, marks: set[int]) -> list[bytes]:
    """What each token decodes to, by id: marks, and ids without a token, to nothing."""
    found = [b""] * model.size
    for token, index in model.vocabulary.items():
        found[index] = bytes_of(token)
    for text, index in model.added.items():
        found[index] = text.encode()
    for index in marks - {NO_MARK}:
        found[index] = b""
    return found


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= CHARACTERS_AT_A_TIME:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the library to this thread: much text is encoded by several processes with an encoder each."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        os.environ.pop(PARALLELISM, None)
        if before is not None:
            os.environ[PARALLELISM] = before
