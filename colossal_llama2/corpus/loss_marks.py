"""Loss marks: fields with which authors of conversations select the answers that are trained on.

    {"role": "assistant", "content": "A bad answer.", "weight": 0}
    {"from": "gpt", "value": "A good answer.", "train": true}
    {"messages": [...], "loss": false}

0 and false mask an answer, 1 and true train it; null is not a mark. An answer is masked if its own mark or the mark of
its record masks it. Other values, such as a weight of 0.5, are not supported and make the record a bad row; so do marks
for parts of an answer.
"""

from typing import Any

from colossal_llama2.corpus.absent import is_absent
from colossal_llama2.storage.row_errors import RowError

# True means "trained on".
MARKS = ("weight", "train", "trainable", "training", "loss", "loss_mask", "loss_weight", "loss_scale")
# True means "not trained on", as in torchtune.
INVERTED_MARKS = ("masked",)
# From axolotl, for parts of an answer.
PART_MARKS = ("train_detail",)
ALL_MARKS = frozenset((*MARKS, *INVERTED_MARKS, *PART_MARKS))

OTHER_VALUE = "a loss mark that is not 0, 1, true or false"
CONTRADICTION = "loss marks of one message that contradict each other"
OF_PARTS = "a loss mark for parts of an answer"


def read_mark(fields: dict[str, Any], where: str) -> bool | None:
    """Whether the marks of a message or a record train it; None if it has no mark.

    `where` names the message or record in errors. Raises RowError for a mark with an unsupported value, and for two
    marks that contradict each other.
    """
    found: bool | None = None
    first = ""
    for name in fields:
        if name not in ALL_MARKS or is_absent(fields[name]):
            continue
        value = fields[name]
        if name in PART_MARKS:
            raise RowError(f'{where} has "{name}", which masks parts of an answer; mark whole answers', reason=OF_PARTS)
        # 1.0 and True equal 1.
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
