"""What became of every record and token of a prepare command, and the table that tells it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import List, Sequence

import numpy as np

from colossal_llama2.dataset import IGNORE_INDEX
from colossal_llama2.dataset.splicing import TokenSequence
from colossal_llama2.errors import RunError


@dataclass
class Account:
    """What became of every record and token. `drops` counts records (or pieces), `drop_tokens` tokens, by reason."""

    num_rows: int = 0
    empty_lines: int = 0
    tokens_in: int = 0
    trained: int = 0
    masked: int = 0
    num_samples: int = 0
    tokens_per_bin: List[int] = field(default_factory=list)
    drops: Counter = field(default_factory=Counter)
    drop_tokens: Counter = field(default_factory=Counter)

    def add_drop(self, reason: str, tokens: int) -> None:
        """Count one record or piece of which `tokens` tokens go into no sample."""
        self.drops[reason] += 1
        self.drop_tokens[reason] += tokens

    def add_bin(self, samples: Sequence[TokenSequence]) -> None:
        """Count the tokens of one bin in the samples that are written."""
        trained = sum(int(np.count_nonzero(sample.labels != IGNORE_INDEX)) for sample in samples)
        total = sum(len(sample.input_ids) for sample in samples)
        self.trained += trained
        self.masked += total - trained
        self.num_samples += len(samples)
        self.tokens_per_bin.append(total)

    def check(self) -> None:
        """Raise RunError unless every token that came in is trained, masked or dropped for a reason."""
        dropped = self.drop_tokens.total()
        if self.tokens_in != self.trained + self.masked + dropped:
            raise RunError(
                f"the account does not balance: {self.tokens_in} tokens in, but {self.trained} trained, "
                f"{self.masked} masked and {dropped} dropped; no output folder was made"
            )

    def table(self, *, max_length: int) -> str:
        """The account as aligned lines: name, number, remark."""
        dropped = self.drop_tokens.total()
        rows = [
            ("documents", f"{self.num_rows:,}", f"{self.empty_lines:,} empty lines skipped"),
            ("tokens in", f"{self.tokens_in:,}", ""),
            ("  trained", f"{self.trained:,}", f"{self.trained / self.tokens_in:.2%}"),
            ("  masked", f"{self.masked:,}", f"{self.masked / self.tokens_in:.2%}"),
            ("  dropped", f"{dropped:,}", f"{dropped / self.tokens_in:.2%}"),
            *(("", f"{tokens:,}", f"in {self.drops[why]:,} {why}") for why, tokens in self.drop_tokens.items()),
            ("samples", f"{self.num_samples:,}", f"of at most {max_length:,} tokens"),
            ("fill", f"{sum(self.tokens_per_bin) / (self.num_samples * max_length):.2%}", ""),
            ("bins", f"{len(self.tokens_per_bin):,}", ""),
            ("tokens per bin", f"{min(self.tokens_per_bin):,}", f"to {max(self.tokens_per_bin):,}"),
        ]
        names, numbers = (max(len(row[column]) for row in rows) for column in (0, 1))
        return "\n".join(f"{name:<{names}}  {number:>{numbers}}  {remark}".rstrip() for name, number, remark in rows)
