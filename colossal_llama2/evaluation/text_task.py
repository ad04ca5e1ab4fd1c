"""Bits per byte of the texts of a jsonl file, as `train.evaluation` defines them: the same numbers for the same texts.

    sum of -log2 p over the predicted tokens / UTF-8 bytes of the text behind these tokens

A text is encoded as training encodes a document, and divided into pieces where it is longer than the model's context.
Texts do not see each other.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX
from colossal_llama2.dataset.write.records import PretrainRow, check_encodable, read_pretrain_document
from colossal_llama2.dataset.write.splicing import piece_lengths
from colossal_llama2.dataset.write.tokenization import pretrain_token_bytes, tokenize_pretrain
from colossal_llama2.encoding.registry import shared_encoder
from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.sets.text_files import check_readable
from colossal_llama2.evaluation.task import BITS, Row, checked_finite
from colossal_llama2.model.positions import positions_of
from colossal_llama2.storage.files import read_jsonl
from colossal_llama2.storage.input_files import ANY_SIZE
from colossal_llama2.storage.row_errors import RowError
from colossal_llama2.task_names import BITS_PER_BYTE

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from colossal_llama2.inference.prompt_batch import SharedStates

# Bounds the logits, which have a column for each token of the vocabulary.
LOGITS_OF_TOKENS = 512
MASKED = "masked by a loss mark"


class TextTask:
    """The texts of a file; see `Task`."""

    metric, num_fewshot = BITS, None

    def __init__(self, path: Path, limit: int | None):
        """
        Raises:
            UserError: with file:line, for a line that is no record of a text, or the file has none.
        """
        self.name = f"{BITS_PER_BYTE} {path.stem}"
        self.left_out: dict[str, int] = {}
        self._texts: list[tuple[str, PretrainRow]] = []
        check_readable(path, max_bytes=ANY_SIZE)
        for line in read_jsonl(path):
            if len(self._texts) == limit:
                break
            if line.record is None:
                continue
            try:
                text = read_pretrain_document(line.record)
            except RowError as error:
                raise UserError(f"{line.where}: {error}")
            if text.is_masked:
                self.left_out[MASKED] = self.left_out.get(MASKED, 0) + 1
            else:
                self._texts.append((line.where, text))
        if not self._texts:
            raise UserError(f"{path}:1: has no text; give a jsonl file of records with a text each")
        self.subjects = [text.category for _, text in self._texts]

    @property
    def definition(self) -> Any:
        """The texts."""
        return [self.name, [list(text.texts) for _, text in self._texts]]

    def prepare(self, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", folder: str) -> "_Prepared":
        """The texts as ids. Raises UserError for a character that the tokenizer cannot encode."""
        return _Prepared(model, folder, self._texts)


class _Prepared:
    new_tokens = 0

    def __init__(self, model: "LlamaForCausalLM", folder: str, texts: Sequence[tuple[str, PretrainRow]]):
        self._model, self._context = model, positions_of(model.config)
        encoder = shared_encoder(folder)
        for where, text in texts:
            try:
                check_encodable(text, encoder)
            except RowError as error:
                raise UserError(f"{where}: {error}")
        self._tokens = tokenize_pretrain([text for _, text in texts], encoder=encoder)
        self._bytes = [
            pretrain_token_bytes(text, tokens, encoder=encoder)
            for (_, text), tokens in zip(texts, self._tokens, strict=True)
        ]
        # The batches count only what one forward pass computes.
        self.rows = [
            Row(number, list(tokens.input_ids[: self._context]), None, {}) for number, tokens in enumerate(self._tokens)
        ]

    def compute(self, rows: Sequence[Row], shared: "SharedStates | None") -> list[dict[str, Any]]:
        """For each text: bits, predicted tokens, and their bytes. Raises RunError as `checked_finite`."""
        pieces = [(place, *bounds) for place, row in enumerate(rows) for bounds in self._pieces(row.item)]
        sums = [[0.0, 0, 0] for _ in rows]
        for some in _batched(pieces, len(rows)):
            ids = [np.asarray(self._tokens[rows[place].item].input_ids[start:stop]) for place, start, stop in some]
            losses = nats_of(self._model, ids)
            for (place, start, stop), nats in zip(some, losses, strict=True):
                item = rows[place].item
                labels = np.asarray(self._tokens[item].labels[start + 1 : stop])
                sums[place][0] += float(nats.numpy()[labels != IGNORE_INDEX].sum()) / math.log(2)
                sums[place][1] += int((labels != IGNORE_INDEX).sum())
                sums[place][2] += int(self._bytes[item][start + 1 : stop].sum())
        return [
            {
                "tokens": len(self._tokens[row.item].input_ids),
                "bits": checked_finite([bits])[0],
                "predicted": predicted,
                "bytes": size,
            }
            for row, (bits, predicted, size) in zip(rows, sums, strict=True)
        ]

    def _pieces(self, item: int) -> Iterable[tuple[int, int]]:
        lengths = piece_lengths(len(self._tokens[item].input_ids), max_length=self._context)
        return pairwise(accumulate(lengths, initial=0))


def nats_of(model: "LlamaForCausalLM", rows: Sequence[np.ndarray]) -> "list[torch.Tensor]":
    """Of each row of ids, (tokens - 1,) float64: the loss of each token after the first."""
    import torch

    width = max(map(len, rows))
    # Behind the rows, where no token of theirs looks.
    padded = torch.tensor(np.stack([np.pad(row, (0, width - len(row))) for row in rows]), device=model.device)
    with torch.inference_mode():
        hidden = model.model(input_ids=padded.long(), use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        targets = padded[:, 1:].long().flatten()
        head = model.get_output_embeddings()
        losses = [
            torch.nn.functional.cross_entropy(head(some).float(), target, reduction="none")
            for some, target in zip(hidden.split(LOGITS_OF_TOKENS), targets.split(LOGITS_OF_TOKENS), strict=True)
        ]
    found = torch.cat(losses).double().cpu().view(len(rows), width - 1)
    return [row[: len(ids) - 1] for row, ids in zip(found, rows, strict=True)]


def _batched(pieces: Sequence[tuple[int, int, int]], size: int) -> Iterable[Sequence[tuple[int, int, int]]]:
    return (pieces[start : start + size] for start in range(0, len(pieces), size))
