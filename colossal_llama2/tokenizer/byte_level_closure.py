"""Find the new tokens that a byte-level BPE can reach, and what must be added so that it reaches all of them.

A byte-level BPE divides a text with its pre-tokenizer. In each part it starts from the bytes, and repeatedly merges the
two neighbours that come first in its list of merges. So a new piece is reached if the pre-tokenizer leaves it whole and
its own bytes end up as one symbol. With the tokens 人工 and 智能, and 人工智能 as a new piece,

    e4 ba ba e5 b7 a5 e6 99 ba e8 83 bd -> 人工 智能 -> 人工智能

New merges rank behind all old ones, so they act only on what old merges leave: lists of old symbols, between which no
old merge is possible, and none becomes possible, since old merges join only old tokens. Every split of a new token into
two tokens is a merge of it (`merges_into`), so there two neighbours merge if their concatenation is a new token. These
are the merges of closure.py with other symbols, and its proof holds here too, step by step:

- Merges inside a stretch that becomes one symbol are those of the stretch alone, in the same order: the next merge of
  all is also the next of the stretch, and equal pairs are merged from left to right in both.
- So a token is always made by the same pair. `tokenizers` ranks pairs and closure.py ranks tokens, but neighbours that
  would make the same token are the same pair, so both choose the same merge.
- A token whose merges rank behind all others acts only where nothing else was possible. So what was reached before is
  reached in the same way; and the two symbols that it joins are reached, so it is reached itself.
- Each addition shortens a list that is stuck. So one pass ends, with every piece as one symbol.

What is added must be new. LLaMA-3 has 588 tokens that its merges never make, such as " характер": it has them only as
whole parts of a text (`ignore_merges`). Merges to such a token would change the ids of old text, and as a new token it
would lose its own id. And the pre-tokenizer must leave it whole: LLaMA-3 divides "\\n " everywhere, but not "\\n \\n".
So the lists are joined in other ways, and a piece for which there is none is dropped.

A part of characters has neighbours in every text, and better merges may always join it to one of them. Such parts are
found with the merges of the whole plan, and left out (byte_level_reach.py).

`ignore_merges` (LLaMA-3) makes a part that is a token without merging. Merges make every new token too, so this changes
none, and programs without it give the same ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from colossal_llama2.encoding.byte_level_file import ByteLevelModel
from colossal_llama2.encoding.byte_level_reach import never_made, split_tokens
from colossal_llama2.encoding.byte_level_tokens import (
    extended,
    is_within_character,
    merging,
    symbols_of,
    text_of,
)
from colossal_llama2.tokenizer.closure import ExtensionPlan, evolve, longest_prefix, pieces_that_join


def plan_byte_level(
    model: ByteLevelModel, wanted: Sequence[str], *, closure: str, max_added: int | None = None
) -> ExtensionPlan:
    """Decide what to append to `model`, of the `wanted` tokens in the order of the file. The plan has no scores.

    Args:
        wanted: new tokens, as the vocabulary spells them, each once.
        closure: "complete" adds bytes, parts of characters, characters and parts of words until all are reached, "drop"
            leaves out tokens that are not reached, "off" appends all.
        max_added: the maximum number of tokens to append; the last ones of the file are left out first.
    """
    source = _Source(model, wanted)
    close = {"complete": source.complete, "drop": source.drop, "off": _append_all}[closure]
    gone = set(source.split) if closure != "off" else set()
    joined: list[str] = []
    # Without the budget first: merges that come before a part's are those of the tokens before it, so nearly all parts
    # that are lost are found at once. With it alone, each pass would see only the few that take the last ones' place.
    for budget in dict.fromkeys((None, max_added)):
        while True:
            kept = [token for token in wanted if token not in gone]
            count, found = _fitting(close, kept, budget)
            lost = source.joined(found.pieces) if closure != "off" else []
            if not lost:
                break
            joined += lost
            gone.update(lost)
    dropped = [token for token in wanted if token in gone] + found.dropped
    return replace(found, dropped=dropped, over_budget=list(kept[count:]), split=source.split, joined=joined)


def _fitting(
    close: Callable[[Sequence[str]], ExtensionPlan], tokens: Sequence[str], max_added: int | None
) -> tuple[int, ExtensionPlan]:
    return longest_prefix(lambda count: close(tokens[:count]), len(tokens), max_added)


class _Source:
    """What a source makes of the wanted tokens: which ones its pre-tokenizer splits, and the symbols of all."""

    def __init__(self, model: ByteLevelModel, wanted: Sequence[str]):
        self._model, self._wanted = model, frozenset(wanted)
        self._known = model.vocabulary.keys()
        # A byte without a token would be dropped from the symbols.
        spelling = extended(model, self._missing_bytes(wanted))
        self._tokenizer = merging(spelling).plain_tokenizer()
        self.split = split_tokens(self._tokenizer, wanted)
        # Each plan asks for nearly the same tokens again.
        self._refused: dict[str, bool] = {}
        self._symbols = dict(zip(wanted, symbols_of(self._tokenizer, wanted), strict=True))

    def _missing_bytes(self, wanted: Sequence[str]) -> list[str]:
        return [byte for byte in dict.fromkeys("".join(wanted)) if byte not in self._known]

    def _is_refused(self, token: str) -> bool:
        if token not in self._refused:
            self._refused[token] = token in self._known or (
                text_of(token) is not None and bool(split_tokens(self._tokenizer, [token]))
            )
        return self._refused[token]

    def joined(self, added: Sequence[str]) -> list[str]:
        """The wanted parts of characters that are never made once the tokens are `added`: other merges come first."""
        parts = [token for token in added if token in self._wanted and text_of(token) is None]
        return never_made(extended(self._model, added), parts, added) if parts else []

    def complete(self, wanted: Sequence[str]) -> ExtensionPlan:
        """Add what makes all wanted tokens single symbols; those for which nothing does are dropped."""
        blocked: set[str] = set()
        while True:
            found, lost = self._joining([token for token in wanted if token not in blocked])
            if not lost:
                dropped = [token for token in wanted if token in blocked]
                return replace(found, dropped=dropped, blocked=dropped)
            # Once more without what was added for these.
            blocked.update(lost)

    def _joining(self, wanted: Sequence[str]) -> tuple[ExtensionPlan, list[str]]:
        """The plan of what makes single symbols of the wanted tokens, and those for which nothing does."""
        own = set(wanted)
        missing = [byte for byte in self._missing_bytes(wanted) if byte not in own]
        scores = _scores(wanted)
        states = {token: evolve(self._symbols[token], scores) for token in wanted}
        stuck = [token for token, state in states.items() if len(state) > 1]
        lists = [states[token] for token in stuck]
        # Whole characters first: words share them, and they are of use in other words.
        added = pieces_that_join(
            lists, scores, is_last=lambda token: not is_within_character(token), is_refused=self._is_refused
        )
        characters = [token for token in added if is_within_character(token)]
        others = [token for token in added if not is_within_character(token)]
        plan = ExtensionPlan(
            [*wanted, *missing, *characters, *others],
            scores=[],
            characters=len(missing) + len(characters),
            intermediates=len(others),
            dropped=[],
            over_budget=[],
        )
        return plan, [token for token, state in zip(stuck, lists, strict=True) if len(state) > 1]

    def drop(self, wanted: Sequence[str]) -> ExtensionPlan:
        """Leave out what is not reached. One pass is enough, since it does not help to reach anything else."""
        unspelled = set(self._missing_bytes(wanted)).difference(wanted)
        spelled = [token for token in wanted if unspelled.isdisjoint(token)]
        scores = _scores(spelled)
        reached = {token for token in spelled if len(evolve(self._symbols[token], scores)) == 1}
        kept = [token for token in spelled if token in reached]
        dropped = [token for token in wanted if token not in reached]
        return ExtensionPlan(kept, [], 0, 0, dropped=dropped, over_budget=[])


def _append_all(wanted: Sequence[str]) -> ExtensionPlan:
    return ExtensionPlan(list(wanted), [], 0, 0, dropped=[], over_budget=[])


def _scores(tokens: Sequence[str]) -> dict[str, float]:
    """The order in which new tokens are merged, as scores: the first of the file is the best."""
    return {token: -float(index) for index, token in enumerate(tokens, start=1)}
