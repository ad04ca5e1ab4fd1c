"""Inference on a tiny model: the right prompt in, the right tokens out, and one line for each mistake."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import inference_example
from colossal_llama2.errors import UserError
from colossal_llama2.inference import generation, loading
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.terminal_text import printable
from tests import tiny

PROMPTS = ("the", "  two  spaces, then a trailing one ", tiny.CHINESE, "明月松间照，", "mixed 混合 <b>\nnew line", "")
GREEDY = {"do_sample": False, "temperature": 0.3, "top_k": 50, "top_p": 0.95, "seed": None}
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.95}


@pytest.fixture(scope="module")
def loaded(model_dir):
    return loading.load_model(str(model_dir), "cpu")


@pytest.fixture
def copied_model(model_dir, tmp_path) -> Path:
    """A copy of the tiny model to damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture
def logger_state():
    """The suite's logger as it was before a command set it up."""
    logger = logging.getLogger("colossal_llama2")
    state = (logger.handlers[:], logger.level, logger.propagate)
    logger.handlers = []
    yield logger
    logger.handlers, logger.level, logger.propagate = state


def likeliest_tokens(model_dir, prompt: str, count: int) -> list:
    """Greedy decoding by hand, with plain transformers and a full forward pass per token."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = []
    with torch.no_grad():
        for _ in range(count):
            new.append(int(model(ids).logits[0, -1].argmax()))
            if new[-1] == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return new


def answer_of(stdout: str, prompt: str) -> str:
    head = f"Prompt: {prompt}\nAnswer: "
    assert stdout.startswith(head) and stdout.endswith("\n")
    return stdout[len(head) : -1]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_is_what_plain_transformers_gives(loaded, model_dir, prompt):
    model, tokenizer = loaded
    expected = tokenizer.decode(likeliest_tokens(model_dir, prompt, 12), skip_special_tokens=True)
    assert generation.generate(model, tokenizer, prompt, GenerationSettings(max_new_tokens=12, **GREEDY)) == expected
    assert expected


def test_greedy_ignores_seed_and_sampling_flags(loaded):
    model, tokenizer = loaded
    other = GREEDY | {"temperature": 2.0, "top_k": 1, "top_p": 0.1, "seed": 5}
    answers = {
        generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=12, **flags))
        for flags in (GREEDY, other)
    }
    assert len(answers) == 1


def test_a_seed_makes_sampling_repeatable(loaded):
    model, tokenizer = loaded

    def sample(seed):
        return generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=20, seed=seed, **SAMPLED))

    first = sample(1)
    assert sample(2) != first
    torch.rand(3)
    assert sample(1) == first


def test_sampling_respects_top_k(loaded, model_dir):
    model, tokenizer = loaded
    likeliest = generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=12, **GREEDY))
    narrow = SAMPLED | {"top_k": 1, "seed": 3}
    assert generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=12, **narrow)) == likeliest


@pytest.mark.parametrize("as_list", [False, True])
def test_the_answer_ends_before_an_end_of_text_token(loaded, model_dir, monkeypatch, as_list):
    model, tokenizer = loaded
    new = likeliest_tokens(model_dir, "the", 8)
    end = next(index for index in range(1, 8) if new[index] not in new[:index])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [new[end], 2] if as_list else new[end])
    answer = generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=8, **GREEDY))
    assert answer == tokenizer.decode(new[:end])


def test_leftover_generation_settings_have_no_effect_and_no_warning(model_dir, copied_model, loaded):
    leftovers = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 5.0, "max_length": 3}
    settings = json.loads((copied_model / "generation_config.json").read_text())
    (copied_model / "generation_config.json").write_text(json.dumps(settings | leftovers))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, tokenizer = loading.load_model(str(copied_model), "cpu")
        answer = generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=12, **GREEDY))
    assert answer == generation.generate(*loaded, "the", GenerationSettings(max_new_tokens=12, **GREEDY))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cpu_computes_a_small_model_in_float32(tmp_path, tokenizer_dir, dtype):
    model, _ = loading.load_model(str(tiny.make_model(tmp_path / "m", tokenizer_dir, dtype=dtype)), "cpu")
    assert model.dtype == torch.float32 and not model.training


def test_a_gpu_gets_the_dtype_of_the_checkpoint(tmp_path, tokenizer_dir):
    folder = tiny.make_model(tmp_path / "m", tokenizer_dir, dtype="bfloat16")
    assert loading._read_weights(folder, given="m", precision=None).dtype == torch.bfloat16


def test_the_command_feeds_the_suffix(model_dir, loaded, logger_state, capsys):
    tokenizer = loaded[1]
    with_suffix, without = (
        tokenizer.decode(likeliest_tokens(model_dir, text, 5), skip_special_tokens=True)
        for text in ("你好 world\n\n->\n\n", "你好 world")
    )
    assert with_suffix != without
    inference_example.main(
        [
            "--model_path",
            str(model_dir),
            "--device",
            "cpu",
            "--do_sample",
            "False",
            "--max_new_tokens",
            "5",
            "--input_txt",
            "你好 world",
            "--prompt_style",
            "pretrained",
        ]
    )
    captured = capsys.readouterr()
    assert answer_of(captured.out, "你好 world") == printable(with_suffix)
    assert f"loading {model_dir} onto cpu" in captured.err


def test_the_command_of_the_readme(model_dir, run_forked):
    prompt = "YOUR_PROMPT_OR_QUESTION"
    process = run_forked(
        "inference_example.py",
        "--model_path",
        str(model_dir),
        "--device",
        "cpu",
        "--max_new_tokens",
        "512",
        "--do_sample",
        "True",
        "--temperature",
        "0.3",
        "--top_k",
        "50",
        "--top_p",
        "0.95",
        "--input_txt",
        prompt,
    )
    assert process.returncode == 0, process.stderr
    assert answer_of(process.stdout, prompt)
    # Only log lines: no warning of a library, no bar.
    assert all(" | " in line for line in process.stderr.splitlines()), process.stderr
    assert "\r" not in process.stderr


def test_an_answer_that_does_not_fit_is_shortened_with_a_warning(loaded, logger_state, caplog, monkeypatch):
    model, tokenizer = loaded
    prompt_length = len(tokenizer("the")["input_ids"])
    monkeypatch.setattr(model.config, "max_position_embeddings", prompt_length + 4)
    logger_state.propagate = True
    with caplog.at_level(logging.INFO, logger="colossal_llama2"):
        answer = generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=5, **GREEDY))
        assert len(caplog.records) == 1
        assert "generating at most 4 new tokens, not 5" in caplog.text
        assert answer == generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=4, **GREEDY))
        assert len(caplog.records) == 1


def test_a_prompt_that_does_not_fit_is_refused(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model.config, "max_position_embeddings", len(tokenizer("the")["input_ids"]))
    with pytest.raises(UserError, match="no room for an answer; shorten it"):
        generation.generate(model, tokenizer, "the", GenerationSettings(max_new_tokens=5, **GREEDY))


def test_no_device_means_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading.resolve_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading.resolve_device(None) == torch.device("cuda:0")


@pytest.mark.parametrize(
    "device, gpus, words",
    [
        ("gpu", 0, "cpu, cuda or cuda:N allowed"),
        ("meta", 0, "cpu, cuda or cuda:N allowed"),
        ("cuda:x", 0, "cpu, cuda or cuda:N allowed"),
        ("", 0, "cpu, cuda or cuda:N allowed"),
        ("cuda", 0, "there is no GPU here; use --device cpu"),
        ("cuda:0", 0, "there is no GPU here; use --device cpu"),
        ("cuda:1", 1, "only cuda:0 is here; use"),
        ("cuda:4", 4, "only cuda:0 to cuda:3 are here; use"),
    ],
)
def test_a_device_that_does_not_exist(device, gpus, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=words):
        loading.resolve_device(device)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def nest(folder: Path) -> None:
    shutil.copytree(folder, folder / "modeling")
    remove_config(folder)


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')


def change_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def shrink_vocabulary(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:500].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (remove_config, ["no config.json", "give a Hugging Face LLaMA folder"]),
        (remove_weights, ["no safetensors weights"]),
        (pickle_weights, ["pickled weights", "safetensors"]),
        (nest, ["no config.json", "/modeling"]),
        (cut_weights, ["cannot be read"]),
        (lose_a_weight, ["lacks model.layers.1.mlp.up_proj.weight"]),
        (break_config, ["config.json: is not a JSON object"]),
        (change_width, ["of shape", "its config.json requires (64, 96)"]),
        (remove_tokenizer, ["tokenizer"]),
        (shrink_vocabulary, ["600 tokens", "500 embeddings"]),
    ],
)
def test_a_damaged_model_is_one_line(damage, words, copied_model, logger_state, capsys):
    damage(copied_model)
    line = error_line(["--model_path", str(copied_model), "--device", "cpu"], capsys)
    assert str(copied_model) in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model_path", "/no/such/folder"], ["--model_path /no/such/folder: no such folder; give the folder"]),
        (["--model_path", "no-such-owner/no-such-model"], ["neither a local folder nor", "Hugging Face"]),
        (["--model_path", __file__], ["is a file"]),
        (["--device", "tpu"], ["--device tpu", "cpu, cuda or cuda:N"]),
        (["--input_txt", "broken \udce4"], ["--input_txt", "UTF-8"]),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words, logger_state, capsys, monkeypatch):
    # What a machine without a network gets, immediately and wherever the tests run.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = error_line(["--device", "cpu", *flags], capsys)
    assert all(word in line for word in words), line


def error_line(flags: list, capsys) -> str:
    """The one line, besides log lines, with which the command ends; its exit code must be 2."""
    with pytest.raises(SystemExit) as end:
        inference_example.main(flags)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if " | " not in line]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("inference_example.py: error: ")
    return lines[0]


def test_a_name_on_hugging_face_is_fetched_without_pickles(model_dir, monkeypatch):
    asked = {}

    def fetch(name, *, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(model_dir)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    model, tokenizer = loading.load_model("owner/a-model", "cpu")
    assert asked["name"] == "owner/a-model"
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked["patterns"])
    assert model.config.vocab_size == len(tokenizer)


def test_a_full_disk_while_fetching_is_not_blamed_on_the_name(monkeypatch):
    def fetch(name, *, allow_patterns):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(OSError, match="No space left"):
        loading.load_model("owner/a-model", "cpu")
