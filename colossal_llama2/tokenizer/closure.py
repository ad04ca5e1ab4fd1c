"""Find the new pieces that a SentencePiece BPE can reach, and what must be added so that it reaches all of them.

BPE starts from single characters, and repeatedly merges the two neighbours with the best score whose concatenation is a
piece. A piece is reached if its own characters end up as one symbol. With the pieces 人 工 智 能 and 人工智能,

    人 工 智 能         no two neighbours are a piece: stuck, 人工智能 is never reached
    人工 智 能          with 人工 added, still stuck
    人工 智能 -> 人工智能  with 智能 added too

Why adding is safe. Merges inside a stretch of text that becomes one symbol are those of the stretch alone, in the same
order, so a piece that is reached on its own is made in the same way in every text. A piece added with a score below all
others acts only where the model was stuck before, so it breaks nothing that was reached; and the two symbols that it
joins are reached, so it is reached itself. Hence one pass reaches every piece. Because each piece is made in one way
and all scores differ, it does not matter that SentencePiece breaks ties by position and other tokenizers by rank.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from colossal_llama2.encoding.bpe_model import BpeModel, altered_by_normalizer, scores_below, unreachable, with_pieces


@dataclass(frozen=True)
class ExtensionPlan:
    """The pieces to append, in order of id, with their `scores`.

    Attributes:
        characters, intermediates: how many pieces the closure adds after those of the file, in this order.
        dropped: pieces of the file that are left out because they cannot be reached.
        over_budget: pieces of the file that are left out because they exceed the budget.
        altered: pieces that the model's normalizer never produces; they are dropped, unless all pieces are appended.
        split: pieces that a byte-level BPE's pre-tokenizer never leaves whole; they are dropped in the same way.
        joined: parts of characters that a byte-level BPE never makes, because better merges always join one of their
            bytes to one outside; they are dropped in the same way.
        blocked: pieces that could only be made through tokens that a byte-level BPE's source has but its merges never
            make, or that its pre-tokenizer divides; the closure drops them.
    """

    pieces: list[str]
    scores: list[float]
    characters: int
    intermediates: int
    dropped: list[str]
    over_budget: list[str]
    altered: Sequence[str] = ()
    split: Sequence[str] = ()
    joined: Sequence[str] = ()
    blocked: Sequence[str] = ()


def plan_extension(
    model: BpeModel, wanted: Sequence[str], *, closure: str, piece_scores: str, max_added: int | None = None
) -> ExtensionPlan:
    """Decide what to append to `model`, of the `wanted` pieces in the order of the file.

    Args:
        closure: "complete" adds single characters and intermediate pieces until all are reached, "drop" leaves out
            pieces that are not reached, "off" appends all.
        piece_scores: "below" for decreasing scores below the lowest merge, in the order of the file; "zero" for score 0
            in order of length, as in the original project.
        max_added: the maximum number of pieces to append; the last ones of the file are left out first.
    """
    # No merge makes a piece whose characters never come out of the normalizer.
    altered = altered_by_normalizer(model, wanted)
    gone = set(altered) if closure != "off" else set()
    wanted = [piece for piece in wanted if piece not in gone]
    close = {"complete": _complete, "drop": _drop, "off": _append_all}[closure]

    count, found = longest_prefix(lambda count: close(model, wanted[:count], piece_scores), len(wanted), max_added)
    dropped = [piece for piece in altered if piece in gone] + found.dropped
    return replace(found, dropped=dropped, over_budget=list(wanted[count:]), altered=altered)


def longest_prefix(plan: Callable[[int], ExtensionPlan], total: int, limit: int | None) -> tuple[int, ExtensionPlan]:
    """The longest prefix of the file that needs at most `limit` pieces in total, and its plan.

    The total grows almost linearly with the prefix, so interpolation finds it in a few trials. It can also shrink by a
    piece or two, where a piece of the file saves intermediate ones; then a slightly longer prefix might fit too.
    """
    whole = plan(total)
    if limit is None or len(whole.pieces) <= limit:
        return total, whole
    fits, best = 0, plan(0)
    too_many, size = total, len(whole.pieces)
    trial = 0
    while too_many - fits > 1:
        trial += 1
        share = (limit - len(best.pieces)) / (size - len(best.pieces)) if trial % 3 else 0.5
        count = min(max(fits + int(share * (too_many - fits)), fits + 1), too_many - 1)
        candidate = plan(count)
        if len(candidate.pieces) <= limit:
            fits, best = count, candidate
        else:
            too_many, size = count, len(candidate.pieces)
    return fits, best


# The three ways to close a list of pieces.


def _complete(model: BpeModel, wanted: Sequence[str], piece_scores: str) -> ExtensionPlan:
    characters = missing_characters(wanted, model.scores)
    known = [*_ordered(wanted, piece_scores), *characters]
    known_scores = _scores(model, known, piece_scores, num_asked=len(wanted))
    stuck = unreachable(with_pieces(model.content, known, known_scores), wanted)
    scores = {**model.scores, **dict(zip(known, known_scores, strict=True))}
    intermediates = intermediate_pieces(stuck, scores)
    pieces = known + intermediates
    # New scores: with more pieces, float32 may need wider steps. The order stays.
    scores_of_all = _scores(model, pieces, piece_scores, num_asked=len(wanted))
    return ExtensionPlan(pieces, scores_of_all, len(characters), len(intermediates), dropped=[], over_budget=[])


def _drop(model: BpeModel, wanted: Sequence[str], piece_scores: str) -> ExtensionPlan:
    """Leave out pieces that are not reached, or only by SentencePiece, which can merge characters that are not pieces.

    One pass is enough: a piece that is never reached does not help to make others, and a piece with an unknown
    character does not help to make pieces without it.
    """
    spelled = set(missing_characters(wanted, {**model.scores, **dict.fromkeys(wanted, 0.0)}))
    candidates = [piece for piece in _ordered(wanted, piece_scores) if spelled.isdisjoint(piece)]
    scores = _scores(model, candidates, piece_scores, num_asked=len(candidates))
    stuck = set(unreachable(with_pieces(model.content, candidates, scores), candidates))
    kept = [piece for piece in candidates if piece not in stuck]
    kept_scores = _scores(model, kept, piece_scores, num_asked=len(kept))
    reached = set(kept)
    return ExtensionPlan(
        kept, kept_scores, 0, 0, dropped=[piece for piece in wanted if piece not in reached], over_budget=[]
    )


def _append_all(model: BpeModel, wanted: Sequence[str], piece_scores: str) -> ExtensionPlan:
    pieces = _ordered(wanted, piece_scores)
    scores = _scores(model, pieces, piece_scores, num_asked=len(pieces))
    return ExtensionPlan(pieces, scores, 0, 0, dropped=[], over_budget=[])


def _ordered(wanted: Sequence[str], piece_scores: str) -> list[str]:
    return sorted(wanted, key=len) if piece_scores == "zero" else list(wanted)


def _scores(model: BpeModel, pieces: Sequence[str], piece_scores: str, *, num_asked: int) -> list[float]:
    """Decreasing scores below every merge of the source; with "zero", 0 for the first `num_asked` pieces."""
    zeros = num_asked if piece_scores == "zero" else 0
    return [0.0] * zeros + scores_below(model.lowest_merge, len(pieces) - zeros)


# Pieces that must be added.


def missing_characters(pieces: Iterable[str], known: Collection[str]) -> list[str]:
    """The single characters of `pieces` that are not among the `known` pieces nor the pieces, in order of appearance.

    A piece is merged from its characters. A character that is not a piece becomes bytes, which never merge:

        missing_characters(["你好", "好"], {"a"}) -> ["你"]
    """
    # Joined into one text, because a dictionary of its characters is made at C speed.
    characters = dict.fromkeys("".join(pieces))
    own = set(pieces)
    return [character for character in characters if character not in known and character not in own]


def evolve(symbols: Sequence[str], scores: dict[str, float]) -> list[str]:
    """Merge neighbours as SentencePiece does, best score first and leftmost among equals, until no merge is possible.

    `scores` are the pieces that merges can make. Cost: the square of the number of symbols, which is small in a piece.
    A score of 0.0 is better than -0.0, the score of LLaMA's first merge: SentencePiece compares their bits.

        evolve("abab", {"ab": -1.0}) -> ["ab", "ab"]
    """
    symbols = list(symbols)
    while len(symbols) > 1:
        best, at = None, -1
        for index in range(len(symbols) - 1):
            score = scores.get(symbols[index] + symbols[index + 1])
            if score is not None and (best is None or (score, math.copysign(1.0, score)) > best):
                best, at = (score, math.copysign(1.0, score)), index
        if at < 0:
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


def intermediate_pieces(stuck: Sequence[str], scores: dict[str, float]) -> list[str]:
    """Pieces to append, in this order, each with a score below all before it, so that every stuck piece is reached.

    As in training a BPE: add the concatenation of two neighbours that occurs in the most stuck pieces, let the model
    merge further, and repeat until each piece is one symbol. So pieces share the additions:

        intermediate_pieces(["abc", "abd"], {"abc": -1.0, "abd": -2.0}) -> ["ab"]

    Args:
        stuck: pieces that are not reached; every one of their characters must be a piece.
        scores: all pieces that merges can make, including the stuck ones. The additions are inserted into it.
    """
    return pieces_that_join([evolve(piece, scores) for piece in stuck], scores)


def pieces_that_join(
    states: list[list[str]],
    scores: dict[str, float],
    *,
    is_last: Callable[[str], bool] = lambda piece: False,
    is_refused: Callable[[str], bool] = lambda piece: False,
) -> list[str]:
    """The same for pieces that merges have turned into `states`, lists of symbols, which become single symbols.

    Args:
        is_last: pieces for which it is true are added only once there is no other to add.
        is_refused: pieces for which it is true are never added. A state keeps several symbols if the only ways to join
            them add such pieces.

    Cost: each addition processes only the stuck pieces that contain it, and removes at least one symbol from each. A
    heap gives the next pair. Memory is proportional to the characters of the stuck pieces.
    """
    holders: dict[str, set[int]] = defaultdict(set)
    for index, state in enumerate(states):
        for pair in _pairs(state):
            holders[pair].add(index)
    heap = [(is_last(pair), -len(found), len(pair), pair) for pair, found in holders.items()]
    heapq.heapify(heap)
    lowest = min(scores.values(), default=0.0)
    added: list[str] = []
    while heap:
        last, count, _, pair = heapq.heappop(heap)
        if len(holders[pair]) != -count:
            if holders[pair]:
                heapq.heappush(heap, (last, -len(holders[pair]), len(pair), pair))
            continue
        if is_refused(pair):
            continue
        lowest = _next_below(lowest)
        scores[pair] = lowest
        added.append(pair)
        fresh = set()
        for index in sorted(holders[pair]):
            for old in _pairs(states[index]):
                holders[old].discard(index)
            states[index] = evolve(states[index], scores)
            for new in _pairs(states[index]):
                holders[new].add(index)
                fresh.add(new)
        for new in fresh:
            heapq.heappush(heap, (is_last(new), -len(holders[new]), len(new), new))
    return added


def _pairs(symbols: Sequence[str]) -> list[str]:
    return [left + right for left, right in zip(symbols, symbols[1:], strict=False)]


def _next_below(score: float) -> float:
    """The next float64 below `score`. Only the final scores in the file need to be distinct in float32."""
    return math.nextafter(score, -math.inf)
