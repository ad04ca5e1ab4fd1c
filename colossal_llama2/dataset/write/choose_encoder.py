"""Choose the encoder, and compare all tokenizers of the folder on a sample of the user's text.

Training data is encoded by the reference encoder of the tokenizer's kind, or by a faster one that gives the same ids.
transformers loads tokenizer.json instead, which can differ (equal scores, unreachable characters, leading spaces); then
the model is used with ids other than those it was trained on.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.corpus.data_files import InputFile, Span
from colossal_llama2.corpus.row_reader import SpanReader
from colossal_llama2.dataset.layout.prepare_settings import Settings
from colossal_llama2.dataset.write.records import row_reader
from colossal_llama2.encoding.encoder import Encoder
from colossal_llama2.encoding.file_names import FAST_FILE
from colossal_llama2.encoding.registry import kind_of, shared_encoder
from colossal_llama2.encoding.transformers_tokenizer import load_fast

SAMPLE_TEXTS = 200
SAMPLE_CHARACTERS = 500
SAMPLE_PLACES = 20
# How far a place is searched for texts: a large file may be blank lines from there to its end.
PLACE_BYTES = 4 << 20


def choose_encoder(
    tokenizer_dir: str, files: Sequence[InputFile], settings: Settings
) -> tuple[type[Encoder], dict[str, int]]:
    """The fastest encoder that gives the reference ids on a sample, and how many texts differ in tokenizer.json.

    The sample consists of texts that will be encoded, from places all over the input. The second value is
    {"sample_texts": 200, "sample_differing": 0}; without tokenizer.json both numbers are 0. Warns about differences.
    """
    reference, fastest = kind_of(tokenizer_dir)
    encoder = fastest(tokenizer_dir)
    reader = shared_encoder(tokenizer_dir, reference)
    # Rows with other texts are bad rows.
    texts = [text for text in sample_texts(files, settings) if not reader.problem_of(text)]
    ids = reader.encode(texts)
    differing = 0 if encoder is reference else _differing(shared_encoder(tokenizer_dir, encoder).encode(texts), ids)
    if differing:
        logs.get_logger().warning(
            f"the fast encoder and {reference.name} give different ids for {differing} of {len(texts)} sample texts; "
            f"{reference.name} is used instead"
        )
        encoder = reference
    path = Path(tokenizer_dir) / FAST_FILE
    if not path.is_file():
        return encoder, {"sample_texts": 0, "sample_differing": 0}
    differing = _differing(_fast_ids(path, texts), ids)
    if differing:
        logs.get_logger().warning(
            f"{differing} of {len(texts)} sample texts are tokenized differently by {path}, which transformers loads, "
            f"and by {reference.name}, which is used here; {reference.other_texts}"
        )
    return encoder, {"sample_texts": len(texts), "sample_differing": differing}


def sample_texts(files: Sequence[InputFile], settings: Settings) -> list[str]:
    """The beginnings of up to `SAMPLE_TEXTS` different texts, equally many from each place.

    These are the texts of checked rows, so ids, URLs and names of roles are not among them. Bad rows are skipped.
    """
    places = list(_places(files))
    each = SAMPLE_TEXTS // len(places)
    texts: dict[str, None] = {}
    for file, span in places:
        texts.update(dict.fromkeys(islice(_new_texts(file, span, settings, texts), each)))
    return list(texts)


def _places(files: Sequence[InputFile]) -> Iterator[tuple[InputFile, Span]]:
    """Yield spans to sample from: one in each of up to `SAMPLE_PLACES` files, or several in each of a few files."""
    step = max(len(files) / SAMPLE_PLACES, 1)
    for number in (int(index * step) for index in range(min(len(files), SAMPLE_PLACES))):
        file = files[number]
        count = 1 if file.is_one_span else max(SAMPLE_PLACES // len(files), 1)
        for index in range(count):
            start = file.size * index // count
            yield file, Span(number, start, None if file.is_one_span else min(start + PLACE_BYTES, file.size))


def _new_texts(file: InputFile, span: Span, settings: Settings, seen: Collection[str]) -> Iterator[str]:
    """Yield the texts of a place that are not in `seen`, each once."""
    own: set[str] = set()
    read = row_reader(settings)
    for line in islice(SpanReader(file, span), SAMPLE_TEXTS):
        try:
            texts = read(line.record).texts if line.record else []
        except ValueError:
            continue
        for text in (text[:SAMPLE_CHARACTERS] for text in texts):
            if text and text not in seen and text not in own:
                own.add(text)
                yield text


def _fast_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    fast = load_fast(path)
    # In data, a mark that is spelled out is text.
    fast.encode_special_tokens = True
    return [fast.encode(text, add_special_tokens=False).ids for text in texts]


def _differing(ids: Sequence[list[int]], expected: Sequence[list[int]]) -> int:
    return sum(one != other for one, other in zip(ids, expected, strict=True))
