"""load_encoder, load_tokenizer and fingerprint, which data preparation and training build on."""

import hashlib
import io
import pickle
import shutil
import subprocess
import sys

import pytest

from colossal_llama2.encoding.registry import fingerprint, load_encoder
from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer
from colossal_llama2.errors import UserError
from tests.conftest import ROOT
from tests.tiny import CHINESE, english_documents


@pytest.fixture(scope="module")
def encoder(tokenizer_dir):
    return load_encoder(tokenizer_dir)


def _train_model(**settings) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english_documents()[:200]), model_writer=model, vocab_size=120, minloglevel=2, **settings
    )
    return model.getvalue()


def test_encoder_gives_the_ids_of_sentencepiece_and_decodes_them(encoder, tokenizer_dir):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    texts = [*english_documents()[:50], CHINESE, " two  spaces", "", "line\nbreak"]
    assert encoder.encode(texts) == processor.encode(texts)
    assert [encoder.decode(ids) for ids in encoder.encode(texts)] == texts
    assert (encoder.bos_id, encoder.eos_id, encoder.vocab_size) == (1, 2, 600)
    assert encoder.encode([]) == []


def test_special_tokens_in_text_stay_text(encoder):
    for text in ("<s>", "a </s> b", "<unk>", "<0x0A>"):
        for dummy_prefix in (True, False):
            (ids,) = encoder.encode([text], dummy_prefix=dummy_prefix)
            assert not {0, 1, 2} & set(ids) and 13 not in ids
            assert encoder.decode(ids) == text


def test_a_continuation_has_no_dummy_prefix(encoder):
    first, second = "The first part", "continues, 世界 and ends."
    (head,) = encoder.encode([first])
    (tail,) = encoder.encode([second], dummy_prefix=False)
    (prefixed,) = encoder.encode([second])
    assert encoder.decode(head + tail) == first + second
    assert encoder.decode(head + prefixed) == f"{first} {second}"


def test_encoder_pickles_as_its_path(encoder):
    content = pickle.dumps(encoder)
    assert len(content) < 500
    assert pickle.loads(content).encode([CHINESE]) == encoder.encode([CHINESE])  # noqa: S301 - our own bytes


def test_encoder_needs_no_transformers(tokenizer_dir):
    code = (
        "import sys; from colossal_llama2.encoding.registry import load_encoder; load_encoder(sys.argv[1]); "
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tokenizer_dir)], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"garbage", "is not a SentencePiece model"),
        (b"\x1a\x02\x18\x00", "is not a SentencePiece model"),
        (None, "holds no tokenizer.model"),
    ],
)
def test_encoder_refuses_a_folder_without_a_model(tmp_path, content, words):
    if content is not None:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_encoder(tmp_path)


def test_encoder_refuses_a_missing_folder_and_a_model_without_markers(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        load_encoder(tmp_path / "missing")
    (tmp_path / "tokenizer.model").write_bytes(_train_model(model_type="bpe", bos_id=-1))
    with pytest.raises(UserError, match="no <s> or no </s>"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("pad_token, pad_id", [("unk", 0), ("eos", 2)])
def test_load_tokenizer_pads_right_with_the_chosen_token(tokenizer_dir, pad_token, pad_id):
    tokenizer = load_tokenizer(tokenizer_dir, pad_token=pad_token)
    assert tokenizer.pad_token_id == pad_id
    assert tokenizer.padding_side == "right"
    assert tokenizer(["a", "a longer text"], padding=True)["input_ids"][0][-1] == pad_id


def test_load_tokenizer_refuses_a_folder_that_is_not_a_tokenizer(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ValueError, match="pad_token"):
        load_tokenizer(tokenizer_dir, pad_token="bos")
    broken = shutil.copytree(tokenizer_dir, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(broken)


def test_load_tokenizer_refuses_a_tokenizer_that_cannot_pad(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no unk and no pad and no eos token"):
        load_tokenizer(tmp_path)


def test_fingerprint_is_the_hash_of_the_model(tokenizer_dir, tmp_path):
    expected = hashlib.sha256((tokenizer_dir / "tokenizer.model").read_bytes()).hexdigest()
    assert fingerprint(tokenizer_dir) == expected
    with pytest.raises(UserError, match="holds no tokenizer.model"):
        fingerprint(tmp_path)
