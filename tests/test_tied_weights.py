"""Folders whose config.json ties the embeddings, with weights stored under two names."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from colossal_llama2.errors import UserError
from colossal_llama2.inference.loading import _read_weights
from colossal_llama2.model.init_model import InitModelSettings, init_model
from colossal_llama2.model.loading import inspect_weights, load_llama
from colossal_llama2.model.tied_weights import INPUT_EMBEDDING, OUTPUT_EMBEDDING
from tests import tiny


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory, tokenizer_dir):
    return tiny.make_model(tmp_path_factory.mktemp("tied") / "model", tokenizer_dir, tie=True)


def with_head(tied_dir, folder, *, added=0.0, sharded=False):
    """A copy that stores the output embedding too, in another file if `sharded`, with a number added to its last."""
    shutil.copytree(tied_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    head = tensors[INPUT_EMBEDDING].clone()
    head[-1, -1] += added
    if not sharded:
        save_file({**tensors, OUTPUT_EMBEDDING: head}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    parts = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": {OUTPUT_EMBEDDING: head}}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_two_equal_matrices_are_one(tied_dir, tmp_path, sharded):
    folder = with_head(tied_dir, tmp_path / "both", sharded=sharded)
    facts = inspect_weights(str(folder))
    assert facts.ties_embeddings and facts == inspect_weights(str(tied_dir))
    model = load_llama(str(folder), precision="fp32", attention="sdpa")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("sharded", [False, True])
def test_two_matrices_that_differ_are_refused(tied_dir, tmp_path, sharded):
    folder = with_head(tied_dir, tmp_path / "both", added=1.0, sharded=sharded)
    with pytest.raises(UserError, match="lm_head.weight that differs from model.embed_tokens.weight; set tie_word"):
        inspect_weights(str(folder))
    with pytest.raises(UserError, match="differs"):
        init_model(InitModelSettings(folder, folder, tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="differs"):
        _read_weights(folder, given=str(folder), precision="fp32")


def test_two_matrices_of_two_shapes_are_refused(tied_dir, tmp_path):
    folder = with_head(tied_dir, tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    tensors[OUTPUT_EMBEDDING] = tensors[OUTPUT_EMBEDDING][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="differs"):
        inspect_weights(str(folder))
