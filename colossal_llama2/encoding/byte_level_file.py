"""Read the tokenizer.json of a byte-level BPE, the kind of LLaMA-3 and SmolLM2, and refuse what cannot be extended.

A byte-level BPE turns a text into UTF-8, splits it with its pre-tokenizer, and merges the bytes of each part by a list
of ranked pairs. Its vocabulary spells a byte as one printable character ("Ġ" is a space), as GPT-2's does.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from colossal_llama2.encoding.file_names import FAST_FILE, MODEL_FILE
from colossal_llama2.encoding.library_panics import panics_as_errors
from colossal_llama2.encoding.model_file_format import is_tiktoken
from colossal_llama2.errors import UserError
from colossal_llama2.storage.given_paths import hub_cure
from colossal_llama2.storage.input_files import is_regular
from colossal_llama2.storage.json_input import parse, read_regular, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

MAX_FILE_BYTES = 128 << 20
# LLaMA-3's file has 128,256 tokens and 280,147 merges, so about a million values.
MAX_FILE_VALUES = 32_000_000
# The largest vocabulary of a published model has about 262,000 tokens. Tables are as long as the highest id.
MOST_IDS = 1 << 24
# Steps that only divide a text. Others drop or change characters, or run code.
DIVIDING_STEPS = ("Split", "Digits", "Punctuation", "ByteLevel")


@lru_cache(maxsize=1)
def byte_characters() -> tuple[str, ...]:
    """(256,): the character that spells each byte: itself if it is printable, otherwise one from U+0100 on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return tuple(found[byte] for byte in range(256))


def spelled(text: str) -> str:
    """The characters that spell a text's UTF-8 bytes: spelled(" é") -> "ĠÃ©"."""
    return spelled_bytes(text.encode())


def spelled_bytes(content: bytes) -> str:
    """The characters that spell bytes, which may be a part of a character: spelled_bytes(b"\\xc3") -> "Ã"."""
    return content.decode("latin-1").translate(_from_bytes())


def bytes_of(token: str) -> bytes:
    """The bytes that a token spells. Raises KeyError for a character that spells none."""
    return bytes(map(_to_bytes().__getitem__, token))


@lru_cache(maxsize=1)
def _from_bytes() -> dict[int, str]:
    return dict(enumerate(byte_characters()))


@lru_cache(maxsize=1)
def _to_bytes() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_characters())}


@dataclass(frozen=True)
class ByteLevelModel:
    """The content of a tokenizer.json.

    Attributes:
        path: the file.
        settings: the parsed file, as it is.
        vocabulary: the ids of the tokens that spell bytes. Special and other added tokens are left out, unless they are
            a byte or the result of a merge, which text without them needs too.
        merges: pairs of such tokens, best first.
        added: the ids of added tokens by their text, special or not, in order of id.
        ignore_merges: whether a part of a text that is a token as a whole is not merged (LLaMA-3).
    """

    path: Path
    settings: dict[str, Any]
    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]
    ignore_merges: bool

    @classmethod
    def read(cls, folder: str | Path) -> "ByteLevelModel":
        """The model of a tokenizer's folder.

        Raises:
            UserError: there is no tokenizer.json, it is damaged, or it is not a byte-level BPE whose pre-tokenizer only
                divides the text.
        """
        path = byte_level_file(folder)
        try:
            content = read_regular(path, most_bytes=MAX_FILE_BYTES)
            # `tokenizers` reads neither of these.
            if content.startswith(codecs.BOM_UTF8):
                raise ValueError("it begins with a byte order mark")
            settings = parse(content, most_values=MAX_FILE_VALUES, allows_constants=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); copy it again from the original tokenizer")
        model = settings.get("model") if isinstance(settings, dict) else None
        if not isinstance(model, dict):
            raise UserError(f"{path} describes no tokenizer; copy it again from the original tokenizer")
        _check_kind(path, settings, model)
        added = _added_tokens(path, settings)
        vocabulary = _vocabulary(path, model, added)
        _check_numbers(path, added, model["vocab"])
        merges = _merges(path, model, vocabulary)
        _check_other_parts(path, settings, model)
        added = dict(sorted(added.items(), key=lambda item: item[1]))
        return cls(path, settings, vocabulary, merges, added, bool(model.get("ignore_merges")))

    @cached_property
    def size(self) -> int:
        """One more than the highest id."""
        return 1 + max(*self.vocabulary.values(), *self.added.values(), -1)

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The tokens that spell bytes, by id."""
        return {index: token for token, index in self.vocabulary.items()}

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps of the pre-tokenizer, without nesting. The last one is ByteLevel."""
        return _steps(self.settings["pre_tokenizer"])

    @cached_property
    def missing_bytes(self) -> tuple[int, ...]:
        """Bytes without a token; a text with one cannot be encoded. SmolLM2 lacks 21, such as most controls and F1."""
        return tuple(byte for byte, character in enumerate(byte_characters()) if character not in self.vocabulary)

    @cached_property
    def pre_tokenizer(self) -> "PreTokenizer":
        """What divides a text, and spells its parts as tokens are."""
        return self._without_merges().pre_tokenizer

    def plain_tokenizer(self) -> "Tokenizer":
        """The pre-tokenizer and the merges alone: special tokens that are spelled out in a text stay text."""
        from tokenizers import models

        tokenizer = self._without_merges()
        try:
            # A third of the time that writing and parsing them as JSON takes.
            tokenizer.model = models.BPE(self.vocabulary, self.merges, ignore_merges=self.ignore_merges)
        except Exception as error:  # tokenizers raises plain Exception
            raise _cannot_be_loaded(self.path, error)
        return tokenizer

    def _without_merges(self) -> "Tokenizer":
        # Added tokens, truncation and padding are not part of it.
        settings = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": self.settings["pre_tokenizer"],
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            "model": {"type": "BPE", "vocab": {}, "merges": []},
        }
        return _loaded(self.path, settings)


def file_content(
    vocabulary: dict[str, int],
    merges: Sequence[Sequence[str]],
    special: dict[str, int],
    steps: Sequence[dict[str, Any]],
    *,
    ignore_merges: bool,
    post_processor: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a new tokenizer.json.

    Args:
        vocabulary, merges: of the model, as `ByteLevelModel` has them; the vocabulary may hold the special tokens too.
        special: the ids of the special tokens, in order of id.
        steps: the pre-tokenizer; its last step is ByteLevel.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for text, index in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
        "post_processor": post_processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _loaded(path: Path, settings: dict[str, Any]) -> "Tokenizer":
    import json

    from tokenizers import Tokenizer

    try:
        with panics_as_errors():
            return Tokenizer.from_str(json.dumps(settings))
    except Exception as error:  # tokenizers raises plain Exception
        raise _cannot_be_loaded(path, error)


def _cannot_be_loaded(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be loaded ({error}); copy it again from the original tokenizer")


def byte_level_file(folder: str | Path) -> Path:
    """Path of tokenizer.json in a tokenizer's folder. Raises UserError if the folder or the file is missing."""
    path = Path(folder, FAST_FILE)
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder{hub_cure(str(folder))}; give the folder of a tokenizer")
    if not is_regular(path):
        if is_tiktoken(Path(folder, MODEL_FILE)):
            raise UserError(
                f"{Path(folder, MODEL_FILE)} is in tiktoken's format; convert it to {FAST_FILE} with "
                f"python -m colossal_llama2.tokenizer.convert_tiktoken"
            )
        raise UserError(
            f"{folder} holds no {MODEL_FILE} (SentencePiece, such as LLaMA-2's) and no {FAST_FILE} (byte-level BPE, "
            "such as LLaMA-3's); copy the one that the original tokenizer has"
        )
    return path


def _check_kind(path: Path, settings: dict, model: dict) -> None:
    """Raise UserError unless the file describes a byte-level BPE that keeps every character of a text."""
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    steps = _steps(settings.get("pre_tokenizer"))
    kinds = [_type(step) for step in steps]
    if kind == "BPE" and model.get("byte_fallback") and "ByteLevel" not in kinds:
        raise UserError(
            f"{path} was converted from a SentencePiece model; copy its {MODEL_FILE}, such as LLaMA-2's, beside it"
        )
    if kind != "BPE":
        raise UserError(f"{path} is a {shown(kind)} model; a byte-level BPE, such as LLaMA-3's, is needed")
    normalizer = settings.get("normalizer")
    if normalizer and not _is_empty_sequence(normalizer):
        raise UserError(
            f"{path} has a normalizer ({shown(_type(normalizer))}), which changes the text; "
            "a byte-level BPE without one, such as LLaMA-3's, is needed"
        )
    if "ByteLevel" not in kinds:
        raise UserError(
            f"{path} is not a byte-level BPE: its pre-tokenizer is {shown(kinds or None)}; "
            "one that ends with ByteLevel, such as LLaMA-3's, is needed"
        )
    if kinds.index("ByteLevel") < len(kinds) - 1:
        raise UserError(
            f"{path}: the steps of its pre-tokenizer are {shown(kinds)}; ByteLevel must be the last step, as in "
            "LLaMA-3's, because steps after it would divide a text inside characters"
        )
    for step in steps:
        if _type(step) not in DIVIDING_STEPS or step.get("behavior") == "Removed":
            raise UserError(
                f"{path}: the pre-tokenizer's step {shown(step)} may drop or change text; allowed are "
                f"{', '.join(DIVIDING_STEPS)} that keep every character"
            )
    if steps[-1].get("add_prefix_space", True):
        raise UserError(
            f"{path}: its pre-tokenizer puts a space before every text (add_prefix_space); set it to false, as "
            "LLaMA-3's has it"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"{path}: {name} is {shown(model[name])}; null is needed, as in LLaMA-3's")


def _is_empty_sequence(step: Any) -> bool:
    return _type(step) == "Sequence" and not step.get("normalizers")


def _type(step: Any) -> Any:
    return step.get("type") if isinstance(step, dict) else step


def _steps(step: Any) -> list[dict]:
    """The steps of a pre-tokenizer, with those of nested sequences in their place."""
    if step is None:
        return []
    if _type(step) == "Sequence" and isinstance(step.get("pretokenizers"), list):
        return [inner for part in step["pretokenizers"] for inner in _steps(part)]
    return [step if isinstance(step, dict) else {"type": step}]


def _added_tokens(path: Path, settings: dict) -> dict[str, int]:
    """The added tokens in the order of the file."""
    found: dict[str, int] = {}
    listed = settings.get("added_tokens")
    for entry in [] if listed is None else listed if isinstance(listed, list) else [listed]:
        content, index = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not _is_text(content) or not _is_id(index):
            raise UserError(
                f"{path}: the added token {shown(entry)} needs a content, which is text, and an id below {MOST_IDS:,}; "
                "copy the file again"
            )
        if found.setdefault(content, index) != index:
            raise UserError(f"{path} has two ids for the added token {content!r}: {found[content]} and {index}")
    by_id: dict[int, str] = {}
    for content, index in found.items():
        if by_id.setdefault(index, content) != content:
            raise UserError(f"{path} gives the id {index} to two added tokens, {by_id[index]!r} and {content!r}")
    return found


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string without half a surrogate pair, which is not a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MOST_IDS


def _check_numbers(path: Path, added: dict[str, int], vocabulary: dict[str, int]) -> None:
    """Raise UserError unless `tokenizers` gives the added tokens these ids.

    It ignores the ids of the file: a token of the vocabulary has its id there, and any other one follows the added
    tokens before it, but not before the number of tokens in the vocabulary (`AddedVocabulary::add_tokens`).
    """
    highest = -1
    for content, index in added.items():
        if not content:
            continue
        given = vocabulary.get(content, max(highest + 1, len(vocabulary)))
        if given != index:
            raise UserError(
                f"{path}: the added token {content!r} has the id {index}, but transformers gives it {given}, which "
                f"follows from the {len(vocabulary):,} tokens of the vocabulary and the added tokens before it; add "
                "the token to the vocabulary too, with its id"
            )
        highest = max(highest, index)


def _vocabulary(path: Path, model: dict, added: dict[str, int]) -> dict[str, int]:
    listed = model.get("vocab")
    if not isinstance(listed, dict) or not all(map(_is_id, listed.values())):
        raise UserError(
            f"{path} has no vocabulary of tokens with ids below {MOST_IDS:,}; copy it again from the original tokenizer"
        )
    taken = {index: token for token, index in added.items()}
    for token, index in listed.items():
        if taken.setdefault(index, token) != token:
            raise UserError(f"{path} gives the id {index} to two tokens, {taken[index]!r} and {token!r}")
        if added.get(token, index) != index:
            raise UserError(f"{path} has two ids for the token {token!r}: {index} and {added[token]}")
    spelling = set(byte_characters())
    in_text = spelling | _merged(model) if added.keys() & listed.keys() else set()
    vocabulary = {token: index for token, index in listed.items() if token not in added or token in in_text}
    for token in vocabulary:
        if not token or not spelling.issuperset(token):
            raise UserError(
                f"{path}: the token {token!r} does not spell bytes, and is not an added token; a byte-level BPE, such "
                "as LLaMA-3's, is needed"
            )
    return vocabulary


def _merged(model: dict) -> set[str]:
    """What the merges of a model make, and what they join. Entries that are not merges are refused by `_merges`."""
    listed = model.get("merges")
    found: set[str] = set()
    for entry in listed if isinstance(listed, list) else []:
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if isinstance(pair, list) and all(isinstance(part, str) for part in pair):
            found.update(pair, ["".join(pair)])
    return found


def _merges(path: Path, model: dict, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of a model, which are written as "a b" or as ["a", "b"]."""
    found = []
    listed = model.get("merges")
    listed = listed if isinstance(listed, list) else []
    for rank, entry in enumerate(listed):
        try:
            left, right = entry.split(" ") if isinstance(entry, str) else entry
            is_merge = left in vocabulary and right in vocabulary and left + right in vocabulary
        except (TypeError, ValueError):
            is_merge = False
        if not is_merge:
            raise UserError(f"{path}: the merge {shown(entry)} at rank {rank} does not join two tokens to a third")
        if type(entry) is not type(listed[0]):
            raise UserError(
                f"{path}: the merge {shown(entry)} at rank {rank} is not written as the first one, {shown(listed[0])}; "
                "copy it again from the original tokenizer"
            )
        found.append((left, right))
    if not found:
        raise UserError(f"{path} has no merges; copy it again from the original tokenizer")
    return found


def _check_other_parts(path: Path, settings: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise UserError unless `tokenizers` reads the rest of the file. Reading vocabulary and merges takes it a second.

    Otherwise data would be prepared with a file that transformers refuses when training begins.
    """
    tokens = settings.get("added_tokens") or []
    # Without a vocabulary, added tokens are numbered from 0.
    added = [{**token, "id": number} for number, token in enumerate(tokens)]
    _loaded(path, {**settings, "added_tokens": added, "model": {**model, "vocab": {}, "merges": []}})
