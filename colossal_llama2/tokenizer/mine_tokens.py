"""Mine new pieces for a tokenizer from text, which init_tokenizer.py can then add to it.

    python -m colossal_llama2.tokenizer.mine_tokens --data_input_dirs data/zh \\
        --source_tokenizer_dir llama-2-7b --output_file new_tokens.jsonl

SentencePiece's trainer learns merges on a sample of the text. Pieces of the source are left out, and every piece that
remains can be reached: its characters and the pieces it is merged from are in the list or in the source. Pieces are in
the order of usefulness: merges in the order of training, and each character at the place of its own gain, always before
the pieces that contain it. So every prefix of the list is itself a good list of its size.

For a byte-level BPE, such as LLaMA-3's, the training of its own merges is continued instead (mine_byte_level.py). Parts
of characters are written as {"bytes": "e4bd"}.
"""

import heapq
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    # Run by its path, this file's own folder is on sys.path instead of the repository's.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama2 import errors, logs
from colossal_llama2.charts import style, vocabulary_curve
from colossal_llama2.cli import tokenizer_flags
from colossal_llama2.encoding.bpe_model import BpeModel, altered_by_normalizer, scores_below, unreachable, with_pieces
from colossal_llama2.encoding.byte_level_encoder import ByteLevelEncoder
from colossal_llama2.encoding.byte_level_file import ByteLevelModel
from colossal_llama2.encoding.registry import kind_of
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.errors import UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import check_new_file, new_file
from colossal_llama2.storage.output_paths import check_apart
from colossal_llama2.tables import print_table
from colossal_llama2.terminal_text import show_line
from colossal_llama2.tokenizer import mine_byte_level
from colossal_llama2.tokenizer.mine_byte_level import Found
from colossal_llama2.tokenizer.new_pieces import MAX_PIECE_CHARACTERS
from colossal_llama2.tokenizer.text_sample import Sample, draw, read_documents

if TYPE_CHECKING:
    import numpy as np
    from sentencepiece import SentencePieceProcessor

# Training uses runs of these characters. "any" excludes whitespace, control characters and two that SentencePiece
# reserves. The trainer treats a run as one word, so long runs are cut.
RUN_CHARACTERS = 1000
SCRIPTS = {
    # Ideographs, CJK punctuation, full-width forms, and the dashes, dots and quotes that Chinese shares with Latin.
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
    "\u3001-\u303f\uff01-\uffee\u2014\u2018-\u201d\u2026\u00b7",
    "any": "^\\s\x00-\x1f\x7f-\x9f\u2581\u2585",
}
# A longer document is sampled in parts, so that it cannot fill the whole sample.
PART_CHARACTERS = 1 << 15
BATCH_LINES = 1 << 14
# Share of extra pieces to train, because some cannot be reached after the source's own merges.
SPARE = 0.03
LAST_PIECES = 1000
CURVE_POINTS = 20


@dataclass(frozen=True)
class Mined:
    """The result of mining.

    Attributes:
        pieces: in order of usefulness; for a byte-level BPE, as its vocabulary spells them.
        curve: (number of pieces, tokens per character on held-out text), from 0 to all pieces.
        unreachable: the number of trained pieces that were left out because they cannot be reached.
        train_bytes, train_documents: the training text; parts of long documents count as documents.
        held_out_documents, held_out_characters: the text to measure on, which was not trained on.
        some_are_rare, some_are_long: whether --min_count, or --max_piece_length, left out pieces.
    """

    pieces: list[str]
    curve: list[tuple[int, float]]
    unreachable: int
    train_bytes: int
    train_documents: int
    held_out_documents: int
    held_out_characters: int
    is_byte_level: bool = False
    some_are_rare: bool = False
    some_are_long: bool = False


@dataclass(frozen=True)
class MiningSettings:
    """The flags of mine_tokens.py.

    Attributes:
        script: a key of `SCRIPTS`; only runs of its characters are trained on.
        min_count: how often the sample must at least contain a character, or merge a piece.
        sample_bytes: the maximum amount of training text; a larger corpus is sampled uniformly.
        held_out: share of documents to measure on instead of training, chosen by a hash of text and seed.
    """

    data_input_dirs: Sequence[str]
    source_tokenizer_dir: str
    num_new_tokens: int
    script: str
    max_piece_length: int
    min_count: int
    sample_bytes: int
    held_out: float
    seed: int
    output_file: str
    plot: str | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """The command: parse `argv` (default: the process's), mine, write and print."""
    args = tokenizer_flags.mine_tokens_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("mine_tokens.py"):
        settings = MiningSettings(**vars(args))
        output_file, plot = Path(settings.output_file), Path(settings.plot) if settings.plot else None
        check_new_file(output_file, "--output_file")
        if plot:
            check_new_file(plot, "--plot")
            check_apart(output_file, "--output_file", plot, "--plot")
            check_apart(plot, "--plot", output_file, "--output_file")
            _check_can_plot(plot)
        mined = mine(settings, curve_points=CURVE_POINTS if plot else 0)
        with new_file(output_file) as path, path.open("w", encoding="utf-8") as out:
            record_of = mine_byte_level.record_of if mined.is_byte_level else _record_of
            records = map(record_of, mined.pieces)
            out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if plot:
            title = f"{plot.stem}: tokens per character by number of new pieces"
            with new_file(plot) as path:
                vocabulary_curve.draw_curve(mined.curve, path, title=title)
        _print_report(mined, settings)


def mine(settings: MiningSettings, *, curve_points: int = 0) -> Mined:
    """Mine at most `num_new_tokens` pieces of at most `max_piece_length` characters from {"source", "target"} jsonl.

    Args:
        curve_points: number of sizes to measure between none and all; with 0, only the effect of the last thousand.

    Raises UserError for a mistake in the folders, and if the text has nothing to train or to measure on.
    """
    script, min_count = settings.script, settings.min_count
    longest = settings.max_piece_length
    if longest > MAX_PIECE_CHARACTERS:
        raise UserError(f"--max_piece_length {longest} given, at most {MAX_PIECE_CHARACTERS} is allowed")
    base = _BASES[kind_of(settings.source_tokenizer_dir).encoder](Path(settings.source_tokenizer_dir))
    train, measured = _sample(settings)
    lines, characters, num_rare = _training_lines(train.items(), min_count)
    if not lines:
        raise UserError(
            f"--data_input_dirs: no text to train on ({script} characters that occur at least "
            f"{counted(min_count, 'time')}); give more text, another --script or a smaller --min_count"
        )
    if not measured.size:
        raise UserError(
            f"--held_out {settings.held_out:g} held out no document, so there is nothing to measure on; give more "
            "documents"
        )
    logs.get_logger().info("training a BPE on %s bytes; %s shows no progress", f"{train.size:,}", base.trainer)
    found = base.mine(lines, characters, settings)
    pieces = found.pieces
    texts = measured.items()
    curve = [(size, base.tokens_per_character(pieces[:size], texts)) for size in _sizes(len(pieces), curve_points)]
    return Mined(
        pieces=pieces,
        curve=curve,
        unreachable=found.unreachable,
        train_bytes=train.size,
        train_documents=len(train.items()),
        held_out_documents=len(texts),
        held_out_characters=sum(map(len, texts)),
        is_byte_level=isinstance(base, _ByteLevelBase),
        some_are_rare=found.some_are_rare or num_rare > 0,
        some_are_long=found.some_are_long,
    )


def _record_of(piece: str) -> dict[str, str]:
    """The line of a file of new pieces for a piece of SentencePiece."""
    return {"piece": piece}


class _SentencePieceBase:
    """The tokenizer to extend, a SentencePiece BPE."""

    trainer = "SentencePiece"

    def __init__(self, folder: Path):
        self._model = BpeModel.read(folder)

    def mine(self, lines: list[str], characters: dict[str, int], settings: MiningSettings) -> Found:
        """New pieces in order of usefulness."""
        num_new_tokens, min_count = settings.num_new_tokens, settings.min_count
        known = set(self._model.pieces)
        num_merges = int(num_new_tokens * (1 + SPARE)) + sum(len(piece) > 1 for piece in known)
        merges, counts = _train(
            lines,
            num_merges=num_merges,
            num_characters=len(characters),
            max_piece_length=settings.max_piece_length,
            spaced=settings.script == "any",
        )
        ordered = list(_in_order_of_use(merges, counts, characters, min_count))
        pieces, unreached = _reachable(self._model, [piece for piece in ordered if piece not in known], num_new_tokens)
        some_are_rare = len(ordered) < len(merges) + len(characters)
        # The trainer ends early when only longer pieces are left, and each of them joins one of more than half of the
        # length.
        some_are_long = (
            len(merges) < num_merges
            and any(len(word) > settings.max_piece_length for line in lines for word in line.split())
            and any(2 * len(piece) > settings.max_piece_length for piece in ordered)
        )
        return Found(pieces, unreached, some_are_rare, some_are_long)

    def tokens_per_character(self, pieces: Sequence[str], texts: Sequence[str]) -> float:
        """With the first pieces added."""
        return tokens_per_character(self._model, pieces, texts)


class _ByteLevelBase:
    """The tokenizer to extend, a byte-level BPE."""

    trainer = "the trainer"

    def __init__(self, folder: Path):
        self._model = ByteLevelModel.read(folder)

    def mine(self, lines: list[str], characters: dict[str, int], settings: MiningSettings) -> Found:
        """New tokens in the order of training."""
        return mine_byte_level.mine_byte_level(
            self._model,
            lines,
            limit=settings.num_new_tokens,
            min_count=settings.min_count,
            max_characters=settings.max_piece_length,
        )

    def tokens_per_character(self, pieces: Sequence[str], texts: Sequence[str]) -> float:
        """With the first tokens added."""
        return mine_byte_level.tokens_per_character(self._model, pieces, texts)


_BASES: dict[type, type[_SentencePieceBase] | type[_ByteLevelBase]] = {
    SentencePieceEncoder: _SentencePieceBase,
    ByteLevelEncoder: _ByteLevelBase,
}


# Sampling.


def _sample(settings: MiningSettings) -> tuple[Sample, Sample]:
    """Training text, reduced to lines of the script's runs, and whole texts to measure on.

    A document without characters of the script is in neither. The second sample is at most its share of `sample_bytes`.
    """
    script, seed, held_out = settings.script, settings.seed, settings.held_out
    run = re.compile(f"[{SCRIPTS[script]}]{{1,{RUN_CHARACTERS}}}")
    train: Sample = Sample(settings.sample_bytes)
    measured: Sample = Sample(int(settings.sample_bytes * held_out))
    longest = max(1, min(PART_CHARACTERS, int(settings.sample_bytes * min(held_out, 1)) // 64))
    for document in read_documents(settings.data_input_dirs):
        is_held_out = is_held_out_document(document, held_out, seed)
        for start in range(0, len(document), longest):
            part = document[start : start + longest]
            _, key = draw(part, seed)
            if is_held_out:
                if measured.wants(key) and run.search(part):
                    measured.add(key, part, len(part.encode()))
            elif train.wants(key):
                text = _runs(part, run, script)
                if text:
                    train.add(key, text, len(text.encode()))
    return train, measured


def is_held_out_document(document: str, held_out: float, seed: int) -> bool:
    """Whether a document is in the share `held_out` of all documents. Equal documents are on the same side."""
    return draw(document, seed)[0] < held_out


def _runs(text: str, run: re.Pattern, script: str) -> str:
    """The runs of a text, one per line; with "any", runs are words, and lines are those of the text."""
    if script == "any":
        return "\n".join(filter(None, (" ".join(run.findall(line)) for line in text.splitlines())))
    return "\n".join(run.findall(text))


def _training_lines(texts: list[str], min_count: int) -> tuple[list[str], dict[str, int], int]:
    """The lines without characters rarer than `min_count`; the other characters with their counts, by frequency; and
    how many are rarer.
    """
    counts: Counter = Counter()
    for text in texts:
        counts.update(text)
    for space in " \n":
        counts.pop(space, None)
    characters = {character: count for character, count in counts.most_common() if count >= min_count}
    # A rare character ends a run, like one of another script, because no piece may contain it.
    rare = str.maketrans(dict.fromkeys(counts.keys() - characters.keys(), "\n"))
    lines = (line.strip() for text in texts for line in text.translate(rare).split("\n"))
    return list(filter(None, lines)), characters, len(rare)


# Training.


def _train(
    lines: list[str], *, num_merges: int, num_characters: int, max_piece_length: int, spaced: bool
) -> tuple[list[str], list[int]]:
    """Train up to `num_merges` merged pieces with SentencePiece, and count how often each is in the encoded text.

    The trainer counts equal lines once with a weight. Digits stay single, as in LLaMA-2.
    """
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_merges + num_characters + 2,  # <unk>, and "▁", which has no count of its own
        hard_vocab_limit=False,
        character_coverage=1.0,
        max_sentencepiece_length=max_piece_length,
        max_sentence_length=1 << 20,
        normalization_rule_name="identity",
        add_dummy_prefix=spaced,
        split_digits=True,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    counts = _count_ids(processor, lines)
    merges = [index for index, piece in enumerate(pieces) if len(piece) > 1 and not processor.is_unknown(index)]
    return [pieces[index] for index in merges], [int(counts[index]) for index in merges]


def _count_ids(processor: "SentencePieceProcessor", lines: list[str]) -> "np.ndarray":
    import numpy as np

    counts = np.zeros(processor.get_piece_size(), dtype=np.int64)
    for start in range(0, len(lines), BATCH_LINES):
        for ids in processor.encode(lines[start : start + BATCH_LINES], num_threads=1):
            np.add.at(counts, ids, 1)
    return counts


def _in_order_of_use(merges: list[str], counts: list[int], characters: dict[str, int], min_count: int) -> Iterator[str]:
    """Yield characters and merges by the number of tokens that each saves, merges in the order of training.

    A merge saves one token whenever it is made. A character saves all of its UTF-8 bytes except one, because otherwise
    each byte is a token. A character is at least as frequent as any piece that contains it, so it comes first.
    """
    made = _times_made(merges, counts)
    fewest = made[0] if made else 0
    merged = []
    for piece, count in zip(merges, made, strict=True):
        if count >= min_count:
            fewest = min(fewest, count)
            merged.append((-fewest, piece))
    single = [(-count * (len(character.encode()) - 1), character) for character, count in characters.items()]
    single.sort(key=lambda entry: entry[0])
    for _, piece in heapq.merge(single, merged, key=lambda entry: entry[0]):
        yield piece


def _times_made(merges: list[str], counts: list[int]) -> list[int]:
    """How often each merge is made: as often as its piece remains at the end, plus once for each larger piece."""
    rank = {piece: index for index, piece in enumerate(merges)}
    made = list(counts)
    for index in range(len(merges) - 1, -1, -1):
        for part in _last_two(merges[index], rank):
            if part in rank:
                made[rank[part]] += made[index]
    return made


def _last_two(piece: str, rank: dict[str, int]) -> list[str]:
    """The parts that the last merge of a piece joins: ["人工", "智能"] of "人工智能"."""
    parts = list(piece)
    while len(parts) > 2:
        pairs = [rank.get(left + right, len(rank)) for left, right in zip(parts, parts[1:], strict=False)]
        first = min(range(len(pairs)), key=pairs.__getitem__)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


# Choosing and measuring, with the tokenizer that init_tokenizer.py would write.


def _reachable(model: BpeModel, candidates: list[str], limit: int) -> tuple[list[str], int]:
    """The first `limit` candidates that can all be reached, and the number of candidates left out before that."""
    altered = set(altered_by_normalizer(model, candidates))
    left = [piece for piece in candidates if piece not in altered]
    while True:
        chosen = left[:limit]
        lost = set(unreached_pieces(model, chosen))
        if not lost:
            return chosen, len(candidates) - len(left)
        left = [piece for piece in left if piece not in lost]


def unreached_pieces(model: BpeModel, pieces: Sequence[str]) -> list[str]:
    """The `pieces` that `model`, extended by all of them, never produces.

    This includes pieces with a character that is not a piece: the fast tokenizer splits it into bytes.
    """
    spelled = {*model.scores, *pieces}
    stuck = set(unreachable(_extended(model, pieces), pieces))
    return [piece for piece in pieces if piece in stuck or not spelled.issuperset(piece)]


def tokens_per_character(model: BpeModel, pieces: Sequence[str], texts: Sequence[str]) -> float:
    """Tokens per character of the texts under `model` extended by `pieces`."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=_extended(model, pieces))
    batches = (list(texts[start : start + BATCH_LINES]) for start in range(0, len(texts), BATCH_LINES))
    tokens = sum(len(ids) for batch in batches for ids in processor.encode(batch, num_threads=1))
    return tokens / sum(map(len, texts))


def _extended(model: BpeModel, pieces: Sequence[str]) -> bytes:
    return with_pieces(model.content, pieces, scores_below(model.lowest_merge, len(pieces)))


def _sizes(count: int, points: int) -> list[int]:
    """The numbers of pieces to measure, in order: none, all but the last thousand, all, and `points` in between."""
    between = {round(count * point / points) for point in range(1, points)} if points else set()
    return sorted({0, max(0, count - LAST_PIECES), count} | between)


# Reporting.


def _print_report(mined: Mined, settings: MiningSettings) -> None:
    curve = dict(mined.curve)
    count = len(mined.pieces)
    before, after = curve[0], curve[count]
    last = min(LAST_PIECES, count)
    rows = (
        ("bytes trained on", f"{mined.train_bytes:,}"),
        ("documents trained on", f"{mined.train_documents:,}"),
        ("documents held out", f"{mined.held_out_documents:,}"),
        ("characters held out", f"{mined.held_out_characters:,}"),
        ("unreachable pieces left out", f"{mined.unreachable:,}"),
        ("tokens per character before", f"{before:.4f}"),
        ("tokens per character after", f"{after:.4f}"),
        (f"without the last {last:,} pieces", f"{curve[count - last]:.4f}"),
        (f"what the last {last:,} pieces save", f"{1 - after / curve[count - last]:.2%}"),
    )
    print_table(rows, has_header=False)
    if count < settings.num_new_tokens:
        show_line(_why_fewer(mined, settings))
    show_line(f"written to {settings.output_file}")
    show_line(f"requested {settings.num_new_tokens}, mined {count}")


def _why_fewer(mined: Mined, settings: MiningSettings) -> str:
    """Which limits left out pieces, and what to change."""
    longest, limits, cures = settings.max_piece_length, "", ["more text"]
    if mined.some_are_long:
        limits += f" of at most {counted(longest, 'character')}"
        cures += ["a larger --max_piece_length"] if longest < MAX_PIECE_CHARACTERS else []
    if mined.some_are_rare:
        limits += f" that occur at least {counted(settings.min_count, 'time')}"
        cures.append("a lower --min_count")
    return f"the text has no more pieces{limits}; give {' or '.join(cures)}"


def _check_can_plot(plot: Path) -> None:
    if plot.suffix.lower() != ".png":
        raise UserError(f"--plot {plot} does not end in .png, the only supported format")
    style.check_can_draw("--plot")


if __name__ == "__main__":
    main()
