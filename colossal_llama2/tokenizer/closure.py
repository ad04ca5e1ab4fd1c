"""Which new pieces a SentencePiece BPE can reach, and what has to be added so that it reaches all of them.

BPE starts from single characters and merges the best-scored two neighbours whose concatenation is a piece, again and
again. A piece is reached if its own characters end up as one symbol. With the pieces 人 工 智 能 and 人工智能,

    人 工 智 能         no two neighbours are a piece: stuck, 人工智能 is never reached
    人工 智 能          with 人工 added, still stuck
    人工 智能 -> 人工智能  with 智能 added too

Why adding is safe. Merges inside a stretch of text that becomes one symbol are those of the stretch alone, in the same
order, so a piece that is reached on its own is made in one way in every text. A piece added with a score below all
others acts only where the model was stuck before, so it breaks nothing that was reached, and the two symbols it joins
have been reached, so it is reached itself. Hence one pass reaches every piece. Since each piece is made in one way, and
all scores differ, it does not matter that SentencePiece breaks ties by position and other tokenizers by rank.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from colossal_llama2.encoding.bpe_model import BpeModel, altered_by_normalizer, scores_below, unreachable, with_pieces


@dataclass(frozen=True)
class Plan:
    """What is appended: `pieces` in order of id with their `scores`, and how that came about.

    The first of the pieces are those of the file; `characters` and `intermediates` follow, the closure's additions.
    `dropped` and `given_up` are pieces of the file that are left out: not to be reached, beyond the budget. `altered`
    are those that the model's normalizer never produces; they are dropped, unless all pieces are appended.
    """

    pieces: list[str]
    scores: list[float]
    characters: int
    intermediates: int
    dropped: list[str]
    given_up: list[str]
    altered: Sequence[str] = ()


def make_plan(
    model: BpeModel, wanted: Sequence[str], *, closure: str, piece_scores: str, max_added: int | None = None
) -> Plan:
    """Decide what to append to `model`, of the `wanted` pieces in the order of the file.

    Args:
        closure: "complete" adds single characters and intermediate pieces until all are reached, "drop" leaves out what
            is not reached, "off" appends all.
        piece_scores: "below" for falling scores under the lowest merge in the order of the file; "zero" for the
            original's: score 0, in order of length.
        max_added: most pieces to append in all; the last ones of the file are given up first.
    """
    # No merge makes a piece whose characters never come out of the normalizer.
    altered = altered_by_normalizer(model, wanted)
    gone = set(altered) if closure != "off" else set()
    wanted = [piece for piece in wanted if piece not in gone]
    close = {"complete": _complete, "drop": _drop, "off": _append_all}[closure]

    count, found = _longest_prefix(lambda count: close(model, wanted[:count], piece_scores), len(wanted), max_added)
    dropped = [piece for piece in altered if piece in gone] + found.dropped
    return replace(found, dropped=dropped, given_up=list(wanted[count:]), altered=altered)


def _longest_prefix(plan: Callable[[int], Plan], total: int, limit: int | None) -> tuple[int, Plan]:
    """How many pieces of the file, from its first, can be planned for within `limit` pieces in all, and the plan.

    What a longer prefix needs grows almost evenly, so interpolation finds the place in a few trials. It can also shrink
    by a piece or two, where a piece of the file saves intermediate ones; then a slightly longer prefix might fit too.
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


def _complete(model: BpeModel, wanted: Sequence[str], piece_scores: str) -> Plan:
    characters = missing_characters(wanted, model.scores)
    known = [*_ordered(wanted, piece_scores), *characters]
    known_scores = _scores(model, known, piece_scores, num_asked=len(wanted))
    stuck = unreachable(with_pieces(model.content, known, known_scores), wanted)
    scores = {**model.scores, **dict(zip(known, known_scores, strict=True))}
    intermediates = intermediate_pieces(stuck, scores)
    pieces = known + intermediates
    # Scored anew: the more pieces, the wider the steps that float32 may need. Their order stays.
    scores_of_all = _scores(model, pieces, piece_scores, num_asked=len(wanted))
    return Plan(pieces, scores_of_all, len(characters), len(intermediates), dropped=[], given_up=[])


def _drop(model: BpeModel, wanted: Sequence[str], piece_scores: str) -> Plan:
    """Leave out what is not reached, or only by SentencePiece, which alone can merge a character that is no piece.

    Once is enough: a piece that is never reached has no part in the making of others, nor has one with an unknown
    character in the making of pieces without it.
    """
    spelled = set(missing_characters(wanted, {**model.scores, **dict.fromkeys(wanted, 0.0)}))
    candidates = [piece for piece in _ordered(wanted, piece_scores) if spelled.isdisjoint(piece)]
    scores = _scores(model, candidates, piece_scores, num_asked=len(candidates))
    stuck = set(unreachable(with_pieces(model.content, candidates, scores), candidates))
    kept = [piece for piece in candidates if piece not in stuck]
    kept_scores = _scores(model, kept, piece_scores, num_asked=len(kept))
    reached = set(kept)
    return Plan(kept, kept_scores, 0, 0, dropped=[piece for piece in wanted if piece not in reached], given_up=[])


def _append_all(model: BpeModel, wanted: Sequence[str], piece_scores: str) -> Plan:
    pieces = _ordered(wanted, piece_scores)
    scores = _scores(model, pieces, piece_scores, num_asked=len(pieces))
    return Plan(pieces, scores, 0, 0, dropped=[], given_up=[])


def _ordered(wanted: Sequence[str], piece_scores: str) -> list[str]:
    return sorted(wanted, key=len) if piece_scores == "zero" else list(wanted)


def _scores(model: BpeModel, pieces: Sequence[str], piece_scores: str, *, num_asked: int) -> list[float]:
    """Falling scores below every merge of the source; with "zero", 0 for the first `num_asked` pieces."""
    zeros = num_asked if piece_scores == "zero" else 0
    return [0.0] * zeros + scores_below(model.lowest_merge, len(pieces) - zeros)


# What has to be added.


def missing_characters(pieces: Iterable[str], known: Collection[str]) -> list[str]:
    """The single characters of `pieces` that are not among the `known` pieces nor the pieces, in order of appearance.

    A piece is built from its characters. One that is no piece would come as bytes, which never merge:

        missing_characters(["你好", "好"], {"a"}) -> ["你"]
    """
    # Joined, the characters of a million pieces are found at the speed of a dictionary.
    characters = dict.fromkeys("".join(pieces))
    own = set(pieces)
    return [character for character in characters if character not in known and character not in own]


def evolve(symbols: Sequence[str], scores: dict[str, float]) -> list[str]:
    """Merge neighbours as SentencePiece does, the best score first and of equals the leftmost, until none can.

    `scores` are the pieces that merges can make. Cost: the square of the number of symbols, of which a piece has few.
    A score of 0.0 is better than one of -0.0, which LLaMA's first merge has: SentencePiece compares their bits.

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

    As in training a BPE: add the concatenation of two neighbours that the most stuck pieces hold, let the model merge
    on, and repeat until each is one symbol. So pieces share what is added for them:

        intermediate_pieces(["abc", "abd"], {"abc": -1.0, "abd": -2.0}) -> ["ab"]

    Args:
        stuck: pieces that are not reached; every one of their characters must be a piece.
        scores: all pieces that merges can make, the stuck ones included. The additions are put into it.

    Cost: each addition touches the stuck pieces that hold it alone, and each touch takes a symbol away from one. A heap
    gives the next pair. Memory is proportional to the characters of the stuck pieces.
    """
    states = [evolve(piece, scores) for piece in stuck]
    holders: dict[str, set[int]] = defaultdict(set)
    for index, state in enumerate(states):
        for pair in _pairs(state):
            holders[pair].add(index)
    heap = [(-len(found), len(pair), pair) for pair, found in holders.items()]
    heapq.heapify(heap)
    lowest = min(scores.values(), default=0.0)
    added: list[str] = []
    while heap:
        count, _, pair = heapq.heappop(heap)
        if len(holders[pair]) != -count:
            if holders[pair]:
                heapq.heappush(heap, (-len(holders[pair]), len(pair), pair))
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
            heapq.heappush(heap, (-len(holders[new]), len(new), new))
    return added


def _pairs(symbols: Sequence[str]) -> list[str]:
    return [left + right for left, right in zip(symbols, symbols[1:], strict=False)]


def _next_below(score: float) -> float:
    """A float64 below `score`; float32 matters only in the file, which is scored in the end."""
    return math.nextafter(score, -math.inf)
