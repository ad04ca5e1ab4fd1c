"""Types of flag values: functions for argparse's `type=`."""

import argparse
import math
import re
import shlex
from collections.abc import Callable, Sequence
from typing import TypeVar

from colossal_llama2.layer_matrices import LAYER_MATRICES, in_order
from colossal_llama2.task_names import BITS_PER_BYTE, GSM8K, ICL, LOGIT_TASK_NAMES, TASK_NAMES
from colossal_llama2.tracker_names import TRACKER_NAMES

Number = TypeVar("Number", int, float)
SWITCH = ("auto", "on", "off")
MAX_BINS = 100_000
MAX_LENGTH = 2**20
# A larger multiple would mostly add rows without a token.
MAX_ROW_MULTIPLE = 2**16


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, "a whole number of at least 1", lambda value: value >= 1)


def row_multiple(text: str) -> int:
    """A whole number from 1 to `MAX_ROW_MULTIPLE`."""
    allowed = f"a whole number from 1 to {MAX_ROW_MULTIPLE}"
    return _number(text, int, allowed, lambda value: 1 <= value <= MAX_ROW_MULTIPLE)


def at_least_two(text: str) -> int:
    """A whole number of at least 2."""
    return _number(text, int, "a whole number of at least 2", lambda value: value >= 2)


def non_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, "a whole number of at least 0", lambda value: value >= 0)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, "a number above 0", lambda value: value > 0)


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, float, "a number of at least 0", lambda value: value >= 0)


def probability(text: str) -> float:
    """A number above 0 and at most 1."""
    return _number(text, float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


def share(text: str) -> float:
    """A number above 0 and below 1."""
    return _number(text, float, "a number above 0 and below 1", lambda value: 0 < value < 1)


def seed_number(text: str) -> int:
    """A seed that both NumPy and PyTorch accept."""
    return _number(text, int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def bin_count(text: str) -> int:
    """A number of bins; folders are named part-00000 to part-99999."""
    return _number(text, int, f"a whole number from 1 to {MAX_BINS}", lambda value: 1 <= value <= MAX_BINS)


def sequence_length(text: str) -> int:
    """A length in tokens that leaves room for text between <s> and </s>."""
    return _number(text, int, f"a whole number from 8 to {MAX_LENGTH}", lambda value: 8 <= value <= MAX_LENGTH)


def fraction(text: str) -> float:
    """A number of at least 0 and below 1."""
    return _number(text, float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)


def shard(text: str) -> tuple[int, int]:
    """A share i/n, counted from 1: "2/8" becomes (2, 8)."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' given, i/n with i from 1 to n allowed, such as 1/8")
    return int(match[1]), int(match[2])


def ray_address(text: str) -> str:
    """Where a Ray cluster is: HOST:PORT of its head node, or "auto"."""
    if text != "auto" and not re.fullmatch(r"[^\s/]+:\d{1,5}", text):
        raise argparse.ArgumentTypeError(f"'{text}' given, HOST:PORT such as 10.0.0.1:6379, or auto allowed")
    return text


def true_or_false(text: str) -> bool:
    """The words True and False, in any case."""
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"'{text}' given, True or False allowed")
    return values[text.lower()]


def source_weight(text: str) -> str:
    """SOURCE=WEIGHT, unchanged: a name and a number above 0."""
    name, _, weight = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"'{text}' given, SOURCE=WEIGHT such as zh=0.8 allowed")
    positive_float(weight)
    return text


def named_path(text: str) -> str:
    """NAME=PATH, unchanged."""
    name, sign, path = text.partition("=")
    if not sign or not name or not path or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} given, NAME=PATH allowed, such as en=arrow_en/eval")
    return text


def named_share(text: str) -> str:
    """NAME=SHARE, unchanged: a name and a number above 0."""
    name, sign, value = text.rpartition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"{text!r} given, NAME=SHARE allowed, such as en=0.05")
    positive_float(value)
    return text


def tracker_list(text: str) -> str:
    """A comma-separated list of trackers, each once, without spaces."""
    names = _comma_list(text, "give names as tensorboard,wandb")
    unknown = [name for name in names if name not in TRACKER_NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"'{unknown[0]}' given, a comma-separated list of {', '.join(TRACKER_NAMES)} allowed"
        )
    return ",".join(dict.fromkeys(names))


def matrix_list(text: str) -> str:
    """A comma-separated list of matrices of a decoder layer, each once, in the order of the layer; "all" for all."""
    if text == "all":
        return text
    names = _comma_list(text, "give names as q_proj,v_proj, or all")
    unknown = [name for name in names if name not in LAYER_MATRICES]
    if unknown:
        allowed = f"all, or a comma-separated list of {', '.join(LAYER_MATRICES)} allowed"
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' given, {allowed}")
    return ",".join(in_order(names))


def path_list(text: str) -> list[str]:
    """A comma-separated list of folders, in the given order."""
    return _comma_list(text, "give folders as DIR_1,DIR_2,DIR_3")


def role_list(text: str) -> list[str]:
    """A comma-separated list of role names."""
    return _comma_list(text, "give names as chatgpt,bing,bard")


def _comma_list(text: str, cure: str) -> list[str]:
    """The entries of a comma-separated list; `cure` is the advice for a list of empty entries."""
    entries = [part.strip() for part in text.split(",")]
    if not all(entries):
        kept = ",".join(filter(None, entries))
        cure = f"type {shlex.quote(kept)}" if kept else cure
        raise argparse.ArgumentTypeError(f"'{text}' has an empty entry; {cure}")
    return entries


def _number(text: str, kind: type[Number], allowed: str, accepts: Callable[[Number], bool]) -> Number:
    try:
        value = kind(text)
        is_allowed = math.isfinite(value) and accepts(value)
    except (ValueError, OverflowError):
        is_allowed = False
    if not is_allowed:
        hint = _number_hint(text, kind, accepts)
        raise argparse.ArgumentTypeError(f"'{text}' given, {allowed} allowed" + (f"; {hint}" if hint else ""))
    return value


def _number_hint(text: str, kind: type[Number], accepts: Callable[[Number], bool]) -> str:
    """How to type a number that was given in another notation, if that is unambiguous; else ""."""
    plain = text.strip().lstrip("+").replace("_", "")
    if re.fullmatch(r"[\d.]+ ?%", plain, re.ASCII):
        plain, divisor = plain.rstrip("% "), 100
    elif re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", plain, re.ASCII):
        if kind is float:
            # 1,000 is a thousand in some countries and one in others.
            return ""
        plain, divisor = plain.replace(",", ""), 1
    elif re.fullmatch(r"\d+,\d+([eE][-+]?\d+)?", plain, re.ASCII):
        plain, divisor = plain.replace(",", "."), 1
    else:
        divisor = 1
    try:
        value = float(plain) / divisor
    except ValueError:
        return ""
    if not math.isfinite(value) or (kind is int and value != int(value)) or not accepts(kind(value)):
        return ""
    return f"type {value!r}" if kind is float else f"type {int(value)}"


def sampling_temperature(text: str) -> float:
    """A finite number above 0; for 0, greedy decoding in other tools, the message names the flag here."""
    try:
        return positive_float(text)
    except argparse.ArgumentTypeError as error:
        is_zero = re.fullmatch(r"\+?0*\.?0*", text) is not None
        greedy = "; for greedy decoding give --do_sample False" if is_zero else ""
        raise argparse.ArgumentTypeError(f"{error}{greedy}")


def candidate_count(text: str) -> int:
    """A whole number of at least 1; for 0 and -1, "no limit" in other tools, the message names the equivalent."""
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        cure = "; to sample from all tokens give a number as large as the vocabulary" if text in ("0", "-1") else ""
        raise argparse.ArgumentTypeError(f"{error}{cure}")


def auto_or_count(text: str) -> int:
    """A whole number of at least 1, or 0 for the word auto."""
    if text == "auto":
        return 0
    return _number(text, int, "auto, or a whole number of at least 1,", lambda value: value >= 1)


def task_list(text: str, names: Sequence[str] = TASK_NAMES) -> list[tuple[str, str | None]]:
    """A comma-separated list of evaluation tasks, each NAME or NAME=PATH, as pairs; the path is None if not given."""
    found: list[tuple[str, str | None]] = []
    for entry in _comma_list(text, "give tasks as mmlu,icl"):
        name, sign, path = entry.partition("=")
        allowed = f"a comma-separated list of {', '.join(names)} allowed"
        if name not in names:
            raise argparse.ArgumentTypeError(f"'{name}' given, {allowed}")
        if sign and not path:
            given = ICL if name == ICL else f"{name}=PATH"
            raise argparse.ArgumentTypeError(f"'{entry}' given, {given} allowed")
        if name == ICL and path:
            raise argparse.ArgumentTypeError(f"'{entry}' given, but {ICL} reads no files; give {ICL}")
        if name == BITS_PER_BYTE and not path:
            raise argparse.ArgumentTypeError(f"'{entry}' given, {name}=FILE.jsonl allowed")
        if (name, path or None) in found or name != BITS_PER_BYTE and name in [other for other, _ in found]:
            raise argparse.ArgumentTypeError(f"'{text}' has {name} twice; keep one")
        found.append((name, path or None))
    return found


def logit_task_list(text: str) -> str:
    """A list as of `task_list`, unchanged, of tasks that training can measure; sets have a PATH each."""
    causes = {BITS_PER_BYTE: "give --eval_dataset for it", GSM8K: "whose answers are generated; leave it out"}
    for entry in text.split(","):
        name = entry.strip().partition("=")[0]
        if name in causes:
            raise argparse.ArgumentTypeError(f"'{name}' given, {causes[name]}")
    for name, path in task_list(text, LOGIT_TASK_NAMES):
        if name != ICL and path is None:
            raise argparse.ArgumentTypeError(f"'{name}' given, {name}=DIR allowed, the folder with the set's files")
    return text
