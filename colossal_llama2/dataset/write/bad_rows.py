"""Report rows and files that cannot be used: warnings, and bad_rows.jsonl beside the manifest.

With --on_bad_row skip, bad_rows.jsonl has one line for each row that was skipped; such rows are counted by `reason`:

    {"file": "data/zh/a.jsonl", "line": 3, "reason": "not JSON", "problem": "not JSON (unexpected end of data: ...)"}

A file that cannot be read to its end is not a bad row. The rows before the damage are used, and the rest of the file is
"lost": the command writes its output, but ends with exit code 1 unless --on_bad_file skip is given.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.corpus.data_files import InputFile, LostFile, Unit
from colossal_llama2.dataset.layout import store
from colossal_llama2.dataset.layout.token_ledger import TokenLedger
from colossal_llama2.errors import RunError
from colossal_llama2.plurals import counted, some
from colossal_llama2.terminal_text import visible_line

BAD_ROWS_FILE = "bad_rows.jsonl"
# A file with a larger share of bad rows probably has an unexpected format.
WARNED_SHARE = 0.1
MAX_WARNINGS = 10
# Unknown roles named in one message.
MAX_ROLES = 10


def warn_of_many(ledger: TokenLedger, files: Sequence[InputFile]) -> None:
    """Warn about files with a share of bad rows over `WARNED_SHARE`, with the most frequent reason and its cure."""
    by_file: dict[int, dict[str, list[Any]]] = {}
    for (file, reason), entry in ledger.bad.items():
        by_file.setdefault(file, {})[reason] = entry
    documents = {file: tally.documents for file, tally in ledger.by_file().items()}
    warnings = []
    for file, reasons in sorted(by_file.items()):
        bad = sum(count for count, _ in reasons.values())
        rows = bad + documents.get(file, 0)
        if bad > WARNED_SHARE * rows:
            reason, (count, example) = max(reasons.items(), key=lambda item: item[1][0])
            warnings.append(
                f"{files[file].path}: {bad:,} of {counted(rows, 'row')} ({bad / rows:.0%}) skipped as bad, most often "
                f"({count:,}): {reason}. The first of these: {example}"
            )
    for warning in warnings[:MAX_WARNINGS]:
        logs.get_logger().warning(warning)
    if len(warnings) > MAX_WARNINGS:
        logs.get_logger().warning(
            f"over {WARNED_SHARE:.0%} bad rows also in {counted(len(warnings) - MAX_WARNINGS, 'more file')}; "
            f"see {BAD_ROWS_FILE}"
        )


def write_bad_rows(folder: Path, units: Iterable[tuple[Unit, int]], cache: Path) -> None:
    """Write bad_rows.jsonl. Each of `units` comes with the number of lines of its file in earlier units."""
    with store.appearing_file(folder / BAD_ROWS_FILE) as file:
        for unit, lines_before in units:
            for row in store.read_json(cache / f"{unit.name}.json")["bad_rows"]:
                row["line"] += lines_before
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def report_lost(lost: Sequence[dict[str, Any]], *, on_bad_file: str, output: Path) -> None:
    """Log each file of a finished run that could not be read to its end.

    Raises:
        RunError: there is such a file, and `on_bad_file` is "fail".
    """
    for entry in lost[:MAX_WARNINGS]:
        logs.get_logger().error(f"lost: {LostFile(**entry)}")
    if lost and on_bad_file == "fail":
        raise RunError(
            f"{len(lost):,} of the input files could not be read to the end, such as {lost[0]['file']}; {output} is "
            "complete apart from them, and its manifest.json lists them as lost_files. Fix them, remove the output and "
            "run the command again, or accept it with --on_bad_file skip"
        )


def roles_in_words(roles: Mapping[str, int]) -> str:
    """The unknown roles with the number of messages of each, the most frequent first, and the cure."""
    ordered = sorted(roles, key=lambda role: (-roles[role], role))
    listed = [f"{visible_line(role)} ({counted(roles[role], 'message')})" for role in ordered]
    return f"unknown roles: {some(listed, MAX_ROLES)}; if one is the assistant, name it with --assistant_roles"
