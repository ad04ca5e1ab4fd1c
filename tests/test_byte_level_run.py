"""A byte-level BPE through training, resume, verify and inference: one small model of LLaMA-3's shape."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colossal_llama2.dataset.write.prepare import prepare_pretrain
from colossal_llama2.encoding.registry import fingerprint, load_encoder
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.errors import UserError
from colossal_llama2.inference import generation, loading
from colossal_llama2.inference.prompts import text_ids
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.train import verify
from colossal_llama2.train.run_folder import checkpoint_files
from tests import launching, tiny
from tests.byte_level import BEGIN, END, make_byte_level
from tests.preparing import settings, write_lines

GREEDY = GenerationSettings(max_new_tokens=4, do_sample=False, temperature=1.0, top_k=1, top_p=1.0, seed=None)


def make_model(folder: Path) -> Path:
    """Fewer key-value heads than query heads, heads of another size than hidden / heads, llama3 positions, tied."""
    torch.manual_seed(0)
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=500000.0,
        rope_scaling={**rope, "original_max_position_embeddings": 128},
        tie_word_embeddings=True,
        bos_token_id=595,
        eos_token_id=[596, 599],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with a tokenizer of LLaMA-3's kind, and prepared data."""
    home = tmp_path_factory.mktemp("byte_level_run")
    shutil.copytree(make_byte_level(home / "tokenizer"), home / "model")
    make_model(home / "model")
    write_lines(home / "in" / "rows.jsonl", [{"target": text} for text in tiny.english_documents()[:60]])
    prepare_pretrain(**settings([home / "in"], home / "model", home, max_length=64))
    return home


def job(folder: Path, name: str, *more) -> dict:
    home = folder / name
    words = ["--pretrained", folder / "model", "--dataset", folder / "arrow" / "part-00000", "--max_length", 64]
    words += ["--plugin", "zero2", "--mixed_precision", "bf16", "--micro_batch_size", 2, "--lr", "1e-3"]
    words += ["--save_dir", home / "ckpt", "--tensorboard_dir", home / "tb", "--config_file", home / "config.json"]
    flags = [str(word) for word in [*words, "--max_steps", 4, "--save_interval", 2, *more]]
    return {"name": name, "script": "train.py", "flags": flags}


@pytest.fixture(scope="module")
def run(folder) -> Path:
    """A run of four steps on two ranks, and one resumed at its second step."""
    launching.launch(folder, [job(folder, "whole")], worker="resume_worker.py")
    again = job(folder, "again", "--load_checkpoint", folder / "whole" / "ckpt" / "epoch-0_step-2")
    launching.launch(folder, [again], worker="resume_worker.py")
    for name in ("whole", "again"):
        assert [error for error, *_ in json.loads((folder / f"{name}.json").read_text())["ranks"]] == [None, None]
    return folder


def test_a_resumed_run_is_the_whole_one_bit_for_bit(run):
    checkpoints = [run / name / "ckpt" / "epoch-0_step-4" for name in ("whole", "again")]
    whole, again = (load_file(folder / "modeling" / "model-00001-of-00001.safetensors") for folder in checkpoints)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    before = load_file(run / "model" / "model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], whole["model.embed_tokens.weight"].float())


def test_a_checkpoint_has_the_tokenizer_and_verify_accepts_it(run):
    checkpoint = run / "whole" / "ckpt" / "epoch-0_step-4"
    assert fingerprint(checkpoint / "modeling") == fingerprint(run / "tokenizer")
    saved = {path.name for path in (checkpoint / "modeling").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= saved and "tokenizer.model" not in saved
    report = list(verify.verify(str(checkpoint)))
    assert report[-1].endswith("600 tokens for 600 rows; transformers encodes as byte-level BPE does")
    assert json.loads((checkpoint / "modeling" / "config.json").read_text())["eos_token_id"] == [596, 599]


def test_verify_names_another_tokenizer(run, tmp_path):
    copy = shutil.copytree(run / "whole" / "ckpt" / "epoch-0_step-4", tmp_path / "epoch-0_step-4")
    path = copy / "modeling" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"].pop()
    path.write_text(json.dumps(content))
    sizes = checkpoint_files.list_files(copy)
    checkpoint_files.write_manifest(copy, checkpoint_files.file_entries(copy, sizes), saved_at=1.0)
    with pytest.raises(UserError, match="tokenizer.json: differs from the tokenizer of the run"):
        list(verify.verify(str(copy)))


@pytest.mark.parametrize("kind, bos", [("llama3", BEGIN), ("smollm2", BEGIN), ("smollm2", END), ("qwen2", None)])
def test_a_prompt_begins_as_documents_in_training_do(kind, bos, tmp_path):
    folder = make_model(make_byte_level(tmp_path / "model", kind, bos=bos, missing=b"\x04").parent / "model")
    tokenizer_ids = AutoTokenizer.from_pretrained(folder)("Hi")["input_ids"]
    model, tokenizer = loading.load_model(str(folder), "cpu")
    encoder = load_encoder(folder)
    expected = [encoder.bos_id] * (bos is not None) + encoder.encode(["Hi 明"])[0]
    # Only a tokenizer.json of LLaMA-3's kind adds the mark itself.
    assert (tokenizer_ids[0] == encoder.bos_id) == (kind == "llama3")
    assert text_ids(tokenizer, "Hi 明") == expected
    with torch.no_grad():
        ids = torch.tensor([expected])
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[0, -1].argmax().reshape(1, 1)], dim=1)
    answer = ids[0, len(expected) :].tolist()
    ends = [place for place, token in enumerate(answer) if token in (596, 599, encoder.eos_id)]
    answer = answer[: ends[0]] if ends else answer
    assert generation.generate(model, tokenizer, "Hi 明", GREEDY) == encoder.decode(answer)
    with pytest.raises(UserError, match="the prompt cannot be used: the character .*04"):
        generation.generate(model, tokenizer, "a \x04", GREEDY)


def test_a_mark_that_only_transformers_adds_begins_no_prompt(tmp_path):
    """GPT-2's class has a bos_token of its own where the folder names none; data is prepared without one."""
    folder = make_byte_level(tmp_path / "model", "smollm2", bos=None)
    config = {"eos_token": END, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, encoder = load_tokenizer(folder), load_encoder(folder)
    assert tokenizer.bos_token == "<|endoftext|>" and encoder.bos_id < 0
    assert [text_ids(tokenizer, "Hi")] == encoder.encode(["Hi"])
