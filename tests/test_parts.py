"""A long text encoded in parts: the same ids and bytes as at once, for every kind of model and text; and its memory."""

import io
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write import prepare
from colossal_llama2.dataset.write.records import read_sft_row
from colossal_llama2.dataset.write.tokenization import tokenize_sft
from colossal_llama2.encoding.bpe_model import BpeModel, scores_below, with_pieces
from colossal_llama2.encoding.fast_encoder import FastEncoder, fastest_class
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.encoding.safe_cuts import PART_CHARACTERS
from colossal_llama2.tokenizer.closure import plan_extension
from tests import tiny
from tests.preparing import contents, read_jsonl, write_lines
from tests.preparing import settings as keywords_of

CHINESE_PIECES = ["人工智能", "改变世界", "明月松间照", "，清泉", "　　", "的的", "x的"]
SPACED_PIECES = ["▁the▁", "s▁", "e▁f", "▁▁▁▁▁▁", "\n\n"]
# Kinds of model: settings of the trainer, pieces that are appended with their characters.
MODELS = {
    "llama": ({}, []),
    "extended": ({}, CHINESE_PIECES),
    "not closed": ({}, CHINESE_PIECES),
    "spaces inside": ({}, SPACED_PIECES),
    "no bytes": ({"byte_fallback": False}, CHINESE_PIECES),
    "user-defined": ({"user_defined_symbols": ["[INST]", "\n\n", "的x", "a b"]}, CHINESE_PIECES),
    "user-defined, no bytes": ({"user_defined_symbols": ["<b>", "Ω"], "byte_fallback": False}, []),
    "no dummy prefix": ({"add_dummy_prefix": False}, CHINESE_PIECES),
    "normalizer": ({"normalization_rule_name": "nmt_nfkc"}, []),
    "spaces removed": ({"remove_extra_whitespaces": True}, []),
    "suffix": ({"treat_whitespace_as_suffix": True}, []),
}
WORDS = [
    *"the of state def return e s f x a b".split(),
    " ",
    "  ",
    " " * 7,
    "\n",
    "\n\n",
    "\t",
    "\u3000",
    "\u00a0",
    "▁",
    "e\u0301",
    "ﬁ",
    "[INST]",
    "<b>",
    "<s>",
    "<0x0A>",
    "ΩΩ",
    "עברית",
    "ไทย",
    "👩\u200d🚀",
    "的x的x",
    "a b a b",
    *"人工智能改变世界明月松间照，清泉的的的鎏鎏",
]
TEXTS = st.lists(st.sampled_from(WORDS) | st.characters(exclude_categories=["Cs"]), max_size=60).map("".join)


def trained(**changes) -> bytes:
    plain = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": [],
    }
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.english_documents()[:80]),
        model_writer=content,
        vocab_size=400,
        minloglevel=2,
        **{**plain, **changes},
    )
    return content.getvalue()


def folder_of(name: str, folder: Path) -> Path:
    changes, pieces = MODELS[name]
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(trained(**changes))
    model = BpeModel.read(folder)
    pieces = [piece for piece in pieces if piece not in model.pieces]
    if name == "extended":
        plan = plan_extension(model, pieces, closure="complete", piece_scores="below")
        pieces, scores = plan.pieces, plan.scores
    else:
        # Some of their characters are unknown and some are not reached, which must not matter.
        characters = dict.fromkeys("".join(pieces))
        pieces = [*(one for one in characters if one not in (*model.pieces, *pieces, "间")), *pieces]
        scores = scores_below(model.lowest_merge, len(pieces))
    (folder / "tokenizer.model").write_bytes(with_pieces(model.content, pieces, scores))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_ids_and_bytes_are_those_of_the_whole_text(name, tmp_path):
    folder = folder_of(name, tmp_path / "tokenizer")
    encoder = load_encoder(folder)
    kinds = [encoder, FastEncoder(folder)] if fastest_class(folder) is FastEncoder else [encoder]
    assert len(kinds) == 2 or name not in ("llama", "extended")
    numbers = []
    of_sizes = {}

    def of_size(kind, size: int):
        """An encoder of the same class that encodes in parts of `size` characters."""
        key = type(kind), size
        if key not in of_sizes:
            of_sizes[key] = type(kind)(folder, size)
        return of_sizes[key]

    @settings(max_examples=100, deadline=None)
    @given(TEXTS, st.booleans(), st.integers(1, 12))
    def check(text, dummy_prefix, size):
        expected = [(kind.encode([text, "a"], dummy_prefix=dummy_prefix)) for kind in kinds]
        sizes = encoder.bytes_of_tokens(text, expected[0][0], dummy_prefix=dummy_prefix).tolist()
        cut = list(encoder._safe_cuts.parts_of(text, size))
        assert "".join(cut) == text
        numbers.append(len(cut))
        for kind, ids in zip(kinds, expected, strict=True):
            with_parts = of_size(kind, size)
            assert with_parts.encode([text, "a"], dummy_prefix=dummy_prefix) == ids
            assert with_parts.encode_long(text, dummy_prefix=dummy_prefix).tolist() == ids[0]
        in_parts = of_size(encoder, size)
        assert in_parts.bytes_of_tokens(text, expected[0][0], dummy_prefix=dummy_prefix).tolist() == sizes

    check()
    assert (max(numbers) > 3) is (name not in ("normalizer", "spaces removed", "suffix"))


@pytest.mark.slow
def test_long_documents_give_the_same_files_in_parts_as_at_once(tokenizer_dir, tmp_path):
    text = "\n\n".join(tiny.english_documents())[:300_000]
    rows = [
        {"target": text[:9000]},
        {"target": text, "source": "Copy: "},
        {"target": text[:500]},
        {"target": text},
        {"source": text, "target": "\u2581 the end"},
    ]
    write_lines(tmp_path / "in" / "rows.jsonl", rows)
    outputs = []
    for size in (1 << 30, PART_CHARACTERS, 1000):
        out = tmp_path / str(size)
        options = {"eval_fraction": 0.2, "seed": 3, "sizes": WorkSizes(part_characters=size)}
        prepare.prepare_pretrain(**keywords_of([tmp_path / "in"], tokenizer_dir, out, max_length=512, **options))
        outputs.append({name: content for name, content in contents(out).items() if "manifest" not in name})
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(read_jsonl(tmp_path / "1000" / "jsonl")) > 400


def test_long_conversations_give_the_same_files_in_parts_as_at_once(tokenizer_dir, tmp_path):
    text = "\n\n".join(tiny.english_documents())[:20_000]
    talks = [
        [("system", text[:5000]), ("user", text[5000:5100]), ("assistant", text[5100:7000]), ("user", "and?")],
        [("user", "Hi"), ("assistant", text[:90]), ("user", text[:15000]), ("assistant", "yes"), ("user", text[:30])],
        [("assistant", text[:3000]), ("user", text[:3000]), ("assistant", text[3000:6000]), ("assistant", "end")],
        [("user", "Hi"), ("assistant", text)],
        [("user", "Hi"), ("assistant", "Hello!")],
    ]
    rows = [{"messages": [{"role": role, "content": content} for role, content in talk]} for talk in talks]
    write_lines(tmp_path / "in" / "rows.jsonl", rows)
    outputs = []
    for size, much in ((1 << 30, 1 << 30), (1000, 1 << 30), (1 << 30, 100)):
        out = tmp_path / f"{size} {much}"
        sizes = WorkSizes(part_characters=size, batch_characters=much)
        prepare.prepare_sft(**keywords_of([tmp_path / "in"], tokenizer_dir, out, max_length=6000, sizes=sizes))
        outputs.append(contents(out))
    assert outputs[0] == outputs[1] == outputs[2]
    assert sorted(sample["seq_length"] > 500 for sample in read_jsonl(out / "jsonl")) == [False, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("message_characters", [1 << 20, 100])
def test_the_dropped_part_of_a_long_conversation_needs_little_memory(message_characters, tokenizer_dir):
    text = "\n\n".join(tiny.english_documents())[: 1 << 20]
    content = [text[start : start + message_characters] for start in range(0, len(text), message_characters)]
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": part} for number, part in enumerate(["Hi", "Hello!", *content])]
    row = read_sft_row({"messages": messages})
    encoder = load_encoder(tokenizer_dir)
    encoder.encode_long(text)
    tracemalloc.start()
    try:
        (tokens,) = tokenize_sft([row], encoder=encoder, max_length=1000, batch_characters=1 << 18)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tokens.tokens_in > len(text) // 5 and 0 < len(tokens.input_ids) <= 1000
    # Four bytes a token, and the memory of a segment; as lists, the tokens alone needed over 60 bytes each.
    assert peak < 8 * len(text) + 700 * len(messages)


# Prints the increase of the process's peak memory while a file is prepared, in bytes.
MEASURED = """
import json
import sys
import tracemalloc
from pathlib import Path

from colossal_llama2.dataset.write import prepare
from tests.preparing import settings

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

peaks = []
for name in ("short", "long"):
    home = Path(sys.argv[1])
    prepare.prepare_pretrain(**settings([home / name], sys.argv[2], home / f"out-{name}", max_length=2048))
    peaks.append(peak())
print(json.dumps(peaks[1] - peaks[0]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_long_document_needs_memory_in_proportion_to_its_bytes(tokenizer_dir, tmp_path):
    text = "\n\n".join(tiny.english_documents())[:4_000_000]
    for name, target in (("short", text[:2000]), ("long", text * (6_000_000 // len(text) + 1))):
        write_lines(tmp_path / name / "rows.jsonl", [{"target": target}])
    size = (tmp_path / "long" / "rows.jsonl").stat().st_size
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(tokenizer_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    # The line, its text, and for each token an id, its bytes and a label. Encoded at once, it took three times as much.
    assert 0 < json.loads(done.stdout.splitlines()[-1]) < 20 * size
