"""Which tokens stand for the letters A to D after a prompt: decided by the ids of the prompt with a letter."""

from typing import TYPE_CHECKING, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.sets.questions import LETTERS
from colossal_llama2.inference.prompts import text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChoiceTokens(NamedTuple):
    """The ids of the letters, how they follow the prompt (" " or ""), and what is put behind the prompt before them."""

    ids: tuple[int, ...]
    lead: str
    suffix: str

    def described(self) -> str:
        """For the log: the letters as they are scored, and their ids."""
        letters = " ".join(f'"{self.lead}{letter}"' for letter in LETTERS)
        after = ', after a prompt that ends with " "' if self.suffix else ""
        return f"logits over {letters} (ids {', '.join(map(str, self.ids))}){after}"


def find_choice_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str, lead: str) -> ChoiceTokens:
    """The tokens of the letters after a prompt.

    A letter that follows as in the examples, with `lead`, must be one token, and must leave the ids of the prompt as
    they are. If that is not so, the letters are tried the other way, and after a prompt that ends with a space.

    Raises:
        UserError: the letters are not four single tokens in any way.
    """
    for suffix, way in (("", lead), ("", "" if lead else " "), (" ", "")):
        before = text_ids(tokenizer, prompt + suffix)
        after = [text_ids(tokenizer, f"{prompt}{suffix}{way}{letter}") for letter in LETTERS]
        ids = tuple(row[-1] for row in after)
        if len(set(ids)) == len(LETTERS) and all(row[:-1] == before for row in after):
            return ChoiceTokens(ids, way, suffix)
    raise UserError(
        f"{tokenizer.name_or_path}: its tokenizer has no single token for each of {', '.join(LETTERS)} after a prompt, "
        "so their logits cannot be compared; leave out the tasks with choices"
    )
