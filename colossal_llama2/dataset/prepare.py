"""From folders of jsonl to bins of samples: the body of prepare_pretrain_dataset.py and prepare_sft_dataset.py.

Read and tokenize -> cut (pre-training) -> deal to bins -> splice (pre-training) -> write each bin as jsonl and as arrow
-> account for every token. The output depends on the input and the settings alone: two runs write the same bytes.
"""

import hashlib
import os
import random
import secrets
import shutil
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Set, Tuple

import numpy as np
import orjson

from colossal_llama2 import logs
from colossal_llama2.dataset import IGNORE_INDEX, tokenization
from colossal_llama2.dataset.splicing import TokenSequence, cut, deal_to_bins, has_trained_token, splice
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.tokenizer import Encoder

SEED = 1024
BATCH_BYTES = 1 << 20
ARROW_BATCH_SAMPLES = 1000
MASKED_PIECES = "pieces of long sources without a trained token"


def prepare_pretrain(
    *,
    data_input_dirs: Sequence[str],
    tokenizer_dir: str,
    data_cache_dir: str,
    data_jsonl_output_dir: str,
    data_arrow_output_dir: str,
    max_length: int,
    num_spliced_dataset_bins: int,
) -> None:
    """Tokenize {"source", "target", "category"} records and splice them into samples of at most `max_length` tokens.

    Writes part-00000.jsonl, ... and arrow folders part-00000, ... with the int32 columns `input_ids` and `labels`, and
    prints where every token went. Raises UserError for anything wrong with flags, folders or records, RunError if the
    account does not balance; in both cases, and when interrupted, no output folder is left behind.
    """
    _prepare(
        read=tokenization.read_pretrain_row,
        tokenize=tokenization.tokenize_pretrain,
        splices=True,
        input_dirs=data_input_dirs,
        tokenizer_dir=tokenizer_dir,
        output_dirs=_OutputDirs(data_cache_dir, data_jsonl_output_dir, data_arrow_output_dir),
        max_length=max_length,
        num_bins=num_spliced_dataset_bins,
    )


def prepare_sft(
    *,
    data_input_dirs: Sequence[str],
    tokenizer_dir: str,
    data_cache_dir: str,
    data_jsonl_output_dir: str,
    data_arrow_output_dir: str,
    max_length: int,
    num_spliced_dataset_bins: int,
) -> None:
    """Tokenize {"messages", "category"} records, one conversation a sample of at most `max_length` tokens.

    As `prepare_pretrain`, with four more columns: `inputs_decode`, `labels_decode`, `seq_length`, `seq_category`.
    """
    _prepare(
        read=tokenization.read_sft_row,
        tokenize=partial(tokenization.tokenize_sft, max_length=max_length),
        splices=False,
        input_dirs=data_input_dirs,
        tokenizer_dir=tokenizer_dir,
        output_dirs=_OutputDirs(data_cache_dir, data_jsonl_output_dir, data_arrow_output_dir),
        max_length=max_length,
        num_bins=num_spliced_dataset_bins,
    )


def _prepare(
    *,
    read: Callable,
    tokenize: Callable,
    splices: bool,
    input_dirs: Sequence[str],
    tokenizer_dir: str,
    output_dirs: "_OutputDirs",
    max_length: int,
    num_bins: int,
) -> None:
    """What both commands do; `read` checks a record, `tokenize` takes checked ones, `splices` joins documents."""
    output_dirs.check()
    files = find_jsonl_files(input_dirs)
    encoder = Encoder(tokenizer_dir)
    account = Account()
    documents = _read_documents(files, read=read, tokenize=partial(tokenize, encoder=encoder), account=account)
    _check_enough(documents, num_bins=num_bins, account=account)
    if splices:
        documents = _cut(documents, max_length=max_length, account=account)
    categories = [document.category for document in documents]
    lengths = [len(document.tokens.input_ids) for document in documents]
    bins = deal_to_bins(categories, lengths, num_bins=num_bins)
    with output_dirs.published_together() as folders, logs.progress(
        total=num_bins, description="write bins", unit="bins"
    ) as progress:  # fmt: skip
        for number, indices in enumerate(bins):
            members = [documents[index] for index in indices]
            if splices:
                pieces = [member.tokens for member in members]
                samples, columns = splice(pieces, max_length=max_length, seed=SEED + number), {}
            else:
                random.Random(SEED + number).shuffle(members)
                samples, columns = [member.tokens for member in members], _text_columns(members, encoder=encoder)
            account.add_bin(samples)
            _write_bin(f"part-{number:05d}", samples=samples, columns=columns, folders=folders)
            progress.update()
        account.check()
    print(account.table(max_length=max_length))


# Input


def find_jsonl_files(folders: Sequence[str]) -> List[Path]:
    """Every *.jsonl file directly inside the folders: folders in the given order, files sorted by name.

    Raises UserError for a folder that is missing, given twice or without such a file.
    """
    files: List[Path] = []
    seen: Set[Path] = set()
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"--data_input_dirs: {folder} is not a folder; give folders with *.jsonl files inside")
        if Path(folder).resolve() in seen:
            raise UserError(f"--data_input_dirs: {folder} is given twice; name each folder once")
        seen.add(Path(folder).resolve())
        inside = sorted(path for path in Path(folder).glob("*.jsonl") if path.is_file())
        if not inside:
            raise UserError(f"--data_input_dirs: {folder} has no *.jsonl file directly inside; subfolders are not read")
        files += inside
    return files


@dataclass
class _Document:
    """One tokenized record, or a piece of one, that goes into a sample."""

    tokens: TokenSequence
    category: str


def _read_documents(
    files: Sequence[Path], *, read: Callable, tokenize: Callable, account: "Account"
) -> List[_Document]:
    """Read and tokenize all files; what is skipped or dropped on the way is counted in `account`."""
    documents: List[_Document] = []
    total = sum(path.stat().st_size for path in files)
    with logs.progress(total=total, description="tokenize", unit="B", unit_scale=True) as progress:
        for rows, size in _read_batches(files, read=read, account=account):
            for row, tokenized in zip(rows, tokenize(rows), strict=True):
                account.num_rows += 1
                account.tokens_in += tokenized.tokens_in
                for drop in tokenized.drops:
                    account.add_drop(drop.reason, drop.tokens)
                if tokenized.input_ids:
                    documents.append(_Document(_as_arrays(tokenized), row.category))
            progress.update(size, documents=f"{account.num_rows:,}", tokens=f"{account.tokens_in:,}")
    return documents


def _as_arrays(tokenized: tokenization.Tokenized) -> TokenSequence:
    return TokenSequence(np.array(tokenized.input_ids, dtype=np.int32), np.array(tokenized.labels, dtype=np.int32))


def _read_batches(files: Sequence[Path], *, read: Callable, account: "Account") -> Iterator[Tuple[List[Any], int]]:
    """Checked records in batches of about `BATCH_BYTES`, each with the bytes of input that it stands for."""
    rows: List[Any] = []
    size = 0
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                size += len(line)
                if line.isspace():
                    account.empty_lines += 1
                else:
                    rows.append(_parse(line, read=read, where=f"{path}:{number}"))
                if size >= BATCH_BYTES:
                    yield rows, size
                    rows, size = [], 0
    yield rows, size


def _parse(line: bytes, *, read: Callable, where: str) -> Any:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: {_why_not_json(line, error)}; each line must be one JSON object in UTF-8")
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__} given; each line must be one JSON object")
    try:
        return read(row)
    except ValueError as error:
        raise UserError(f"{where}: {error}; correct or remove the line")


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as undecodable:
        return f"not UTF-8 at byte {undecodable.start + 1} of the line"
    return f"not JSON ({error})"


def _check_enough(documents: Sequence[_Document], *, num_bins: int, account: "Account") -> None:
    if len(documents) >= num_bins:
        return
    reasons = "".join(f", {count} dropped: {reason}" for reason, count in account.drops.items())
    left = f"{len(documents)} of {account.num_rows} records can be used{reasons}"
    if not documents:
        raise UserError(f"nothing to prepare: {left}; give folders with usable records")
    raise UserError(
        f"--num_spliced_dataset_bins {num_bins} given, but {left}; give at most {len(documents)} bins or more data"
    )


def _cut(documents: Sequence[_Document], *, max_length: int, account: "Account") -> List[_Document]:
    """All documents in pieces that fit a sample, without those that would bring no loss."""
    pieces: List[_Document] = []
    for document in documents:
        for piece in cut(document.tokens, max_length=max_length):
            if has_trained_token(piece):
                pieces.append(_Document(piece, document.category))
            else:
                account.add_drop(MASKED_PIECES, len(piece.input_ids))
    return pieces


# Output


@dataclass(frozen=True)
class _OutputDirs:
    """The three folders to write. Cache comes into being empty: no step of this one-pass design needs it yet."""

    cache: str
    jsonl: str
    arrow: str

    def check(self) -> None:
        """Raise UserError unless all three can be made: new, apart from each other, in folders that can be written."""
        resolved = {flag: Path(folder).resolve() for flag, folder in self._by_flag().items()}
        for flag, given in self._by_flag().items():
            folder = resolved[flag]
            if folder.exists():
                raise UserError(f"{flag}: {given} exists already; remove it or name another folder")
            for other_flag, other in resolved.items():
                if flag != other_flag and folder.is_relative_to(other):
                    raise UserError(f"{flag}: {given} is the folder of {other_flag} or inside it; name one beside it")
            parent = next(parent for parent in folder.parents if parent.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise UserError(f"{flag}: {given} cannot be made in {parent}; name a folder where you may write")

    @contextmanager
    def published_together(self) -> Iterator["_OutputDirs"]:
        """Yield folders beside the final ones, which get the final names at the end; on an error all of them go."""
        mark = f".partial-{secrets.token_hex(4)}"
        finals = [Path(folder).resolve() for folder in self._by_flag().values()]
        partials = [final.with_name(final.name + mark) for final in finals]
        published: List[Path] = []
        try:
            for folder in partials:
                folder.mkdir(parents=True)
            yield _OutputDirs(*map(str, partials))
            for folder, final in zip(partials, finals, strict=True):
                folder.rename(final)
                published.append(final)
        except BaseException:
            for folder in [*partials, *published]:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _by_flag(self) -> Dict[str, str]:
        # Arrow last: it is what training reads, so when it is there all is there.
        return {
            "--data_cache_dir": self.cache,
            "--data_jsonl_output_dir": self.jsonl,
            "--data_arrow_output_dir": self.arrow,
        }


def _text_columns(members: Sequence[_Document], *, encoder) -> Dict[str, List[Any]]:
    """The original's columns for reading a conversation by eye: one entry per sample."""
    return {
        "inputs_decode": [tokenization.decode_marked(member.tokens.input_ids, encoder=encoder) for member in members],
        "labels_decode": [tokenization.decode_trained(member.tokens.labels, encoder=encoder) for member in members],
        "seq_length": [len(member.tokens.input_ids) for member in members],
        "seq_category": [member.category for member in members],
    }


def _write_bin(
    name: str, *, samples: Sequence[TokenSequence], columns: Dict[str, List[Any]], folders: _OutputDirs
) -> None:
    """Write one bin as `name`.jsonl and as the arrow folder `name`, which datasets.load_from_disk reads."""
    import datasets
    import pyarrow

    digest = hashlib.sha256()
    with open(Path(folders.jsonl, f"{name}.jsonl"), "wb") as file:
        for index, sample in enumerate(samples):
            row = {**sample._asdict(), **{column: values[index] for column, values in columns.items()}}
            line = orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
            digest.update(line)
            file.write(line)
    batches = []
    for start in range(0, len(samples), ARROW_BATCH_SAMPLES):
        part = slice(start, start + ARROW_BATCH_SAMPLES)
        arrays = {
            "input_ids": _list_column(sample.input_ids for sample in samples[part]),
            "labels": _list_column(sample.labels for sample in samples[part]),
            **{column: pyarrow.array(values[part]) for column, values in columns.items()},
        }
        batches.append(pyarrow.RecordBatch.from_pydict(arrays))
    # Left to itself, datasets makes a fingerprint of the clock; this one is of the content.
    table = datasets.Dataset(pyarrow.Table.from_batches(batches), fingerprint=digest.hexdigest()[:16])
    datasets.disable_progress_bars()
    table.save_to_disk(str(Path(folders.arrow, name)))


def _list_column(sequences: Iterable[np.ndarray]):
    import pyarrow

    values = list(sequences)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(values)))


# Account


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
