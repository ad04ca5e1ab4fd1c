"""The parser of every command: it accepts no abbreviations, shows defaults, and reports a mistake in one line."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from colossal_llama2.cli import settings_file
from colossal_llama2.cli.flag_definitions import FlagParser
from colossal_llama2.cli.word_mistakes import check_words, repeated_lists
from colossal_llama2.launcher import place, report_to_torchrun, wait_for_first_of_host
from colossal_llama2.terminal_text import one_line, show_line


class CommandParser(FlagParser):
    """An ArgumentParser that accepts no abbreviations, shows defaults, and reports a mistake in one line."""

    def __init__(self, prog: str, description: str, example: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n{example}",
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print one line with the mistake and where to find help, once per host, and exit with code 2."""
        line = f"{self.prog}: error: {one_line(message).strip()} (see {self.prog} --help)"
        report_to_torchrun(line)
        wait_for_first_of_host()
        self.exit(2, f"{line}\n" if place().local_rank == 0 else None)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        # Prompts, pieces and paths may contain characters that the terminal cannot encode; that must not be fatal.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        words = list(sys.argv[1:] if args is None else args)
        # First of all: a misspelt required flag should be reported as misspelt, not as missing.
        try:
            check_words(words, self)
        except ValueError as error:
            self.error(str(error))
        loaded = self._loaded_words(words)
        parsed, unknown = self.parse_known_args([*loaded, *words], namespace)
        if unknown:
            self.error(f"unexpected {' '.join(unknown)}; quote a value that has spaces, and check its flag")
        if place().rank == 0:
            for sentence in repeated_lists(words, self):
                show_line(f"{self.prog}: warning: {sentence}", file=sys.stderr)
        return parsed

    def _loaded_words(self, words: Sequence[str]) -> list[str]:
        path = settings_file.named_file(words) if settings_file.FLAG in self.by_spelling else None
        if path is None:
            return []
        try:
            return settings_file.words_of(path, self)
        except ValueError as error:
            self.error(str(error))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the example's line breaks and appends defaults, except where the help explains an unset flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default is None or isinstance(action.default, bool) and action.nargs == 0:
            return action.help or ""
        return super()._get_help_string(action)
