"""Figures in what the suite's commands print."""

import json
import re
from pathlib import Path

from tests.gpu.parts import Figures

MIB, GIB = 2**20, 2**30
SELFTEST_ROW = re.compile(r"^(.*\S) +(\S+) +(\S+)  (?:equal|DIFFERENT)$", re.MULTILINE)
SELFTEST_COLUMNS = {
    "loss, largest relative difference of a step": "loss",
    "gradient norm, the same": "norm",
    "final weights, norm of the difference": "weights",
    "resumed: loss": "resumed loss",
    "resumed: gradient norm": "resumed norm",
    "resumed: final weights": "resumed weights",
}
STEP_PARTS = ("data", "forward", "backward", "optimizer", "rest")


def attention(text: str) -> str:
    """What a training command logs about its attention; empty if it logs nothing."""
    found = re.findall(r"\| Attention: (.*)$", text, re.MULTILINE)
    return found[-1] if found else ""


def selftest(text: str) -> Figures:
    """Found and allowed differences of a self-test, by a short name of each row, and its attention."""
    rows = {
        SELFTEST_COLUMNS[name]: [float(found), float(allowed)]
        for name, found, allowed in SELFTEST_ROW.findall(text)
        if name in SELFTEST_COLUMNS
    }
    if len(rows) != len(SELFTEST_COLUMNS):
        raise ValueError(f"{len(rows)} of {len(SELFTEST_COLUMNS)} rows of the self-test were printed")
    return {**rows, "attention": attention(text)}


def benchmark(text: str) -> Figures:
    """The table of --benchmark: tokens/s, seconds of a step, shares of its parts, bytes, TFLOPS, and MFU if known."""
    table = dict(re.findall(r"^ *(\S.*?) {2,}([\d,.]+)", text, re.MULTILINE))
    numbers = {name: float(value.replace(",", "")) for name, value in table.items() if re.search(r"\d", value)}
    missing = {"tokens/s", "step", "peak memory", "TFLOPS", *STEP_PARTS} - set(numbers)
    if missing:
        raise ValueError(f"the table of --benchmark has no {', '.join(sorted(missing))}")
    return {
        "tokens_per_second": numbers["tokens/s"],
        "step_seconds": numbers["step"],
        "step_percent": {name: numbers[name] for name in STEP_PARTS},
        "memory_bytes": numbers["peak memory"] * MIB,
        "tflops": numbers["TFLOPS"],
        "mfu_percent": numbers.get("MFU"),
        "attention": attention(text),
    }


def forecast(text: str) -> Figures:
    """The peak that --dry_run computes, in bytes, and its moment."""
    found = re.search(r"^peak: ([\d.]+) GiB, at (\w+);", text, re.MULTILINE)
    if found is None:
        raise ValueError("the dry run printed no peak")
    return {"memory_bytes": float(found[1]) * GIB, "moment": found[2]}


def saved(text: str) -> Figures:
    """The last checkpoint that a run saved: bytes, and seconds for which training paused."""
    found = re.findall(r"\| Saved .*: ([\d,]+) bytes; training paused for ([\d.]+) s", text)
    if not found:
        raise ValueError("the run saved no checkpoint")
    size, seconds = found[-1]
    return {"bytes": int(size.replace(",", "")), "seconds": float(seconds)}


def resumed(text: str, *, whole: Path, resumed: Path) -> Figures:
    """How far a resumed run is from the whole one, by the train_log.jsonl of both.

    Raises:
        ValueError: the logs have no losses of the same later steps.
        OSError: a log cannot be read.
    """
    start = re.search(r"\| Resuming .*, step (\d+),", text)
    if start is None:
        raise ValueError("the run did not resume")
    first, again = (_losses(path) for path in (whole, resumed))
    steps = [step for step in again if step > int(start[1])]
    if not steps or not set(steps) <= set(first):
        raise ValueError("the resumed run has no steps of the whole one")
    gap = max(abs(again[step] / first[step] - 1) for step in steps)
    return {"loss_difference": gap, "steps": len(steps), "seconds": _resume_seconds(text)}


def _losses(path: Path) -> dict[int, float]:
    records = map(json.loads, path.read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def _resume_seconds(text: str) -> int | None:
    """Whole seconds between the log lines before and after the states are read; None if there are no such lines."""
    times = [re.search(rf"^(\d\d):(\d\d):(\d\d) \| {word} ", text, re.MULTILINE) for word in ("Resuming", "Resumed")]
    if None in times:
        return None
    begin, end = (int(found[1]) * 3600 + int(found[2]) * 60 + int(found[3]) for found in times if found)
    return (end - begin) % 86400


def verified(text: str) -> Figures:
    """That a checkpoint was verified."""
    if "all as they were written" not in text:
        raise ValueError("the checkpoint was not verified")
    return {}


def answered(text: str) -> Figures:
    """That a prompt was answered, and in how many seconds."""
    found = re.search(r"answered in ([\d.]+) s", text)
    if found is None or "Answer:" not in text:
        raise ValueError("there is no answer")
    return {"seconds": float(found[1])}


def nothing(text: str) -> Figures:
    """No figures: the exit code says it all."""
    return {}
