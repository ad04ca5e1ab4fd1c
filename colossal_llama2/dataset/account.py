"""What became of every record and token of a prepare command: counted per file and category, checked, and told.

As JSON, one `Tally`:

    {"documents": 3, "bytes": 1790, "characters": 1790, "tokens_in": 620, "trained": 560, "masked": 20,
     "truncated": 0, "dropped": {"documents with an empty target": {"documents": 1, "tokens": 40}},
     "predicted": 558, "pieces": 3, "cut_documents": 1, "held_out_documents": 0, "held_out_pieces": 0}
"""

from dataclasses import dataclass, field, fields
from typing import Any, Dict, Iterable, List, Tuple

from colossal_llama2.errors import RunError

TABLE_ROWS = 20


@dataclass
class Tally:
    """Counts of the records of one file and category, or of more.

    Attributes:
        bytes, characters: of the records' text, in UTF-8.
        tokens_in: every token that the text became, with <s> and </s>; trained + masked + truncated + dropped.
        trained: labels other than -100. masked: labels of -100.
        predicted: trained tokens that have one before them in their piece; the others carry no loss.
        truncated: tokens beyond max_length that --overlong truncate leaves out.
        dropped: reason to [records or pieces, tokens].
        pieces: what goes into samples: whole documents and the pieces of `cut_documents`; `held_out_pieces` of them
            are of documents in eval/.
    """

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    tokens_in: int = 0
    trained: int = 0
    masked: int = 0
    truncated: int = 0
    predicted: int = 0
    pieces: int = 0
    cut_documents: int = 0
    held_out_documents: int = 0
    held_out_pieces: int = 0
    dropped: Dict[str, List[int]] = field(default_factory=dict)

    def drop(self, reason: str, *, documents: int, tokens: int) -> None:
        """Count records or pieces that go into no sample."""
        counts = self.dropped.setdefault(reason, [0, 0])
        counts[0] += documents
        counts[1] += tokens

    @property
    def dropped_tokens(self) -> int:
        """Tokens dropped, for whatever reason."""
        return sum(tokens for _, tokens in self.dropped.values())

    @property
    def kept(self) -> int:
        """Tokens that go into samples."""
        return self.trained + self.masked

    def add(self, other: "Tally") -> None:
        """Add the counts of `other`."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, (documents, tokens) in other.dropped.items():
            self.drop(reason, documents=documents, tokens=tokens)

    def check(self, name: str) -> None:
        """Raise RunError unless every token that came in is trained, masked, truncated or dropped."""
        if self.tokens_in != self.kept + self.truncated + self.dropped_tokens:
            raise RunError(
                f"the account of {name} does not balance: {self.tokens_in} tokens in, but {self.trained} trained, "
                f"{self.masked} masked, {self.truncated} truncated and {self.dropped_tokens} dropped; "
                "no output folder was made"
            )

    def as_json(self) -> Dict[str, Any]:
        """The counts as in this module's docstring."""
        dropped = {reason: {"documents": count, "tokens": tokens} for reason, (count, tokens) in self.dropped.items()}
        return {**{name: getattr(self, name) for name in COUNTS}, "dropped": dropped}

    @classmethod
    def from_json(cls, content: Dict[str, Any]) -> "Tally":
        """The inverse of `as_json`."""
        dropped = {reason: [drop["documents"], drop["tokens"]] for reason, drop in content["dropped"].items()}
        return cls(**{name: content[name] for name in COUNTS}, dropped=dropped)


COUNTS = tuple(count.name for count in fields(Tally) if count.name != "dropped")


@dataclass
class Account:
    """The tallies of a whole run, by (file number, category); and its lines that are no documents."""

    tallies: Dict[Tuple[int, str], Tally] = field(default_factory=dict)
    lines: int = 0
    empty_lines: int = 0
    bad_rows: int = 0
    formats: Dict[str, int] = field(default_factory=dict)

    def tally(self, file: int, category: str) -> Tally:
        """The tally of one file and category."""
        key = (file, category)
        if key not in self.tallies:
            self.tallies[key] = Tally()
        return self.tallies[key]

    def add(self, other: "Account") -> None:
        """Add the counts of `other`."""
        for key, tally in other.tallies.items():
            self.tally(*key).add(tally)
        self.lines += other.lines
        self.empty_lines += other.empty_lines
        self.bad_rows += other.bad_rows
        for name, count in other.formats.items():
            self.formats[name] = self.formats.get(name, 0) + count

    def total(self) -> Tally:
        """All tallies together."""
        return _sum(self.tallies.values())

    def by_file(self) -> Dict[int, Tally]:
        """The tallies of each file, in the order of the input."""
        return {file: _sum(tally for key, tally in self.tallies.items() if key[0] == file) for file in self._files()}

    def by_category(self) -> Dict[str, Tally]:
        """The tallies of each category, by name."""
        sums: Dict[str, Tally] = {}
        for (_, category), tally in sorted(self.tallies.items()):
            sums.setdefault(category, Tally()).add(tally)
        return dict(sorted(sums.items()))

    def _files(self) -> List[int]:
        return sorted({file for file, _ in self.tallies})

    def check(self, names: Dict[int, str], *, bins: Tally) -> None:
        """Raise RunError unless each file and category balances, and `bins` hold what is to be kept of all of them."""
        for (file, category), tally in self.tallies.items():
            tally.check(f"{names[file]}, category {category}")
        total = self.total()
        total.check("all files")
        if (total.trained, total.masked, total.predicted) != (bins.trained, bins.masked, bins.predicted):
            raise RunError(
                f"the account does not balance: {total.trained} trained and {total.masked} masked tokens were to be "
                f"kept, but the bins hold {bins.trained} and {bins.masked}; no output folder was made"
            )

    def as_json(self) -> Dict[str, Any]:
        """The account of one unit, as its file in the cache holds it."""
        tallies = [[file, category, tally.as_json()] for (file, category), tally in sorted(self.tallies.items())]
        return {"tallies": tallies, **{name: getattr(self, name) for name in ("lines", "empty_lines", "bad_rows")},
                "formats": dict(sorted(self.formats.items()))}  # fmt: skip

    @classmethod
    def from_json(cls, content: Dict[str, Any]) -> "Account":
        """The inverse of `as_json`."""
        tallies = {(file, category): Tally.from_json(tally) for file, category, tally in content["tallies"]}
        return cls(tallies, content["lines"], content["empty_lines"], content["bad_rows"], content["formats"])


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total


def breakdown_table(heading: str, tallies: Dict[str, Tally]) -> str:
    """One aligned line for each name, the largest first; those beyond `TABLE_ROWS` are summed up."""
    ordered = sorted(tallies.items(), key=lambda item: -item[1].tokens_in)
    shown, rest = ordered[:TABLE_ROWS], ordered[TABLE_ROWS:]
    if rest:
        shown.append((f"{len(rest):,} more, in manifest.json", _sum(tally for _, tally in rest)))
    columns = ("documents", "tokens in", "trained", "masked", "truncated", "dropped")
    lines = [(heading, *columns)]
    for name, tally in shown:
        counts = (tally.documents, tally.tokens_in, tally.trained, tally.masked, tally.truncated, tally.dropped_tokens)
        lines.append((name, *(f"{count:,}" for count in counts)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    first, *others = widths
    return "\n".join(
        "  ".join([f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))])
        for name, *cells in lines
    )


def summary_table(account: Account, *, tokens_per_bin: List[int], num_samples: int, max_length: int) -> str:
    """The account as aligned lines: name, number, remark."""
    total = account.total()
    skipped = f"{account.empty_lines:,} empty lines skipped"
    if account.bad_rows:
        skipped += f", {account.bad_rows:,} bad rows skipped, listed in bad_rows.jsonl"
    rows = [
        ("documents", f"{total.documents:,}", skipped),
        *(("", f"{count:,}", f"in the format {name}") for name, count in sorted(account.formats.items())),
        ("tokens in", f"{total.tokens_in:,}", ""),
        ("  trained", f"{total.trained:,}", f"{total.trained / total.tokens_in:.2%}, {total.predicted:,} predicted"),
        ("  masked", f"{total.masked:,}", f"{total.masked / total.tokens_in:.2%}"),
        ("  truncated", f"{total.truncated:,}", f"{total.truncated / total.tokens_in:.2%}"),
        ("  dropped", f"{total.dropped_tokens:,}", f"{total.dropped_tokens / total.tokens_in:.2%}"),
        *(("", f"{tokens:,}", f"in {count:,} {why}") for why, (count, tokens) in sorted(total.dropped.items())),
        ("cut documents", f"{total.cut_documents:,}", f"over {max_length:,} tokens"),
        ("samples", f"{num_samples:,}", f"of at most {max_length:,} tokens"),
        ("fill", f"{total.kept / (num_samples * max_length):.2%}", ""),
        ("bins", f"{len(tokens_per_bin):,}", ""),
        ("tokens per bin", f"{min(tokens_per_bin):,}", f"to {max(tokens_per_bin):,}"),
    ]
    if total.held_out_documents:
        rows.append(("held out", f"{total.held_out_documents:,}", "documents in eval"))
    names, numbers = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:<{names}}  {number:>{numbers}}  {remark}".rstrip() for name, number, remark in rows)
