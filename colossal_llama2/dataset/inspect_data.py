"""Look at prepared data: decoded samples with what is trained and what is masked, the manifest, and two charts.

    python -m colossal_llama2.dataset.inspect_data arrow_output/part-00000 --tokenizer_dir tokenizer-zh

On a terminal, trained, masked and borders differ by colour; elsewhere, and with NO_COLOR, by a word before each line.
"""

import os
import random
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2 import errors, logs
from colossal_llama2.chat.marks import NO_NAMES, Marks
from colossal_llama2.cli import data_flags
from colossal_llama2.corpus.category_names import NO_CATEGORY, category_name
from colossal_llama2.dataset.layout.columns import (
    DOCUMENT_CATEGORIES,
    DOCUMENT_LENGTHS,
    IGNORE_INDEX,
    INPUT_IDS,
    LABELS,
    SAMPLE_CATEGORY,
)
from colossal_llama2.dataset.layout.manifest_table import manifest_lines
from colossal_llama2.dataset.layout.output_folder import DATA_MANIFEST_FILE
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.encoding.registry import fingerprint, load_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import read_json
from colossal_llama2.storage.output_paths import check_output_file
from colossal_llama2.terminal_text import visible, visible_line

if TYPE_CHECKING:
    import datasets

COMMAND = "python -m colossal_llama2.dataset.inspect_data"
LENGTHS_FILE, CATEGORIES_FILE = "lengths.png", "categories.png"
# The columns with the categories of a sample's documents; older fine-tuning data has one category per sample.
CATEGORY_COLUMNS = (DOCUMENT_CATEGORIES, SAMPLE_CATEGORY)
# At most this many of the characters that no font can draw are listed.
MAX_MISSING = 20
TRAINED, MASKED, BORDER = "trained", "masked", "border"
# Brightness differs as well, for readers who do not distinguish the colours.
COLOURS = {TRAINED: "32", MASKED: "2", BORDER: "1;35"}


class Run(NamedTuple):
    """A stretch of a document whose tokens are all trained, or all masked, as text that is safe to print."""

    text: str
    is_trained: bool


class Document(NamedTuple):
    """One document of a sample: its category, if it is recorded, its length in tokens, and its runs."""

    category: str | None
    num_tokens: int
    runs: list[Run]


@dataclass(frozen=True)
class InspectSettings:
    """The flags of inspect_data.py: a bin, its tokenizer, the number of samples to show, and the charts' folder."""

    part: str
    tokenizer_dir: str
    sample: int
    seed: int
    plots: str | None


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and print the report."""
    args = data_flags.inspect_data_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors(COMMAND):
        # A terminal that cannot show a character shows its code, instead of ending the report.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        report = inspect_part(InspectSettings(**vars(args)), is_coloured=is_coloured, width=width)
        try:
            for line in report:
                print(line)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader, such as `head`, has closed the pipe. Without this, Python reports it again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def inspect_part(settings: InspectSettings, *, is_coloured: bool, width: int | None = None) -> Iterator[str]:
    """The lines of the report on a bin; with `plots`, also write the charts to that folder.

    Args:
        width: columns of the terminal; None if the report goes elsewhere.

    Raises:
        UserError: the folder is not a bin, it was prepared with another tokenizer, or the charts cannot be written.
    """
    part, plots = Path(settings.part), settings.plots
    encoder = load_encoder(settings.tokenizer_dir)
    dataset = open_bin(part)
    lengths = sample_lengths(dataset)
    manifest = _manifest_of(part)
    _check_tokenizer(part, manifest, settings.tokenizer_dir)
    is_rendered = bool((manifest.get("settings") or {}).get("template_text"))
    names = Marks.of(settings.tokenizer_dir, encoder).names if is_rendered else {}
    if plots is not None:
        check_plots_folder(Path(plots))
    yield from _manifest_table(part, manifest, width=width)
    yield (
        f"{part}: {counted(len(lengths), 'sample')} of {min(lengths):,} to {max(lengths):,} tokens, "
        f"median {statistics.median(lengths):,.0f}, mean {statistics.fmean(lengths):,.1f}"
    )
    if DOCUMENT_LENGTHS not in dataset.column_names:
        yield "this bin does not record where its documents end, so no borders are shown"
    chosen = sorted(random.Random(settings.seed).sample(range(len(lengths)), min(settings.sample, len(lengths))))
    if chosen and is_coloured:
        yield "colours: " + " ".join(_painted(name, name) for name in COLOURS)
    for index in chosen:
        where = f"sample {index} of {part}"
        documents = documents_of(dataset[index], encoder=encoder, where=where, names=names)
        yield from _sample_lines(documents, title=f"sample {index} of {len(lengths):,}", is_coloured=is_coloured)
    if plots is not None:
        yield from _draw(part, lengths=lengths, folder=Path(plots))


# Reading.


def open_bin(folder: Path) -> "datasets.Dataset":
    """The `datasets.Dataset` of a bin. Raises UserError if the folder is not a bin, or holds no samples."""
    import datasets

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a prepared bin, such as arrow_output/part-00000")
    bins = bins_in(folder)
    if bins and not _is_bin(folder):
        raise UserError(f"{folder} holds {counted(len(bins), 'bin')}; give one of them, such as {bins[0]}")
    try:
        dataset = datasets.load_from_disk(str(folder))
        columns = set(dataset.column_names)
    except Exception as error:  # pyarrow and datasets have many kinds for a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{folder} is not a prepared bin ({reason}); give one, such as arrow_output/part-00000")
    if not {INPUT_IDS, LABELS} <= columns or not len(dataset):
        raise UserError(f"{folder} holds no samples of input_ids and labels; give a bin that was prepared here")
    return dataset


def bins_in(folder: Path) -> list[Path]:
    """The bins in a folder, by name."""
    return [path for path in sorted(folder.glob("part-*")) if _is_bin(path)]


def _is_bin(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file()


def _manifest_path(part: Path) -> Path:
    return part.absolute().parent / DATA_MANIFEST_FILE


def _manifest_of(part: Path) -> dict[str, Any]:
    """The manifest beside the bin; empty if there is none."""
    path = _manifest_path(part)
    return read_json(path) if path.is_file() else {}


def _check_tokenizer(part: Path, manifest: dict[str, Any], tokenizer_dir: str) -> None:
    """Raise UserError if the manifest records another tokenizer: the ids would be shown as text that was never there.

    A tokenizer that extends the recorded one is another one too. It would encode the same text with other ids.
    """
    recorded = manifest.get("tokenizer")
    known = recorded.get("sha256") if isinstance(recorded, dict) else None
    if known and (found := fingerprint(tokenizer_dir)) != known:
        raise UserError(
            f"{part}: prepared with another tokenizer (SHA-256 {str(known)[:12]}) than that of {tokenizer_dir} "
            f"({found[:12]}); give --tokenizer_dir the tokenizer that the data was prepared with"
        )


def sample_lengths(dataset: "datasets.Dataset") -> list[int]:
    """Tokens of each sample, without reading the tokens."""
    import pyarrow.compute

    column = dataset.data.column(INPUT_IDS)
    return [length for chunk in column.chunks for length in pyarrow.compute.list_value_length(chunk).to_pylist()]


def count_categories(dataset: "datasets.Dataset") -> Counter[str] | None:
    """Documents per category of a bin, None if it does not record them."""
    import pyarrow

    name = next((name for name in CATEGORY_COLUMNS if name in dataset.column_names), None)
    if name is None:
        return None
    counts: Counter = Counter()
    for chunk in dataset.data.column(name).chunks:
        values = chunk.flatten() if isinstance(chunk, (pyarrow.ListArray, pyarrow.LargeListArray)) else chunk
        for entry in values.value_counts().to_pylist():
            counts[category_name(entry["values"])] += entry["counts"]
    return counts


def documents_of(
    row: dict[str, Any], *, encoder: Encoder, where: str, names: Mapping[int, str] = NO_NAMES
) -> list[Document]:
    """The documents of a sample, decoded. Without recorded borders, the whole sample is one document.

    `names` are the texts of marks besides those of the encoder, by id.

    Raises UserError if the tokenizer lacks an id, or the borders do not fit the sample. `where` names the sample.
    """
    input_ids, labels = row[INPUT_IDS], row[LABELS]
    borders = row.get(DOCUMENT_LENGTHS) or [len(input_ids)]
    if sum(borders) != len(input_ids) or len(labels) != len(input_ids):
        raise UserError(
            f"{where} is damaged: its ids, labels and {DOCUMENT_LENGTHS} differ in length; prepare it again"
        )
    marks = {**names, encoder.bos_id: encoder.bos_text, encoder.eos_id: encoder.eos_text}
    unknown = next((token for token in input_ids if not 0 <= token < encoder.vocab_size and token not in marks), None)
    if unknown is not None:
        raise UserError(
            f"{where} holds the id {unknown}, but the tokenizer has {encoder.vocab_size:,} pieces; "
            "give --tokenizer_dir the tokenizer that the bin was prepared with"
        )
    categories = next((row[name] for name in CATEGORY_COLUMNS if row.get(name) is not None), None)
    categories = categories if isinstance(categories, list) else [categories] * len(borders)
    categories = categories if len(categories) == len(borders) else [None] * len(borders)
    documents, start = [], 0
    for length, category in zip(borders, categories, strict=True):
        ids, document_labels = input_ids[start : start + length], labels[start : start + length]
        name = None if category is None else visible_line(category_name(category))
        documents.append(Document(name, length, _runs(ids, document_labels, encoder=encoder, marks=marks)))
        start += length
    return documents


def _runs(input_ids: Sequence[int], labels: Sequence[int], *, encoder: Encoder, marks: Mapping[int, str]) -> list[Run]:
    runs, start = [], 0
    for end in range(1, len(input_ids) + 1):
        if end == len(input_ids) or (labels[end] == IGNORE_INDEX) != (labels[start] == IGNORE_INDEX):
            text = _readable(input_ids[start:end], encoder=encoder, marks=marks, opens=start == 0)
            runs.append(Run(text, is_trained=labels[start] != IGNORE_INDEX))
            start = end
    return runs


def _readable(ids: Sequence[int], *, encoder: Encoder, marks: Mapping[int, str], opens: bool) -> str:
    """The text of `ids` with its marks shown. After the mark that `opens` a document, a text has a dummy prefix."""
    parts: list[str] = []
    start = 0
    for end in range(len(ids) + 1):
        if end == len(ids) or ids[end] in marks:
            has_prefix = opens and start == 1 and ids[0] == encoder.bos_id
            parts.append(visible(encoder.decode(ids[start:end], dummy_prefix=has_prefix)))
            parts += [marks[ids[end]]] if end < len(ids) else []
            start = end + 1
    return "".join(parts)


# Showing.


def _manifest_table(part: Path, manifest: dict[str, Any], *, width: int | None) -> Iterator[str]:
    """The manifest beside the bin as a table."""
    if not manifest:
        return
    yield f"manifest {_manifest_path(part)}:"
    categories = manifest.get("categories")
    if isinstance(categories, dict):
        manifest = {**manifest, "categories": {category_name(name): entry for name, entry in categories.items()}}
    yield from manifest_lines(manifest, width=width)
    yield ""


def _sample_lines(documents: Sequence[Document], *, title: str, is_coloured: bool) -> Iterator[str]:
    num_tokens = sum(document.num_tokens for document in documents)
    yield ""
    heading = f"==== {title}: {counted(num_tokens, 'token')}, documents: {len(documents):,}"
    yield _labelled(BORDER, heading, is_coloured=is_coloured)
    for number, document in enumerate(documents, start=1):
        named = document.category if document.category == NO_CATEGORY else f"category {document.category}"
        category = "" if document.category is None else f", {named}"
        border = f"---- document {number} of {len(documents)}: {counted(document.num_tokens, 'token')}{category}"
        yield _labelled(BORDER, border, is_coloured=is_coloured)
        kinds = [(TRAINED if run.is_trained else MASKED, run.text) for run in document.runs]
        if is_coloured:
            yield "".join("\n".join(_painted(kind, line) for line in text.split("\n")) for kind, text in kinds)
        else:
            for kind, text in kinds:
                yield from (_labelled(kind, line, is_coloured=False) for line in text.split("\n"))


def _labelled(kind: str, line: str, *, is_coloured: bool) -> str:
    return _painted(kind, line) if is_coloured else f"{kind:<7} | {line}"


def _painted(kind: str, line: str) -> str:
    # Line by line, since a pager such as `less -R` begins each line without colour.
    return f"\x1b[{COLOURS[kind]}m{line}\x1b[0m" if line else ""


def check_plots_folder(folder: Path) -> None:
    """Create the folder for the charts. Raises UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plots {folder} cannot be created ({error.strerror}); name a folder where you may write")
    for name in (LENGTHS_FILE, CATEGORIES_FILE):
        check_output_file(folder / name, "--plots")


def _draw(part: Path, *, lengths: Sequence[int], folder: Path) -> Iterator[str]:
    from colossal_llama2.charts import style
    from colossal_llama2.charts.plots import draw_categories, total_categories

    yield ""
    yield _draw_lengths(part, lengths=lengths, path=folder / LENGTHS_FILE)
    bins: dict[str, Counter] = {}
    for path in bins_in(part.absolute().parent) or [part]:
        counts = count_categories(open_bin(path))
        if counts is None:
            yield f"no {CATEGORIES_FILE}: {path} does not record the categories of its documents"
            return
        bins[path.name] = counts
    # Names as they are: the picture escapes them.
    title = f"{part.absolute().parent.name}: categories of {counted(len(bins), 'bin')}"
    draw_categories(bins, folder / CATEGORIES_FILE, title=title)
    totals = ", ".join(f"{visible_line(name)} {count:,}" for name, count in total_categories(bins).items())
    where = f"each of {len(bins):,} bins" if len(bins) > 1 else "the only bin"
    yield f"{folder / CATEGORIES_FILE}: documents per category in {where}; from the bottom: {totals}"
    missing = style.missing_characters("".join(total_categories(bins)))
    if missing:
        yield (
            f"no font here has {missing[:MAX_MISSING]}{'…' if len(missing) > MAX_MISSING else ''}, so the picture has "
            "their numbers instead; install a font such as Noto Sans CJK and draw it again"
        )


def _draw_lengths(part: Path, *, lengths: Sequence[int], path: Path) -> str:
    """Write lengths.png, and return the line about it. For spliced samples, nearly all full, it shows the documents.

    The fill is a share of --max_length if a manifest records it, otherwise of the longest sample.
    """
    from colossal_llama2.charts.plots import draw_lengths, draw_spliced

    manifest = part.absolute().parent / DATA_MANIFEST_FILE
    longest = (read_json(manifest).get("settings") or {}).get("max_length") if manifest.is_file() else None
    longest = max(longest if isinstance(longest, int) else 0, max(lengths))
    fill = f"fill {sum(lengths) / (len(lengths) * longest):.1%} of {longest:,} tokens"
    title = f"{part.absolute().name}: {counted(len(lengths), 'sample')}, {fill}"
    dataset = open_bin(part)
    borders = dataset[DOCUMENT_LENGTHS] if DOCUMENT_LENGTHS in dataset.column_names else []
    if all(len(documents) == 1 for documents in borders):
        draw_lengths(lengths, path, title=title)
        return f"{path}: how long the samples of this bin are; {fill}"
    documents = [length for sample in borders for length in sample]
    title += f", {len(documents) / len(lengths):.1f} documents per sample"
    draw_spliced(documents, [len(sample) for sample in borders], path, title=title)
    return f"{path}: how long the documents of this bin are, and how many share a sample; {fill}"


if __name__ == "__main__":
    main()
