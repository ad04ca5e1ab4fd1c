"""Does SentencePiece give the same ids as the fast tokenizer of the folder, on the user's own text?

Training data is encoded with tokenizer.model, and whoever loads the folder in transformers gets tokenizer.json. They
can differ (equal scores, unreachable characters, leading spaces), and then model and text do not fit each other.
"""

from itertools import islice
from pathlib import Path
from typing import Dict, Iterator, Sequence

from colossal_llama2 import logs
from colossal_llama2.dataset.plan import InputFile, Span
from colossal_llama2.dataset.rows import SpanReader
from colossal_llama2.tokenizer import FAST_FILE, Encoder

SAMPLE_TEXTS = 200
SAMPLE_CHARACTERS = 1000


def compare_on_sample(tokenizer_dir: str, encoder: Encoder, files: Sequence[InputFile]) -> Dict[str, int]:
    """Encode the first texts with both, and warn if any differ; returns {"sample_texts": 200, "sample_differing": 0}.

    A folder without tokenizer.json has nothing to compare with: both numbers are 0.
    """
    path = Path(tokenizer_dir) / FAST_FILE
    if not path.is_file():
        return {"sample_texts": 0, "sample_differing": 0}
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(path))
    # In data, a mark is text; SentencePiece always takes it for text.
    fast.encode_special_tokens = True
    texts = list(islice(_texts(files), SAMPLE_TEXTS))
    pairs = zip(encoder.encode(texts), texts, strict=True)
    differing = sum(ids != fast.encode(text, add_special_tokens=False).ids for ids, text in pairs)
    if differing:
        logs.get_logger().warning(
            f"{differing} of the first {len(texts)} texts are tokenized otherwise by {path}, which transformers loads, "
            "than by tokenizer.model, which is taken here; init_tokenizer.py makes folders in which both agree"
        )
    return {"sample_texts": len(texts), "sample_differing": differing}


def _texts(files: Sequence[InputFile]) -> Iterator[str]:
    """Texts of good rows, as many of each file at most as make the sample."""
    for number, file in enumerate(files):
        for line in islice(SpanReader(file, Span(number, 0, None)), SAMPLE_TEXTS):
            yield from (text[:SAMPLE_CHARACTERS] for text in _strings(line.record or {}) if text)


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for key, inner in value.items() if key != "category" for text in _strings(inner))
    elif isinstance(value, list):
        yield from (text for inner in value for text in _strings(inner))
