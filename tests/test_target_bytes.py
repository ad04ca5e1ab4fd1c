"""The bytes of predicted text in prepared pieces, against the bytes that their tokens spell, counted independently."""

import io
import json

import datasets
import pytest
import sentencepiece

from colossal_llama2.dataset.read import eval_sets
from colossal_llama2.dataset.write import prepare
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.errors import UserError
from tests import bits_per_byte, tiny
from tests.preparing import manifest, read_jsonl, settings, write_lines

# Characters of three bytes and three tokens each, and then text whose tokens have several bytes.
MIXED = [tiny.CHINESE[:number] + tiny.english_documents()[number][:200] for number in range(1, 40)]
ODD = ["  two  spaces ", "▁ as text ▁▁", "e\u0301 ﬁ ① ＡＢ", "a\nb\t\0c", "\ufeffmark", "😀" * 30, "x" * 70]


def rows() -> list:
    return [{"target": text, **({"source": "Say: "} if n % 3 == 0 else {})} for n, text in enumerate(MIXED + ODD)]


@pytest.mark.parametrize("overlong", ["split", "truncate"])
def test_pieces_count_what_their_tokens_spell(overlong, tokenizer_dir, tmp_path):
    lines = [row for row in rows() if "▁" not in row["target"]]
    write_lines(tmp_path / "in" / "rows.jsonl", lines)
    prepare.prepare_pretrain(
        **settings([tmp_path / "in"], tokenizer_dir, tmp_path, max_length=32, overlong=overlong, bins=2)
    )
    processor = bits_per_byte.load_processor(tokenizer_dir / "tokenizer.model")
    samples = read_jsonl(tmp_path / "jsonl")
    expected = [bits_per_byte.predicted_bytes(processor, sample) for sample in samples]
    assert [sample["document_target_bytes"] for sample in samples] == expected
    total = sum(map(sum, expected))
    whole = sum(len(row["target"].encode()) for row in lines)
    # With "split", only the text of the first tokens of later pieces is missing.
    assert 0.9 * whole < total < whole if overlong == "split" else 0.1 * whole < total < 0.6 * whole


@pytest.mark.parametrize("normalizer", ["nmt_nfkc", "identity"])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_bytes_are_those_of_the_text_under_any_normalizer(normalizer, byte_fallback, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.english_documents()[:300]),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        normalization_rule_name=normalizer,
        byte_fallback=byte_fallback,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    encoder = load_encoder(tmp_path)
    for text in MIXED + ODD:
        for dummy_prefix in (True, False):
            (ids,) = encoder.encode([text], dummy_prefix=dummy_prefix)
            found = encoder.bytes_of_tokens(text, ids, dummy_prefix=dummy_prefix)
            assert found.sum() == len(text.encode()) and (found >= 0).all() and len(found) == len(ids)
    # Characters that the model lacks: as separate bytes, or all in one <unk>.
    (ids,) = encoder.encode(["a 鎏鎏  "])
    found = encoder.bytes_of_tokens("a 鎏鎏  ", ids).tolist()
    removed = 2
    if normalizer == "identity" and byte_fallback:
        assert found[-6:] == [1, 1, 1, 1, 1, 1 + removed]
    else:
        assert sum(found) == 10 and found[-1] in (1 + removed, 3 + removed, 6 + removed)


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_labels_that_are_unknown_tokens_are_counted_and_warned_of(byte_fallback, tmp_path, caplog, capsys):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.english_documents()[:100]),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        normalization_rule_name="identity",
        byte_fallback=byte_fallback,
        minloglevel=2,
    )
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(model.getvalue())
    rows = [{"target": "the \u05e2\u05d1 state"}, {"source": "\u05e2 of ", "target": "the \u05e2 x \u0e44"}] * 20
    write_lines(tmp_path / "in" / "rows.jsonl", [*rows, {"target": "the state" * 50}])
    prepare.prepare_pretrain(**settings([tmp_path / "in"], tmp_path / "tokenizer", tmp_path, max_length=64))
    samples = read_jsonl(tmp_path / "jsonl")
    counts = {
        "labels that are <unk>": sum(sample["labels"].count(0) for sample in samples),
        "tokens of samples that are <unk>": sum(sample["input_ids"].count(0) for sample in samples),
    }
    assert manifest(tmp_path)["notes"] == ({} if byte_fallback else counts)
    assert byte_fallback or list(counts.values()) == [60, 80]
    trained = manifest(tmp_path)["total"]["trained"]
    warnings = [record.message for record in caplog.records if "<unk>" in record.message]
    assert len(warnings) == (not byte_fallback)
    if warnings:
        assert f"60 of {trained:,} labels ({60 / trained:.2%}) and 80 of " in warnings[0]
        assert "byte_fallback" in warnings[0]
        assert "60  labels that are <unk>" in capsys.readouterr().out


def test_older_data_with_cut_documents_has_no_byte_counts(tokenizer_dir, tmp_path, caplog):
    """Before version 2 they were divided by tokens; without cut documents they are right."""
    for name, length in (("cut", 32), ("whole", 2000)):
        write_lines(tmp_path / name / "rows.jsonl", rows())
        keywords = settings([tmp_path / name], tokenizer_dir, tmp_path / f"out-{name}", max_length=length)
        prepare.prepare_pretrain(**keywords, eval_fraction=0.3)
        folder = tmp_path / f"out-{name}" / "arrow"
        now = eval_sets.target_bytes(str(folder / "eval"))
        assert now == sum(map(sum, datasets.load_from_disk(str(folder / "eval"))["document_target_bytes"])) > 0
        for path in (folder / "manifest.json", folder / "eval" / "dataset_info.json"):
            content = json.loads(path.read_text())
            content.update({"version": 1} if path.name == "manifest.json" else {"description": ""})
            path.write_text(json.dumps(content))
        caplog.clear()
        assert eval_sets.target_bytes(str(folder / "eval")) == (None if name == "cut" else now)
        assert ("prepare it again" in caplog.text) is (name == "cut")
        # The present command would write something else.
        with pytest.raises(UserError, match="it was made by another version"):
            prepare.prepare_pretrain(**keywords, eval_fraction=0.3)
