"""Check the files of a tokenizer's folder, which may come from anyone, before transformers opens them.

transformers passes every entry of tokenizer_config.json to the tokenizer's class as an argument. Some entries name
files, which would be opened anywhere on the disk, so they are refused. So are values of a type that would fail later.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.encoding.file_names import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    FAST_FILE,
    MODEL_CONFIG_FILE,
    MODEL_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TEMPLATE_JSON_FILE,
    TEMPLATES_FOLDER,
)
from colossal_llama2.encoding.model_file_format import is_tiktoken, refuse_gguf
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import is_stray
from colossal_llama2.storage.input_files import MIB, check_regular, is_regular, read_settings
from colossal_llama2.storage.json_input import shown

if TYPE_CHECKING:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

CONFIG_FILES = (CONFIG_FILE, SPECIAL_TOKENS_FILE)
# The files of a LLaMA tokenizer, and their maximum sizes.
NAMED_FILES = {
    MODEL_FILE: 64 * MIB,
    FAST_FILE: 128 * MIB,
    ADDED_TOKENS_FILE: 64 * MIB,
    TEMPLATE_FILE: MIB,
    TEMPLATE_JSON_FILE: MIB,
    **dict.fromkeys(CONFIG_FILES, 64 * MIB),
}
# Other kinds of tokenizers keep their vocabulary in files with other names.
OTHER_PATTERNS = ("*.json", "*.model", "*.jinja", "*.txt")
MOST_TEMPLATES = 100
# Arguments of tokenizer classes that are a path, or an object that JSON cannot represent.
PATH_ENTRIES = ("vocab_file", "tokenizer_file", "merges_file", "spm_file", "gguf_file", "vocabulary_file")
# The file that transformers uses for each of them by default.
OWN_FILES = {"vocab_file": MODEL_FILE, "tokenizer_file": FAST_FILE}
OBJECT_ENTRIES = ("tokenizer_object", "__slow_tokenizer", "slow_tokenizer", "init_inputs")
ADDITIONAL = "additional_special_tokens"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
SWITCHES = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "legacy",
    "spaces_between_special_tokens",
    "split_special_tokens",
    "use_default_system_prompt",
    "from_slow",
)


def check_tokenizer_files(folder: str | Path) -> None:
    """Check the files of a folder that a tokenizer may be read from. Missing files are accepted.

    Raises:
        UserError: one of them is not a regular file, or tokenizer_config.json or special_tokens_map.json holds an
            invalid value or names a file.
    """
    folder = Path(folder)
    refuse_gguf(folder / MODEL_FILE)
    for name, max_bytes in NAMED_FILES.items():
        if os.path.lexists(folder / name):
            check_regular(folder / name, max_bytes=max_bytes, allows_empty=name == TEMPLATE_FILE)
    for path in sorted(path for pattern in OTHER_PATTERNS for path in folder.glob(pattern)):
        if path.exists() and not path.is_file() and not path.is_dir():
            check_regular(path)
    _check_templates(folder / TEMPLATES_FOLDER)
    for name in CONFIG_FILES:
        if is_regular(folder / name):
            _check_settings(read_settings(folder / name), folder / name)


def _check_templates(folder: Path) -> None:
    """The folder is copied into every saved model, so it must hold nothing but templates."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of chat templates; remove it")
    paths = sorted(path for path in folder.iterdir() if not is_stray(path.name))
    if len(paths) > MOST_TEMPLATES:
        raise UserError(
            f"{folder} holds {len(paths):,} chat templates, at most {MOST_TEMPLATES} are allowed; remove some"
        )
    for path in paths:
        if path.suffix != ".jinja":
            raise UserError(f"{path} is not a chat template: only files named *.jinja are allowed here; remove it")
        check_regular(path, max_bytes=MIB, allows_empty=True)


def has_other_chat_template(folder: str | Path, own: str) -> bool:
    """Whether a folder has a chat template other than `own`, in a file or in tokenizer_config.json.

    False if its settings cannot be read: SentencePiece does not need them.
    """
    path = Path(folder, TEMPLATE_FILE)
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace").strip() != own.strip()
    if any(Path(folder, name).exists() for name in (TEMPLATE_JSON_FILE, TEMPLATES_FOLDER)):
        return True
    try:
        return read_settings(Path(folder, CONFIG_FILE)).get("chat_template") not in (None, "", [], {}, own)
    except (UserError, OSError):
        return False


def _check_settings(settings: dict, path: Path) -> None:
    for name in PATH_ENTRIES:
        # Without tokenizer.json transformers drops the entry, which many old folders have.
        is_dropped = name == "tokenizer_file" and not (path.parent / FAST_FILE).is_file()
        if settings.get(name) is not None and not is_dropped and not _is_own_file(name, settings[name], path.parent):
            raise UserError(
                f"{path}: {name} names the file {shown(settings[name])}; only the folder's own files are opened, "
                f"remove the entry"
            )
    for name in OBJECT_ENTRIES:
        if settings.get(name) not in (None, [], {}):
            raise UserError(
                f"{path}: {name} is {shown(settings[name])}, which cannot be set in a file; remove the entry"
            )
    for name, rule in RULES.items():
        problem = rule(settings[name]) if settings.get(name) is not None else None
        if problem:
            raise UserError(f"{path}: {name} is {shown(settings[name])}; {problem}, or null")


def _is_own_file(name: str, value: Any, folder: Path) -> bool:
    """Whether an entry names, without a folder, the file that transformers would use without the entry."""
    return name in OWN_FILES and value == OWN_FILES[name] and is_regular(folder / OWN_FILES[name])


def loading_arguments(folder: str | Path) -> dict[str, Any]:
    """Arguments for a tokenizer's from_pretrained that replace entries of tokenizer_config.json.

    File names become full paths: transformers would look for such a file in the working directory. What transformers 5
    writes as a list of extra_special_tokens is read by version 4 as additional_special_tokens only.

    Args:
        folder: accepted by `check_tokenizer_files`.
    """
    path = Path(folder, CONFIG_FILES[0])
    settings = read_settings(path) if is_regular(path) else {}
    found: dict[str, Any] = {
        name: str(Path(folder, own)) for name, own in OWN_FILES.items() if settings.get(name) == own
    }
    moved = with_additional_tokens(settings)
    if moved is not settings:
        found |= {"extra_special_tokens": {}, ADDITIONAL: moved[ADDITIONAL]}
    return found


def with_additional_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with a list of extra_special_tokens, as transformers 5 writes it, as additional_special_tokens.

    Version 5 reads both, and version 4 only these.
    """
    extra = settings.get("extra_special_tokens")
    if not isinstance(extra, list):
        return settings
    texts = [token["content"] if isinstance(token, dict) else token for token in extra]
    others = {name: value for name, value in settings.items() if name != "extra_special_tokens"}
    return {**others, ADDITIONAL: [*(settings.get(ADDITIONAL) or []), *texts]}


def loader_of(folder: str | Path) -> type["PreTrainedTokenizerBase"] | type["AutoTokenizer"]:
    """The class that loads a folder: AutoTokenizer, unless that finds no class, and tokenizer.json is a byte-level BPE.

    It does not find one that only the folder's own code defines, nor TokenizersBackend, the name of
    PreTrainedTokenizerFast in version 5 of transformers. Without a name it looks into the model's config.json.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    model = Path(folder, MODEL_FILE)
    if not Path(folder, FAST_FILE).is_file() or model.is_file() and not is_tiktoken(model):
        return AutoTokenizer
    paths = [path for name in (CONFIG_FILE, MODEL_CONFIG_FILE) if is_regular(path := Path(folder, name))]
    settings = (read_settings(path, allows_mark=path.name != CONFIG_FILE) for path in paths)
    named = next(filter(None, (one.get("tokenizer_class") for one in settings)), None)
    if not named:
        # The class of the model's kind.
        return AutoTokenizer if Path(folder, MODEL_CONFIG_FILE).is_file() else PreTrainedTokenizerFast
    classes = [tokenizer_class_from_name(name) for name in (named, f"{named}Fast")]
    return AutoTokenizer if any(classes) else PreTrainedTokenizerFast


def _token(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return None if isinstance(content, str) else 'a string, or an object with "content", is allowed'


def _tokens(value: Any) -> str | None:
    is_list = isinstance(value, list) and not any(map(_token, value))
    return None if is_list else "a list of tokens is allowed"


def _extra_tokens(value: Any) -> str | None:
    # By their names in transformers 4, as a list in version 5.
    tokens = list(value.values()) if isinstance(value, dict) else value
    return _tokens(tokens) and "an object or a list of tokens is allowed"


def _templates(value: Any) -> str | None:
    listed = value if isinstance(value, list) else []
    are_named = all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in listed
    )
    is_allowed = isinstance(value, (str, list, dict)) and are_named
    return None if is_allowed else 'a string, or a list of objects with "name" and "template", is allowed'


def _names(value: Any) -> str | None:
    are_names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return None if are_names else "a list of strings is allowed"


def _numbered_tokens(value: Any) -> str | None:
    are_tokens = isinstance(value, dict) and all(
        key.isascii() and key.isdecimal() and len(key) < 10 and isinstance(token, dict) and not _token(token)
        for key, token in value.items()
    )
    return None if are_tokens else "an object of token ids and tokens is allowed"


def _is(kinds: tuple, text: str) -> Callable[[Any], str | None]:
    return lambda value: None if isinstance(value, kinds) else f"{text} is allowed"


def _length(value: Any) -> str | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    return None if is_number else "a positive number is allowed"


def _side(value: Any) -> str | None:
    return None if value in ("left", "right") else "left or right is allowed"


def _sentencepiece_settings(value: Any) -> str | None:
    is_harmless = isinstance(value, dict) and not any(name.startswith("model") for name in value)
    return None if is_harmless else "an object that names no model is allowed"


def _plain_names(value: Any) -> str | None:
    are_plain = isinstance(value, list) and all(
        isinstance(name, str) and Path(name).name == name and "\\" not in name for name in value
    )
    return None if are_plain else "a list of plain file names is allowed"


RULES: dict[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(SPECIAL_TOKENS, _token),
    **dict.fromkeys(SWITCHES, _is((bool,), "true or false")),
    **dict.fromkeys(("padding_side", "truncation_side"), _side),
    ADDITIONAL: _tokens,
    "added_tokens_decoder": _numbered_tokens,
    "auto_map": _is((dict, list), "an object or a list"),
    "chat_template": _templates,
    "extra_special_tokens": _extra_tokens,
    "fast_tokenizer_files": _plain_names,
    "model_input_names": _names,
    "model_max_length": _length,
    "sp_model_kwargs": _sentencepiece_settings,
    "tokenizer_class": _is((str,), "a string"),
}
