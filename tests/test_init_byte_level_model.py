"""Initializing a model with a byte-level BPE: each new row against a plain loop, and which ids and rows stay."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from colossal_llama2.encoding.byte_level_file import ByteLevelModel, bytes_of
from colossal_llama2.encoding.registry import fingerprint, load_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.model.init_model import InitModelSettings, init_model
from colossal_llama2.model.loading import NEW_ROWS_KEY
from colossal_llama2.model.tied_weights import INPUT_EMBEDDING, OUTPUT_EMBEDDING
from tests import tiny
from tests.byte_level import END, extend, make_byte_level, make_llama3

PIECES = ["人工智能", "鎏金", " the world", "éclair", "😀"]
ADDED = ["<|tool|>"]


def make_model(folder, tokenizer, *, tie=False, rows=None):
    tiny.make_model(folder, tokenizer, tie=tie)
    config = json.loads((folder / "config.json").read_text())
    if rows is not None:
        weights = load_file(folder / "model.safetensors")
        for name in (INPUT_EMBEDDING, OUTPUT_EMBEDDING):
            if name in weights:
                missing = rows - len(weights[name])
                more = torch.full((max(missing, 0), weights[name].shape[1]), 7.0)
                weights[name] = torch.cat([weights[name], more])[:rows].contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config["vocab_size"] = rows
    ids = ByteLevelModel.read(tokenizer).added
    # LLaMA-3's are lists.
    config |= {"bos_token_id": load_encoder(tokenizer).bos_id, "eos_token_id": [ids[END], ids["<|eot_id|>"]]}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [ids[END], ids["<|eot_id|>"]], "pad_token_id": ids["<|end_header_id|>"]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def merged(model: ByteLevelModel, token: str) -> list[int]:
    """The ids of a token's bytes after the source's merges, best pair first, one by one."""
    ranks = {pair: rank for rank, pair in enumerate(model.merges)}
    parts = list(token)
    while True:
        pairs = [
            (ranks[pair], place) for place, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in ranks
        ]
        if not pairs:
            return [model.vocabulary[part] for part in parts]
        _, place = min(pairs)
        parts[place : place + 2] = ["".join(parts[place : place + 2])]


def check_rows(source, tokenizer, target):
    """Old rows bit for bit, and new rows as the float32 mean of their bags. Returns the number of new rows."""
    old, new = ByteLevelModel.read(source), ByteLevelModel.read(tokenizer)
    before, after = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    old_ids, new_ids = {**old.vocabulary, **old.added}, {**new.vocabulary, **new.added}
    fresh = {token: index for token, index in new_ids.items() if token not in old_ids}
    for name, matrix in before.items():
        if name not in (INPUT_EMBEDDING, OUTPUT_EMBEDDING):
            assert torch.equal(after[name], matrix)
            continue
        for token, index in new_ids.items():
            if token not in fresh:
                assert torch.equal(after[name][index], matrix[old_ids[token]])
        for token, index in fresh.items():
            ids = load_encoder(source).encode([token])[0] if token in new.added else merged(old, token)
            mean = torch.stack([matrix[row].float() for row in ids]).mean(0).to(matrix.dtype)
            torch.testing.assert_close(after[name][index], mean)
    model = LlamaForCausalLM.from_pretrained(target)
    assert model.config.vocab_size == len(after[INPUT_EMBEDDING]) >= new.size
    return len(fresh)


@pytest.mark.parametrize("tie, rows", [(False, None), (True, 640)])
@pytest.mark.parametrize("specials_first", [False, True])
def test_new_rows_are_the_means_of_their_bags(tie, rows, specials_first, tmp_path, capsys):
    base = make_byte_level(tmp_path / "base", specials_first=specials_first)
    source = make_model(tmp_path / "source", base, tie=tie, rows=rows)
    tokenizer = extend(base, tmp_path / "tokenizer", PIECES, added=ADDED)
    # A stray file of tiktoken, which is not copied.
    (tokenizer / "tokenizer.model").write_bytes(b"IQ== %d\n" % ByteLevelModel.read(base).vocabulary["!"])
    init_model(InitModelSettings(source, tokenizer, tmp_path / "target", pad_vocab_to_multiple_of=64))
    new = ByteLevelModel.read(tokenizer)
    fresh = check_rows(source, tokenizer, tmp_path / "target")
    assert fresh == new.size - 600 > 10 and any(bytes_of(token)[-1] >= 0x80 for token in new.vocabulary)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config[NEW_ROWS_KEY] == [[600, new.size]] and config["vocab_size"] % 64 == 0
    before = json.loads((source / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id"):
        assert config[key] == before[key]
    generation = json.loads((tmp_path / "target" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == before["eos_token_id"]
    assert fingerprint(tmp_path / "target") == fingerprint(tokenizer)
    assert not (tmp_path / "target" / "tokenizer.model").exists()
    assert f"{fresh:,} rows initialized" in capsys.readouterr().out


def test_added_tokens_that_move_keep_their_rows_and_ids(tmp_path, caplog):
    caplog.set_level("INFO")
    base = make_byte_level(tmp_path / "base")
    source = make_model(tmp_path / "source", base)
    tokenizer = extend(base, tmp_path / "tokenizer", PIECES)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    old, size = ByteLevelModel.read(base), ByteLevelModel.read(tokenizer).size
    # As a tool that puts special tokens behind all others leaves them: their ids go to the last pieces.
    last = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])[-len(old.added) :]
    for (token, index), entry in zip(last, content["added_tokens"], strict=True):
        content["model"]["vocab"][token], entry["id"] = entry["id"], index
        content["model"]["vocab"][entry["content"]] = index
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    init_model(InitModelSettings(source, tokenizer, tmp_path / "target"))
    check_rows(source, tokenizer, tmp_path / "target")
    added = ByteLevelModel.read(tokenizer).added
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["eos_token_id"] == [added[END], added["<|eot_id|>"]] and config["bos_token_id"] == min(added.values())
    assert config[NEW_ROWS_KEY] == [[595, size - 5]]
    assert "its token moved" in caplog.text


def change(folder, edit):
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content["model"], content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_new_marks_of_the_tokenizer_are_those_of_the_model(tmp_path, caplog):
    caplog.set_level("INFO")
    tokenizer = make_byte_level(tmp_path / "chat", bos="<|start_header_id|>", eos="<|eot_id|>")
    source = make_model(tmp_path / "chat", tokenizer)
    ids = ByteLevelModel.read(tokenizer).added
    for name in ("config.json", "generation_config.json"):
        content = json.loads((source / name).read_text())
        (source / name).write_text(json.dumps({**content, "eos_token_id": ids["<|eot_id|>"]}))
    extended = extend(make_byte_level(tmp_path / "text", bos=END, eos=END), tmp_path / "extended", PIECES)
    init_model(InitModelSettings(source, extended, tmp_path / "target"))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "target" / name).read_text())
        assert content["eos_token_id"] == [ids["<|eot_id|>"], ids[END]]
    assert json.loads((tmp_path / "target" / "config.json").read_text())["bos_token_id"] == ids[END]
    assert (
        f"config.json: bos_token_id {ids['<|start_header_id|>']} is now {ids[END]}, as in the tokenizer" in caplog.text
    )
    model = LlamaForCausalLM.from_pretrained(tmp_path / "target")
    assert model.generation_config.eos_token_id == [ids["<|eot_id|>"], ids[END]]


def test_marks_that_only_the_source_lacks_or_has(tmp_path):
    source = make_model(tmp_path / "source", make_byte_level(tmp_path / "source"))
    (source / "generation_config.json").unlink()
    extended = extend(make_byte_level(tmp_path / "text", bos=None, eos=END), tmp_path / "extended", PIECES)
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    init_model(InitModelSettings(source, extended, tmp_path / "target"))
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    ids = ByteLevelModel.read(source).added
    assert (written["bos_token_id"], written["eos_token_id"]) == (None, [ids[END], ids["<|eot_id|>"]])
    assert not (tmp_path / "target" / "generation_config.json").exists()


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda model, _: model["merges"].insert(0, model["merges"].pop()), "the merge of rank 0 is not"),
        (lambda model, _: model["merges"].__delitem__(slice(9, None)), "the merge of rank 9 is not"),
        (lambda model, _: model["vocab"].update(Ġthe=999), "the id of 'Ġthe' is 999, 26. expected"),
        (lambda model, _: model["vocab"].update({"人".encode().hex(): 900}), "no token with the id"),
    ],
)
def test_tokenizers_that_do_not_extend_the_source(edit, words, tmp_path):
    base = make_byte_level(tmp_path / "base")
    source = make_model(tmp_path / "source", base)
    tokenizer = extend(base, tmp_path / "tokenizer", PIECES)
    change(tokenizer, edit)
    with pytest.raises(UserError, match=words):
        init_model(InitModelSettings(source, tokenizer, tmp_path / "target"))
    assert not (tmp_path / "target").exists()


def test_other_folders_that_are_refused(tokenizer_dir, tmp_path):
    base = make_byte_level(tmp_path / "base")
    source = make_model(tmp_path / "source", base, rows=500)
    with pytest.raises(UserError, match="has 500 rows, fewer than the 595 tokens"):
        init_model(InitModelSettings(source, extend(base, tmp_path / "more", PIECES), tmp_path / "target"))
    with pytest.raises(UserError, match="holds a SentencePiece tokenizer, and .* a byte-level BPE one"):
        init_model(InitModelSettings(source, tokenizer_dir, tmp_path / "target"))


def test_a_piece_with_a_byte_that_the_source_lacks(tmp_path, caplog):
    base = make_byte_level(tmp_path / "base", missing=b"\x04")
    source = make_model(tmp_path / "source", base)
    tokenizer = shutil.copytree(base, tmp_path / "tokenizer")
    size, added = ByteLevelModel.read(base).size, ByteLevelModel.read(base).added
    change(tokenizer, lambda model, _: model["vocab"].update(added))
    change(tokenizer, lambda model, _: model["vocab"].update({"Ą": size, "theĄ": size + 1}))
    with pytest.raises(UserError, match="encodes 'Ą' as nothing"):
        init_model(InitModelSettings(source, tokenizer, tmp_path / "target"))
    change(tokenizer, lambda model, _: (model["vocab"].pop("Ą"), model["vocab"].update({"theĄ": size})))
    init_model(InitModelSettings(source, tokenizer, tmp_path / "target"))
    assert "no tokens for some bytes of 1 new token, such as 'theĄ'" in caplog.text


def test_text_without_new_pieces_gives_the_source_logits(tmp_path):
    base = make_byte_level(tmp_path / "base")
    source = make_model(tmp_path / "source", base)
    tokenizer = extend(base, tmp_path / "tokenizer", PIECES)
    init_model(InitModelSettings(source, tokenizer, tmp_path / "target"))
    text = "An English text keeps its ids."
    (ids,) = load_encoder(source).encode([text])
    assert load_encoder(tmp_path / "target").encode([text]) == [ids]
    models = [LlamaForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "target")]
    with torch.no_grad():
        before, after = (model(torch.tensor([ids])).logits for model in models)
    assert torch.equal(before, after[..., :600])


@pytest.mark.slow
def test_llama3(tmp_path):
    base = make_llama3(tmp_path / "base")
    source = make_model(tmp_path / "source", base, tie=True)
    tokenizer = extend(base, tmp_path / "tokenizer", PIECES)
    init_model(InitModelSettings(source, tokenizer, tmp_path / "target"))
    new = ByteLevelModel.read(tokenizer)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config[NEW_ROWS_KEY] == [[128256, new.size]]
    assert (config["bos_token_id"], config["eos_token_id"]) == (128000, [128001, 128009])
    before, after = (
        load_file(folder / "model.safetensors")[INPUT_EMBEDDING] for folder in (source, tmp_path / "target")
    )
    assert torch.equal(after[:128256], before)
    plain = ByteLevelModel.read(base).plain_tokenizer()
    for token, index in new.vocabulary.items():
        if index >= 128256:
            ids = [part.id for part in plain.model.tokenize(token)]
            torch.testing.assert_close(after[index], before[ids].mean(0))
