"""Untrusted folders: files that are not opened, fields that no LLaMA has, numbers that are not finite.

All commands that read a model call `check_model`: most cases test it, and one case per command shows that it is called.
"""

import contextlib
import inspect
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colossal_llama2.cli import train_flags
from colossal_llama2.encoding.folder_files import check_tokenizer_files
from colossal_llama2.encoding.parity import load_with_transformers
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.inference import loading
from colossal_llama2.model import config_fields, init_model
from colossal_llama2.model.front_matter import read_front_matter
from colossal_llama2.model.loading import (
    check_model,
    check_weights,
    expected_shapes,
    generation_ids,
    load_llama,
    model_without_weights,
)
from colossal_llama2.model.weight_numbers import check_numbers
from colossal_llama2.storage import unpickling_guard
from colossal_llama2.storage.unpickling_guard import unpickling_refused
from colossal_llama2.train.checks import JobChecks
from colossal_llama2.train.settings.from_flags import resolve
from tests import tiny
from tests.faults import artifacts

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}


@pytest.fixture
def folder(model_dir, tmp_path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def edit(path: Path, **entries) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | entries))


def refusal(call) -> str:
    """The message of the UserError that a call raises, within a second."""
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        call()
    assert time.monotonic() - start < 2
    return str(caught.value)


# Fields of config.json.


@pytest.mark.parametrize(
    "name, values",
    {
        "num_hidden_layers": [10**9, 10**40, 0, -1, True, "2", 2.0, None, [2], 3, 1],
        "hidden_size": [10**9, 0, -64, "64", 63],
        "intermediate_size": [10**9, None, 127],
        "vocab_size": [10**12, -1, "600", 599],
        "num_attention_heads": [0, -4, 3, "4", 10**9],
        "num_key_value_heads": [0, 3, "4", 8, 2],
        "head_dim": [0, 15, 17, "16", 10**9],
        "hidden_act": ["no such", None, 3, ["silu"], "prelu"],
        "max_position_embeddings": [0, -1, 10**12, "4096", None],
        "rms_norm_eps": ["1e-6", 0, -1e-6, None, 2],
        "rope_theta": [0, -1.0, 1, "10000"],
        "initializer_range": ["0.02", -1, None],
        "attention_dropout": [1.5, "0"],
        "attention_bias": ["no", 1, True],
        "mlp_bias": [0, True],
        "tie_word_embeddings": ["yes", 1],
        "torch_dtype": ["float", "torch.int8", "int8", 16, "auto"],
        "bos_token_id": ["x", 1.5, True],
        "eos_token_id": ["x", [[2]], {"a": 2}],
        "pad_token_id": ["x", [0]],
        "model_type": ["gpt2", None, ["llama"]],
        "quantization_config": [{"quant_method": "gptq", "bits": 4}, {}],
        "partial_rotary_factor": [0.5],
        "rope_scaling": [
            "linear",
            [],
            {"type": "no such", "factor": 2.0},
            {"type": "linear"},
            {"type": 3},
            {**LINEAR, "factor": "2"},
            {**LINEAR, "factor": 0},
            {**LINEAR, "type": "dynamic"},
            {**LLAMA3, "high_freq_factor": 1.0},
            {**LLAMA3, "original_max_position_embeddings": 2048.5},
            {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]},
        ],
        "rope_parameters": [{"rope_type": "no such"}, {"rope_type": "default", "rope_theta": "x"}],
    }.items(),
)
def test_fields_that_no_llama_has_are_refused(folder, name, values):
    config = json.loads((folder / "config.json").read_text())
    for name_alone in ("rope_theta", "rope_scaling"):
        if name == "rope_parameters":
            config.pop(name_alone, None)
    for value in values:
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        line = refusal(lambda: check_model(str(folder), "--pretrained"))
        assert str(folder) in line and len(line) < 600, line
        if not isinstance(value, int) or isinstance(value, bool):
            assert name in line or name == "attention_bias" or name == "mlp_bias" or "rope" in line, (value, line)


@pytest.mark.parametrize(
    "entries",
    [
        {"pad_token_id": -1},
        {"pad_token_id": None, "eos_token_id": [2, 3]},
        {"num_key_value_heads": None},
        {"head_dim": None},
        {"rope_scaling": LINEAR},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 32}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default"}},
        {"torch_dtype": None},
        {"rope_theta": 10000},
        {"auto_map": {"AutoModel": "code.Evil"}},
        # Entries that transformers would set as attributes, over its own.
        {"to_dict": 1, "return_dict": False, "pruned_heads": "x", "id2label": [], "torchscript": "x"},
        {"configuration_files": ["../config.4.0.0.json"]},
        # Null and missing fields.
        dict.fromkeys(
            (
                "rope_theta",
                "attention_bias",
                "mlp_bias",
                "use_cache",
                "pretraining_tp",
                "tie_word_embeddings",
                "attention_dropout",
                "rope_parameters",
            )
        ),
        {"rope_scaling": {}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "mscale": 0, "mscale_all_dim": 0}},
        {"torch_dtype": "torch.float16"},
        # As in mirrors of LLaMA-2: the padding token is one beyond the last row.
        {"pad_token_id": 600},
        {"pad_token_id": -2, "bos_token_id": 10**30, "eos_token_id": [2, 600]},
    ],
)
def test_fields_that_a_llama_may_have_are_accepted(folder, entries):
    edit(folder / "config.json", **entries)
    check_model(str(folder), "--pretrained")
    model = load_llama(str(folder), precision="fp32", attention="sdpa")
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    # With -1 PyTorch would leave the last row untrained.
    assert model.model.embed_tokens.padding_idx is None
    assert model.config.to_dict()["num_key_value_heads"] == 4


def test_names_of_transformers_5_mean_the_same(folder):
    edit(folder / "config.json", torch_dtype=None, dtype="bfloat16", rope_parameters={**LLAMA3, "rope_theta": 5e5})
    config = json.loads((folder / "config.json").read_text())
    for name in ("torch_dtype", "rope_theta", "rope_scaling"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    made = config_fields.llama_config(folder)
    assert tiny.rope_of(made) == (5e5, LLAMA3) and made.torch_dtype == torch.bfloat16


def test_a_model_that_the_installed_transformers_saved_is_read(folder, tmp_path):
    """Other tests have a config.json with the names of transformers 4, whatever is installed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    edit(folder / "config.json", rope_scaling=LLAMA3, rope_theta=5e5)
    saved = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    saved.save_pretrained(tmp_path / "saved")
    check_model(str(tmp_path / "saved"), "--pretrained")
    loaded = load_llama(str(tmp_path / "saved"), precision="fp32", attention="sdpa")
    ids = torch.arange(2000)[None] % 600
    assert tiny.rope_of(loaded.config) == (5e5, LLAMA3) and loaded.dtype == torch.float32
    assert torch.equal(loaded(input_ids=ids).logits, saved(input_ids=ids).logits)


def test_a_config_that_was_read_is_not_read_again(folder):
    edit(folder / "config.json", rope_scaling=LINEAR)
    read = config_fields.ModelFolder(folder)
    check_model(read, "--pretrained")
    before = json.dumps(read.fields)
    edit(folder / "config.json", vocab_size=-1)
    assert load_llama(read, precision="fp32", attention="sdpa").config.vocab_size == 600
    assert json.dumps(read.fields) == before
    assert "vocab_size is -1" in refusal(lambda: check_model(str(folder), "--pretrained"))


def test_ids_outside_the_vocabulary_are_null_and_logged_once(folder, caplog):
    edit(folder / "config.json", pad_token_id=600, eos_token_id=[2, 633], bos_token_id=-1)
    edit(folder / "generation_config.json", pad_token_id=600, eos_token_id=633)
    with caplog.at_level("INFO", "colossal_llama2"):
        for _ in range(2):
            check_model(str(folder), "--pretrained")
            fields = config_fields.read_fields(folder)
            ids = generation_ids(folder, fields)
    expected = {"pad_token_id": None, "eos_token_id": [2], "bos_token_id": None}
    assert {name: fields[name] for name in expected} == expected
    # generation_config.json has no valid end id, so that of config.json is used.
    assert ids["eos_token_id"] == [2] and ids["pad_token_id"] is None
    lines = [line.split(": ", 1)[1] for line in caplog.messages if "vocabulary of 600" in line]
    assert sorted(line.split()[0] for line in lines) == ["eos_token_id"] * 2 + ["pad_token_id"] * 2
    loading.load_model(str(folder), "cpu")


def test_a_byte_order_mark_is_accepted_where_only_we_read(folder):
    mark = b"\xef\xbb\xbf"
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_bytes(mark + (folder / name).read_bytes())
    check_model(str(folder), "--pretrained")
    load_llama(str(folder), precision="fp32", attention="sdpa")
    if tiny.has_slow_tokenizer():
        loading.load_model(str(folder), "cpu")
    else:
        # transformers 5 reads config.json for a tokenizer too.
        assert "config.json' is not a valid JSON file" in refusal(lambda: load_tokenizer(folder))
    (folder / "tokenizer_config.json").write_bytes(mark + (folder / "tokenizer_config.json").read_bytes())
    assert "byte order mark" in refusal(lambda: load_tokenizer(folder))


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
        ({"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 4.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        # As in Gemma 3.
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_type"),
    ],
)
def test_contradicting_rope_parameters_are_refused(folder, entries, words):
    edit(folder / "config.json", **{"rope_theta": None, "rope_scaling": None, **entries})
    line = refusal(lambda: check_model(str(folder), "--pretrained"))
    assert words in line and ("rope_parameters" in line or entries.keys() == {"rope_parameters"})


def test_rope_parameters_beside_the_older_names(folder):
    older = {"rope_theta": None, "rope_scaling": None}
    edit(folder / "config.json", **older, rope_parameters={**LLAMA3, "rope_theta": 5e5})
    fields = config_fields.read_fields(folder)
    assert fields["rope_theta"] == 5e5 and fields["rope_scaling"] == LLAMA3
    same = {"type" if name == "rope_type" else name: value for name, value in LLAMA3.items()}
    edit(folder / "config.json", rope_theta=5e5, rope_scaling=same)
    fields = config_fields.read_fields(folder)
    assert fields["rope_theta"] == 5e5 and fields["rope_scaling"]["rope_type"] == "llama3"


def test_a_layer_with_a_number_that_no_layer_has(folder):
    weights = load_file(folder / "model.safetensors")
    for number in ("9" * 5000, "٣"):
        added = {f"model.layers.{number}.x": torch.zeros(1)}
        save_file(weights | added, folder / "model.safetensors", metadata={"format": "pt"})
        assert "unknown weight" in refusal(lambda: check_weights(str(folder)))


def test_defaults_and_activations_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.activations import ACT2FN

    defaults = {name: one.default for name, one in inspect.signature(LlamaConfig.__init__).parameters.items()}
    if "rope_parameters" in defaults:
        # transformers 5 has one field for both, and lists those of all models too.
        defaults = {name: default for name, default in defaults.items() if name in LlamaConfig.__annotations__}
        del defaults["rope_parameters"]
        defaults["rope_theta"], defaults["rope_scaling"] = tiny.rope_of(LlamaConfig())
    ours = {name: field.default for name, field in config_fields.FIELDS.items() if name != "torch_dtype"}
    assert ours == {name: defaults[name] for name in ours}
    assert set(defaults) - set(ours) - {"self", "kwargs"} == {"rope_scaling"}
    assert config_fields.ACTIVATIONS <= set(ACT2FN)
    assert not any(list(ACT2FN[name].parameters()) for name in config_fields.ACTIVATIONS)


@pytest.mark.parametrize(
    "entries", [{}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 2, "head_dim": 8}]
)
@pytest.mark.parametrize("tied", [True, False])
def test_expected_weights_are_those_of_transformers(folder, entries, tied):
    edit(folder / "config.json", **entries, tie_word_embeddings=tied)
    fields = config_fields.read_fields(folder)
    state = {name: tuple(tensor.shape) for name, tensor in model_without_weights(str(folder)).state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    assert dict(expected_shapes(fields)) == state


@pytest.mark.parametrize(
    "content, word",
    [
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "twice"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[]", "not a JSON object"),
        (b"", "empty"),
        (None, "at most"),
    ],
)
def test_config_files_without_settings(folder, content, word):
    (folder / "config.json").write_bytes(content or b"{")
    if content is None:
        os.truncate(folder / "config.json", 2**30)
    if content == b"":
        os.truncate(folder / "config.json", 0)
    assert word in refusal(lambda: check_model(str(folder), "--pretrained"))


def test_packed_weights_and_doubled_ones_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    packed = weights | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    assert "stored as I8" in refusal(lambda: check_weights(str(folder)))
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors", metadata={"format": "pt"})
    save_file({"lm_head.weight": weights["lm_head.weight"] + 1}, folder / "b.safetensors", metadata={"format": "pt"})
    names = dict.fromkeys(weights, "a.safetensors")
    edit(folder / "model.safetensors.index.json", weight_map=names)
    check_weights(str(folder))
    edit(folder / "model.safetensors.index.json", weight_map={**names, "lm_head.weight": "b.safetensors"})
    assert "both hold lm_head.weight" in refusal(lambda: check_weights(str(folder)))


# Files.


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "nowhere"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_only_regular_files_of_a_model_are_opened(folder, name, kind):
    replace(folder / name, kind)
    assert name in refusal(lambda: check_model(str(folder), "--pretrained"))


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "nowhere"])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_only_regular_files_of_a_tokenizer_are_opened(folder, name, kind):
    replace(folder / name, kind)
    for call in (lambda: check_tokenizer_files(folder), lambda: load_tokenizer(folder)):
        assert name in refusal(call)


def replace(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.parent / "nowhere")


def test_links_to_regular_files_are_followed(folder):
    (folder / "blobs").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "blobs" / path.name)
        path.symlink_to(Path("blobs", path.name))
    check_model(str(folder), "--pretrained")
    assert len(load_tokenizer(folder)) == 600


@pytest.mark.parametrize(
    "entries, word",
    [
        ({"vocab_file": "/dev/zero"}, "vocab_file"),
        ({"tokenizer_file": "/etc/hostname"}, "tokenizer_file"),
        ({"sp_model_kwargs": {"model_file": "/dev/zero"}}, "sp_model_kwargs"),
        ({"fast_tokenizer_files": ["../tokenizer.4.0.json"]}, "fast_tokenizer_files"),
        ({"tokenizer_object": {}, "init_inputs": ["/dev/zero"]}, "init_inputs"),
        ({"eos_token": 3}, "eos_token"),
        ({"unk_token": {"content": 3}}, "unk_token"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder"),
        ({"model_max_length": "long"}, "model_max_length"),
        ({"add_bos_token": "yes"}, "add_bos_token"),
        ({"padding_side": "top"}, "padding_side"),
        ({"tokenizer_class": ["LlamaTokenizer"]}, "tokenizer_class"),
        ({"chat_template": 3}, "chat_template"),
    ],
)
def test_settings_that_no_tokenizer_has_are_refused(folder, entries, word):
    edit(folder / "tokenizer_config.json", **entries)
    assert word in refusal(lambda: load_tokenizer(folder))


def test_templates_lead_nowhere_else(folder):
    (folder / "additional_chat_templates").symlink_to("/")
    assert "additional_chat_templates" in refusal(lambda: check_tokenizer_files(folder))
    (folder / "additional_chat_templates").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    for name in ("chat_template.jinja", "additional_chat_templates/.DS_Store", "additional_chat_templates/none.jinja"):
        (folder / name).touch()
    check_tokenizer_files(folder)
    (folder / "additional_chat_templates" / "tool.txt").write_text("x")
    assert "tool.txt is not a chat template" in refusal(lambda: check_tokenizer_files(folder))
    (folder / "additional_chat_templates" / "tool.txt").unlink()
    for number in range(99):
        (folder / "additional_chat_templates" / f"{number}.jinja").touch()
    assert "101 chat templates, at most 100" in refusal(lambda: check_tokenizer_files(folder))
    for path in (folder / "additional_chat_templates").glob("*.jinja"):
        path.unlink()
    (folder / "chat_template.jinja").unlink()
    # Files of /proc report a size of 0, and some never end.
    (folder / "chat_template.jinja").symlink_to("/proc/kmsg")
    assert "is empty" in refusal(lambda: check_tokenizer_files(folder))


def test_settings_of_real_tokenizers_are_accepted(folder, tmp_path, monkeypatch):
    # LLaMA-2's own model_max_length, and names of the folder's own files.
    entries = {"model_max_length": int(1e30), "vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    edit(folder / "tokenizer_config.json", **entries)
    # transformers alone would open these.
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 600 and tokenizer.model_max_length == int(1e30)
    assert len(load_with_transformers(folder, use_fast=False)) == 600
    (folder / "tokenizer.model").unlink()
    assert "vocab_file" in refusal(lambda: load_tokenizer(folder))


# Adapters, and files that run code.


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"])
def test_an_adapter_is_refused_by_every_command(folder, tokenizer_dir, tmp_path, name):
    (folder / name).write_text("{}")
    train = train_flags.train_parser().parse_args(["--pretrained", str(folder), "--dataset", str(tmp_path)])
    calls = [
        lambda: check_model(str(folder), "--pretrained"),
        lambda: resolve(train),
        lambda: load_llama(str(folder), precision="fp32", attention="sdpa"),
        lambda: loading.load_model(str(folder), "cpu"),
        lambda: init_model.init_model(init_model.InitModelSettings(folder, tokenizer_dir, tmp_path / "target")),
    ]
    for call in calls:
        line = refusal(call)
        assert name in line and "python -m colossal_llama2.model.merge_lora" in line


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "modeling_llama.py", "x.pt", "README.md"])
def test_pickles_and_code_beside_weights_are_ignored(folder, name):
    os.mkfifo(folder / name)
    check_model(str(folder), "--pretrained")
    load_llama(str(folder), precision="fp32", attention="sdpa")
    loading.load_model(str(folder), "cpu")


def test_nothing_is_unpickled_while_a_model_is_loaded(tmp_path):
    import pickle

    torch.save({"a": 1}, tmp_path / "a.pt")
    payload = artifacts.Payload(tmp_path / "canary")
    (tmp_path / "evil.pt").write_bytes(payload.torchscript)
    calls = {
        "torch.load": lambda: torch.load(tmp_path / "a.pt", weights_only=True),
        "torch.serialization.load": lambda: torch.serialization.load(tmp_path / "a.pt", weights_only=True),
        "torch.jit.load": lambda: torch.jit.load(tmp_path / "evil.pt"),
        "torch._C.import_ir_module": lambda: torch._C.import_ir_module(
            torch._C.CompilationUnit(), str(tmp_path / "evil.pt"), None, {}, False
        ),
        "pickle.loads": lambda: pickle.loads(pickle.dumps(1)),  # noqa: S301
        "pickle.Unpickler": lambda: pickle.Unpickler(open(tmp_path / "a.pt", "rb")),  # noqa: S301, SIM115
    }
    for name, call in calls.items():
        with unpickling_refused(), pytest.raises(RunError, match=name):
            call()
    assert not payload.canary.exists()
    # Afterwards everything is restored, and the payload works.
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"a": 1} and pickle.loads(pickle.dumps(1)) == 1  # noqa: S301
    torch.jit.load(tmp_path / "evil.pt")
    assert payload.canary.exists()


def test_what_is_imported_while_a_model_is_loaded_works_later():
    import pickle

    with unpickling_refused():
        kept, kind = pickle.loads, pickle.Unpickler
    assert kept(pickle.dumps([1])) == [1]

    class Mine(kind):
        """As in multiprocessing and torch.distributed."""

    import io

    assert Mine(io.BytesIO(pickle.dumps(2))).load() == 2  # noqa: S301


def test_what_is_imported_while_a_model_is_loaded_is_guarded(monkeypatch):
    # Instead of torch, whose second import in a process fails.
    monkeypatch.setattr(unpickling_guard, "REFUSED", [("this", "d"), ("no.such.module", "x")])
    monkeypatch.delitem(sys.modules, "this", raising=False)
    original = sys.meta_path[:]
    with unpickling_refused():
        with contextlib.redirect_stdout(None):
            import this
        with pytest.raises(RunError, match="this.d was called"):
            this.d()
    assert isinstance(this.d, dict) and sys.meta_path == original


def test_no_local_folder_asks_the_network(folder, monkeypatch):
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["no-such-owner/no-such--code.Evil", None]})
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "no-such-owner/no-such--code.Evil"})
    (folder / "special_tokens_map.json").unlink()
    load_llama(str(folder), precision="fp32", attention="sdpa")
    loading.load_model(str(folder), "cpu")
    edit(folder / "adapter_config.json", base_model_name_or_path="no-such-owner/no-such", peft_type="LORA")
    refusal(lambda: loading.load_model(str(folder), "cpu"))
    # The second safeguard: without the first one, transformers would still not search for the adapter's base.
    with pytest.MonkeyPatch.context() as without_check:
        for module in ("colossal_llama2.model.model_folder", "colossal_llama2.model.loading"):
            without_check.setattr(f"{module}.check_model_files", lambda folder: None)
        without_check.setattr(loading, "check_model_files", lambda folder: None)
        load_llama(str(folder), precision="fp32", attention="sdpa")
        loading.load_model(str(folder), "cpu")
    assert not tried


def test_checks_before_a_run_import_no_torch(folder, tmp_path, run_script):
    edit(folder / "config.json", num_hidden_layers=10**9)
    code = (
        "import sys\nfrom colossal_llama2.cli import train_flags\n"
        "from colossal_llama2.train.settings.from_flags import resolve\n"
        "try:\n    resolve(train_flags.train_parser().parse_args(sys.argv[1:]))\n"
        "except Exception as error:\n    print(error)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    script = tmp_path / "check.py"
    script.write_text(code)
    process = run_script(
        str(script), "--pretrained", folder, "--dataset", tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert process.returncode == 0, process.stderr
    assert "num_hidden_layers" in process.stdout


# Numbers.


def spoil(folder: Path, name: str, value: float, dtype=torch.float32, count: int = 3) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in load_file(folder / "model.safetensors").items()}
    weights[name].view(-1)[-count:] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "value, stored, held, words",
    [
        (float("nan"), torch.float32, "fp32", "3 NaN of its 8,192 numbers"),
        (float("nan"), torch.bfloat16, "bf16", "3 NaN"),
        (float("inf"), torch.float16, "bf16", "3 infinite"),
        (-float("inf"), torch.bfloat16, None, "3 infinite"),
        (1e5, torch.bfloat16, "fp16", "3 too large for float16"),
        (-7e4, torch.float32, "fp16", "too large for float16"),
        (3.4e38, torch.float32, "bf16", "too large for bfloat16"),
        (1e300, torch.float64, "fp32", "too large for float32"),
        (65504.0, torch.float32, "fp16", None),
        (65519.0, torch.float32, "fp16", None),
        (1e5, torch.bfloat16, "bf16", None),
    ],
)
def test_numbers_are_finite_in_the_requested_format(folder, value, stored, held, words):
    spoil(folder, NAME, value, stored)
    if words is None:
        check_numbers(str(folder), held, cure="use bf16")
        return
    line = refusal(lambda: check_numbers(str(folder), held, cure="use bf16"))
    assert NAME in line and words in line and ("use bf16" in line) == ("too large" in words)


def test_ranks_look_at_all_numbers_between_them(folder):
    spoil(folder, NAME, float("nan"), count=1)
    found = []
    for share in range(3):
        try:
            check_numbers(str(folder), "fp32", cure="", share=share, shares=3)
        except UserError as error:
            found.append((share, str(error)))
    assert [share for share, _ in found] == [2] and "1 NaN of its 8,192 numbers" in found[0][1]


def test_each_host_looks_at_all_numbers(folder, monkeypatch):
    """The folder may be on a disk of each host, where another host's copy is intact."""
    spoil(folder, NAME, float("nan"), count=1)
    hosts = ["a", "b", "a", "b"]
    monkeypatch.setattr(collectives, "gather_values", lambda value: hosts)
    monkeypatch.setattr(collectives, "all_or_none", contextlib.nullcontext)
    found = set()
    for rank in range(4):
        monkeypatch.setattr(collectives, "place", lambda rank=rank: (rank, 4))
        with contextlib.suppress(UserError):
            JobChecks().weights(str(folder), "fp32")
            continue
        found.add(hosts[rank])
    assert found == {"a", "b"}


def test_inference_and_init_model_find_them_too(folder, tokenizer_dir, tmp_path):
    spoil(folder, NAME, float("nan"))
    for call in (
        lambda: loading.load_model(str(folder), "cpu"),
        lambda: init_model.init_model(init_model.InitModelSettings(folder, tokenizer_dir, tmp_path / "target")),
    ):
        line = refusal(call)
        assert NAME in line and "NaN" in line
    assert not (tmp_path / "target").exists()


# A card.


@pytest.mark.parametrize(
    "text",
    [
        "---\na: [\n---\n",
        "---\n: : :\n\t-\n---\n",
        "---\na: 2024-13-45\n---\n",
        "---\n- a\n---\n",
        "---\nno end\n",
        "---\na: !!python/object/apply:os.system ['true']\n---\n",
        "---\na: &a [1]\nb:\n  <<: *a\n---\n",
        "---\n" + "[" * 5000 + "\n---\n",
        "---\n" + "- " * 8000 + "\n---\n",
        "---\nbase_model: [\nx:\n" + "- y\n" * 9000 + "---\n",
    ],
)
def test_a_card_that_is_not_yaml_is_ignored(tmp_path, caplog, text):
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path / "README.md") == {}
    assert "is passed over" in caplog.text


def test_a_card_is_read_or_is_not_there(tmp_path, caplog):
    card = tmp_path / "README.md"
    assert read_front_matter(card) == {}
    card.write_text("no front matter")
    assert read_front_matter(card) == {}
    card.write_text("---\r\nbase_model: a/b\r\n---\r\ntext")
    assert read_front_matter(card) == {"base_model": "a/b"}
    card.write_text("---\nresults:\n" + "- x: {}\n" * 9000 + "base_model:\n- a/b\nlicense: mit\n---\ntext")
    assert read_front_matter(card) == {"base_model": ["a/b"]}
    assert not caplog.text
    card.unlink()
    os.mkfifo(card)
    assert read_front_matter(card) == {} and "FIFO" in caplog.text
