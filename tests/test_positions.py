"""The longest possible sample with rope_scaling."""

import json
import shutil

import pytest
from transformers import LlamaConfig

from colossal_llama2.cli import train_flags
from colossal_llama2.dataset.write import prepare, sample_lengths
from colossal_llama2.errors import UserError
from colossal_llama2.inference import generation
from colossal_llama2.model.loading import ModelFacts
from colossal_llama2.model.positions import positions_of
from colossal_llama2.train import checks
from colossal_llama2.train.settings.from_flags import resolve_with_problems
from tests import preparing, tiny

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("kind", "more", "positions", "expected"),
    [
        ("linear", {"factor": 4.0}, 4096, 16384),
        ("linear", {"factor": 2.5}, 4096, 10240),
        ("dynamic", {"factor": 2.0}, 2048, 4096),
        ("yarn", {"factor": 16.0}, 4096, 65536),
        # As in Qwen2.5 and DeepSeek: the first length in both, or the extended one in the first.
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),
        ("yarn", {"factor": 40.0, "original_max_position_embeddings": 4096}, 163840, 163840),
        # The other two use only max_position_embeddings.
        ("linear", {"factor": 4.0, "original_max_position_embeddings": 1024}, 4096, 16384),
        ("dynamic", {"factor": 2.0, "original_max_position_embeddings": 8192}, 2048, 4096),
        # Llama-3.1 itself.
        ("llama3", {"factor": 8.0, **LLAMA3}, 131072, 131072),
        ("default", {}, 4096, 4096),
        # Unusable values extend nothing.
        ("linear", {"factor": "4"}, 4096, 4096),
        ("linear", {"factor": 0.5}, 4096, 4096),
    ],
)
def test_positions(spelling, kind, more, positions, expected):
    config = LlamaConfig(max_position_embeddings=positions, rope_scaling={spelling: kind, **more})
    assert positions_of(config) == expected


def test_without_scaling_it_is_the_value_of_the_config():
    assert positions_of(LlamaConfig(max_position_embeddings=4096)) == 4096


def test_training_and_inference_use_them():
    facts = ModelFacts(
        parameters=1,
        embedding_parameters=1,
        vocab_size=10,
        max_position_embeddings=2048,
        positions=8192,
        scaling="linear",
        attention_heads=4,
        key_value_heads=4,
        layers=2,
        ties_embeddings=False,
    )
    args = train_flags.train_parser().parse_args(["--pretrained", "m", "--dataset", "d", "--max_length", "8192"])
    checks.check_model_fits(resolve_with_problems(args)[0], facts)
    args.max_length = 8193
    with pytest.raises(UserError, match="8193 given, the model has 8192 positions .*rope_scaling of type linear"):
        checks.check_model_fits(resolve_with_problems(args)[0], facts)

    class Model:
        config = LlamaConfig(max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 2.0})

    assert generation.room_for_answer(Model, prompt_length=100, max_new_tokens=50) == 28


@pytest.mark.parametrize(
    ("scaling", "positions", "problem"),
    [
        (None, 100, "100 positions (max_position_embeddings of its config.json), "),
        (LINEAR, 60, "120 positions (max_position_embeddings of its config.json, and rope_scaling of type linear), "),
        (LINEAR, 64, None),
        (None, 128, None),
    ],
)
def test_prepare_and_training_name_one_cure_for_samples_that_are_too_long(
    scaling, positions, problem, tokenizer_dir, tmp_path, caplog
):
    folder = shutil.copytree(tokenizer_dir, tmp_path / "model")
    LlamaConfig(
        vocab_size=600, hidden_size=16, num_attention_heads=2, max_position_embeddings=positions, rope_scaling=scaling
    ).save_pretrained(folder)
    preparing.write_lines(tmp_path / "in" / "a.jsonl", [{"target": text} for text in tiny.english_documents()[:40]])
    prepare.prepare_pretrain(**preparing.settings([tmp_path / "in"], folder, tmp_path, max_length=128))
    (entry,) = preparing.manifest(tmp_path)["bins"]
    longest = max(len(sample["input_ids"]) for sample in preparing.read_jsonl(tmp_path / "jsonl"))
    assert entry["longest"] == longest > 120
    warned = [message for message in caplog.messages if "positions" in message]
    part = str(tmp_path / "arrow" / "part-00000")
    if problem is None:
        assert not warned
        sample_lengths.check_samples_fit([part], str(folder))
        return
    cure = warned[0].partition("; ")[2]
    assert warned == [f"--max_length 128 given, the model has {problem}and training refuses longer samples; {cure}"]
    assert cure.startswith("prepare the data with --max_length 1")
    with pytest.raises(UserError) as raised:
        sample_lengths.check_samples_fit([part], str(folder))
    given = f"--dataset {part}: its longest sample has {longest} tokens, the model has "
    assert str(raised.value) == f"{given}{problem.removesuffix(', ')}; {cure}"
    with pytest.raises(UserError, match="--max_length 128 given, the model has .* give at most that"):
        sample_lengths.check_max_length(128, str(folder))
    # Data of earlier versions does not record it, and a folder from elsewhere has no manifest.
    del entry["longest"]
    path = tmp_path / "arrow" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bins": [entry]}))
    sample_lengths.check_samples_fit([part, str(tmp_path / "in")], str(folder))
