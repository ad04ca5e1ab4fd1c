"""The fields of a LLaMA's config.json: what each may be, checked before transformers sees the file.

transformers accepts nearly anything and fails much later, on one rank or in a save, and it makes an attribute of every
entry, whatever its name. So a model is built from the fields in FIELDS only, which are all that a LLaMA computes with.
Nothing here imports torch.
"""

import os
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.errors import UserError
from colossal_llama2.model.model_folder import CONFIG_FILE, StrPath
from colossal_llama2.plurals import counted
from colossal_llama2.storage.input_files import read_settings
from colossal_llama2.storage.json_input import is_finite, is_whole, shown

if TYPE_CHECKING:
    from transformers import LlamaConfig

# Keys under which a quantized model describes how its weights are packed.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# The entries of transformers' ACT2FN without parameters of their own.
ACTIVATIONS = frozenset(
    "gelu gelu_10 gelu_fast gelu_new gelu_python gelu_pytorch_tanh gelu_accurate laplace leaky_relu linear mish "
    "quick_gelu relu relu2 relu6 sigmoid silu swish tanh".split()
)
DTYPES = ("float16", "bfloat16", "float32", "float64")

# Returns what is wrong with a value, as "... allowed"; None if it is valid.
Rule = Callable[[Any], str | None]


def integer(low: int, high: int) -> Rule:
    """An integer from `low` to `high`."""

    def problem(value: Any) -> str | None:
        return None if is_whole(value) and low <= value <= high else f"an integer from {low:,} to {high:,} is allowed"

    return problem


def number(low: float, high: float, *, above: bool = False) -> Rule:
    """A finite number from `low`, or `above` it, to `high`."""

    def problem(value: Any) -> str | None:
        if is_finite(value) and low <= value <= high and not (above and value == low):
            return None
        return f"a number {'above' if above else 'from'} {low:g} to {high:g} is allowed"

    return problem


def boolean(value: Any) -> str | None:
    """true or false."""
    return None if isinstance(value, bool) else "true or false is allowed"


def one_of(names: Collection[str]) -> Rule:
    """One of some strings."""
    return lambda value: None if isinstance(value, str) and value in names else f"{', '.join(sorted(names))} allowed"


def or_null(rule: Rule) -> Rule:
    """The same, or null."""

    def problem(value: Any) -> str | None:
        return None if value is None else (text := rule(value)) and f"{text}, or null"

    return problem


def token_ids(value: Any) -> str | None:
    """An integer or a list of integers. `known_ids` finds which of them are token ids."""
    listed = value if isinstance(value, list) else [value]
    return None if all(map(is_whole, listed)) else "a token id or a list of token ids is allowed"


def token_id(value: Any) -> str | None:
    """An integer."""
    return None if is_whole(value) else "a token id is allowed"


def dtype_name(value: Any) -> str | None:
    """A dtype of weights, as `torch.float16` or without the module."""
    return one_of(DTYPES)(value.removeprefix("torch.") if isinstance(value, str) else value)


@dataclass(frozen=True)
class Field:
    """One field: the rule for its value, and the default of a LLaMA.

    `null_is_default`: null in the file means the default.
    """

    rule: Rule
    default: Any = None
    null_is_default: bool = False


POSITIONS = integer(1, 10**9)
FIELDS: dict[str, Field] = {
    "vocab_size": Field(integer(1, 2**27), 32000),
    "hidden_size": Field(integer(1, 2**20), 4096),
    "intermediate_size": Field(integer(1, 2**24), 11008),
    "num_hidden_layers": Field(integer(1, 1000), 32),
    "num_attention_heads": Field(integer(1, 2**16), 32),
    "num_key_value_heads": Field(or_null(integer(1, 2**16))),
    "head_dim": Field(or_null(integer(2, 2**16))),
    "hidden_act": Field(one_of(ACTIVATIONS), "silu"),
    "max_position_embeddings": Field(POSITIONS, 2048),
    "initializer_range": Field(number(0, 1000), 0.02),
    "rms_norm_eps": Field(number(0, 1, above=True), 1e-6),
    "rope_theta": Field(number(1, 1e30, above=True), 10000.0, null_is_default=True),
    "attention_bias": Field(boolean, False, null_is_default=True),
    "attention_dropout": Field(number(0, 1), 0.0, null_is_default=True),
    "mlp_bias": Field(boolean, False, null_is_default=True),
    "tie_word_embeddings": Field(boolean, False, null_is_default=True),
    "use_cache": Field(boolean, True, null_is_default=True),
    "pretraining_tp": Field(integer(1, 2**16), 1, null_is_default=True),
    "bos_token_id": Field(or_null(token_ids), 1),
    "eos_token_id": Field(or_null(token_ids), 2),
    "pad_token_id": Field(or_null(token_id)),
    "torch_dtype": Field(or_null(dtype_name)),
}
TOKEN_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")

POSITIVE = number(0, 1e30, above=True)


def factors(value: Any) -> str | None:
    """A factor for each pair of channels."""
    are_numbers = isinstance(value, list) and not any(map(POSITIVE, value))
    return None if are_numbers else "a list of positive numbers is allowed"


# Also an entry beside the fields, but only if the file has it: transformers checks whether it exists.
TRAINED_POSITIONS = "original_max_position_embeddings"
# For each kind of scaling, its parameters: required and optional ones.
ROPE_TYPES: dict[str, tuple[dict[str, Rule], dict[str, Rule]]] = {
    "default": ({}, {}),
    "linear": ({"factor": POSITIVE}, {}),
    "dynamic": ({"factor": POSITIVE}, {TRAINED_POSITIONS: or_null(POSITIONS)}),
    "yarn": (
        {"factor": POSITIVE},
        {
            TRAINED_POSITIONS: POSITIONS,
            **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), or_null(POSITIVE)),
            # 0 counts as not given.
            **dict.fromkeys(("mscale", "mscale_all_dim"), or_null(number(0, 1e30))),
        },
    ),
    "llama3": (
        {
            **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), POSITIVE),
            TRAINED_POSITIONS: POSITIONS,
        },
        {},
    ),
    "longrope": (
        {"short_factor": factors, "long_factor": factors},
        {**dict.fromkeys(("factor", "attention_factor"), POSITIVE), TRAINED_POSITIONS: or_null(POSITIONS)},
    ),
}


class ModelFolder(os.PathLike[str]):
    """A model folder that keeps what it has read of its config.json. It stands for its path wherever one is expected.

    The file is read at the first use of `content` or `fields`, and not again.
    """

    def __init__(self, path: StrPath):
        self._path = os.fspath(path)

    def __fspath__(self) -> str:
        return self._path

    def __str__(self) -> str:
        return self._path

    @property
    def config_file(self) -> Path:
        """The path of config.json."""
        return Path(self._path, CONFIG_FILE)

    @cached_property
    def content(self) -> dict[str, Any]:
        """All entries of config.json, unchecked. Raises UserError if it cannot be read or is not a JSON object."""
        return read_settings(self.config_file, allows_mark=True)

    @cached_property
    def fields(self) -> dict[str, Any]:
        """What `fields_of` returns for config.json. Token ids outside its vocabulary are logged.

        Raises:
            UserError: the file cannot be read, is of another type of model or a quantized one, or a field is wrong.
        """
        path, config = self.config_file, self.content
        if config.get("model_type") != "llama":
            raise UserError(f"{path}: model_type is {shown(config.get('model_type'))}, only 'llama' can be used here")
        check_not_quantized(config, path)
        fields = fields_of(config, path)
        log_unknown_ids(config, fields["vocab_size"], path)
        return fields


def opened(folder: StrPath) -> ModelFolder:
    """The folder itself if it is a ModelFolder, which has perhaps been read; a new one for any other path."""
    return folder if isinstance(folder, ModelFolder) else ModelFolder(folder)


def read_fields(folder: StrPath) -> dict[str, Any]:
    """The checked fields of a folder's config.json. Raises UserError, as `ModelFolder.fields`."""
    return opened(folder).fields


def check_not_quantized(config: dict, path: Path) -> None:
    """Raise a UserError for the config of a quantized model."""
    for key in QUANTIZATION_KEYS:
        if config.get(key) is not None:
            raise UserError(
                f"{path}: has {key}, so its weights are quantized, which cannot be trained or read here; give the "
                f"original model, or, if its weights are plain float16, bfloat16 or float32, remove {key} from the file"
            )


def fields_of(config: dict, path: Path) -> dict[str, Any]:
    """The FIELDS of a config, checked, with defaults where it has none, and `rope_scaling`.

    Token ids are those of `known_ids`.

    Raises:
        UserError: a field has a value of another type or range, or two fields do not fit together.
    """
    config = with_older_rope(config, path)
    if config.get("torch_dtype") is None:
        config["torch_dtype"] = config.get("dtype")
    found: dict[str, Any] = {}
    for name, field in FIELDS.items():
        found[name] = config.get(name, field.default)
        if found[name] is None and field.null_is_default:
            found[name] = field.default
        problem = field.rule(found[name])
        if problem:
            raise UserError(f"{path}: {name} is {shown(found[name])}; {problem}")
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    found["head_dim"] = found["head_dim"] or found["hidden_size"] // found["num_attention_heads"]
    _check_heads(found, config, path)
    if found["torch_dtype"] is not None:
        found["torch_dtype"] = found["torch_dtype"].removeprefix("torch.")
    for name in TOKEN_ID_FIELDS:
        found[name] = known_ids(found[name], found["vocab_size"])
    if config.get(TRAINED_POSITIONS) is not None:
        found[TRAINED_POSITIONS] = config[TRAINED_POSITIONS]
        problem = POSITIONS(config[TRAINED_POSITIONS])
        if problem:
            raise UserError(f"{path}: {TRAINED_POSITIONS} is {shown(config[TRAINED_POSITIONS])}; {problem}")
    found["rope_scaling"] = _rope_scaling(config.get("rope_scaling"), found, path)
    return found


def with_older_rope(config: dict, path: Path) -> dict:
    """The config with rope_theta and rope_scaling, as transformers 4 has them, for version 5's rope_parameters.

    Raises:
        UserError: rope_parameters is not an object, or contradicts one of the two.
    """
    config = dict(config)
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return config
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {shown(rope)}; a JSON object is allowed")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    newer = {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaling or None}
    newer["partial_rotary_factor"] = rope.get("partial_rotary_factor")
    for name, value in newer.items():
        older = config.get(name)
        if value is None:
            continue
        if older in (None, {}):
            config[name] = value
        elif _rope_type_spelt(older) != _rope_type_spelt(value):
            raise UserError(
                f"{path}: {name} is {shown(older)}, but in rope_parameters {shown(value)}; remove the wrong one"
            )
    # Versions before 4.43 do not know this type.
    if config.get("rope_scaling") in ({"rope_type": "default"}, {}):
        config["rope_scaling"] = None
    return config


def _rope_type_spelt(value: Any) -> Any:
    """A scaling with the newer name of its type; any other value as it is."""
    if isinstance(value, dict) and "type" in value:
        value = {"rope_type": value["type"], **value}
        del value["type"]
    return value


def _check_heads(found: dict[str, Any], config: dict, path: Path) -> None:
    heads, key_value_heads, size = found["num_attention_heads"], found["num_key_value_heads"], found["head_dim"]
    if heads % key_value_heads:
        raise UserError(
            f"{path}: num_key_value_heads is {key_value_heads}, num_attention_heads {heads}; the first must divide "
            f"the second"
        )
    if size < 2 or size % 2:
        raise UserError(
            f"{path}: a head has {size} channels (head_dim, or hidden_size {found['hidden_size']} over "
            f"num_attention_heads {heads}); an even number is needed"
        )
    partial = config.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise UserError(f"{path}: partial_rotary_factor is {shown(partial)}; a LLaMA rotates whole heads, 1.0 allowed")


def check_ids(settings: dict, path: Path) -> None:
    """Raise a UserError unless the token ids of a file's settings are whole numbers, lists of some, or null."""
    for name in TOKEN_ID_FIELDS:
        problem = or_null(token_ids)(settings.get(name))
        if problem:
            raise UserError(f"{path}: {name} is {shown(settings[name])}; {problem}")


def known_ids(value: Any, vocab_size: float) -> Any:
    """The ids that are in the vocabulary, of one token id or a list, in the same form; None if there are none.

    Any other id means that there is no such token, such as -1 in many files. PyTorch would treat a padding id of -1 as
    the last row and not train it; the <pad> of LLaMA-2 in some mirrors is one beyond the last row.
    """
    if isinstance(value, list):
        return [token for token in value if _is_known_id(token, vocab_size)] or None
    return value if _is_known_id(value, vocab_size) else None


def _is_known_id(value: Any, vocab_size: float) -> bool:
    return is_whole(value) and 0 <= value < vocab_size


def log_unknown_ids(settings: dict, vocab_size: int, path: Path) -> None:
    """Log a file's token ids that `known_ids` drops, once per process. -1 means none and is not logged."""
    for name in TOKEN_ID_FIELDS:
        value = settings.get(name)
        listed = value if isinstance(value, list) else [value]
        for token in listed:
            if token not in (None, -1) and known_ids(token, vocab_size) is None:
                _log_once(f"{path}: {name} {shown(token)} is not in the vocabulary of {vocab_size:,}: read as null")


@lru_cache(maxsize=1000)
def _log_once(line: str) -> None:
    logs.get_logger().info("%s", line)


def _rope_scaling(scaling: Any, fields: dict[str, Any], path: Path) -> dict | None:
    if scaling is None or scaling == {}:
        return None
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: rope_scaling is {shown(scaling)}; a JSON object or null is allowed")
    kinds = [scaling[key] for key in ("rope_type", "type") if key in scaling]
    if not kinds or kinds[0] != kinds[-1] or not isinstance(kinds[0], str) or kinds[0] not in ROPE_TYPES:
        raise UserError(
            f"{path}: rope_type of rope_scaling is {', '.join(map(shown, kinds)) or 'not given'}; one of "
            f"{', '.join(ROPE_TYPES)} is allowed"
        )
    needed, optional = ROPE_TYPES[kinds[0]]
    for name, rule in {**needed, **optional}.items():
        if name not in scaling and name in optional:
            continue
        problem = rule(scaling.get(name))
        if problem:
            raise UserError(f"{path}: {name} of rope_scaling is {shown(scaling.get(name))}; {problem}")
    problem = _rope_mismatch(kinds[0], scaling, fields)
    if problem:
        raise UserError(f"{path}: rope_scaling of type {kinds[0]}: {problem}")
    return {**scaling, "rope_type": kinds[0]}


def _rope_mismatch(kind: str, scaling: dict, fields: dict[str, Any]) -> str | None:
    """Why the parameters of a scaling contradict each other or the heads; None if they do not."""
    pairs = fields["head_dim"] // 2
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        return "high_freq_factor must be above low_freq_factor"
    if kind == "dynamic" and pairs == 1:
        return "it needs heads of more than 2 channels"
    if kind != "longrope":
        return None
    if any(len(scaling[name]) != pairs for name in ("short_factor", "long_factor")):
        return f"short_factor and long_factor need {counted(pairs, 'number')} each, half of head_dim"
    if TRAINED_POSITIONS not in fields and not {"factor", "attention_factor"} & scaling.keys():
        return f"it needs factor, or {TRAINED_POSITIONS} beside it"
    return None


def llama_config(folder: StrPath, **settings: Any) -> "LlamaConfig":
    """The transformers LlamaConfig of a folder, made from the checked fields only; `settings` are added to them.

    Raises:
        UserError: as `read_fields`, or transformers cannot make one from the fields.
    """
    from transformers import LlamaConfig

    path = Path(folder, CONFIG_FILE)
    # transformers adds entries to rope_scaling.
    fields = deepcopy(read_fields(folder))
    try:
        config = LlamaConfig(**fields, **settings)
    except Exception as error:  # what transformers raises for an entry that it cannot use is documented nowhere
        raise UserError(f"{path}: no LLaMA can be made from it ({shown(f'{type(error).__name__}: {error}')})")
    config.name_or_path = str(folder)
    return config
