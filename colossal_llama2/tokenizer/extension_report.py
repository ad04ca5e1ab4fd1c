"""The report of init_tokenizer.py, vocabulary_report.json and a table: which pieces were added, and what was proven."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from colossal_llama2.encoding.parity import Difference
from colossal_llama2.plurals import counted
from colossal_llama2.tables import print_table
from colossal_llama2.terminal_text import show_line
from colossal_llama2.tokenizer.closure import ExtensionPlan
from colossal_llama2.tokenizer.extension import Proof
from colossal_llama2.tokenizer.new_pieces import NewPieces


class Count(NamedTuple):
    """A number of the report: its key, and its label in the table for each kind of tokenizer; "" for no row."""

    key: str
    sentencepiece: str
    byte_level: str


def _count(key: str, label: str) -> Count:
    return Count(key, label, label)


COUNTS = (
    _count("asked", "pieces in the file"),
    _count("duplicates", "repeated in the file"),
    _count("already_pieces", "already pieces of the source"),
    Count("dropped", "dropped: no merges lead to them", "dropped: no text is encoded to them"),
    Count("split", "", "of these, divided by the pre-tokenizer"),
    _count("given_up", "left out for --max_added_pieces"),
    _count("added_from_file", "added from the file"),
    _count("added_characters", "added by closure: characters"),
    _count("added_intermediates", "added by closure: intermediate pieces"),
    _count("added", "added in all"),
    _count("unreachable", "unreachable among these"),
    _count("vocabulary_before", "vocabulary before"),
    _count("vocabulary_after", "vocabulary after"),
)
BYTE_LEVEL = "byte-level BPE"
# Lists in the report are cut at this length, which a million given-up pieces would exceed; counts are exact.
MAX_LISTED = 100_000


def make_report(
    asked: NewPieces,
    plan: ExtensionPlan,
    proof: Proof,
    *,
    vocabulary_before: int,
    settings: dict,
    shown: Callable[[str], str],
    is_byte_level: bool,
) -> dict:
    """The content of vocabulary_report.json.

    Args:
        settings: the flags that led to it.
        shown: how a piece of the plan is written.
    """
    own = {"kind": BYTE_LEVEL, "split": len(plan.split), "split_pieces": list(map(shown, plan.split[:MAX_LISTED]))}
    return {
        **settings,
        **(own if is_byte_level else {}),
        "asked": asked.asked,
        "duplicates": asked.duplicates,
        "already_pieces": asked.already_pieces,
        "dropped": len(plan.dropped),
        "given_up": len(plan.over_budget),
        "added_from_file": len(plan.pieces) - plan.characters - plan.intermediates,
        "added_characters": plan.characters,
        "added_intermediates": plan.intermediates,
        "added_by_closure": plan.characters + plan.intermediates,
        "added": len(plan.pieces),
        "unreachable": len(proof.unreachable),
        "vocabulary_before": vocabulary_before,
        "vocabulary_after": vocabulary_before + len(plan.pieces),
        "unreachable_pieces": proof.unreachable[:MAX_LISTED],
        "dropped_pieces": list(map(shown, plan.dropped[:MAX_LISTED])),
        "given_up_pieces": list(map(shown, plan.over_budget[:MAX_LISTED])),
        "parity": [measurement.as_dict() for measurement in proof.measurements],
    }


def failures(report: dict) -> list[str]:
    """The problems that a proven extension must not have, one phrase each; empty if there are none."""
    parity = report["parity"]
    fast = sum(group["fast"]["added"] for group in parity)
    slow = sum(group["slow"]["added"] for group in parity if group["slow"])
    changed = sum(group["changed"] for group in parity)
    found = []
    if report["unreachable"]:
        found.append(f"{report['unreachable']:,} of {counted(report['added'], 'new piece')} never reached")
    if fast or slow:
        found.append(
            f"tokenizers have new differences on {counted(fast, 'text')} (fast) and {slow:,} (slow)"
            f"{_example(parity, ('fast', 'slow'))}"
        )
    if changed:
        found.append(f"changed ids in {counted(changed, 'text')} without a new piece{_example(parity)}")
    return found


def _example(parity: Sequence[dict], names: Sequence[str] = ()) -> str:
    shown = [group[name]["first"] for group in parity for name in names if group[name] and group[name]["first"]]
    shown = shown or [group["first_changed"] for group in parity if not names and group["first_changed"]]
    return f", the first is {shown[0]['text'][:60]!r}" if shown else ""


def print_report(report: dict) -> None:
    """Print the counts, and a table with one row for each group of texts."""
    is_byte_level = report.get("kind") == BYTE_LEVEL
    labels = {count.key: count.byte_level if is_byte_level else count.sentencepiece for count in COUNTS}
    print_table([[label, f"{report[key]:,}"] for key, label in labels.items() if label], has_header=False)
    reference = "tokenizer.json's merges" if is_byte_level else "SentencePiece"
    show_line("")
    rows = [[f"ids that differ from {reference}", "texts", "fast", "slow", "already", "old text", "changed"]]
    for group in report["parity"]:
        slow = group["slow"] or vars(Difference())
        already = max(group["fast"]["source_differs"], slow["source_differs"])
        slow_added = f"{slow['added']:,}" if group["slow"] else "none"
        rows.append([group["group"], f"{group['documents']:,}", f"{group['fast']['added']:,}", slow_added])
        rows[-1] += [f"{already:,}", f"{group['without_new_piece']:,}", f"{group['changed']:,}"]
    print_table(rows)
    for group in report["parity"]:
        for name in ("fast", "slow"):
            if group[name] and group[name]["first"]:
                show_line(f"{group['group']}: first that differs ({name}): {group[name]['first']}")
        if group["first_changed"]:
            show_line(f"{group['group']}: first that changed: {group['first_changed']['text']!r}")
        if group["slow"] and group["slow"]["documents"] < group["documents"]:
            show_line(f"{group['group']}: slow was measured on {counted(group['slow']['documents'], 'text')}")
    show_line(
        "fast, slow: texts on which the extension adds a difference; already: on which the source's tokenizers differ;"
    )
    show_line("old text: texts without a new piece; changed: those of them whose ids changed")
