"""Initializing a model: which rows it writes, what it does not change, what it refuses."""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from colossal_llama2.encoding.bpe_model import read_model
from colossal_llama2.encoding.registry import fingerprint, load_encoder
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.inference import generation, loading
from colossal_llama2.model.init_model import InitModelSettings, Rows, _recorded_ranges, init_model
from colossal_llama2.model.model_folder import INDEX_FILE, WEIGHTS_FILE
from colossal_llama2.model.tied_weights import INPUT_EMBEDDING, OUTPUT_EMBEDDING
from colossal_llama2.model.training_history import read_history
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer
from colossal_llama2.train.report.model_card import _stage_cells
from tests import tiny
from tests.conftest import ROOT

MODEL_FILES = {WEIGHTS_FILE, "config.json", "generation_config.json", "training_history.json"}
PIECES = ["人工智能", "你好", "世界", "人工", "智能", "▁Hello▁world", "éclair"]


def expand(source, folder):
    path = folder / "pieces.jsonl"
    path.write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in PIECES))
    expand_tokenizer(ExtensionSettings(source, folder / "tokenizer", path))
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def expanded(tokenizer_dir, tmp_path_factory):
    """The tokenizer folder of the tiny tokenizer with PIECES. Read only."""
    return expand(tokenizer_dir, tmp_path_factory.mktemp("expanded"))


def weights_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def mean_rows(matrix, source, tokenizer):
    """The definition, one token at a time: float32 mean of the rows of the piece's ids, cast once."""
    encoder, rows = load_encoder(source), []
    for piece in read_model(tokenizer).pieces[encoder.vocab_size :]:
        (ids,) = encoder.encode([piece.piece.replace("▁", " ")], dummy_prefix=False)
        rows.append(torch.stack([matrix[index].float() for index in ids]).mean(0).to(matrix.dtype))
    return torch.stack(rows)


def check(source, tokenizer, target):
    """Old rows and other tensors bit for bit, new rows by the definition, and the folder loads as a model."""
    before, after = weights_of(source), weights_of(target)
    pieces, old = load_encoder(tokenizer).vocab_size, load_encoder(source).vocab_size
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
    init_model(InitModelSettings(model_dir, expanded, tmp_path / "out"))
    check(model_dir, expanded, tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-1]
    added = load_encoder(expanded).vocab_size - 600
    size = (tmp_path / "out" / WEIGHTS_FILE).stat().st_size
    assert last == (
        f"vocabulary 600 -> {600 + added}, {added} rows initialized in each of 2 matrices, {size:,} bytes written"
    )
    config, old_config = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", model_dir))
    assert config == {**old_config, "vocab_size": 600 + added, "initialized_rows": [[600, 600 + added]]}
    generation = "generation_config.json"
    assert json.loads((tmp_path / "out" / generation).read_text()) == json.loads((model_dir / generation).read_text())
    assert not list(tmp_path.glob(".*"))


def test_without_new_rows_the_record_of_new_rows_stays(model_dir, expanded, tmp_path):
    """For example a change of the number format only; a second extension records its own rows."""
    init_model(InitModelSettings(model_dir, expanded, tmp_path / "first"))
    recorded = json.loads((tmp_path / "first" / "config.json").read_text())["initialized_rows"]
    init_model(InitModelSettings(tmp_path / "first", tmp_path / "first", tmp_path / "second", dtype="bfloat16"))
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["initialized_rows"] == recorded == [[600, config["vocab_size"]]]
    # Rows without a token are left out, and an invalid record counts as none.
    rows = Rows(kept=10, bags=[[12]], new=0, moved_ids={12: 10})
    assert _recorded_ranges({"initialized_rows": [[3, 5], [7, 20]]}, rows) == [[3, 5], [7, 11]]
    assert _recorded_ranges({"initialized_rows": [["a", 5]]}, rows) == _recorded_ranges({}, rows) == []


@pytest.mark.parametrize("dtype, tie", [("bfloat16", False), ("float16", True)])
def test_sharded_half_precision_and_tied(tokenizer_dir, expanded, tmp_path, dtype, tie):
    source = tiny.make_model(tmp_path / "source", tokenizer_dir, dtype=dtype, tie=tie)
    LlamaForCausalLM.from_pretrained(source, torch_dtype="auto").save_pretrained(source, max_shard_size="60KB")
    (source / WEIGHTS_FILE).unlink(missing_ok=True)
    edited_json(source / INDEX_FILE, metadata={"total_size": 1, "total_parameters": 0})
    init_model(InitModelSettings(source, expanded, tmp_path / "out"))
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
        init_model(InitModelSettings(source, expanded, tmp_path / "out"))
    check(source, expanded, tmp_path / "out")
    assert not (weights_of(tmp_path / "out")[INPUT_EMBEDDING] == 7.0).all(1).any()
    # Row 639 was padding. Its number is a Chinese piece or nothing now, so it must not stay the padding token.
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is None
    assert "pad_token_id 639 is now None" in caplog.text


def test_added_tokens_keep_their_rows_and_ids(model_dir, tmp_path):
    source = padded(model_dir, tmp_path / "source", 1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<late>"]})
    tokenizer.save_pretrained(source)
    edited_json(source / "config.json", pad_token_id=600, eos_token_id=[2, 600])
    edited_json(source / "generation_config.json", pad_token_id=600)
    target_tokenizer = expand(source, tmp_path)
    init_model(InitModelSettings(source, target_tokenizer, tmp_path / "out"))
    check(source, target_tokenizer, tmp_path / "out")
    matrix = weights_of(tmp_path / "out")[INPUT_EMBEDDING]
    pad, late = AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(["<pad>", "<late>"])
    assert (pad, late) == (len(matrix) - 2, len(matrix) - 1)
    assert (matrix[pad] == 7.0).all()
    # <late> had no row in the source, so it gets the mean of the rows of its text.
    (ids,) = load_encoder(source).encode(["<late>"], dummy_prefix=False)
    torch.testing.assert_close(matrix[late], weights_of(source)[INPUT_EMBEDDING][ids].mean(0))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["initialized_rows"] == [[600, pad], [late, late + 1]]
    assert (config["pad_token_id"], config["eos_token_id"]) == (pad, [2, pad])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_token_id"] == pad


@pytest.mark.parametrize("tie, dtype", [(False, "bfloat16"), (True, "float32")])
def test_rows_without_a_token_fill_the_vocabulary_up(tokenizer_dir, expanded, tmp_path, capsys, tie, dtype):
    """They are the mean of the old rows, recorded, never generated, and not copied by the next init_model."""
    source = tiny.make_model(tmp_path / "source", tokenizer_dir, tie=tie, dtype=dtype)
    init_model(InitModelSettings(source, expanded, tmp_path / "plain"))
    init_model(InitModelSettings(source, expanded, tmp_path / "out", pad_vocab_to_multiple_of=64))
    tokens, rows = load_encoder(expanded).vocab_size, 640
    assert 600 < tokens < rows
    assert f"600 -> 640 ({rows - tokens} of them without a token), {tokens - 600} rows" in capsys.readouterr().out
    plain, padded = weights_of(tmp_path / "plain"), weights_of(tmp_path / "out")
    for name in plain.keys() & {INPUT_EMBEDDING, OUTPUT_EMBEDDING}:
        assert torch.equal(padded[name][:tokens], plain[name]) and len(padded[name]) == rows
        mean = padded[name][:600].double().mean(0).to(padded[name].dtype)
        assert torch.equal(padded[name][tokens:], mean.expand(rows - tokens, -1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["initialized_rows"]) == (rows, [[600, tokens]])
    assert config["padding_rows"] == [[tokens, rows]]
    history = read_history(tmp_path / "out")
    assert history.problem is None and history.stages[0]["padding_rows"] == rows - tokens
    expected = f"vocabulary of 600, now 640, {rows - tokens} of them rows without a token"
    assert _stage_cells(history.stages[0])[1] == expected

    for again, more in (("same", 64), ("none", 1), ("larger", 128)):
        init_model(InitModelSettings(tmp_path / "out", expanded, tmp_path / again, pad_vocab_to_multiple_of=more))
        config = json.loads((tmp_path / again / "config.json").read_text())
        assert config["vocab_size"] == {"same": rows, "none": tokens, "larger": 640}[again]
        assert ("padding_rows" in config) is (again != "none") and config["initialized_rows"] == [[600, tokens]]
    assert weights_of(tmp_path / "none").keys() == plain.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights_of(tmp_path / "none").items())

    model, tokenizer = loading.load_model(str(tmp_path / "out"), "cpu")
    settings = generation.GenerationSettings(8, do_sample=False, temperature=1.0, top_k=0, top_p=1.0, seed=0)
    expected = [generation.generate(model, tokenizer, "the state", settings)]
    with torch.no_grad():
        # One of two opposite rows has by far the largest logit. If tied, they are never input, so nothing else changes.
        head = model.get_output_embeddings().weight
        head[tokens : tokens + 2] = 100 * torch.stack([torch.ones(head.shape[1]), -torch.ones(head.shape[1])])
    raw = model.generate(**tokenizer("the state", return_tensors="pt"), max_new_tokens=1, do_sample=False)
    assert raw[0, -1] >= tokens
    assert [generation.generate(model, tokenizer, "the state", settings)] == expected


def test_into_the_tokenizer_folder_through_links(model_dir, expanded, tmp_path):
    """A hub cache consists of links; the output consists of files."""
    source = tmp_path / "source"
    source.mkdir()
    for path in model_dir.iterdir():
        (source / path.name).symlink_to(path)
    target = shutil.copytree(expanded, tmp_path / "target")
    init_model(InitModelSettings(source, target, target))
    check(source, expanded, target)
    assert not any(path.is_symlink() or path.is_dir() for path in target.iterdir())
    with pytest.raises(UserError, match="already holds a model"):
        init_model(InitModelSettings(source, expanded, target))


@pytest.mark.parametrize("spelling", ["init_model.py", "colossal_llama2/model/init_model.py"])
def test_both_spellings_from_another_folder(run_forked, model_dir, expanded, tmp_path, spelling):
    done = run_forked(
        spelling,
        "--source_model_and_tokenizer_path",
        model_dir,
        "--target_tokenizer_path",
        expanded,
        "--target_model_path",
        "out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("vocabulary 600 -> ")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in expanded.iterdir()} | MODEL_FILES
    (stage,) = json.loads((tmp_path / "out" / "training_history.json").read_text())["stages"]
    assert (stage["stage"], stage["vocabulary_before"], stage["parent"]["name"]) == ("vocabulary", 600, "model")
    assert done.stdout.splitlines()[-1].startswith(f"vocabulary 600 -> {stage['vocabulary']},")
    assert stage["tokenizer_sha256"] == fingerprint(expanded)
    sha256 = hashlib.sha256((model_dir / WEIGHTS_FILE).read_bytes()).hexdigest()
    assert stage["parent"]["weights"][WEIGHTS_FILE]["sha256"] == sha256
    # If no row is new, only the name of the base is copied.
    init_model(
        InitModelSettings(tmp_path / "out", tmp_path / "out", tmp_path / "again", dtype="bfloat16", overwrite=True)
    )
    again = json.loads((tmp_path / "again" / "training_history.json").read_text())
    assert again == {"version": 1, "base_model": "model", "stages": [stage]}


def test_as_a_module_and_one_line_for_a_mistake(assert_user_error, model_dir, expanded):
    command = [
        sys.executable,
        "-m",
        "colossal_llama2.model.init_model",
        "--source_model_and_tokenizer_path",
        str(model_dir),
        "--target_tokenizer_path",
        str(expanded),
        "--target_model_path",
        str(model_dir),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert_user_error(done, "init_model.py: error:", "already holds a model")


def test_folders_that_are_refused(model_dir, expanded, tokenizer_dir, tmp_path):
    def refused(words, *, source=model_dir, tokenizer=expanded, target=tmp_path / "out"):
        with pytest.raises(UserError, match=words):
            init_model(InitModelSettings(source, tokenizer, target))

    refused("--source_model_and_tokenizer_path .* is not a folder", source=tmp_path / "missing")
    refused("--target_tokenizer_path .* is not a folder", tokenizer=tmp_path / "missing")
    refused("inside the source", target=model_dir / "out")
    refused("already exists", target=tmp_path)
    (tmp_path / "file").touch()
    refused("is not a folder", target=tmp_path / "file")
    refused("holds no config.json", source=tokenizer_dir)
    refused(
        "does not extend .*piece 600 is missing",
        source=_with_tokenizer(model_dir, expanded, tmp_path / "a"),
        tokenizer=tokenizer_dir,
    )
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
            init_model(InitModelSettings(source, expanded, tmp_path / "out"))

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
    refused(
        "never unpickled.*convert: python -c",
        lambda source: (source / WEIGHTS_FILE).rename(source / "pytorch_model-00001-of-00001.bin"),
    )
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
    monkeypatch.setattr(SentencePieceEncoder, "encode", lambda self, texts, dummy_prefix=True: [[] for _ in texts])
    with pytest.raises(UserError, match="encodes .* as nothing"):
        init_model(InitModelSettings(model_dir, expanded, tmp_path / "out"))


def test_a_failed_write_leaves_nothing(model_dir, expanded, tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("colossal_llama2.model.safetensors_stream._mean_rows", fail)
    target = shutil.copytree(expanded, tmp_path / "target")
    before = sorted(path.name for path in target.iterdir())
    for place in (target, tmp_path / "out"):
        with pytest.raises(OSError, match="No space .*model.safetensors"):
            init_model(InitModelSettings(model_dir, expanded if place != target else target, place))
    assert sorted(path.name for path in target.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("tie", [False, True])
def test_text_without_new_pieces_gives_the_source_logits(tokenizer_dir, expanded, tmp_path, tie):
    source_dir = tiny.make_model(tmp_path / "source", tokenizer_dir, tie=tie)
    init_model(InitModelSettings(source_dir, expanded, tmp_path / "out"))
    source, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source_dir, tmp_path / "out"))
    documents = zip(
        *(load_encoder(folder).encode(tiny.english_documents()) for folder in (source_dir, expanded)), strict=True
    )
    old = [ids for ids, target_ids in documents if max(target_ids) < 600 and ids == target_ids]
    assert len(old) > 100
    for ids in old[:20]:
        with torch.no_grad():
            before, after = (m(torch.tensor([ids]), output_hidden_states=True) for m in (source, model))
        assert all(map(torch.equal, before.hidden_states, after.hidden_states))
        torch.testing.assert_close(after.logits[..., :600], before.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("before, after", [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32")])
def test_dtype_converts_every_weight(tokenizer_dir, expanded, tmp_path, before, after, monkeypatch):
    monkeypatch.setattr("colossal_llama2.model.safetensors_stream.CHUNK_BYTES", 1000)
    source = tiny.make_model(tmp_path / "source", tokenizer_dir, dtype=before)
    tensors = load_file(source / WEIGHTS_FILE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8, dtype=torch.float32)
    tensors["position_ids"] = torch.arange(3)
    save_file(tensors, source / WEIGHTS_FILE, metadata={"format": "pt"})
    init_model(InitModelSettings(source, expanded, tmp_path / "out", dtype=after))
    written = weights_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == after
    for name, tensor in tensors.items():
        kept = written[name][: len(tensor)]
        assert torch.equal(kept, tensor.to(kept.dtype))
        stays = name == "position_ids" or name.endswith("inv_freq")
        assert kept.dtype == (tensor.dtype if stays else getattr(torch, after))
    new = mean_rows(tensors[INPUT_EMBEDDING].float(), source, expanded).to(getattr(torch, after))
    torch.testing.assert_close(written[INPUT_EMBEDDING][600:], new)
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_number_too_large_for_the_dtype_is_refused(model_dir, expanded, tmp_path):
    source = shutil.copytree(model_dir, tmp_path / "source")
    tensors = load_file(source / WEIGHTS_FILE)
    tensors["model.norm.weight"][:2] = torch.tensor([65504.0, -65504.0])
    save_file(tensors, source / WEIGHTS_FILE)
    init_model(InitModelSettings(source, expanded, tmp_path / "kept", dtype="float16"))
    tensors["model.norm.weight"][2] = 70000.0
    save_file(tensors, source / WEIGHTS_FILE)
    with pytest.raises(UserError, match="model.norm.weight: 1 of its numbers would be too large for --dtype float16"):
        init_model(InitModelSettings(source, expanded, tmp_path / "out", dtype="float16"))
    init_model(InitModelSettings(source, expanded, tmp_path / "out", dtype="bfloat16"))
    with pytest.raises(ValueError, match="dtype is 'fp16'"):
        init_model(InitModelSettings(source, expanded, tmp_path / "misspelt", dtype="fp16"))
    edited_json(source / "config.json", quantization_config={"bits": 4})
    with pytest.raises(UserError, match="quantized"):
        init_model(InitModelSettings(source, expanded, tmp_path / "quantized", dtype="float16"))
    assert not list(tmp_path.glob(".*"))


def test_a_moved_row_may_also_be_too_large(model_dir, tmp_path):
    source = padded(model_dir, tmp_path / "source", 1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(source)
    tensors = load_file(source / WEIGHTS_FILE)
    tensors[INPUT_EMBEDDING][600, :3] = torch.tensor([65504.0, 70000.0, -1e30])
    save_file(tensors, source / WEIGHTS_FILE, metadata={"format": "pt"})
    target_tokenizer = expand(source, tmp_path)
    with pytest.raises(UserError, match="embed_tokens.weight: 2 of its numbers would be too large"):
        init_model(InitModelSettings(source, target_tokenizer, tmp_path / "out", dtype="float16"))
    assert not (tmp_path / "out").exists()


def test_config_code_is_never_run_and_sizes_must_match(model_dir, expanded, tmp_path, caplog):
    source = shutil.copytree(model_dir, tmp_path / "source")
    edited_json(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    with caplog.at_level("INFO", logger="colossal_llama2"):
        init_model(InitModelSettings(source, expanded, tmp_path / "out"))
    assert "auto_map is left out" in caplog.text
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    edited_json(source / "config.json", model_type="other")
    with pytest.raises(UserError, match="its own code .auto_map., which is never run"):
        init_model(InitModelSettings(source, expanded, tmp_path / "other"))
    shutil.copyfile(model_dir / "config.json", source / "config.json")
    for change in ({"vocab_size": 601}, {"hidden_size": 65}):
        edited_json(source / "config.json", **change)
        with pytest.raises(UserError, match="is 600 x 64, but its config.json has"):
            init_model(InitModelSettings(source, expanded, tmp_path / "other"))


def test_integer_embeddings_are_refused(model_dir, expanded, tmp_path):
    source = shutil.copytree(model_dir, tmp_path / "source")
    tensors = load_file(source / WEIGHTS_FILE)
    tensors[INPUT_EMBEDDING] = tensors[INPUT_EMBEDDING].to(torch.int8)
    save_file(tensors, source / WEIGHTS_FILE)
    with pytest.raises(UserError, match="has the dtype I8"):
        init_model(InitModelSettings(source, expanded, tmp_path / "out"))


def test_a_full_disk_is_reported_before_anything_is_written(model_dir, expanded, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=12345)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(RunError) as expected:
        init_model(InitModelSettings(model_dir, expanded, tmp_path / "deep" / "out"))
    needed = int(
        re.match(r"([\d,]+) bytes are needed in .*, 12,345 bytes are free", str(expected.value))[1].replace(",", "")
    )
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    init_model(InitModelSettings(model_dir, expanded, tmp_path / "deep" / "out"))
    written = sum(path.stat().st_size for path in (tmp_path / "deep" / "out").iterdir())
    assert 0 <= written - needed < 4096  # the two configs


# --overwrite.


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwrite_replaces_the_whole_folder(model_dir, expanded, tokenizer_dir, tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr("colossal_llama2.storage.publishing._exchange", lambda one, other: False)
    target = shutil.copytree(expanded, tmp_path / "target")
    (target / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (target / "vocabulary_report.json").write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(target)
    init_model(InitModelSettings(model_dir, target, link, overwrite=True))
    check(model_dir, expanded, target)
    names = {path.name for path in expanded.iterdir()} | MODEL_FILES
    assert {path.name for path in target.iterdir()} == names | {"vocabulary_report.json"}
    assert link.is_symlink() and {path.name for path in tmp_path.iterdir()} == {"target", "link"}
    init_model(InitModelSettings(model_dir, expanded, tmp_path / "new", overwrite=True))
    check(model_dir, expanded, tmp_path / "new")


def test_overwrite_keeps_the_old_one_until_the_new_is_complete(model_dir, expanded, tmp_path, monkeypatch):
    init_model(InitModelSettings(model_dir, expanded, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*arguments, **named):
        raise OSError(5, "Input/output error")

    for place in ("safetensors_stream._mean_rows", "init_model._write_configs", "init_model.publish"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(f"colossal_llama2.model.{place}", fail)
            init_model(InitModelSettings(model_dir, expanded, tmp_path / "out", overwrite=True))
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_overwrite_refuses(model_dir, expanded, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("thesis.txt", "pytorch_model.bin"):
        (other / name).write_text("mine")
        with pytest.raises(UserError, match=f"would remove {name}"):
            init_model(InitModelSettings(model_dir, expanded, other, overwrite=True))
    source = shutil.copytree(model_dir, tmp_path / "source")
    with pytest.raises(UserError, match="which is in the target"):
        init_model(InitModelSettings(source, expanded, source, overwrite=True))
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in source.iterdir():
        (linked / path.name).symlink_to(path)
    with pytest.raises(UserError, match="which is in the target"):
        init_model(InitModelSettings(linked, expanded, source, overwrite=True))
    finished = tmp_path / "finished"
    init_model(InitModelSettings(model_dir, expanded, finished))
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "pytorch_model.bin.index.json"):
        (finished / name).write_text("mine")
        with pytest.raises(UserError, match=f"would remove {name}"):
            init_model(InitModelSettings(model_dir, expanded, finished, overwrite=True))
        (finished / name).unlink()
    assert len(list(other.iterdir())) == 2 and (source / WEIGHTS_FILE).exists() and not list(tmp_path.glob(".*"))


def test_a_parent_that_cannot_be_written_to_is_found_before_any_work(model_dir, expanded, tmp_path, monkeypatch):
    init_model(InitModelSettings(model_dir, expanded, tmp_path / "out"))
    (tmp_path / "new").mkdir()
    for target, closed, named in (
        (tmp_path / "new" / "out", tmp_path / "new", {}),
        (tmp_path / "out", tmp_path, {"overwrite": True}),
        (tmp_path / "out", tmp_path / "out", {"overwrite": True}),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"no write permission in {closed};"):
            # Root may write everywhere, so the system's answer is patched.
            patch.setattr("os.access", lambda path, mode, closed=closed, **_: Path(path) != closed)
            patch.setattr("colossal_llama2.model.init_model._read_config", None)
            init_model(InitModelSettings(model_dir, expanded, target, **named))


# Killed runs.

SLOW = """
import sys, time
from colossal_llama2 import logs
from colossal_llama2.model import init_model, safetensors_stream
safetensors_stream.CHUNK_BYTES = 20_000

class Tell(logs.SilentProgress):
    def update(self, count=1, **figures):
        print("wrote", flush=True)
        time.sleep(0.01)

logs.progress = lambda **named: Tell()
init_model.publish = lambda *given, **named: (print("publish", flush=True), time.sleep(60))
init_model.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "random", "publish"])
def test_a_killed_run_leaves_nothing_under_the_final_name(model_dir, expanded, tmp_path, caplog, moment):
    source = {"--source_model_and_tokenizer_path": model_dir, "--target_tokenizer_path": expanded}
    words = [str(word) for pair in (source | {"--target_model_path": tmp_path / "out"}).items() for word in pair]
    child = subprocess.Popen([sys.executable, "-c", SLOW, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for _ in range(1 if moment == "start" else random.randrange(2, 30)):
        assert child.stdout.readline() == "wrote\n"
    while moment == "publish" and child.stdout.readline() != "publish\n":
        pass
    with pytest.raises(UserError, match="another run is writing"):
        init_model(InitModelSettings(model_dir, expanded, tmp_path / "out"))
    child.kill()
    child.communicate()
    (leftover,) = tmp_path.iterdir()
    assert re.fullmatch(r"\.out\.[a-z0-9_]{8}\.tmp", leftover.name)
    with caplog.at_level("INFO", logger="colossal_llama2"):
        init_model(InitModelSettings(model_dir, expanded, tmp_path / "out"))
    assert f"removing {leftover}" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check(model_dir, expanded, tmp_path / "out")


def test_after_a_kill_between_the_two_renames_the_old_folder_is_restored(model_dir, expanded, tmp_path, caplog):
    init_model(InitModelSettings(model_dir, expanded, tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / ".out.12345678.old")
    (tmp_path / ".out.mine.tmp").mkdir()
    with caplog.at_level("INFO", logger="colossal_llama2"), pytest.raises(UserError, match="already holds a model"):
        init_model(InitModelSettings(model_dir, expanded, tmp_path / "out"))
    assert "its old content is restored" in caplog.text
    check(model_dir, expanded, tmp_path / "out")
    assert (tmp_path / ".out.mine.tmp").exists()  # not a name that we create
