"""What all tasks have in common: items that are counted without torch, and rows of ids that a model computes."""

import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from colossal_llama2.errors import RunError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from colossal_llama2.inference.prompt_batch import SharedStates

ACCURACY, BITS = "accuracy", "bits per byte"


class Row(NamedTuple):
    """One item as the ids that a model gets.

    Attributes:
        item: its number in the task, from 0.
        ids: at least one, and at most what the model's context allows.
        group: rows of a group may share their beginning; None if it shares none.
        notes: fields of the item's record, such as how many examples it has.
        candidates: the tokens that may follow, whose logits are compared; empty if none are.
    """

    item: int
    ids: Sequence[int]
    group: Hashable
    notes: Mapping[str, Any]
    candidates: Sequence[int] = ()


def checked_finite(values: list[float]) -> list[float]:
    """Logits or bits of an item. Raises RunError if one is NaN/Inf: none of them would be comparable."""
    if not all(map(math.isfinite, values)):
        raise RunError(
            "the model computes NaN/Inf; what was computed before is kept. Give --dtype fp32 or bf16, or a model whose "
            "weights are not damaged"
        )
    return values


class LogitItems(Protocol):
    """The items of a task that are scored by logits, without a model: training computes these in its own way."""

    @property
    def rows(self) -> Sequence[Row]:
        """One for each item, with the candidates."""

    def record(self, row: Row, logits: list[float]) -> dict[str, Any]:
        """The fields of the record of an item, from the logits of its candidates. Raises RunError for NaN/Inf."""


class PreparedTask(Protocol):
    """A task for one model."""

    @property
    def rows(self) -> Sequence[Row]:
        """One for each item."""

    @property
    def new_tokens(self) -> int:
        """Most tokens that follow a row."""

    def compute(self, rows: Sequence[Row], shared: "SharedStates | None") -> list[dict[str, Any]]:
        """The fields of the records of some rows. `shared` are states that all of them begin with."""


class Task(Protocol):
    """Something to measure."""

    @property
    def name(self) -> str:
        """Its name in the table and in records."""

    @property
    def metric(self) -> str:
        """`ACCURACY` or `BITS`."""

    @property
    def num_fewshot(self) -> int | None:
        """Examples before each question; None for a task without questions."""

    @property
    def subjects(self) -> Sequence[str]:
        """The subject of each item."""

    @property
    def left_out(self) -> Mapping[str, int]:
        """What cannot be used, by reason."""

    @property
    def definition(self) -> Any:
        """Everything that decides the items, as JSON."""

    def prepare(self, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", folder: str) -> PreparedTask:
        """The task for a model. Raises UserError if its tokenizer cannot be used for it."""


class LogitTask(Task, Protocol):
    """A task whose items have candidates."""

    def items(self, tokenizer: "PreTrainedTokenizerBase", *, context: int, vocab_size: int) -> LogitItems:
        """The items for models with this tokenizer.

        Args:
            context: the longest input of the model, in tokens.
            vocab_size: rows of its embeddings.

        Raises:
            UserError: the tokenizer cannot be used for the task, or the context is too short.
        """


def task_fingerprint(task: Task) -> str:
    """A hash of what decides the items of a task, without where its files are."""
    return hashlib.sha256(json.dumps(task.definition, ensure_ascii=False).encode()).hexdigest()
