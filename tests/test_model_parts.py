"""Freezing, NEFTune, the choice of attention, and the check of stored weights."""

import importlib
import json
import shutil
import sys
import types
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama2.errors import RunError, UserError
from colossal_llama2.model import attention
from colossal_llama2.model.attention import choose_attention
from colossal_llama2.model.loading import check_model_folder, inspect_weights, load_llama
from colossal_llama2.model.model_folder import shard_names
from colossal_llama2.model.neftune import embedding_noise
from colossal_llama2.model.trainable import Embeddings, NewRows, Trainable, read_new_rows
from colossal_llama2.train.checkpointing.new_rows_report import NewRowsReport


@pytest.fixture
def model(model_dir):
    return LlamaForCausalLM.from_pretrained(model_dir)


def test_freezing_leaves_both_embeddings(model):
    trainable, frozen = Embeddings().prepare(model)
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}
    assert trainable == 2 * 600 * 64 and trainable + frozen == sum(p.numel() for p in model.parameters())


def noisy_embeddings(
    model, *, alpha=5.0, seed=3, data_rank=0, step=0, micro_step=0, lengths=(8, 5), documents=None, width=8
):
    ids = torch.arange(len(lengths) * width).view(len(lengths), width) % 600
    clean = model.get_input_embeddings()(ids)
    with embedding_noise(model, alpha=alpha, seed=seed, data_rank=data_rank) as noise:
        noise.prepare(step=step, micro_step=micro_step, lengths=torch.tensor(lengths), documents=documents)
        noisy = model.get_input_embeddings()(ids)
    assert torch.equal(model.get_input_embeddings()(ids), clean)
    return (noisy - clean).detach()


def test_noise_has_the_paper_s_scale_and_spares_padding(model):
    model.train()
    noise = noisy_embeddings(model)
    for row, length in enumerate((8, 5)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.9 * bound < noise[row, :length].abs().max() <= bound * 1.001
        assert noise[row, :length].std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert (noise[row, length:] == 0).all()


def test_noise_of_spliced_documents_has_the_scale_of_each(model):
    """alpha 5, width 64: 5 / sqrt(118 * 64) = 0.057536 and 5 / sqrt(393 * 64) = 0.031527; uniform: over sqrt(3)."""
    model.train()
    documents = torch.zeros(2, 520, dtype=torch.int64)
    documents[0, :118], documents[0, 118:511], documents[1, :393] = 1, 2, 1
    noise = noisy_embeddings(model, lengths=(511, 393), documents=documents, width=520)
    for row, tokens, bound, std in (
        (0, slice(0, 118), 0.057536, 0.033218),
        (0, slice(118, 511), 0.031527, 0.018202),
        (1, slice(0, 393), 0.031527, 0.018202),
    ):
        assert 0.99 * bound < noise[row, tokens].abs().max() < 1.0001 * bound
        assert noise[row, tokens].std().item() == pytest.approx(std, rel=0.02)
    assert (noise[documents == 0] == 0).all()
    # Documents that are not kept apart are one sequence: 5 / sqrt(511 * 64) = 0.027648.
    together = noisy_embeddings(model, lengths=(511, 393), width=520)
    assert together[0].abs().max() < 1.0001 * 0.027648 < noise[0].abs().max()


@pytest.mark.parametrize("change", [{"seed": 4}, {"data_rank": 1}, {"step": 1}, {"micro_step": 1}])
def test_noise_is_a_function_of_its_place(model, change):
    model.train()
    assert torch.equal(noisy_embeddings(model), noisy_embeddings(model))
    assert not torch.equal(noisy_embeddings(model), noisy_embeddings(model, **change))


def test_no_noise_in_evaluation(model):
    model.eval()
    assert (noisy_embeddings(model) == 0).all()


def test_attention_without_a_gpu():
    assert choose_attention(False, precision="bf16") == "sdpa"
    assert choose_attention(True, precision="bf16") == "sdpa"


@pytest.fixture
def gpu(monkeypatch):
    """A simulated A800; call it with the error that importing flash-attn raises, or None."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))

    def importing(error):
        module = types.ModuleType("flash_attn")
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        monkeypatch.setattr(importlib, "import_module", Mock(return_value=module, side_effect=error))
        attention._why_no_flash_attn.cache_clear()

    yield importing
    attention._why_no_flash_attn.cache_clear()


def test_attention_on_a_gpu(gpu):
    gpu(None)
    assert choose_attention(True, precision="bf16") == "flash_attention_2"
    assert choose_attention(True, precision="fp32") == "sdpa"
    assert choose_attention(True, precision="bf16", replaced=True) == "sdpa"


@pytest.mark.parametrize(
    "error, words",
    [
        (ModuleNotFoundError("No module", name="flash_attn"), "requirements-gpu.txt"),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "does not import: No module named 'einops'"),
        (ImportError("undefined symbol: _ZN3c10"), "does not import: undefined symbol"),
    ],
)
def test_flash_attn_that_cannot_be_used_is_reported(gpu, caplog, error, words):
    gpu(error)
    with caplog.at_level("INFO"):
        assert choose_attention(True, precision="bf16") == "sdpa"
    assert words in caplog.text


def test_flash_attn_is_for_ampere_and_later(gpu, monkeypatch, caplog):
    gpu(None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with caplog.at_level("INFO"):
        assert choose_attention(True, precision="bf16") == "sdpa"
    assert "Tesla V100" in caplog.text


@pytest.fixture
def folder(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "model")


def test_facts_of_a_good_model(folder):
    check_model_folder(str(folder), "--pretrained")
    facts = inspect_weights(str(folder))
    model = LlamaForCausalLM.from_pretrained(folder)
    assert (facts.parameters, facts.vocab_size) == (model.num_parameters(), 600)
    assert facts.max_position_embeddings == 4096


def test_loading_keeps_weights_and_settings(folder):
    model = load_llama(str(folder), precision="bf16", attention="sdpa")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name].bfloat16()) for name, value in model.state_dict().items())


def test_old_rotary_constants_are_accepted(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert inspect_weights(str(folder)).vocab_size == 600


def damage(folder, case):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if case == "missing":
        del tensors["lm_head.weight"]
    elif case == "unknown":
        tensors["extra.weight"] = torch.zeros(1)
    elif case == "shape":
        tensors["lm_head.weight"] = torch.zeros(599, 64)
    save_file(tensors, path, metadata={"format": "pt"})
    if case == "cut":
        path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("case", "word"),
    [("missing", "lacks lm_head.weight"), ("unknown", "extra.weight"), ("shape", "599"), ("cut", "cannot be read")],
)
def test_weights_that_do_not_fit_are_refused(folder, case, word):
    damage(folder, case)
    with pytest.raises(UserError, match=word):
        inspect_weights(str(folder))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", ""])
def test_index_names_stay_inside_the_folder(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match="only plain"):
        shard_names(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_damaged_index_is_refused(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="not an index"):
        shard_names(str(folder))


@pytest.mark.parametrize("case", ["nowhere", "no config", "bad config", "gpt2", "pickled", "no weights"])
def test_folders_that_are_not_llama_models_are_refused(folder, case):
    config, weights = folder / "config.json", folder / "model.safetensors"
    word = case
    if case == "nowhere":
        folder, word = folder / "nowhere", "no such folder"
    elif case == "no config":
        config.unlink()
        word = "no config.json"
    elif case == "bad config":
        config.write_text("{")
        word = "not a JSON object"
    elif case == "gpt2":
        config.write_text('{"model_type": "gpt2"}')
    else:
        weights.unlink()
        word = "no safetensors"
        if case == "pickled":
            (folder / "pytorch_model.bin").touch()
            word = "save_pretrained"
    with pytest.raises(UserError, match=word):
        check_model_folder(str(folder), "--pretrained")


def test_tied_model_is_inspected(tmp_path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert inspect_weights(str(tmp_path)).vocab_size == 32


@pytest.mark.parametrize("ranges", [[[8, 8]], [[8, 9], [3, 5]], [[8, 601]], [[8]], [8, 9], "8-9", [[-1, 3]]])
def test_impossible_new_rows_are_refused(folder, ranges):
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r'"initialized_rows": \[\[FIRST, '):
        read_new_rows(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "initialized_rows": ranges}))
    with pytest.raises(UserError, match="ascending"):
        read_new_rows(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "initialized_rows": [[8, 9], [20, 24]]}))
    assert read_new_rows(str(folder)) == ((8, 9), (20, 24))


def test_what_is_trained_is_one_choice(folder, model):
    facts = inspect_weights(str(folder))
    flags = ((False, False), (True, False), (False, True))
    choices = [Trainable.from_flags(embeddings=embeddings, new_rows=new_rows) for embeddings, new_rows in flags]
    everything, _, rows = choices
    assert [type(choice) for choice in choices] == [Trainable, Embeddings, NewRows]
    assert everything.prepare(model) == (facts.parameters, 0)
    sizes = [facts.parameters, facts.embedding_parameters, facts.embedding_parameters]
    assert [choice.parameters(facts) for choice in choices] == sizes
    assert [choice.decays for choice in choices] == [True, True, False]
    assert [len(choice.problems(pp_size=3, chunked_loss="off")) for choice in choices] == [0, 1, 2]
    assert everything.of_model(str(folder)) == everything and everything.rows is None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "initialized_rows": [[8, 9], [20, 24]]}))
    assert rows.of_model(str(folder)).description == "5 new rows of the embeddings"


def test_row_health_reports_what_moved(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    health = NewRowsReport(str(folder), ((8, 12),), "bf16")
    model = LlamaForCausalLM.from_pretrained(folder).bfloat16()
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding[9:12] += 0.5
    head[8:12] += 0.5
    model.save_pretrained(tmp_path / "later")
    figures = health.examine(tmp_path / "later")
    assert figures["Rows/embed_tokens moved"] == 0.75 and figures["Rows/lm_head moved"] == 1.0
    assert figures["Rows/lm_head norm"] == pytest.approx(head[8:12].float().norm(dim=1).mean().item(), rel=1e-6)
    assert "embed_tokens: 75.0 % of 4 new rows changed" in caplog.text
    head[12] *= -1
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(RunError, match="row 12 of lm_head.weight changed, but it is not trained"):
        health.examine(tmp_path / "broken")
