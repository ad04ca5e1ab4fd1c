"""Bad rows and unreadable files of one unit of work: raise an error, or record them and continue."""

from collections.abc import Mapping
from typing import Any

from colossal_llama2.corpus.data_files import EMPTY_FILE, InputFile, LostFile
from colossal_llama2.corpus.message_formats import PRETRAINING_DATA
from colossal_llama2.corpus.row_reader import OTHER_REASON, SpanReader
from colossal_llama2.dataset.layout.token_ledger import TokenLedger
from colossal_llama2.dataset.write.records import CONVERSATIONS
from colossal_llama2.errors import UserError

CORRECT_HINT = "; correct or remove the line"
SKIP_HINT = ", or skip such lines with --on_bad_row skip"
SKIP_FILE_HINT = ", or skip the rest of such files with --on_bad_file skip"


class UnitProblems:
    """Collects what could not be used. `bad_rows` and `lost` go into the unit's JSON file."""

    def __init__(
        self, files: Mapping[int, InputFile], ledger: TokenLedger, *, skips_bad_rows: bool, fails_at_bad_file: bool
    ):
        self._files, self._ledger = files, ledger
        self._skips_bad_rows, self._fails_at_bad_file = skips_bad_rows, fails_at_bad_file
        self.bad_rows: list[dict[str, Any]] = []
        self.lost: list[LostFile] = []

    def refused(self, file: int, reader: SpanReader, number: int, error: ValueError) -> None:
        """Record a record that the stage's check refused. Raises UserError unless bad rows are skipped."""
        self._ledger.count_roles(getattr(error, "roles", {}))
        reason = getattr(error, "reason", OTHER_REASON)
        # Nothing needs correcting in data of the other stage.
        cure = "" if reason in (CONVERSATIONS, PRETRAINING_DATA) else CORRECT_HINT
        self.bad_row(file, reader, number, f"{error}{cure}", reason)

    def bad_row(self, file: int, reader: SpanReader, number: int, problem: str, reason: str) -> None:
        """Record a line that cannot be used. Raises UserError with file:line unless bad rows are skipped."""
        path = self._files[file].path
        if not self._skips_bad_rows:
            raise UserError(f"{path}:{reader.line_number(number)}: {problem}{SKIP_HINT}")
        self._ledger.bad_row(file, reason, problem)
        # The line in the span: the number of lines before it is known only when all spans are read.
        self.bad_rows.append({"file": path, "line": number, "reason": reason, "problem": problem})

    def lost_file(self, path: str, line: int, problem: str, reason: str) -> None:
        """Record a file that cannot be read from `line` on. Only this unit reads it, so its lines are the span's."""
        lost = LostFile(path, line, reason, problem)
        if self._fails_at_bad_file:
            raise UserError(f"{lost}{SKIP_FILE_HINT}")
        self.lost.append(lost)

    def empty_file(self, path: str) -> None:
        """Record a file without any line."""
        self.lost_file(path, 0, f"{path} {EMPTY_FILE}", "holds nothing")
