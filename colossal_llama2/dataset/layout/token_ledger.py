"""Count every record and token of a prepare command, by what happened to it, file and category; check and print that.

As JSON, one `Tally`:

    {"documents": 3, "bytes": 1790, "characters": 1790, "tokens_in": 620, "trained": 560, "masked": 20,
     "truncated": 0, "dropped": {"conversations without an answer": {"documents": 1, "tokens": 40}},
     "predicted": 558, "pieces": 3, "cut_documents": 1, "held_out_documents": 0, "held_out_pieces": 0}
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from colossal_llama2.corpus.category_names import category_name
from colossal_llama2.errors import RunError
from colossal_llama2.plurals import counted
from colossal_llama2.tables import print_table
from colossal_llama2.terminal_text import show_line, visible_line

TABLE_ROWS = 20
MOST_ROLES, OTHER_ROLES = 100, "(other roles)"


@dataclass
class Tally:
    """Counts for the records of one file and category, or of several.

    Attributes:
        bytes, characters: of the records' text, in UTF-8.
        tokens_in: all tokens of the text, with marks; equals trained + masked + truncated + dropped.
        trained: labels other than -100. masked: labels of -100.
        predicted: trained tokens that are not the first of their piece; only these carry a loss.
        truncated: tokens beyond max_length that --overlong truncate drops.
        dropped: reason to [records or pieces, tokens].
        pieces: what goes into samples: whole documents, and pieces of `cut_documents`, which are over max_length;
            `held_out_pieces`, from `held_out_documents`, are in eval/.
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
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, *, documents: int, tokens: int) -> None:
        """Count records or pieces that go into no sample."""
        counts = self.dropped.setdefault(reason, [0, 0])
        counts[0] += documents
        counts[1] += tokens

    @property
    def dropped_tokens(self) -> int:
        """Tokens dropped for any reason."""
        return sum(tokens for _, tokens in self.dropped.values())

    @property
    def kept(self) -> int:
        """Tokens that go into samples."""
        return self.trained + self.masked

    def add(self, other: "Tally") -> None:
        """Add the counts of `other`."""
        own, others = vars(self), vars(other)
        for name in COUNTS:
            own[name] += others[name]
        for reason, (documents, tokens) in other.dropped.items():
            self.drop(reason, documents=documents, tokens=tokens)

    def check(self, name: str) -> None:
        """Raise RunError unless every token that came in is trained, masked, truncated or dropped."""
        if self.tokens_in != self.kept + self.truncated + self.dropped_tokens:
            raise RunError(
                f"the token counts of {name} do not balance: {self.tokens_in} tokens in, but {self.trained} trained, "
                f"{self.masked} masked, {self.truncated} truncated and {self.dropped_tokens} dropped; "
                "no output folder was made"
            )

    def as_json(self) -> dict[str, Any]:
        """The counts as in this module's docstring."""
        dropped = {reason: {"documents": count, "tokens": tokens} for reason, (count, tokens) in self.dropped.items()}
        return {**{name: getattr(self, name) for name in COUNTS}, "dropped": dropped}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Tally":
        """The inverse of `as_json`."""
        dropped = {reason: [drop["documents"], drop["tokens"]] for reason, drop in content["dropped"].items()}
        return cls(**{name: content[name] for name in COUNTS}, dropped=dropped)


COUNTS = tuple(count.name for count in fields(Tally) if count.name != "dropped")


@dataclass
class TokenLedger:
    """The tallies of a unit or a whole run, by (file number, category), and counts of other lines.

    Attributes:
        bad: (file number, reason) of bad rows to [count, problem of the first].
        formats: the format of conversations to their number.
        notes: remarks about rows that were used, such as "answers masked by a loss mark", to their number.
        unknown_roles: roles that made rows bad, to the number of messages with each.
    """

    tallies: dict[tuple[int, str], Tally] = field(default_factory=dict)
    lines: int = 0
    empty_lines: int = 0
    bad: dict[tuple[int, str], list[Any]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    unknown_roles: dict[str, int] = field(default_factory=dict)

    def tally(self, file: int, category: str) -> Tally:
        """The tally of one file and category."""
        key = (file, category)
        if key not in self.tallies:
            self.tallies[key] = Tally()
        return self.tallies[key]

    def add(self, other: "TokenLedger") -> None:
        """Add the counts of `other`."""
        for key, tally in other.tallies.items():
            self.tally(*key).add(tally)
        self.lines += other.lines
        self.empty_lines += other.empty_lines
        for (file, reason), (count, example) in other.bad.items():
            self.bad_row(file, reason, example, count)
        for name, count in other.formats.items():
            self.formats[name] = self.formats.get(name, 0) + count
        for name, count in other.notes.items():
            self.count_note(name, count)
        self.count_roles(other.unknown_roles)

    def bad_row(self, file: int, reason: str, problem: str, count: int = 1) -> None:
        """Count bad rows with one reason; the first `problem` is kept as an example."""
        self.bad.setdefault((file, reason), [0, problem])[0] += count

    @property
    def bad_rows(self) -> int:
        """The number of bad rows."""
        return sum(count for count, _ in self.bad.values())

    def bad_reasons(self) -> dict[str, int]:
        """The number of bad rows by reason, the most frequent first."""
        reasons: dict[str, int] = {}
        for (_, reason), (count, _) in self.bad.items():
            reasons[reason] = reasons.get(reason, 0) + count
        return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))

    def count_note(self, name: str, count: int = 1) -> None:
        """Count a remark about rows that were used."""
        self.notes[name] = self.notes.get(name, 0) + count

    def count_roles(self, roles: Mapping[str, int]) -> None:
        """Count messages by unknown role; roles beyond the first `MOST_ROLES` are counted together."""
        for role, count in roles.items():
            is_listed = role in self.unknown_roles or len(self.unknown_roles) < MOST_ROLES
            name = role if is_listed else OTHER_ROLES
            self.unknown_roles[name] = self.unknown_roles.get(name, 0) + count

    def total(self) -> Tally:
        """The sum of all tallies."""
        return _sum(self.tallies.values())

    def by_file(self) -> dict[int, Tally]:
        """The tallies of each file, in the order of the input."""
        parts: dict[int, list[Tally]] = {}
        for file, category in sorted(self.tallies):
            parts.setdefault(file, []).append(self.tallies[file, category])
        return {file: _sum(tallies) for file, tallies in parts.items()}

    def by_category(self) -> dict[str, Tally]:
        """The tallies of each category, by name."""
        parts: dict[str, list[Tally]] = {}
        for file, category in sorted(self.tallies):
            parts.setdefault(category, []).append(self.tallies[file, category])
        return {category: _sum(parts[category]) for category in sorted(parts)}

    def check(self, names: dict[int, str], *, bins: Tally) -> None:
        """Raise RunError unless each file and category balances, and `bins` hold all tokens that should be kept."""
        for (file, category), tally in self.tallies.items():
            tally.check(f"{names[file]}, category {category}")
        total = self.total()
        total.check("all files")
        if (total.trained, total.masked, total.predicted) != (bins.trained, bins.masked, bins.predicted):
            raise RunError(
                f"the token counts do not balance: {total.trained} trained, {total.masked} masked and "
                f"{total.predicted} predicted tokens should be kept, but the bins hold {bins.trained}, "
                f"{bins.masked} and {bins.predicted}; no output folder was made. Delete --data_cache_dir and run the "
                "command again"
            )

    def as_json(self) -> dict[str, Any]:
        """The counts of one unit, as its JSON file in the cache holds them."""
        tallies = [[*key, self.tallies[key].as_json()] for key in sorted(self.tallies)]
        bad = [[*key, *self.bad[key]] for key in sorted(self.bad)]
        return {
            "tallies": tallies,
            "lines": self.lines,
            "empty_lines": self.empty_lines,
            "bad": bad,
            "formats": dict(sorted(self.formats.items())),
            "notes": dict(sorted(self.notes.items())),
            "unknown_roles": dict(sorted(self.unknown_roles.items())),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "TokenLedger":
        """The inverse of `as_json`."""
        tallies = {(file, category): Tally.from_json(tally) for file, category, tally in content["tallies"]}
        bad = {(file, reason): [count, example] for file, reason, count, example in content["bad"]}
        others = ("lines", "empty_lines", "formats", "notes", "unknown_roles")
        return cls(tallies, bad=bad, **{name: content[name] for name in others})


def _sum(tallies: Iterable[Tally]) -> Tally:
    tallies = list(tallies)
    # Not tally by tally, for speed: there may be as many categories as documents.
    counts = map(sum, zip(*map(attrgetter(*COUNTS), tallies), strict=True))
    figures: dict[str, Any] = dict(zip(COUNTS, counts, strict=False))
    total = Tally(**figures)
    for tally in tallies:
        for reason, (documents, tokens) in tally.dropped.items():
            total.drop(reason, documents=documents, tokens=tokens)
    return total


def print_tables(manifest: Mapping[str, Any]) -> None:
    """Print the counts in a manifest (see `manifest`): by file, by category, and in total."""
    inputs, categories = manifest["inputs"], manifest["categories"]
    by_file = {entry["path"]: Tally.from_json(entry) for entry in inputs if "documents" in entry}
    by_category = {category_name(name): Tally.from_json(entry) for name, entry in categories.items()}
    for heading, tallies in (("file", by_file), ("category", by_category)):
        print_table(_breakdown(heading, tallies))
        show_line("")
    print_table(_summary(manifest), align="lrl", has_header=False)


def _breakdown(heading: str, tallies: Mapping[str, Tally]) -> list[tuple[str, ...]]:
    """One row per name, the largest first; names beyond `TABLE_ROWS` are summed."""
    ordered = sorted(tallies.items(), key=lambda item: -item[1].tokens_in)
    shown, rest = ordered[:TABLE_ROWS], ordered[TABLE_ROWS:]
    rows: list[tuple[str, ...]] = [(heading, "documents", "tokens in", "trained", "masked", "truncated", "dropped")]
    remainder = [(f"{len(rest):,} more, in manifest.json", _sum(tally for _, tally in rest))] if rest else []
    for name, tally in [*((visible_line(name), tally) for name, tally in shown), *remainder]:
        counts = (tally.documents, tally.tokens_in, tally.trained, tally.masked, tally.truncated, tally.dropped_tokens)
        rows.append((name, *(f"{count:,}" for count in counts)))
    return rows


def _summary(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of name, number and remark."""
    total, settings = Tally.from_json(manifest["total"]), manifest["settings"]
    max_length, num_samples = settings["max_length"], manifest["samples"]
    skipped = f"{counted(manifest['empty_lines'], 'empty line')} skipped"
    if manifest["bad_rows"]:
        skipped += f", {counted(manifest['bad_rows'], 'bad row')} skipped, listed in bad_rows.jsonl"
    tokens_per_bin = [entry["tokens"] for entry in manifest["bins"]]
    rows = [
        ("documents", f"{total.documents:,}", skipped),
        # Manifests of earlier versions have neither of the next two.
        *(("", f"{count:,}", f"bad rows: {reason}") for reason, count in manifest.get("bad_reasons", {}).items()),
        *_lost_rows(manifest.get("lost_files", ())),
        *(("", f"{count:,}", f"in the format {name}") for name, count in manifest["formats"].items()),
        # Manifests of earlier versions have none.
        *(("", f"{count:,}", name) for name, count in manifest.get("notes", {}).items()),
        *_role_rows(manifest.get("unknown_roles", {})),
        ("tokens in", f"{total.tokens_in:,}", ""),
        ("  trained", f"{total.trained:,}", f"{total.trained / total.tokens_in:.2%}, {total.predicted:,} predicted"),
        ("  masked", f"{total.masked:,}", f"{total.masked / total.tokens_in:.2%}"),
        ("  truncated", f"{total.truncated:,}", f"{total.truncated / total.tokens_in:.2%}"),
        ("  dropped", f"{total.dropped_tokens:,}", f"{total.dropped_tokens / total.tokens_in:.2%}"),
        *(("", f"{tokens:,}", f"in {count:,} {why}") for why, (count, tokens) in sorted(total.dropped.items())),
        ("samples", f"{num_samples:,}", f"of at most {max_length:,} tokens"),
        ("fill", f"{total.kept / (num_samples * max_length):.2%}", ""),
        ("bins", f"{len(tokens_per_bin):,}", ""),
        ("tokens per bin", f"{min(tokens_per_bin):,}", f"to {max(tokens_per_bin):,}"),
    ]
    # A conversation is not cut: its last turns are dropped, and counted as such.
    if settings["stage"] == "pretrain":
        rows.insert(-4, ("cut documents", f"{total.cut_documents:,}", f"over {max_length:,} tokens"))
    if total.held_out_documents:
        rows.append(("held out", f"{total.held_out_documents:,}", "documents in eval"))
    if "eval_dedup" in manifest:
        overlap = manifest["eval_dedup"]
        remark = f"of {overlap['compared']:,} compared share {overlap['ngram']} words in a row with training text"
        rows.append(("  overlapping", f"{overlap['overlapping']:,}", remark))
    return rows


def _role_rows(roles: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Rows of the unknown roles, the most frequent first; roles beyond `TABLE_ROWS` are summed."""
    ordered = sorted(roles.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        ("", f"{count:,}", f"messages of the unknown role {visible_line(role)}, in bad rows")
        for role, count in ordered[:TABLE_ROWS]
    ]
    rest = ordered[TABLE_ROWS:]
    if rest:
        count = sum(count for _, count in rest)
        rows.append(("", f"{count:,}", f"messages of {counted(len(rest), 'more unknown role')}, in manifest.json"))
    return rows


def _lost_rows(lost: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    if not lost:
        return []
    reasons = Counter(entry["reason"] for entry in lost)
    rows = [("", f"{count:,}", f"files: {reason}") for reason, count in sorted(reasons.items())]
    return [("LOST FILES", f"{len(lost):,}", "not read to the end, see lost_files in manifest.json"), *rows]
