"""From folders of jsonl to bins of samples: the body of prepare_pretrain_dataset.py and prepare_sft_dataset.py.

Read and tokenize -> cut (pre-training) -> deal to bins -> splice (pre-training) -> write each bin as jsonl and as arrow
-> account for every token. The output depends on the input and the settings alone: two runs write the same bytes.
"""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.dataset import tokenization
from colossal_llama2.dataset.account import Account
from colossal_llama2.dataset.output import OutputDirs, write_bin
from colossal_llama2.dataset.splicing import TokenSequence, cut, deal_to_bins, has_trained_token, splice
from colossal_llama2.errors import UserError
from colossal_llama2.files import find_jsonl_files, read_jsonl
from colossal_llama2.tokenizer import Encoder

SEED = 1024
BATCH_BYTES = 1 << 20
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
        output_dirs=OutputDirs(data_cache_dir, data_jsonl_output_dir, data_arrow_output_dir),
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
        output_dirs=OutputDirs(data_cache_dir, data_jsonl_output_dir, data_arrow_output_dir),
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
    output_dirs: OutputDirs,
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
            write_bin(f"part-{number:05d}", samples=samples, columns=columns, folders=folders)
            progress.update()
        account.check()
    print(account.table(max_length=max_length))


@dataclass
class _Document:
    """One tokenized record, or a piece of one, that goes into a sample."""

    tokens: TokenSequence
    category: str


def _read_documents(
    files: Sequence[Path], *, read: Callable, tokenize: Callable, account: Account
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


def _read_batches(files: Sequence[Path], *, read: Callable, account: Account) -> Iterator[Tuple[List[Any], int]]:
    """Checked records in batches of about `BATCH_BYTES`, each with the bytes of input that it stands for."""
    rows: List[Any] = []
    size = 0
    for path in files:
        for line in read_jsonl(path):
            size += line.size
            if line.record is None:
                account.empty_lines += 1
            else:
                try:
                    rows.append(read(line.record))
                except ValueError as error:
                    raise UserError(f"{line.where}: {error}; correct or remove the line")
            if size >= BATCH_BYTES:
                yield rows, size
                rows, size = [], 0
    yield rows, size


def _check_enough(documents: Sequence[_Document], *, num_bins: int, account: Account) -> None:
    if len(documents) >= num_bins:
        return
    reasons = "".join(f", {count} dropped: {reason}" for reason, count in account.drops.items())
    left = f"{len(documents)} of {account.num_rows} records can be used{reasons}"
    if not documents:
        raise UserError(f"nothing to prepare: {left}; give folders with usable records")
    raise UserError(
        f"--num_spliced_dataset_bins {num_bins} given, but {left}; give at most {len(documents)} bins or more data"
    )


def _cut(documents: Sequence[_Document], *, max_length: int, account: Account) -> List[_Document]:
    """All documents in pieces that fit a sample, without those that would bring no loss."""
    pieces: List[_Document] = []
    for document in documents:
        for piece in cut(document.tokens, max_length=max_length):
            if has_trained_token(piece):
                pieces.append(_Document(piece, document.category))
            else:
                account.add_drop(MASKED_PIECES, len(piece.input_ids))
    return pieces


def _text_columns(members: Sequence[_Document], *, encoder) -> Dict[str, List[Any]]:
    """The original's columns for reading a conversation by eye: one entry per sample."""
    return {
        "inputs_decode": [tokenization.decode_marked(member.tokens.input_ids, encoder=encoder) for member in members],
        "labels_decode": [tokenization.decode_trained(member.tokens.labels, encoder=encoder) for member in members],
        "seq_length": [len(member.tokens.input_ids) for member in members],
        "seq_category": [member.category for member in members],
    }
