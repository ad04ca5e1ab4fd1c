"""--eval_dedup against a plain count of shared runs of 13 words, for any workers, units and shares."""

import json
import random
import re

import datasets
import pytest

from colossal_llama2.dataset.layout import token_ledger
from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write import overlap, prepare
from colossal_llama2.dataset.write.records import PretrainRow
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.errors import UserError
from tests.preparing import manifest, settings, write_lines

WORDS = [f"word{number}" for number in range(300)]
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 300)]


def rows() -> list:
    """Texts of different lengths; a third repeat a part of another one, one with other case and spacing."""
    draw = random.Random(0)
    found = []
    for number in range(240):
        signs, joint = ((WORDS, " "), (CHARACTERS, ""))[number % 2]
        words = draw.choices(signs, k=draw.choice((5, 12, 13, 14, 40)))
        if number % 3 == 0 and number > 20:
            earlier = found[-2]["words"]
            words[3:3] = earlier[: draw.choice((12, 13, 20))]
        found.append({"words": words, "target": joint.join(words)})
    for row in found[::7]:
        row["target"] = row["target"].upper().replace(" ", ",\n ")
    return found


def prepared(folder, tokenizer_dir, **options) -> dict:
    lines = [{"target": row["target"]} for row in rows()]
    write_lines(folder / "in" / "rows.jsonl", [*lines[:100], b"", b"{", b"\n", *lines[100:]])
    keywords = {"max_length": 4096, "splicing": "none", "eval_fraction": 0.3, "eval_dedup": True, "on_bad_row": "skip"}
    shares = options.pop("shares", (None,))
    for shard in shares:
        given = settings([folder / "in"], tokenizer_dir, folder, **{**keywords, **options})
        prepare.prepare_pretrain(**given, shard=shard)
    return manifest(folder)["eval_dedup"]


def test_overlaps_are_those_of_a_plain_count(tokenizer_dir, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "colossal_llama2")
    report = prepared(tmp_path / "one", tokenizer_dir)
    decode = load_encoder(tokenizer_dir).decode
    held_out = {
        decode([token for token in sample["input_ids"] if token > 2])
        for sample in datasets.load_from_disk(str(tmp_path / "one" / "arrow" / "eval"))
    }

    def grams(row) -> set:
        return {tuple(row["words"][start : start + 13]) for start in range(len(row["words"]) - 12)}

    sides = {True: [], False: []}
    for row in rows():
        sides[row["target"] in held_out].append(row)
    trained = set().union(*map(grams, sides[False]))
    overlapping = [row for row in sides[True] if grams(row) & trained]
    short = [row for row in sides[True] if not grams(row)]
    assert report["documents"] == len(sides[True]) and report["too_short"] == len(short) > 5
    assert report["compared"] == len(sides[True]) - len(short) and report["overlapping"] == len(overlapping) > 5
    assert 3 <= len(report["examples"]) <= 5 and f"{len(overlapping)} of {report['compared']} held-out" in caplog.text
    lines = (tmp_path / "one" / "in" / "rows.jsonl").read_text().split("\n")
    for example in report["examples"]:
        for side in ("held_out", "training"):
            place, line = example[side].rsplit(":", 1)
            target = json.loads(lines[int(line) - 1])["target"]
            assert place.endswith("rows.jsonl") and (target in held_out) is (side == "held_out")
            assert "".join(example["text"].split()) in "".join(target.replace(",", "").lower().split())
    capsys.readouterr()
    token_ledger.print_tables(manifest(tmp_path / "one"))
    table = capsys.readouterr().out
    assert re.search(rf"^  overlapping +{len(overlapping)}  ", table, re.M)
    assert f"of {report['compared']} compared share 13 words" in table
    sizes = WorkSizes(unit_bytes=2000, lookup_grams=7)
    for name, options in (("two", {"num_workers": 2}), ("shares", {"shares": ((2, 2), (1, 2))})):
        again = prepared(tmp_path / name, tokenizer_dir, sizes=sizes, **options)
        assert {**again, "examples": []} == {**report, "examples": []} and 3 <= len(again["examples"]) <= 5


@pytest.mark.parametrize("limit", ["lookup_characters", "lookup_documents"])
def test_what_is_looked_up_together_is_bounded(limit):
    short = [PretrainRow(source="", target="a b c", category="") for _ in range(20)]
    long = [PretrainRow(source="", target=" ".join(WORDS[:14]), category="") for _ in range(20)]
    places = [(overlap.Place(0, number), row) for number, row in enumerate([*short, *long])]
    most = {"lookup_characters": 3 * len(long[0].target), "lookup_documents": 3}[limit]
    batches = list(overlap.batches(iter(places), WorkSizes(**{limit: most})))
    assert [len(found) for found, *_ in batches] == [3] * 6 + [2]
    assert [place.line for found, *_ in batches for place in found] == list(range(20, 40))


def test_much_held_out_text_is_sampled(tokenizer_dir, tmp_path):
    report = prepared(tmp_path, tokenizer_dir, sizes=WorkSizes(max_grams=300))
    assert 0 < report["compared"] < report["documents"] - report["too_short"]


def test_conversations_are_compared_by_their_answers(tokenizer_dir, tmp_path):
    same = " ".join(WORDS[:20])
    chats = [
        {"messages": [{"from": "human", "content": question}, {"from": "assistant", "content": answer}]}
        for number in range(40)
        for question, answer in ((same, f"{number} " + " ".join(WORDS[number : number + 15])),)
    ]
    write_lines(tmp_path / "in" / "rows.jsonl", chats)
    options = {"max_length": 4096, "eval_fraction": 0.3, "eval_dedup": True}
    prepare.prepare_sft(**settings([tmp_path / "in"], tokenizer_dir, tmp_path, **options))
    report = manifest(tmp_path)["eval_dedup"]
    # The answers overlap with their neighbours' by 14 words; the question that all share is not measured.
    assert 5 < report["overlapping"] <= report["compared"] == report["documents"] < 35


def test_nothing_to_compare_is_refused(tokenizer_dir, tmp_path):
    write_lines(tmp_path / "in" / "rows.jsonl", [{"target": "a text"}])
    with pytest.raises(UserError, match="--eval_dedup compares what --eval_fraction holds out"):
        prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out", eval_dedup=True))
    assert not (tmp_path / "out").exists()
