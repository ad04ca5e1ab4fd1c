"""A probe of in-context learning that needs no data: the answers follow from the context alone, not from any language.

Held-out loss may stay the same while a model loses the ability to use its context (Elhady, Agirre and Artetxe 2025,
"Emergent Abilities of Large Language Models under Continued Pretraining for Language Adaptation"). All items are made
of random common words, by seed:

    copy        a b c d ... a b c     ->  d   a block of words and its repetition up to some word
    induction   .. a b .. a b ... a   ->  b   a word that was always followed by the same one, among others
    retrieval   k:v  k:v  ...  k:     ->  v   lines of a key, a colon and a value, then one of the keys

An item is right if the word has the largest logit among those that could be meant, so chance is 1 in their number. The
words are the first of the vocabulary, which a tokenizer that extends another one has too: both get the same items.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.by_logits import records_by_logits
from colossal_llama2.evaluation.task import ACCURACY, Row, checked_finite
from colossal_llama2.inference.prompts import first_mark
from colossal_llama2.model.positions import positions_of

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from colossal_llama2.inference.prompt_batch import SharedStates

KINDS = ("copy", "induction", "retrieval")
ITEMS = 300
# Words of a block to copy, different words around the repeated two and how often these occur, and pairs.
BLOCK, CONTEXT, REPEATS, PAIRS = 32, 64, 4, 16
# From how many different words the items are made. A shorter word may be a part of a longer one.
VOCABULARY, LEAST_LETTERS = 1000, 3
LEAST_VOCABULARY = 2 * CONTEXT
WORD_STARTS = ("▁", "Ġ")


class Probe(NamedTuple):
    """An item: its context, the tokens to choose from, and which of them is right."""

    context: list[int]
    candidates: list[int]
    answer: int


class IclTask:
    """The probe; see `Task`. Items are of the three kinds by turns."""

    name, metric, num_fewshot = "icl", ACCURACY, None

    def __init__(self, *, seed: int, limit: int | None):
        self._seed = seed
        self.subjects = [KINDS[number % len(KINDS)] for number in range(limit or ITEMS)]
        self.left_out: dict[str, int] = {}

    @property
    def definition(self) -> Any:
        """Seed and sizes."""
        return [self.name, self._seed, len(self.subjects), BLOCK, CONTEXT, REPEATS, PAIRS, VOCABULARY]

    def prepare(self, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", folder: str) -> "_Prepared":
        """The items in the model's own tokens. Raises UserError if there are too few, or the context is too short."""
        rows = model.get_input_embeddings().num_embeddings
        return _Prepared(model, self.items(tokenizer, context=positions_of(model.config), vocab_size=rows))

    def items(self, tokenizer: "PreTrainedTokenizerBase", *, context: int, vocab_size: int) -> "IclItems":
        """See `LogitTask`."""
        return IclItems(tokenizer, self._seed, self.subjects, context=context, vocab_size=vocab_size)


class _Prepared:
    new_tokens = 1

    def __init__(self, model: "LlamaForCausalLM", items: "IclItems"):
        self._model, self._items, self.rows = model, items, items.rows

    def compute(self, rows: Sequence[Row], shared: "SharedStates | None") -> list[dict[str, Any]]:
        return records_by_logits(self._model, self._items, rows, shared)


class IclItems:
    """The items in a tokenizer's own tokens; see `LogitItems`."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        kinds: Sequence[str],
        *,
        context: int,
        vocab_size: int,
    ):
        tokens = common_words(tokenizer, vocab_size)
        mark = first_mark(tokenizer)
        opening = [] if mark is None else [mark]
        # How a colon and a line feed continue a text; a tokenizer may have other tokens for them at its beginning.
        colon, line_feed = (tokenizer(f"a{sign}", add_special_tokens=False)["input_ids"][-1] for sign in (":", "\n"))
        self._probes = [
            make_probe(kind, tokens, f"{seed} {number}", (colon, line_feed)) for number, kind in enumerate(kinds)
        ]
        self.rows = [
            Row(number, [*opening, *probe.context], None, {}, probe.candidates)
            for number, probe in enumerate(self._probes)
        ]
        longest = max(len(row.ids) for row in self.rows)
        if longest > context:
            raise UserError(
                f"icl: its items have up to {longest} tokens, the model's context has {context}; leave it out"
            )

    def record(self, row: Row, logits: list[float]) -> dict[str, Any]:
        """See `LogitItems`."""
        checked_finite(logits)
        choice, answer = logits.index(max(logits)), self._probes[row.item].answer
        return {
            "logits": logits,
            "choice": choice,
            "answer": answer,
            "is_correct": choice == answer,
            "chance": 1 / len(logits),
        }


def common_words(tokenizer: "PreTrainedTokenizerBase", rows: int) -> list[int]:
    """The first tokens of the vocabulary that are a word with a space in front; none has an id of `rows` or more.

    A vocabulary with few words, such as one of a language without spaces, is filled up with other tokens of letters.

    Raises:
        UserError: the tokenizer has too few of both.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    words: list[int] = []
    others: list[int] = []
    for token in range(min(len(tokenizer), rows)):
        text = tokenizer.decode([token]).strip()
        if token in special or not text.isalpha():
            continue
        starts = str(tokenizer.convert_ids_to_tokens(token)).startswith(WORD_STARTS)
        (words if starts and len(text) >= LEAST_LETTERS else others).append(token)
        if len(words) == VOCABULARY:
            break
    found = [*words, *others][:VOCABULARY]
    if len(found) < LEAST_VOCABULARY:
        raise UserError(
            f"icl: needs {LEAST_VOCABULARY} tokens of letters, the tokenizer has {len(found)}; leave it out"
        )
    return found


def make_probe(kind: str, tokens: Sequence[int], seed: str, marks: tuple[int, int]) -> Probe:
    """An item of one of `KINDS`. `marks` are the tokens of a colon and a line feed."""
    chance = random.Random(seed)
    if kind == "copy":
        block = chance.sample(tokens, BLOCK)
        place = chance.randrange(BLOCK // 2, BLOCK)
        return Probe([*block, *block[:place]], block, place)
    if kind == "induction":
        drawn = chance.sample(tokens, CONTEXT)
        pair, others = drawn[:2], drawn[2:]
        # One pair at a random place of each part of the context, and words between them.
        length = len(others) // REPEATS
        context: list[int] = []
        for start in range(0, REPEATS * length, length):
            place = start + chance.randrange(1, length)
            context += [*others[start:place], *pair, *others[place : start + length]]
        return Probe([*context, pair[0]], drawn, 1)
    drawn = chance.sample(tokens, 2 * PAIRS)
    keys, values = drawn[:PAIRS], drawn[PAIRS:]
    pairs = [token for key, value in zip(keys, values, strict=True) for token in (key, marks[0], value, marks[1])]
    place = chance.randrange(PAIRS)
    return Probe([*pairs, keys[place], marks[0]], values, place)
