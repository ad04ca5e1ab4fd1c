"""Compare tokenizers on text, to choose a vocabulary.

    python -m colossal_llama2.tokenizer.compare --tokenizer_dirs llama-2-7b,tokenizer-zh --data_input_dirs data/zh

A tokenizer is a Hugging Face folder of any kind, a SentencePiece tokenizer.model or a tokenizer.json. Code that comes
with a tokenizer is never run: a tokenizer that needs it is reported and left out.
"""

import json
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    # Run by its path, this file's own folder is on sys.path instead of the repository's.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import tokenizer_flags
from colossal_llama2.encoding.bpe_model import SPACE, unreachable
from colossal_llama2.encoding.byte_level_tokens import text_of
from colossal_llama2.encoding.file_names import CONFIG_FILE, FAST_FILE, MODEL_CONFIG_FILE, MODEL_FILE
from colossal_llama2.encoding.folder_files import check_tokenizer_files, loader_of, loading_arguments
from colossal_llama2.encoding.library_panics import panics_as_errors
from colossal_llama2.encoding.model_file_format import is_tiktoken
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import check_new_file, new_file, read_json, write_json
from colossal_llama2.storage.unpickling_guard import unpickling_refused
from colossal_llama2.tables import print_table
from colossal_llama2.terminal_text import show_line
from colossal_llama2.tokenizer.text_sample import Sample, draw, read_documents

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

SEED = 1024
BATCH_DOCUMENTS = 64
BATCH_PIECES = 1 << 14
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        unknown_id: the id of unknown text, if there is one.
        encode: texts to ids without special tokens.
        find_unreachable: returns the tokens that no text is encoded to; None if that cannot be found for its kind.
    """

    kind: str
    vocabulary_size: int
    unknown_id: int | None
    encode: Callable[[list[str]], list[list[int]]]
    find_unreachable: Callable[[], list[str]] | None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `compression_rate` is in tokens per character. Unknown text improves it, so `unknown_tokens` is shown beside it.
    `megabytes_per_second` is UTF-8 text per CPU-second, on one thread.
    """

    tokenizer: str
    kind: str
    vocabulary_size: int
    compression_rate: float
    average_sample_tokens: float
    unknown_tokens: int
    unreachable_pieces: int | None
    megabytes_per_second: float


@dataclass(frozen=True)
class LeftOut:
    """A tokenizer that cannot be compared, and the reason."""

    tokenizer: str
    error: str


@dataclass(frozen=True)
class CompareSettings:
    """The flags of compare.py."""

    tokenizer_dirs: Sequence[str]
    data_input_dirs: Sequence[str]
    output_file: str | None
    sample_documents: int


def main(argv: Sequence[str] | None = None) -> None:
    """The command: parse `argv` (default: the process's), compare and print."""
    args = tokenizer_flags.compare_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("compare.py"):
        settings = CompareSettings(**vars(args))
        output_file = Path(settings.output_file) if settings.output_file else None
        if output_file:
            check_new_file(output_file, "--output_file")
        _check_paths(settings.tokenizer_dirs)
        documents = sample_documents(settings.data_input_dirs, settings.sample_documents)
        rows, left_out = compare(settings.tokenizer_dirs, documents)
        _print_table(rows, left_out, documents)
        if output_file:
            with new_file(output_file) as path:
                write_json(path, _as_json(rows, left_out, documents))
            show_line(f"written to {output_file}")
        if not rows:
            raise UserError("no tokenizer could be compared; see the lines above")


def compare(tokenizer_dirs: Sequence[str], documents: Sequence[str]) -> tuple[list[Row], list[LeftOut]]:
    """Measure each tokenizer on the documents; one that cannot be loaded, or fails on them, is left out."""
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    total = len(tokenizer_dirs) * len(documents)
    with _single_thread(), logs.progress(total=total, description="encode", unit="documents") as progress:
        for path in tokenizer_dirs:
            try:
                with panics_as_errors():
                    rows.append(_measure(path, load(Path(path)), documents, progress))
            except UserError as error:
                left_out.append(LeftOut(path, str(error)))
            except Exception as error:  # tokenizers raises plain Exception, and each library its own kinds
                left_out.append(LeftOut(path, textwrap.shorten(f"{type(error).__name__}: {error}", 200)))
    return rows, left_out


def sample_documents(data_input_dirs: Sequence[str], count: int) -> list[str]:
    """At most `count` different documents, drawn by a hash. Raises UserError if there is no text."""
    sample: Sample = Sample(count)
    for document in read_documents(data_input_dirs):
        sample.add(draw(document, SEED)[1], document, 1)
    if not sample.size:
        raise UserError('--data_input_dirs: no text in any record; give jsonl with {"target": "..."}')
    return sample.items()


def _check_paths(paths: Sequence[str]) -> None:
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(
                f"--tokenizer_dirs: {path} does not exist; give folders, {MODEL_FILE} or {FAST_FILE} files on this disk"
            )


def _measure(path: str, tokenizer: Tokenizer, documents: Sequence[str], progress: logs.SilentProgress) -> Row:
    tokens, unknown, seconds = 0, 0, 0.0
    tokenizer.encode(list(documents[:1]))  # not measured: it builds what is built at first use
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        batch = list(documents[start : start + BATCH_DOCUMENTS])
        began = time.process_time()
        encoded = tokenizer.encode(batch)
        seconds += time.process_time() - began
        tokens += sum(map(len, encoded))
        if tokenizer.unknown_id is not None:
            unknown += sum(ids.count(tokenizer.unknown_id) for ids in encoded)
        progress.update(len(batch), tokenizer=Path(path).name)
    return Row(
        tokenizer=path,
        kind=tokenizer.kind,
        vocabulary_size=tokenizer.vocabulary_size,
        compression_rate=tokens / sum(map(len, documents)),
        average_sample_tokens=tokens / len(documents),
        unknown_tokens=unknown,
        unreachable_pieces=len(tokenizer.find_unreachable()) if tokenizer.find_unreachable else None,
        megabytes_per_second=_utf8_bytes(documents) / 1e6 / max(seconds, 1e-9),
    )


def _utf8_bytes(documents: Sequence[str]) -> int:
    return sum(len(document.encode()) for document in documents)


@contextmanager
def _single_thread() -> Iterator[None]:
    """Use one thread in the tokenizers library, so that its speed is comparable."""
    import os

    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


# Loading.


def load(path: Path) -> Tokenizer:
    """The tokenizer of a folder or file. Raises UserError, or an error of its library, if it cannot be loaded."""
    if path.is_dir():
        return _load_folder(path)
    if path.suffix == ".json":
        return _load_fast_file(path)
    return _load_sentencepiece(path.read_bytes(), path)


def _load_folder(folder: Path) -> Tokenizer:
    _refuse_remote_code(folder)
    names_class = (folder / CONFIG_FILE).is_file() and read_json(folder / CONFIG_FILE).get("tokenizer_class")
    # Without a class, transformers uses the model's type; without either, it loads nothing.
    if names_class or (folder / MODEL_CONFIG_FILE).is_file():
        return _load_with_transformers(folder)
    for name in (FAST_FILE, MODEL_FILE):
        if (folder / name).is_file():
            return load(folder / name)
    raise UserError(
        f"{folder} holds no {FAST_FILE}, no {MODEL_FILE} and no {CONFIG_FILE} that names a class; "
        "give a tokenizer's folder"
    )


def _refuse_remote_code(folder: Path) -> None:
    """Raise UserError for a folder with its own tokenizer code: its files alone do not determine the ids."""
    for name in (CONFIG_FILE, MODEL_CONFIG_FILE):
        auto_map = read_json(folder / name).get("auto_map") if (folder / name).is_file() else None
        code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        if code:
            names = ", ".join(filter(None, code)) if isinstance(code, list) else code
            cure = f"; its {MODEL_FILE} can be given as a file" if (folder / MODEL_FILE).is_file() else ""
            raise UserError(f"needs its own code ({names}, auto_map in {name}), which is never run here{cure}")


def _load_with_transformers(folder: Path) -> Tokenizer:
    import transformers

    check_tokenizer_files(folder)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with unpickling_refused():
            loaded = loader_of(folder).from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **loading_arguments(folder)
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    if loaded.is_fast:
        return _fast(loaded.backend_tokenizer, "transformers fast")

    def encode(texts: list[str]) -> list[list[int]]:
        return loaded(texts, add_special_tokens=False, verbose=False)["input_ids"]

    model = getattr(loaded, "sp_model", None)
    search = (lambda: _unreachable_in_model(model.serialized_model_proto())) if model else None
    return Tokenizer("transformers slow", len(loaded), loaded.unk_token_id, encode, search)


def _load_fast_file(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    return _fast(Backend.from_file(str(path)), FAST_FILE)


def _fast(backend: "Backend", kind: str) -> Tokenizer:
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]

    settings = json.loads(backend.to_str())
    can_search = settings["model"]["type"] in ("BPE", "Unigram")
    search = (lambda: _unreachable_in_fast(backend, settings, encode)) if can_search else None
    unknown = settings["model"].get("unk_token")
    unknown_id = None if unknown is None else backend.token_to_id(unknown)
    return Tokenizer(kind, backend.get_vocab_size(with_added_tokens=True), unknown_id, encode, search)


def _load_sentencepiece(content: bytes, path: Path) -> Tokenizer:
    if is_tiktoken(path):
        raise UserError(
            f"{path} is in tiktoken's format; convert it with python -m colossal_llama2.tokenizer.convert_tiktoken"
        )
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, OSError):
        raise UserError(f"{path} is neither a SentencePiece model nor a {FAST_FILE}")

    def encode(texts: list[str]) -> list[list[int]]:
        return processor.encode(texts, num_threads=1)

    def search() -> list[str]:
        return _unreachable_in_model(content)

    return Tokenizer("SentencePiece", processor.get_piece_size(), processor.unk_id(), encode, search)


# Tokens that no text is encoded to.


def _unreachable_in_model(content: bytes) -> list[str]:
    """Ordinary pieces of a SentencePiece model that its merges (or its likeliest split) never produce."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(content)
    ordinary = [piece.piece for piece in model.pieces if piece.type == model.SentencePiece.NORMAL]
    return unreachable(content, ordinary)


def _unreachable_in_fast(
    backend: "Backend", settings: dict[str, Any], encode: Callable[[list[str]], list[list[int]]]
) -> list[str]:
    """Tokens of a tokenizer.json that none of a few texts is encoded to, without special, added and byte tokens.

    A token of a byte-level vocabulary that is part of a character has no text: only its merges are tested.
    """
    added = set(backend.get_added_tokens_decoder())
    vocabulary = {token: index for token, index in backend.get_vocab().items() if index not in added}
    unknown = settings["model"].get("unk_token")
    byte_level = "ByteLevel" in json.dumps([settings["pre_tokenizer"], settings["normalizer"], settings["decoder"]])
    texts, lost = {}, []
    for token, index in vocabulary.items():
        text = _text_of(token) if byte_level else token.replace(SPACE, " ")
        if text is not None:
            texts[token] = text
        elif [part.id for part in backend.model.tokenize(token)] != [index]:
            lost.append(token)
    left = [token for token in texts if not BYTE_PIECE.fullmatch(token) and token != unknown]
    for variant in _TEXT_VARIANTS:
        left = _not_among_ids(left, [variant(texts[token]) for token in left], vocabulary, encode)
    return lost + left


# In this order: alone, after a line break (where many tokenizers add no space), without a space, and after a letter.
_TEXT_VARIANTS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: f"\n{text}",
    lambda text: text.removeprefix(" "),
    lambda text: f"x{text}",
)


def _not_among_ids(tokens: list[str], texts: list[str], vocabulary: dict, encode: Callable) -> list[str]:
    left = []
    for start in range(0, len(tokens), BATCH_PIECES):
        part = tokens[start : start + BATCH_PIECES]
        encoded = encode(texts[start : start + BATCH_PIECES])
        left += [token for token, ids in zip(part, encoded, strict=True) if vocabulary[token] not in ids]
    return left


def _text_of(token: str) -> str | None:
    """The text of a byte-level vocabulary's token; None for part of a character, and for one that spells no bytes."""
    try:
        return text_of(token)
    except KeyError:
        return None


# Reporting.


def _print_table(rows: Sequence[Row], left_out: Sequence[LeftOut], documents: Sequence[str]) -> None:
    head = ("tokenizer", "kind", "vocabulary", "tokens/character", "tokens/sample", "unknown", "unreachable", "MB/s")
    lines = [head] + [
        (
            row.tokenizer,
            row.kind,
            f"{row.vocabulary_size:,}",
            f"{row.compression_rate:.3f}",
            f"{row.average_sample_tokens:,.3f}",
            f"{row.unknown_tokens:,}",
            "-" if row.unreachable_pieces is None else f"{row.unreachable_pieces:,}",
            f"{row.megabytes_per_second:.1f}",
        )
        for row in rows
    ]
    if rows:
        print_table(lines, align="llr")
    for entry in left_out:
        show_line(f"{entry.tokenizer}: left out: {' '.join(entry.error.split())}")
    sizes = {"document": len(documents), "character": sum(map(len, documents)), "byte": _utf8_bytes(documents)}
    show_line(", ".join(counted(size, noun) for noun, size in sizes.items()))


def _as_json(rows: Sequence[Row], left_out: Sequence[LeftOut], documents: Sequence[str]) -> dict:
    return {
        "documents": len(documents),
        "characters": sum(map(len, documents)),
        "bytes": _utf8_bytes(documents),
        "tokenizers": [asdict(row) for row in rows],
        "left_out": [asdict(entry) for entry in left_out],
    }


if __name__ == "__main__":
    main()
