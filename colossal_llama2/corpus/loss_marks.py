"""Loss marks: the fields by which the authors of conversations say which answers are trained on.

    {"role": "assistant", "content": "A bad answer.", "weight": 0}
    {"from": "gpt", "value": "A good answer.", "train": true}
    {"messages": [...], "loss": false}

0 and false mask an answer, 1 and true train it; null is no mark. An answer is masked if its own mark or that of its
record says so. Other values, such as a weight of 0.5, cannot be honoured and are refused, and so are marks of parts of
an answer.
"""

from typing import Any

from colossal_llama2.corpus.absent import is_absent
from colossal_llama2.storage.row_errors import RowError

# True is "trained on".
MARKS = ("weight", "train", "trainable", "training", "loss", "loss_mask", "loss_weight", "loss_scale")
# True is "not trained on", as torchtune has it.
INVERTED_MARKS = ("masked",)
# axolotl's, for stretches of an answer.
PART_MARKS = ("train_detail",)
ALL_MARKS = frozenset((*MARKS, *INVERTED_MARKS, *PART_MARKS))

OTHER_VALUE = "a loss mark that is not 0, 1, true or false"
CONTRADICTION = "loss marks of one message that contradict each other"
OF_PARTS = "a loss mark for parts of an answer"


def read_mark(fields: dict[str, Any], where: str) -> bool | None:
    """Whether the marks among the fields of a message or a record train it; None if there is no mark.

    `where` names the message or record. Raises RowError for a mark that cannot be honoured, and for two marks that
    contradict each other.
    """
    found: bool | None = None
    first = ""
    for name in fields:
        if name not in ALL_MARKS or is_absent(fields[name]):
            continue
        value = fields[name]
        if name in PART_MARKS:
            raise RowError(f'{where} has "{name}", which masks parts of an answer; mark whole answers', reason=OF_PARTS)
        # 1.0 and True are equal to 1.
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError(
                f'{where} has the loss mark "{name}": {value!r:.40}; allowed are 0, 1, true and false; correct the '
                "mark, or remove it if it is not about the loss",
                reason=OTHER_VALUE,
            )
        is_trained = bool(value) != (name in INVERTED_MARKS)
        if found is None:
            found, first = is_trained, name
        elif found != is_trained:
            raise RowError(f'{where} has "{first}" and "{name}", which contradict; keep one', reason=CONTRADICTION)
    return found
