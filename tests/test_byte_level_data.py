"""Prepared data, batches and chat templates of byte-level BPE tokenizers, with every combination of marks."""

import json
import shutil

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.dataset.inspect_data import InspectSettings, inspect_part
from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.layout.manifest import check_parts_fit
from colossal_llama2.dataset.write.document_marks import log_marks
from colossal_llama2.dataset.write.prepare import prepare_pretrain, prepare_sft
from colossal_llama2.dataset.write.records import read_sft_row
from colossal_llama2.dataset.write.tokenization import tokenize_sft
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.errors import UserError
from tests.byte_level import BEGIN, END, make_byte_level
from tests.preparing import manifest, pieces_of, settings, write_lines
from tests.tiny import CHINESE, english_documents

MARKS = {"both": (BEGIN, END), "one": (END, END), "no bos": (None, END)}
ROWS = [
    *({"target": text} for text in [*english_documents()[:40], CHINESE * 8, "!", f"Say {BEGIN}{END}."]),
    {"source": "翻译：", "target": CHINESE * 6, "category": "zh"},
]


@pytest.fixture(scope="module", params=list(MARKS))
def folder(request, tmp_path_factory):
    bos, eos = MARKS[request.param]
    return make_byte_level(tmp_path_factory.mktemp("marks") / "tokenizer", "llama3", bos=bos, eos=eos)


def opening(encoder) -> list[int]:
    return [encoder.bos_id] if encoder.bos_id >= 0 else []


@pytest.mark.parametrize("eos, warns", [("<|eot_id|>", True), (END, False)])
@pytest.mark.parametrize("bos", [BEGIN, None])
def test_marks_of_a_chat_around_plain_text_are_reported(bos, eos, warns, tmp_path, caplog):
    folder = make_byte_level(tmp_path / "tokenizer", bos=bos, eos=eos)
    write_lines(tmp_path / "in" / "rows.jsonl", ROWS)
    prepare_pretrain(**settings([tmp_path / "in"], folder, tmp_path, max_length=120))
    words = f"<|eot_id|> marks the turns of a chat, and here the documents too, since {folder} names it as eos_token."
    cure = f"init_tokenizer.py --eos_token '{END}', or change the entry in a copy of tokenizer_config.json"
    assert (words in caplog.text and cure in caplog.text) is warns
    assert ("a chat" in caplog.text) is warns


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|other|>"])
def test_both_marks_of_a_chat_are_reported_if_there_is_another(end, tmp_path, caplog):
    folder = make_byte_level(tmp_path / "tokenizer", "smollm2", specials_first=True)
    names = {BEGIN: "<|im_start|>", END: "<|im_end|>", "<|eot_id|>": end}
    for path in folder.iterdir():
        text = path.read_text()
        for old, new in names.items():
            text = text.replace(old, new)
        path.write_text(text)
    log_marks(load_encoder(folder), folder, chat_template=None)
    words = (
        f"<|im_start|> and <|im_end|> mark the turns of a chat, and here the documents too, since {folder} names them"
    )
    cure = "init_tokenizer.py --bos_token '<|endoftext|>' --eos_token '<|endoftext|>', or change the entries"
    assert (words in caplog.text and cure in caplog.text) is (end == "<|endoftext|>")


def test_pretraining_data(folder, tokenizer_dir, tmp_path, caplog):
    caplog.set_level("INFO")
    write_lines(tmp_path / "in" / "rows.jsonl", ROWS)
    prepare_pretrain(**settings([tmp_path / "in"], folder, tmp_path, max_length=120))
    encoder = load_encoder(folder)
    samples = datasets.load_from_disk(str(tmp_path / "arrow" / "part-00000"))
    found = {piece[0] for piece in pieces_of(samples)}
    first = opening(encoder)
    for row in ROWS:
        source, target = encoder.encode([row.get("source", ""), row["target"]])
        ids = tuple([*first, *source, *target, encoder.eos_id])
        assert any(piece == ids[: len(piece)] for piece in found), row
    masked = next(piece for piece in pieces_of(samples) if piece[2] == "zh")
    assert masked[1][: len(first) + 3] == (IGNORE_INDEX,) * (len(first) + 3)
    # Each byte of a target is predicted, but for those of the token that begins a document or a piece without a mark.
    expected = 0
    for _, labels, _ in pieces_of(samples):
        predicted = [label for label in labels[1:] if label not in (IGNORE_INDEX, encoder.eos_id)]
        expected += sum(len(encoder._bytes[token]) for token in predicted)
    assert sum(map(sum, samples["document_target_bytes"])) == expected
    written = manifest(tmp_path)
    assert written["tokenizer"] == {"sha256": encoder.fingerprint, "sample_texts": 45, "sample_differing": 0}
    assert not any("unk" in name for name in written["notes"])
    said = [record.message for record in caplog.records if "bos_token" in record.message]
    assert len(said) == (encoder.bos_text != BEGIN)
    check_parts_fit([str(tmp_path / "arrow" / "part-00000")], stage="pretrain", tokenizer_dir=str(folder))
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        check_parts_fit([str(tmp_path / "arrow" / "part-00000")], stage="pretrain", tokenizer_dir=str(tokenizer_dir))
    shown = InspectSettings(str(tmp_path / "arrow" / "part-00000"), str(folder), 99, 0, None)
    text = "\n".join(inspect_part(shown, is_coloured=False))
    assert f"{encoder.bos_text}!{END}" in text and f"Say {BEGIN}{END}.{END}" in text


def ours(encoder, messages) -> tuple:
    (row,) = tokenize_sft([read_sft_row({"messages": messages})], encoder=encoder, max_length=100_000)
    return row.input_ids, [int(label != IGNORE_INDEX) for label in row.labels]


def test_the_chat_template_gives_the_ids_of_fine_tuning(folder):
    encoder, tokenizer = load_encoder(folder), load_tokenizer(folder, pad_token="eos")
    has_bos = encoder.bos_id >= 0
    tokenizer.chat_template = chat_template(prefix_after_marks=False, has_dummy_prefix=False, has_bos=has_bos)
    texts = st.text(st.sampled_from("ab  <|>/人工\n\t:'\"{%}1é"), max_size=10)

    @hypothesis_settings(max_examples=60, deadline=None)
    @given(st.none() | texts, st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
    def check(system, turns):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, trained = ours(encoder, messages)
        assert tokenizer.apply_chat_template(messages, return_dict=False) == ids
        before = encoder.bos_id if has_bos else encoder.eos_id
        assert ids[: len(opening(encoder))] == opening(encoder) and ids.count(before) >= 2 * len(turns)
        last = [*encoder.encode([turns[-1][1]])[0], encoder.eos_id]
        assert ids[-len(last) :] == last and all(trained[-len(last) :])

    check()


def test_a_chat_template_that_is_not_used_is_logged(folder, tmp_path, caplog):
    """And the one that is written replaces it, also if it is in tokenizer_config.json."""
    from transformers import AutoTokenizer

    caplog.set_level("INFO")
    encoder = load_encoder(folder)
    log_marks(encoder, folder, chat_template="{{ own }}")
    assert "chat template" not in caplog.text
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    log_marks(encoder, copy, chat_template=None)
    assert "chat template" not in caplog.text
    log_marks(encoder, copy, chat_template="{{ own }}")
    before = encoder.bos_text or encoder.eos_text
    assert (
        f"has a chat template, which is not used: conversations are written as Human: {before}...{END}" in caplog.text
    )
    caplog.clear()
    log_marks(encoder, copy, chat_template="{{ messages }}")
    (copy / "chat_template.jinja").write_text("{{ bos_token }}")
    log_marks(encoder, copy, chat_template="{{ bos_token }}")
    # Not needed by SentencePiece.
    (copy / "chat_template.jinja").unlink()
    (copy / "tokenizer_config.json").write_text("damaged")
    log_marks(encoder, copy, chat_template="{{ own }}")
    assert "chat template" not in caplog.text
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    (copy / "chat_template.jinja").write_text("{{ bos_token }}")
    assert AutoTokenizer.from_pretrained(copy).chat_template == "{{ bos_token }}"


def test_conversations(folder, tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "明月松间照"}]
    write_lines(tmp_path / "in" / "rows.jsonl", [{"messages": messages, "system": "Be kind."}])
    prepare_sft(**settings([tmp_path / "in"], folder, tmp_path))
    (sample,) = datasets.load_from_disk(str(tmp_path / "arrow" / "part-00000"))
    encoder = load_encoder(folder)
    before = encoder.bos_text or encoder.eos_text
    expected = f"{encoder.bos_text}Be kind.\n\nHuman: {before}Hi{END}Assistant: {before}明月松间照{END}"
    assert sample["inputs_decode"] == expected and sample["labels_decode"] == [f"明月松间照{END}"]
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (tmp_path / "arrow" / "chat_template.jinja").read_text()
    messages = [{"role": "system", "content": "Be kind."}, *messages]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == sample["input_ids"]


def test_a_row_with_a_byte_that_has_no_token(tmp_path):
    folder = make_byte_level(tmp_path / "tokenizer", missing=b"\x04")
    rows = [{"target": text} for text in english_documents()[:30]]
    rows.insert(3, {"source": "a \x04", "target": "The text."})
    write_lines(tmp_path / "in" / "rows.jsonl", rows)
    keywords = settings([tmp_path / "in"], folder, tmp_path, eval_fraction=0.3, eval_dedup=True)
    with pytest.raises(
        UserError, match=r"rows.jsonl:4: the character '\\x04' \(U\+0004\) cannot be encoded: .* byte 04"
    ):
        prepare_pretrain(**keywords)
    prepare_pretrain(**{**keywords, "on_bad_row": "skip"})
    written = manifest(tmp_path)
    assert written["bad_rows"] == 1 and written["total"]["documents"] == 30
    bad = json.loads((tmp_path / "arrow" / "bad_rows.jsonl").read_text())
    assert bad["line"] == 4 and bad["reason"] == "a character that the tokenizer cannot encode"


@pytest.mark.parametrize("unk, pads", [(None, (END, END)), ("<|eot_id|>", ("<|eot_id|>", END))])
def test_padding_without_an_unknown_token(unk, pads, tmp_path):
    folder = make_byte_level(tmp_path / "tokenizer", unk=unk)
    for pad_token, text in zip(("unk", "eos"), pads, strict=True):
        tokenizer = load_tokenizer(folder, pad_token=pad_token)
        assert (tokenizer.pad_token, tokenizer.padding_side) == (text, "right")
        batch = tokenizer(["a", "a longer text"], padding=True, return_tensors="np")
        width = np.count_nonzero(batch["attention_mask"][0])
        assert set(batch["input_ids"][0][width:].tolist()) == {tokenizer.convert_tokens_to_ids(text)}
