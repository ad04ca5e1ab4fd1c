"""Initializing a model: which rows it writes, what it leaves as it is, what it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from colossal_llama2.errors import UserError
from colossal_llama2.model.init_model import INDEX_FILE, INPUT_EMBEDDING, OUTPUT_EMBEDDING, WEIGHTS_FILE, init_model
from colossal_llama2.tokenizer import Encoder
from colossal_llama2.tokenizer.init_tokenizer import expand_tokenizer, read_model
from tests import tiny
from tests.conftest import ROOT

PIECES = ["人工智能", "你好", "世界", "人工", "智能", "▁Hello▁world", "éclair"]
ENGLISH = "The first statement of a function body may be a string."


def expand(source, folder):
    path = folder / "pieces.jsonl"
    path.write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in PIECES))
    expand_tokenizer(source, folder / "tokenizer", path)
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def expanded(tokenizer_dir, tmp_path_factory):
    """The tokenizer folder of the tiny tokenizer with PIECES. Read only."""
    return expand(tokenizer_dir, tmp_path_factory.mktemp("expanded"))


def weights_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def mean_rows(matrix, source, tokenizer):
    """The definition, one token at a time: float32 mean of the rows of the piece's ids, cast once."""
    encoder, rows = Encoder(source), []
    for piece in read_model(tokenizer).pieces[encoder.vocab_size :]:
        (ids,) = encoder.encode([piece.piece.replace("▁", " ")], dummy_prefix=False)
        rows.append(torch.stack([matrix[index].float() for index in ids]).mean(0).to(matrix.dtype))
    return torch.stack(rows)


def check(source, tokenizer, target):
    """Old rows and other tensors bit for bit, new rows by the definition, and the folder loads as a model."""
    before, after = weights_of(source), weights_of(target)
    pieces, old = Encoder(tokenizer).vocab_size, Encoder(source).vocab_size
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name not in (INPUT_EMBEDDING, OUTPUT_EMBEDDING):
            assert torch.equal(after[name], tensor)
            continue
        assert torch.equal(after[name][:old], tensor[:old])
        torch.testing.assert_close(after[name][old:pieces], mean_rows(tensor, source, tokenizer))
    model = LlamaForCausalLM.from_pretrained(target, torch_dtype="auto")
    tokens = AutoTokenizer.from_pretrained(target)
    assert model.config.vocab_size == len(tokens) == after[INPUT_EMBEDDING].shape[0]
    assert model.get_input_embeddings().weight.dtype == before[INPUT_EMBEDDING].dtype
    assert tokens("人工智能")["input_ids"] == AutoTokenizer.from_pretrained(tokenizer)("人工智能")["input_ids"]
    return model


def edited_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_single_file(model_dir, expanded, tmp_path, capsys):
    init_model(model_dir, expanded, tmp_path / "out")
    model = check(model_dir, expanded, tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-1]
    added = Encoder(expanded).vocab_size - 600
    size = (tmp_path / "out" / WEIGHTS_FILE).stat().st_size
    assert last == (
        f"vocabulary 600 -> {600 + added}, {added} rows initialized in each of 2 matrices, {size:,} bytes written"
    )
    source = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = torch.tensor([[1, *Encoder(expanded).encode([ENGLISH])[0]]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[..., :600], source(ids).logits, atol=1e-5, rtol=0)
    config, old_config = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", model_dir))
    assert config == {**old_config, "vocab_size": 600 + added}
    generation = "generation_config.json"
    assert json.loads((tmp_path / "out" / generation).read_text()) == json.loads((model_dir / generation).read_text())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dtype, tie", [("bfloat16", False), ("float16", True)])
def test_sharded_half_precision_and_tied(tokenizer_dir, expanded, tmp_path, dtype, tie):
    source = tiny.make_model(tmp_path / "source", tokenizer_dir, dtype=dtype, tie=tie)
    LlamaForCausalLM.from_pretrained(source, torch_dtype="auto").save_pretrained(source, max_shard_size="60KB")
    (source / WEIGHTS_FILE).unlink(missing_ok=True)
    edited_json(source / INDEX_FILE, metadata={"total_size": 1, "total_parameters": 0})
    init_model(source, expanded, tmp_path / "out")
    check(source, expanded, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    tensors = weights_of(tmp_path / "out")
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    grown = sum(tensor.numel() for tensor in tensors.values()) - sum(t.numel() for t in weights_of(source).values())
    assert index["metadata"]["total_parameters"] == grown
    assert (OUTPUT_EMBEDDING in tensors) == (not tie)


def padded(model_dir, folder, rows):
    source = shutil.copytree(model_dir, folder)
    tensors = load_file(source / WEIGHTS_FILE)
    for name in (INPUT_EMBEDDING, OUTPUT_EMBEDDING):
        extra = torch.full((rows, tensors[name].shape[1]), 7.0)
        tensors[name] = torch.cat([tensors[name], extra])
    save_file(tensors, source / WEIGHTS_FILE, metadata={"format": "pt"})
    edited_json(source / "config.json", vocab_size=600 + rows)
    return source


def test_rows_beyond_the_tokenizer_are_left_out(model_dir, expanded, tmp_path, caplog):
    source = padded(model_dir, tmp_path / "source", 40)
    edited_json(source / "config.json", pad_token_id=639)
    with caplog.at_level("INFO", logger="colossal_llama2"):
        init_model(source, expanded, tmp_path / "out")
    check(source, expanded, tmp_path / "out")
    assert not (weights_of(tmp_path / "out")[INPUT_EMBEDDING] == 7.0).all(1).any()
    # Row 639 was padding. Its number is a Chinese piece or nothing now, so it must not stay the padding token.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is None
    assert "pad_token_id 639 is now None" in caplog.text


def test_added_tokens_take_their_rows_and_ids_along(model_dir, tmp_path):
    source = padded(model_dir, tmp_path / "source", 1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<late>"]})
    tokenizer.save_pretrained(source)
    edited_json(source / "config.json", pad_token_id=600, eos_token_id=[2, 600])
    edited_json(source / "generation_config.json", pad_token_id=600)
    target_tokenizer = expand(source, tmp_path)
    init_model(source, target_tokenizer, tmp_path / "out")
    check(source, target_tokenizer, tmp_path / "out")
    matrix = weights_of(tmp_path / "out")[INPUT_EMBEDDING]
    pad, late = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["<pad>", "<late>"])
    assert (pad, late) == (len(matrix) - 2, len(matrix) - 1)
    assert (matrix[pad] == 7.0).all()
    # <late> had no row in the source: it gets the mean of what its text is made of.
    (ids,) = Encoder(source).encode(["<late>"], dummy_prefix=False)
    torch.testing.assert_close(matrix[late], weights_of(source)[INPUT_EMBEDDING][ids].mean(0))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["pad_token_id"], config["eos_token_id"]) == (pad, [2, pad])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_token_id"] == pad


def test_into_the_tokenizer_folder_through_links(model_dir, expanded, tmp_path):
    """A hub cache is made of links: what is written are files."""
    source = tmp_path / "source"
    source.mkdir()
    for path in model_dir.iterdir():
        (source / path.name).symlink_to(path)
    target = shutil.copytree(expanded, tmp_path / "target")
    init_model(source, target, target)
    check(source, expanded, target)
    assert not any(path.is_symlink() or path.is_dir() for path in target.iterdir())
    with pytest.raises(UserError, match="holds a model already"):
        init_model(source, expanded, target)


@pytest.mark.parametrize("spelling", ["init_model.py", "colossal_llama2/model/init_model.py"])
def test_both_spellings_from_another_folder(run_script, model_dir, expanded, tmp_path, spelling):
    done = run_script(
        spelling, "--source_model_and_tokenizer_path", model_dir, "--target_tokenizer_path", expanded,
        "--target_model_path", "out", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("vocabulary 600 -> ")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in expanded.iterdir()} | {WEIGHTS_FILE, "config.json", "generation_config.json"}


def test_as_a_module_and_one_line_for_a_mistake(assert_user_error, model_dir, expanded):
    command = [
        sys.executable, "-m", "colossal_llama2.model.init_model", "--source_model_and_tokenizer_path", str(model_dir),
        "--target_tokenizer_path", str(expanded), "--target_model_path", str(model_dir),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_user_error(done, "init_model.py: error:", "holds a model already")


def test_folders_that_are_refused(model_dir, expanded, tokenizer_dir, tmp_path):
    def refused(words, *, source=model_dir, tokenizer=expanded, target=tmp_path / "out"):
        with pytest.raises(UserError, match=words):
            init_model(source, tokenizer, target)

    refused("--source_model_and_tokenizer_path .* is not a folder", source=tmp_path / "missing")
    refused("--target_tokenizer_path .* is not a folder", tokenizer=tmp_path / "missing")
    refused("inside the source", target=model_dir / "out")
    refused("exists already", target=tmp_path)
    (tmp_path / "file").touch()
    refused("is not a folder", target=tmp_path / "file")
    refused("holds no config.json", source=tokenizer_dir)
    refused("does not extend .*piece 600 is missing", source=_with_tokenizer(model_dir, expanded, tmp_path / "a"),
            tokenizer=tokenizer_dir)  # fmt: skip
    other = tiny.make_tokenizer(tmp_path / "other", vocab_size=400)
    refused(r"does not extend .*piece \d+ is ", tokenizer=other)
    refused("fewer than the .* pieces", source=_with_tokenizer(model_dir, expanded, tmp_path / "b"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def _with_tokenizer(model_dir, tokenizer, folder):
    shutil.copytree(model_dir, folder)
    return shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def test_weights_that_are_refused(model_dir, expanded, tmp_path):
    def refused(words, change):
        source = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(model_dir, source)
        change(source)
        with pytest.raises(UserError, match=words):
            init_model(source, expanded, tmp_path / "out")

    def only_index(source, weight_map):
        (source / WEIGHTS_FILE).rename(source / "one.safetensors")
        (source / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    def without(*names, rows=None):
        def change(source):
            tensors = {name: tensor for name, tensor in load_file(source / WEIGHTS_FILE).items() if name not in names}
            if rows is not None:
                tensors[OUTPUT_EMBEDDING] = tensors[OUTPUT_EMBEDDING][:rows].clone()
            save_file(tensors, source / WEIGHTS_FILE)

        return change

    refused("holds neither", lambda source: (source / WEIGHTS_FILE).unlink())
    refused("never unpickled.*convert: python -c", lambda source: (source / WEIGHTS_FILE).rename(
        source / "pytorch_model-00001-of-00001.bin"))  # fmt: skip
    refused("not a whole safetensors file", lambda source: (source / WEIGHTS_FILE).write_bytes(b"\x08"))
    refused("no model.embed_tokens.weight", without(INPUT_EMBEDDING))
    refused("no lm_head.weight", without(OUTPUT_EMBEDDING))
    refused("two equal matrices", without(rows=599))
    refused("no vocab_size", lambda source: (source / "config.json").write_text("{}"))
    for name in ("../one.safetensors", "/one.safetensors", "a\\one.safetensors", "one.bin", 7):
        refused("only plain", lambda source, name=name: only_index(source, {INPUT_EMBEDDING: name}))
    refused("is missing", lambda source: only_index(source, {INPUT_EMBEDDING: "two.safetensors"}))
    refused("disagree about", lambda source: only_index(source, {"extra": "one.safetensors"}))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_piece_that_the_source_cannot_encode_is_refused(model_dir, expanded, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, dummy_prefix=True: [[] for _ in texts])
    with pytest.raises(UserError, match="encodes .* as nothing"):
        init_model(model_dir, expanded, tmp_path / "out")


def test_a_failed_write_leaves_nothing(model_dir, expanded, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("colossal_llama2.model.init_model._write_new_rows", fail)
    target = shutil.copytree(expanded, tmp_path / "target")
    before = sorted(path.name for path in target.iterdir())
    for place in (target, tmp_path / "out"):
        with pytest.raises(OSError, match="No space"):
            init_model(model_dir, expanded if place != target else target, place)
    assert sorted(path.name for path in target.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
