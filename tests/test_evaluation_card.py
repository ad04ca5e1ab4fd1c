"""What --write_card puts into a model card, and what it leaves as it is."""

import pytest
import yaml

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.card import check_card, with_results, write_card
from colossal_llama2.evaluation.results import Result, Score

CARD = """---
base_model: llama-2-7b
model-index:
- name: older
  results:
  - task: {type: x}
tags:
- llama
---

# Continued pre-training of llama-2-7b

Some text.
"""


def results(share: float) -> list[Result]:
    """Those of two tasks."""
    accuracy, bits = Score(share, 0.01, 280), Score(1.23456, 0.004, 12)
    return [
        Result("m", "cmmlu", "accuracy", 5, accuracy, {}, {}, 0.25, 1, 1.0, {}, (5, 5)),
        Result("m", "bits_per_byte <a>|b", "bits per byte", None, bits, {}, {}, None, 1, 1.0, {}),
    ]


def test_a_card_gets_a_table_and_a_model_index(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    write_card(tmp_path, results(0.2625))
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    content = yaml.safe_load(front)
    assert (content["base_model"], content["tags"]) == ("llama-2-7b", ["llama"])
    (model,) = content["model-index"]
    assert model["name"] == "m"
    assert model["results"][0] == {
        "task": {"type": "text-generation"},
        "dataset": {"type": "cmmlu", "name": "cmmlu (5-shot)"},
        "metrics": [{"type": "accuracy", "value": 26.25}],
    }
    assert body.startswith("\n# Continued pre-training of llama-2-7b\n\nSome text.\n\n")
    assert "| cmmlu (5-shot) | 280 | accuracy | 26.2% | 1.0% |" in body
    assert "| bits_per_byte &lt;a&gt;\\|b | 12 | bits per byte | 1.2346 | 0.0040 |" in body


def test_a_later_evaluation_replaces_its_own_part_only():
    once = with_results(CARD, results(0.2))
    twice = with_results(once + "\n## After\n", results(0.3))
    assert twice.count("## Evaluation on tasks") == twice.count("model-index") == 1
    assert "30.0%" in twice and "20.0%" not in twice and twice.endswith("## After\n")
    assert with_results(with_results("", results(0.2)), results(0.2)) == with_results("", results(0.2))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_rest_of_a_card_stays_as_it_is(line_end, tmp_path):
    """With other ends of lines, and characters that some programs take for ends of lines."""
    body = "# A\u2028title\x0c" + line_end + line_end + "a\x85b" + line_end + "c"
    content = CARD.replace("# Continued pre-training of llama-2-7b\n\nSome text.\n", "").replace("\n", line_end) + body
    content = content.replace("---", "--- ")
    (tmp_path / "README.md").write_bytes(content.encode())
    check_card(str(tmp_path))
    for share in (0.2, 0.3):
        write_card(tmp_path, results(share))
    text = (tmp_path / "README.md").read_bytes().decode()
    assert f"\n---\n\n{body}\n\n<!-- evaluation: begin -->" in text and text.startswith("---\n")
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["tags"], front["model-index"][0]["name"]) == ("llama-2-7b", ["llama"], "m")
    assert text.count("## Evaluation on tasks") == 1 and "30.0%" in text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"---\nbase_model: a\n", "README.md:1: its front matter does not end"),
        ("---\n---\n接着".encode("gb18030"), "README.md is not UTF-8 at byte 9"),
        (b"<!-- evaluation: begin -->\n", "has only one of"),
        (
            b"<!-- evaluation: end -->\n<!-- evaluation: begin -->\n",
            "must have .* begin --> once, and behind it .* end",
        ),
    ],
)
def test_a_card_that_cannot_be_used_is_reported_first(content, message, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(UserError, match=message):
        check_card(str(tmp_path))
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_model_of_a_hub_has_no_card():
    with pytest.raises(UserError, match="is not a local folder"):
        check_card("owner/name")
