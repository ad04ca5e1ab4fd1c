"""config.json and generation_config.json in the form that every version of transformers loads and saves.

Mirrors of LLaMA-2 from 2023 hold values that later versions warn about, refuse to save, or read differently: sampling
values without do_sample, pad_token_id -1 for a model without a padding token, generation settings in config.json. The
rules follow transformers 4.51.3 and 5.24 (`GenerationConfig.validate`, `PreTrainedConfig.validate_token_ids`):

    rope          rope_parameters of version 5 becomes rope_theta and rope_scaling, which both versions read.
    token ids     An id outside the vocabulary means that there is no such token, and becomes null. nn.Embedding would
                  read -1 as the last row, and give that row no gradient.
    config.json   Its generation settings move to generation_config.json, where generate() reads them, unless that file
                  already has them.
    do_sample     If it is false, sampling values have no effect and are left out. If it is missing, generate() ignores
                  them too, but generate(do_sample=True) samples with them. So they stay and do_sample becomes true, as
                  in Meta's own later file. A temperature of 0 means greedy decoding.
    the rest      What generate() would refuse or ignore is left out.

Each function returns descriptions of its changes, and leaves everything else as it is.
"""

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from colossal_llama2.model.config_fields import FIELDS, TOKEN_ID_FIELDS, known_ids, opened, with_older_rope
from colossal_llama2.model.model_folder import CONFIG_FILE, GENERATION_CONFIG_FILE, StrPath
from colossal_llama2.model.purpose import PURPOSE_KEY, Purpose, read_purpose
from colossal_llama2.storage.input_files import read_settings
from colossal_llama2.storage.json_input import is_finite, is_whole

# Entries that name code, or the attention implementation of one run.
CODE_KEYS = ("auto_map", "_attn_implementation_internal")

# Generation settings that old versions wrote into config.json, and their defaults.
DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "max_new_tokens": None,
    "min_new_tokens": None,
    "min_p": None,
    "top_h": None,
    "penalty_alpha": None,
}


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_whole, value))


# The values that generate() accepts, besides null.
RANGES: dict[str, Callable[[Any], bool]] = {
    "do_sample": _is_flag,
    "temperature": lambda value: is_finite(value) and value >= 0,
    "top_k": lambda value: is_whole(value) and value >= 0,
    "top_p": lambda value: is_finite(value) and 0 < value <= 1,
    "min_p": lambda value: is_finite(value) and 0 <= value <= 1,
    "top_h": lambda value: is_finite(value) and 0 < value <= 1,
    "typical_p": lambda value: is_finite(value) and 0 < value <= 1,
    "epsilon_cutoff": lambda value: is_finite(value) and 0 <= value < 1,
    "eta_cutoff": lambda value: is_finite(value) and 0 <= value < 1,
    "num_beams": lambda value: is_whole(value) and value >= 1,
    "num_return_sequences": lambda value: is_whole(value) and value >= 1,
    "max_length": lambda value: is_whole(value) and value >= 1,
    "min_length": lambda value: is_whole(value) and value >= 0,
    "max_new_tokens": lambda value: is_whole(value) and value >= 1,
    "min_new_tokens": lambda value: is_whole(value) and value >= 0,
    "repetition_penalty": lambda value: is_finite(value) and value > 0,
    "length_penalty": is_finite,
    "no_repeat_ngram_size": lambda value: is_whole(value) and value >= 0,
    "early_stopping": lambda value: _is_flag(value) or value == "never",
    "use_cache": _is_flag,
    "return_dict_in_generate": _is_flag,
    "remove_invalid_values": _is_flag,
    "suppress_tokens": _are_counts,
    "begin_suppress_tokens": _are_counts,
    "forced_bos_token_id": is_whole,
    "forced_eos_token_id": lambda value: is_whole(value) or _are_counts(value),
    "bad_words_ids": lambda value: isinstance(value, list) and all(map(_are_counts, value)),
    "assistant_ensemble_weight": lambda value: is_finite(value) and 0 < value < 1,
}
# For most settings null means no value; these must have one.
NEVER_NULL = ("do_sample", "early_stopping", "num_beams", "num_return_sequences")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints")
EXTRA_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
# Decoding methods that only some versions have, arguments of generate(), and settings that depend on the machine.
NOT_PORTABLE = (
    "num_beam_groups",
    "diversity_penalty",
    "constraints",
    "force_words_ids",
    "penalty_alpha",
    "dola_layers",
    "cache_implementation",
    "cache_config",
    "return_legacy_cache",
    "compile_config",
    "watermarking_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


class ModelConfigs:
    """Both files of a model folder, made portable.

    Attributes:
        config: what config.json should hold.
        generation: what generation_config.json should hold.
        changes: descriptions of the differences from the folder's own files.
    """

    def __init__(self, folder: StrPath):
        """Raises UserError if one of the files is damaged, or there is no config.json."""
        config = opened(folder).content
        path = Path(folder, GENERATION_CONFIG_FILE)
        own = read_settings(path, allows_mark=True) if path.is_file() else None
        self.config, moved, self.changes = portable_config(config)
        # Without the file, transformers uses the ids of config.json.
        ids = {key: self.config[key] for key in TOKEN_ID_FIELDS if self.config.get(key) is not None}
        content, moves = with_moved_settings(ids if own is None else own, moved)
        self.generation, changes = portable_generation(content, vocab_size=config.get("vocab_size"))
        self.changes += moves + changes

    def set_purpose(self, purpose: Purpose) -> list[str]:
        """Record in config.json what the model is trained for. Returns a description if it was another stage."""
        before = read_purpose(self.config)
        self.config[PURPOSE_KEY] = purpose.as_json()
        if before is None or before.stage == purpose.stage:
            return []
        return [f"{CONFIG_FILE}: {PURPOSE_KEY} was {before.stage}, and is now {purpose.stage}"]

    def add_ends(self, ids: Sequence[int]) -> list[str]:
        """Let generation end at these tokens too. Returns a description of the change, if there is one."""
        own = self.generation.get("eos_token_id")
        known = own if isinstance(own, list) else [] if own is None else [own]
        if set(ids) <= set(known):
            return []
        ends = [*ids, *(end for end in known if end not in ids)]
        self.generation["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        return [
            f"{GENERATION_CONFIG_FILE}: eos_token_id {own} is now {self.generation['eos_token_id']}, to end answers"
        ]

    def exported(self, torch_dtype: str) -> dict[str, dict[str, Any]]:
        """Both files' contents by name, of a LlamaForCausalLM whose weights are stored in `torch_dtype`."""
        # transformers 5 writes "dtype" and prefers it if both are given; 4 reads only "torch_dtype".
        config = {key: value for key, value in self.config.items() if key != "dtype"}
        config.update(architectures=["LlamaForCausalLM"], torch_dtype=torch_dtype)
        return {CONFIG_FILE: config, GENERATION_CONFIG_FILE: self.generation}


def portable_config(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What config.json should hold, what of it belongs in generation_config.json, and what was changed."""
    config, changes = _with_older_names(config)
    found = {key: config[key] for key in DEFAULTS if key in config}
    moved = {key: value for key, value in found.items() if value is not None and value != DEFAULTS[key]}
    kept = {key: value for key, value in config.items() if key not in found and key not in CODE_KEYS}
    ids, changed = _portable_ids(kept, CONFIG_FILE, vocab_size=config.get("vocab_size"))
    changes += changed
    if "auto_map" in config:
        changes.append(f"{CONFIG_FILE}: auto_map is left out, because it names code")
    return {**kept, **ids}, moved, changes


def _with_older_names(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config in the names and forms that transformers 4 and 5 both read, and what was changed."""
    # Null in these fields means the default; transformers would compute with it.
    unset = [name for name, field in FIELDS.items() if field.null_is_default and config.get(name, 0) is None]
    config = {key: value for key, value in config.items() if key not in unset}
    for name in ("torch_dtype", "dtype"):
        if isinstance(config.get(name), str):
            config[name] = config[name].removeprefix("torch.")
    if config.get("model_type") != "llama" or "rope_parameters" not in config:
        return config, []
    older = with_older_rope(config, Path(CONFIG_FILE))
    if config["rope_parameters"] is None:
        return older, []
    older.setdefault("rope_scaling", None)
    return older, [f"{CONFIG_FILE}: rope_parameters is now rope_theta and rope_scaling, which transformers 4 reads too"]


def with_moved_settings(content: dict[str, Any], moved: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """generation_config.json with the settings of config.json that it lacks, and what was changed."""
    new = {key: value for key, value in moved.items() if key not in content}
    old = {key: value for key, value in moved.items() if content.get(key, value) != value}
    changes = [f"{CONFIG_FILE}: {_listed(new)} moved to {GENERATION_CONFIG_FILE}"] if new else []
    if old:
        changes.append(f"{CONFIG_FILE}: {_listed(old)} left out, since generate() reads {GENERATION_CONFIG_FILE}")
    return {**new, **content}, changes


def portable_generation(content: dict[str, Any], *, vocab_size: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """What generation_config.json should hold, and what was changed."""
    ids, changes = _portable_ids(content, GENERATION_CONFIG_FILE, vocab_size=vocab_size)
    kept: dict[str, Any] = {}
    unusable: dict[str, Any] = {}
    for key, value in {**content, **ids}.items():
        allowed = RANGES.get(key)
        # JSON has neither NaN nor infinity.
        is_json = not isinstance(value, float) or math.isfinite(value)
        is_usable = key not in NEVER_NULL if value is None else is_json and (allowed is None or allowed(value))
        (kept if is_usable else unusable)[key] = value
    for rule in (_leave_out_unportable, _normalize_sampling, _normalize_beams, _normalize_outputs):
        unusable.update(rule(kept, changes))
    lost = {key: value for key, value in unusable.items() if value is not None and value != DEFAULTS.get(key)}
    if lost:
        changes.append(f"{GENERATION_CONFIG_FILE}: {_listed(lost)} left out, since generate() refuses or ignores it")
    return kept, changes


def _portable_ids(content: dict[str, Any], name: str, *, vocab_size: int | None) -> tuple[dict[str, Any], list[str]]:
    """The token ids that have to change, null where no token is left."""
    beyond = vocab_size if is_whole(vocab_size) else math.inf
    changed, changes = {}, []
    for key in TOKEN_ID_FIELDS:
        ids = content.get(key)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        tokens = known_ids(listed, beyond) or []
        # Several tokens may end a text, but only one begins it, and only one pads it.
        is_many = isinstance(ids, list) and key == "eos_token_id"
        portable = (tokens if is_many else tokens[0]) if tokens else None
        if portable != ids:
            changed[key] = portable
            reason = "one token is needed" if tokens == listed else "the vocabulary has no such token"
            changes.append(f"{name}: {key} {ids!r:.40} is now {portable}, {reason}")
    return changed, changes


def _removed(content: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: content.pop(key) for key in keys if key in content}


def _leave_out_unportable(content: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    out = _removed(content, NOT_PORTABLE)
    suppressed = set(content.get("suppress_tokens") or ())
    for key in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = content.get(key)
        forced = set(forced) if isinstance(forced, list) else {forced}
        if forced <= suppressed:
            out.update(_removed(content, [key]))
    return out


def _normalize_sampling(content: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    values = [key for key in SAMPLING if content.get(key, DEFAULTS[key]) not in (None, DEFAULTS[key])]
    if content.get("temperature") == 0:
        content["do_sample"] = False
        changes.append(f"{GENERATION_CONFIG_FILE}: temperature 0 is now do_sample false, which has the same meaning")
    if not values or content.get("do_sample") is True:
        return {}
    if "do_sample" in content or content.get("num_beams", 1) > 1:
        # Beam search does not sample without do_sample.
        return _removed(content, values)
    content["do_sample"] = True
    listed = _listed({key: content[key] for key in values})
    changes.append(f"{GENERATION_CONFIG_FILE}: do_sample is now true, as {listed} set up sampling")
    return {}


def _normalize_beams(content: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    beams, samples = content.get("num_beams", 1), content.get("do_sample") is True
    out = _removed(content, BEAMS) if beams == 1 else {}
    most = beams if beams > 1 else math.inf if samples else 1
    if content.get("num_return_sequences", 1) > most:
        out.update(_removed(content, ["num_return_sequences"]))
    return out


def _normalize_outputs(content: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    ignored = [key for key in EXTRA_OUTPUTS if content.get(key) is True]
    return {} if content.get("return_dict_in_generate") is True else _removed(content, ignored)


def _listed(values: dict[str, Any]) -> str:
    return " and ".join(f"{key} {value!r:.40}" for key, value in values.items())


def accepted_generation(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content if the installed transformers accepts it without a warning, else its token ids; and what was changed.

    The rules above should leave nothing for this to find. It is for entries that they do not cover.
    """
    from transformers import GenerationConfig

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            GenerationConfig.from_dict(dict(content)).validate()
        reason = str(caught[0].message) if caught else None
    except Exception as error:  # an entry may replace a method
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return content, []
    ids = {key: content[key] for key in TOKEN_ID_FIELDS if key in content}
    reason = textwrap.shorten(reason, 200)
    return ids, [f"{GENERATION_CONFIG_FILE}: all but the token ids is left out, transformers refuses it ({reason})"]
