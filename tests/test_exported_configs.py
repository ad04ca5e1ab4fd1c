"""config.json and generation_config.json of saved models, from what old mirrors ship."""

import json
import math
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from colossal_llama2.errors import UserError
from colossal_llama2.model import exported_configs
from colossal_llama2.model.exported_configs import (
    ModelConfigs,
    portable_config,
    portable_generation,
    with_moved_settings,
)
from colossal_llama2.train.checkpointing.small_files import json_bytes, model_files
from tests import tiny

IDS = {"bos_token_id": 1, "eos_token_id": 2}
# A folder's generation_config.json, and the exported one.
GENERATION = {
    "a mirror of 2023": ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
    "as Meta has it today": ({"do_sample": True, "top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
    "greedy, explicitly": ({"do_sample": False, "temperature": 0.9, "top_k": 10}, {"do_sample": False}),
    "defaults": ({"temperature": 1.0, "top_p": 1.0, "top_k": 50}, {"temperature": 1.0, "top_p": 1.0, "top_k": 50}),
    "temperature 0": ({"temperature": 0.0, "top_p": 0.6}, {"do_sample": False}),
    "sampling without a temperature": ({"do_sample": True, "temperature": 0}, {"do_sample": False}),
    "not to be sampled with": ({"do_sample": True, "top_p": 1.5, "temperature": "hot"}, {"do_sample": True}),
    "no padding token": ({"pad_token_id": -1}, {"pad_token_id": None}),
    "padding beyond the vocabulary": ({"pad_token_id": 600}, {"pad_token_id": None}),
    "two ends, one unknown": ({"eos_token_id": [2, 700]}, {"eos_token_id": [2]}),
    "a padding token in a list in a list": ({"pad_token_id": [[0]]}, {"pad_token_id": None}),
    "two padding tokens": ({"pad_token_id": [0, 2]}, {"pad_token_id": 0}),
    "beams alone": ({"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, {"num_beams": 1}),
    "beams": ({"num_beams": 4, "early_stopping": True, "top_p": 0.5}, {"num_beams": 4, "early_stopping": True}),
    "more answers than beams": ({"num_beams": 2, "num_return_sequences": 3}, {"num_beams": 2}),
    "several samples": ({"do_sample": True, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 3}),
    "nothing new": ({"max_new_tokens": 0, "max_length": 4096}, {"max_length": 4096}),
    "another version's": ({"cache_implementation": "paged", "penalty_alpha": 0.6, "compile_config": {}}, {}),
    "arguments of generate()": ({"streamer": True, "logits_processor": []}, {}),
    "outputs that are not returned": ({"output_scores": True}, {}),
    "forced and suppressed": ({"forced_eos_token_id": 2, "suppress_tokens": [2]}, {"suppress_tokens": [2]}),
    "null": ({"top_k": None, "num_beams": None, "do_sample": True}, {"top_k": None, "do_sample": True}),
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 700),
    st.floats(-1, 2),
    st.sampled_from([math.nan, math.inf, "x", "never"]),
    st.lists(st.integers(-1, 3), max_size=2),
    st.lists(st.lists(st.integers(0, 3)), max_size=1),
    st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=1),
)
KEYS = st.sampled_from(
    [
        *exported_configs.DEFAULTS,
        *exported_configs.RANGES,
        *exported_configs.NOT_PORTABLE,
        *exported_configs.EXTRA_OUTPUTS,
        *exported_configs.TOKEN_ID_FIELDS,
        "guidance_scale",
        "stop_strings",
    ]
)


def is_accepted(content) -> bool:
    """Whether transformers accepts it without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            GenerationConfig.from_dict(dict(content)).validate()
        except (ValueError, TypeError, Warning):
            return False
    return True


@pytest.mark.parametrize("name", GENERATION)
def test_generation_settings_are_valid_and_mean_the_same(name):
    given_content, expected = GENERATION[name]
    content, changes = portable_generation({**IDS, **given_content}, vocab_size=600)
    assert content == {**IDS, **expected} and is_accepted(content)
    # Null for a setting that needs a value means the default; nothing else changes silently.
    meaningful = {key: value for key, value in given_content.items() if value is not None or key in content}
    assert bool(changes) == (content != {**IDS, **meaningful})
    assert portable_generation(content, vocab_size=600) == (content, [])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_no_generation_settings_fail_at_a_save(content):
    portable, _ = portable_generation(content, vocab_size=600)
    assert is_accepted(portable) and json.loads(json_bytes(portable, "it")) == portable


def test_unknown_settings_leave_only_the_token_ids():
    content, changes = exported_configs.accepted_generation({**IDS, "validate": 1, "temperature": 0.5})
    assert content == IDS and "transformers refuses it" in changes[0]
    assert exported_configs.accepted_generation({**IDS, "top_k": 50}) == ({**IDS, "top_k": 50}, [])


def test_generation_settings_leave_config_json():
    config = {
        "vocab_size": 600,
        "pad_token_id": -1,
        "temperature": 0.5,
        "top_k": 50,
        "max_length": 99,
        "hidden_size": 4,
    }
    kept, moved, changes = portable_config({**config, "auto_map": {"AutoModel": "x.py"}})
    assert kept == {"vocab_size": 600, "pad_token_id": None, "hidden_size": 4}
    assert moved == {"temperature": 0.5, "max_length": 99}
    assert [change.split(":")[1].split()[0] for change in changes] == ["pad_token_id", "auto_map"]
    own = {"temperature": 0.7, "top_p": 0.5}
    content, changes = with_moved_settings(own, moved)
    assert content == {**own, "max_length": 99}
    assert "max_length 99 moved" in changes[0] and "temperature 0.5 left out" in changes[1]
    assert with_moved_settings(own, {"top_p": 0.5}) == (own, [])


def old_mirror(model_dir, folder, *, generation=None, **config):
    """A folder with only configurations, those of `model_dir` with these changes."""
    folder.mkdir()
    content = json.loads((model_dir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("generation", [None, {**IDS, "top_p": 0.6}, {**IDS, "do_sample": True, "temperature": 0.7}])
def test_an_exported_folder_loads_in_transformers_without_a_warning(generation, model_dir, tmp_path):
    folder = old_mirror(
        model_dir, tmp_path / "m", generation=generation, pad_token_id=-1, temperature=0.9, top_k=50, dtype="float16"
    )
    files = model_files(str(folder), str(model_dir), "bf16", stage="pretrain")
    export = tmp_path / "export"
    AutoModelForCausalLM.from_pretrained(model_dir).bfloat16().save_pretrained(export)
    for name, content in files.items():
        (export / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForCausalLM.from_pretrained(export, torch_dtype="auto")
        model.save_pretrained(tmp_path / "again")
    config = json.loads(files["config.json"])
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config and "temperature" not in config
    assert model.model.embed_tokens.padding_idx is None and model.generation_config.do_sample
    # generation_config.json has precedence over config.json.
    assert model.generation_config.temperature == (0.7 if generation and "temperature" in generation else 0.9)
    assert set(files) > {"config.json", "generation_config.json", "tokenizer.model"}


def test_an_export_of_a_transformers_5_config_has_the_same_positions(model_dir, tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 2048
    folder = old_mirror(
        model_dir,
        tmp_path / "m",
        rope_theta=None,
        rope_scaling=None,
        attention_bias=None,
        dtype="torch.float16",
        rope_parameters={**scaling, "rope_theta": 5e5},
    )
    configs = ModelConfigs(folder)
    assert any("rope_parameters" in change for change in configs.changes)
    for content in (configs.exported("bfloat16")["config.json"], configs.config):
        loaded = LlamaConfig.from_dict(content)
        assert tiny.rope_of(loaded) == (5e5, scaling) and "rope_parameters" not in content
        assert loaded.attention_bias is False and content.get("dtype", "float16") == "float16"


def test_without_generation_settings_the_ids_of_config_json_hold(model_dir, tmp_path):
    configs = ModelConfigs(old_mirror(model_dir, tmp_path / "m", eos_token_id=[2, 5]))
    assert configs.generation == {"bos_token_id": 1, "eos_token_id": [2, 5]}


def test_what_cannot_be_written_is_named(model_dir, tmp_path):
    with pytest.raises(UserError, match="config.json.*is not UTF-8"):
        model_files(str(old_mirror(model_dir, tmp_path / "m", note="\ud800")), str(model_dir), "bf16", stage="pretrain")
    with pytest.raises(UserError, match="the state cannot be saved as JSON"):
        json_bytes({"a": object()}, "the state")
    folder = old_mirror(model_dir, tmp_path / "damaged")
    (folder / "generation_config.json").write_text("[1")
    with pytest.raises(UserError, match="generation_config.json: is not a JSON object"):
        model_files(str(folder), str(model_dir), "bf16", stage="pretrain")
