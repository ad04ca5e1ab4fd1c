"""--eval_dedup: how much held-out text also occurs in training text, by 13-grams as in GPT-3's report.

A held-out document overlaps if 13 consecutive words of the text that is measured (its target; the answers of a
conversation) occur in the text of a training document (source and target; all messages, without system texts). Case,
forms of characters (`held_out.folded`), punctuation and white space are ignored; in scripts without spaces, such as
Chinese, Japanese and Thai, each character is a word. Shorter documents cannot be compared. Nothing is removed.

    {"ngram": 13, "documents": 461, "compared": 455, "too_short": 6, "overlapping": 12, "share": 0.026374,
     "examples": [{"held_out": "data/a.jsonl:17", "training": "data/b.jsonl:3", "text": "the ..."}]}

The input is read twice more, so the time is linear in it. Memory: 24 bytes for each held-out n-gram, at most
`WorkSizes.max_grams` of them; with more held-out text a sample of the documents is compared, "compared" in number.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.corpus.data_files import Unit
from colossal_llama2.corpus.row_reader import SpanReader
from colossal_llama2.dataset.layout import store
from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write.held_out import folded
from colossal_llama2.dataset.write.records import Row, check_encodable, row_reader
from colossal_llama2.dataset.write.tokenize_unit import UnitTask
from colossal_llama2.dataset.write.unit_files import HELD_OUT, TRAINED_ON, unit_sides
from colossal_llama2.encoding.registry import shared_encoder
from colossal_llama2.plurals import counted
from colossal_llama2.terminal_text import visible_line

NGRAM = 13
MAX_EXAMPLES = 5
GRAMS_FILE = "overlap.grams"
GRAM = np.dtype([("gram", "<u8"), ("document", "<i4")])
# Han, kana, bopomofo, Thai, Lao, Tibetan, Burmese, Khmer: scripts without spaces between words.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u3100-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Vowel signs and accents, which Python's \w does not match.
MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff"
WORD = re.compile(f"[{UNSPACED}]|(?:[^\\W_{UNSPACED}]|[{MARKS}])+")
# Odd, so that multiplication loses no bits of a hash.
MULTIPLIER, MIXER = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9


class Place(NamedTuple):
    """The place of a document: its file, and its line in the unit's part of the file."""

    file: int
    line: int


def count_overlaps(
    tasks: Sequence[UnitTask],
    lines_before: dict[int, int],
    *,
    run_tasks: Callable,
    paths: Sequence[str],
    max_grams: int,
) -> dict[str, Any]:
    """The report above, for a run whose units are done. Finished steps are in the cache, so that a restart continues.

    Args:
        tasks: of all units.
        lines_before: by unit, the number of lines of its file in earlier units.
        paths: of the files, by number.
        max_grams: with more held-out n-grams than this, a sample of the documents is compared.
    """
    cache = Path(tasks[0].cache_dir)
    tasks = [task for task in tasks if not task.unit.hashes_only]
    waiting = [task for task in tasks if not _json(task, "grams").exists()]
    _run(run_tasks, write_held_out_grams, waiting, "held-out text")
    documents: Counter[bool] = Counter()
    for task in tasks:
        for _, _, grams in store.read_json(_json(task, "grams"))["documents"]:
            documents[bool(grams)] += 1
    grams, is_in_sample = _sampled_grams(tasks, max_grams=max_grams)
    with store.appearing_file(cache / GRAMS_FILE, needed_bytes=grams.nbytes) as file:
        file.write(grams.tobytes())
    waiting = [task for task in tasks if not _json(task, "found").exists()]
    _run(run_tasks, write_overlaps, waiting, "compare with it")

    report = _report(tasks, grams, is_in_sample, documents=documents, lines_before=lines_before, paths=paths)
    _log(report)
    return report


def _report(
    tasks: Sequence[UnitTask],
    grams: np.ndarray,
    is_in_sample: Callable[[Unit, int], bool],
    *,
    documents: Counter[bool],
    lines_before: dict[int, int],
    paths: Sequence[str],
) -> dict[str, Any]:
    """Combine the workers' results. `documents` counts the held-out documents with (True) and without n-grams."""

    def where(unit: int, place: Sequence[int]) -> str:
        return f"{paths[place[0]]}:{lines_before[unit] + place[1]}"

    is_found = np.zeros(len(grams), bool)
    texts: dict[int, tuple[str, str]] = {}
    for task in tasks:
        found = store.read_json(_json(task, "found"))["examples"]
        is_found[np.fromfile(_data(task, "found"), np.int64)] = True
        for gram, place, text in found:
            texts.setdefault(gram, (where(task.unit.number, place), text))
    compared, overlapping = 0, 0
    examples: list[dict[str, str]] = []
    for task in tasks:
        for place, own in _held_out_documents(task, is_in_sample):
            numbers = np.searchsorted(grams, own)
            compared += 1
            overlapping += bool(is_found[numbers].any())
            known = next((number for number in numbers.tolist() if number in texts), None)
            if known is not None and len(examples) < MAX_EXAMPLES:
                training, text = texts.pop(known)
                examples.append({"held_out": where(task.unit.number, place), "training": training, "text": text})
    return {
        "ngram": NGRAM,
        "documents": sum(documents.values()),
        "compared": compared,
        "too_short": documents[False],
        "overlapping": overlapping,
        "share": round(overlapping / compared, 6) if compared else 0.0,
        "examples": examples,
    }


def _log(report: dict[str, Any]) -> None:
    first = "".join(
        f"; such as {example['held_out']} and {example['training']}: {visible_line(example['text'])}"
        for example in report["examples"][:1]
    )
    logs.get_logger().info(
        f"--eval_dedup: {NGRAM} consecutive words shared with training text in {report['overlapping']:,} of "
        f"{counted(report['compared'], 'held-out document')} ({report['share']:.2%}; {report['too_short']:,} of "
        f"{report['documents']:,} too short to compare){first}"
    )


def _run(run_tasks: Callable, function: Callable, tasks: Sequence[UnitTask], description: str) -> None:
    size = sum(task.unit.size for task in tasks)
    with logs.progress(total=size, description=description, unit="B", unit_scale=True) as progress:
        for done in run_tasks(function, tasks):
            progress.update(done)


def _json(task: UnitTask, kind: str) -> Path:
    return Path(task.cache_dir, f"overlap-{task.unit.number:08d}.{kind}.json")


def _data(task: UnitTask, kind: str) -> Path:
    return Path(task.cache_dir, f"overlap-{task.unit.number:08d}.{kind}")


# In worker processes.


def write_held_out_grams(task: UnitTask) -> int:
    """Write the n-grams of a unit's held-out documents, and [file, line, count] of each. Returns the unit's size."""
    documents: list[list[int]] = []
    with store.appearing_file(_data(task, "grams")) as file:
        for place, row in _rows(task, HELD_OUT):
            own = np.unique(grams_of(row.measured_texts))
            entries = np.empty(len(own), GRAM)
            entries["gram"], entries["document"] = own, len(documents)
            file.write(entries.tobytes())
            documents.append([*place, len(own)])
    store.write_json_whole(_json(task, "grams"), {"documents": documents})
    return task.unit.size


def write_overlaps(task: UnitTask) -> int:
    """Write which held-out n-grams occur in a unit's training documents, and [number, place, text] of a few."""
    path = Path(task.cache_dir, GRAMS_FILE)
    grams = np.memmap(path, "<u8", "r") if path.stat().st_size else np.zeros(0, np.uint64)
    found = [np.zeros(0, np.int64)]
    examples: list[list[Any]] = []
    for places, texts, ends, own in batches(_rows(task, TRAINED_ON), task.sizes):
        numbers = np.searchsorted(grams, own)
        numbers[numbers == len(grams)] = 0
        hits = np.flatnonzero(grams[numbers] == own) if len(grams) else np.zeros(0, np.int64)
        found = [np.unique(np.concatenate([*found, numbers[hits]]))]
        documents, firsts = np.unique(np.searchsorted(ends, hits, side="right"), return_index=True)
        for document, hit in list(zip(documents, hits[firsts], strict=True))[: MAX_EXAMPLES - len(examples)]:
            begin = ends[document - 1] if document else 0
            examples.append([int(numbers[hit]), list(places[document]), _example(texts[document], hit - begin)])
    with store.appearing_file(_data(task, "found")) as file:
        file.write(found[0].astype(np.int64).tobytes())
    store.write_json_whole(_json(task, "found"), {"examples": examples})
    return task.unit.size


def batches(
    rows: Iterable[tuple[Place, Row]], sizes: WorkSizes
) -> Iterator[tuple[list[Place], list[list[str]], np.ndarray, np.ndarray]]:
    """Batches of documents: places, texts, where the n-grams of each end, and all n-grams.

    Documents without n-grams are left out. A batch ends with the document that reaches one of the `sizes`.
    """
    places: list[Place] = []
    texts: list[list[str]] = []
    grams: list[np.ndarray] = []
    count, characters = 0, 0
    for place, row in rows:
        text = row.seen_texts
        own = grams_of(text)
        if not len(own):
            continue
        places.append(place)
        texts.append(text)
        grams.append(own)
        count += len(own)
        characters += sum(map(len, text))
        is_full = count >= sizes.lookup_grams or characters >= sizes.lookup_characters
        if is_full or len(places) >= sizes.lookup_documents:
            yield places, texts, np.cumsum([*map(len, grams)]), np.concatenate(grams)
            places, texts, grams, count, characters = [], [], [], 0, 0
    if grams:
        yield places, texts, np.cumsum([*map(len, grams)]), np.concatenate(grams)


def _example(texts: Sequence[str], gram: int) -> str:
    """The text of a document's n-gram number `gram`."""
    for words in map(words_of, texts):
        count = max(len(words) - NGRAM + 1, 0)
        if gram < count:
            return _spaced(words[gram : gram + NGRAM])
        gram -= count
    raise IndexError(gram)


def _spaced(words: Sequence[str]) -> str:
    """The words as text, with spaces except between two characters of a script without spaces."""
    text = words[0]
    for before, word in zip(words, words[1:], strict=False):
        is_unspaced = re.match(f"[{UNSPACED}]", before) and re.match(f"[{UNSPACED}]", word)
        text += word if is_unspaced else f" {word}"
    return text


def _rows(task: UnitTask, side: int) -> Iterator[tuple[Place, Row]]:
    """Yield the checked records of a unit that are on one side, as recorded when the unit was done."""
    read, encoder = row_reader(task.settings), shared_encoder(task.tokenizer_dir, task.encoder_class)
    sides = iter(unit_sides(Path(task.cache_dir), task.unit))
    for span in task.unit.spans:
        for line in SpanReader(task.files[span.file], span, task.base):
            if line.record is None:
                continue
            try:
                row = check_encodable(read(line.record), encoder)
            except ValueError:  # a bad row, which was skipped before, too
                continue
            if next(sides) == side:
                yield Place(span.file, line.number), row


def words_of(text: str) -> list[str]:
    """The words of a text for n-grams."""
    return WORD.findall(folded(text))


def grams_of(texts: Sequence[str]) -> np.ndarray:
    """(n-grams,) uint64: a hash of each `NGRAM` consecutive words of each text, in order."""
    return np.concatenate([np.zeros(0, np.uint64), *map(_grams_of, texts)])


def _grams_of(text: str) -> np.ndarray:
    words = np.array([_hash(word) for word in words_of(text)], np.uint64)
    count = max(len(words) - NGRAM + 1, 0)
    grams = np.zeros(count, np.uint64)
    for place in range(NGRAM if count else 0):
        grams = grams * np.uint64(MULTIPLIER) + words[place : place + count]
    grams = (grams ^ (grams >> np.uint64(32))) * np.uint64(MIXER)
    return grams ^ (grams >> np.uint64(29))


@lru_cache(maxsize=1 << 17)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


# In the command's own process.


def _sampled_grams(tasks: Sequence[UnitTask], *, max_grams: int) -> tuple[np.ndarray, Callable[[Unit, int], bool]]:
    """The sorted n-grams of the held-out documents, or of a sample of at most `max_grams`, and its membership test."""
    counts = np.zeros(64, np.int64)
    for task in tasks:
        for number, (_, _, grams) in enumerate(store.read_json(_json(task, "grams"))["documents"]):
            counts[_level(task.unit, number)] += grams
    # Each level halves the number of documents at that level or above.
    lowest = next(level for level in range(64) if counts[level:].sum() <= max_grams or level == 63)

    def is_in_sample(unit: Unit, number: int) -> bool:
        return _level(unit, number) >= lowest

    parts = [own for task in tasks for _, own in _held_out_documents(task, is_in_sample)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts])), is_in_sample


def _level(unit: Unit, number: int) -> int:
    """Trailing zeros of a hash of a held-out document's place: half of the documents have 0, a quarter 1, and so on."""
    digest = hashlib.blake2b(f"{unit.number} {number}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") | 1 << 63
    return (value & -value).bit_length() - 1


def _held_out_documents(
    task: UnitTask, is_in_sample: Callable[[Unit, int], bool]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield the place and the n-grams of each held-out document of a unit that is in the sample and has n-grams."""
    entries = np.fromfile(_data(task, "grams"), GRAM)
    end = 0
    for number, (file, line, grams) in enumerate(store.read_json(_json(task, "grams"))["documents"]):
        end += grams
        if grams and is_in_sample(task.unit, number):
            yield [file, line], entries["gram"][end - grams : end]
