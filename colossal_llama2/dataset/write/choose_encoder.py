"""Which encoder is taken, proven on the user's own text: on a sample of it, all tokenizers of the folder must agree.

Training data is encoded by SentencePiece, or by `FastEncoder` where that gives the same ids; and whoever loads the
folder in transformers gets tokenizer.json. That one can differ (equal scores, unreachable characters, leading spaces),
and then model and text do not fit each other.
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
# A place is searched for texts up to here: it may be blank lines up to the end of a large file.
PLACE_BYTES = 4 << 20


def choose_encoder(
    tokenizer_dir: str, files: Sequence[InputFile], settings: Settings
) -> tuple[type[Encoder], dict[str, int]]:
    """The fastest encoder that gives SentencePiece's ids on a sample; and how far tokenizer.json gives them too.

    The sample holds texts that will be encoded, from places all over the input. The second is {"sample_texts": 200,
    "sample_differing": 0}; a folder without tokenizer.json has nothing to compare with, and both numbers are 0. Warns
    of what differs.
    """
    reference, fastest = kind_of(tokenizer_dir)
    encoder = fastest(tokenizer_dir)
    texts = sample_texts(files, settings)
    ids = shared_encoder(tokenizer_dir, reference).encode(texts)
    differing = 0 if encoder is reference else _differing(shared_encoder(tokenizer_dir, encoder).encode(texts), ids)
    if differing:
        logs.get_logger().warning(
            f"the fast encoder gives other ids than SentencePiece for {differing} of {len(texts)} texts of a sample; "
            "SentencePiece encodes"
        )
        encoder = reference
    path = Path(tokenizer_dir) / FAST_FILE
    if not path.is_file():
        return encoder, {"sample_texts": 0, "sample_differing": 0}
    differing = _differing(_fast_ids(path, texts), ids)
    if differing:
        logs.get_logger().warning(
            f"of a sample of {len(texts)} texts, {differing} are tokenized otherwise by {path}, which transformers "
            "loads, than by tokenizer.model, which is taken here; in folders of init_tokenizer.py these are texts that "
            "begin with spaces, others may differ in more"
        )
    return encoder, {"sample_texts": len(texts), "sample_differing": differing}


def sample_texts(files: Sequence[InputFile], settings: Settings) -> list[str]:
    """The beginnings of up to `SAMPLE_TEXTS` different texts, as many from each of the places.

    They are what the reader of the rows returns, so ids, URLs and names of roles are not among them. Rows that it
    refuses are passed over.
    """
    places = list(_places(files))
    each = SAMPLE_TEXTS // len(places)
    texts: dict[str, None] = {}
    for file, span in places:
        texts.update(dict.fromkeys(islice(_new_texts(file, span, settings, texts), each)))
    return list(texts)


def _places(files: Sequence[InputFile]) -> Iterator[tuple[InputFile, Span]]:
    """Spans to begin reading at: in some of many files, or several in each of a few."""
    step = max(len(files) / SAMPLE_PLACES, 1)
    for number in (int(index * step) for index in range(min(len(files), SAMPLE_PLACES))):
        file = files[number]
        count = 1 if file.is_one_span else max(SAMPLE_PLACES // len(files), 1)
        for index in range(count):
            start = file.size * index // count
            yield file, Span(number, start, None if file.is_one_span else min(start + PLACE_BYTES, file.size))


def _new_texts(file: InputFile, span: Span, settings: Settings, seen: Collection[str]) -> Iterator[str]:
    """The texts of a place that are not among the `seen` ones, each once."""
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
    # In data, a mark is text; SentencePiece always takes it for text.
    fast.encode_special_tokens = True
    return [fast.encode(text, add_special_tokens=False).ids for text in texts]


def _differing(ids: Sequence[list[int]], expected: Sequence[list[int]]) -> int:
    return sum(one != other for one, other in zip(ids, expected, strict=True))
