"""LoRA on two ranks: PEFT reads the adapter, a resume is bit for bit, and merging is what PEFT does.

That training is equal to a plain loop with PEFT is a matter of tests/equality.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from colossal_llama2.cli import inference_flags, train_flags
from colossal_llama2.cli.dependent_flags import with_defaults
from colossal_llama2.errors import UserError
from colossal_llama2.model import merge_lora
from colossal_llama2.model.loading import check_model, facts_of_config
from colossal_llama2.model.merge_lora import MergeSettings
from colossal_llama2.model.training_history import read_history
from colossal_llama2.train import verify
from colossal_llama2.train.settings.from_flags import engine_settings, resolve
from tests import launching, layouts, tiny, training_jobs
from tests.training_jobs import Job

STEPS = 4
NEW_ROWS_FROM = 500
LORA = ("--lora_rank", "4")
# Everything at once that changes what is trained: NEFTune, dropout, accumulation, and embeddings that have grown.
ZERO2 = layouts.flags("bf16 zero2", *LORA, "--lora_dropout", "0.1", "--use_neft", batch=16, accumulation_steps=2)
GEMINI = layouts.flags("bf16 gemini", *LORA, batch=16)
ROWS = layouts.flags("fp32 3d", *LORA, "--lora_targets", "q_proj,down_proj", "--train_new_rows_only", batch=16)
TIED = layouts.flags("fp32 ddp", *LORA, "--lora_alpha", "3", batch=16)
# Name, model, flags, and the run whose second step it resumes, or whose adapter it loads.
RUNS: list[tuple[str, str, list[str], str | None]] = [
    ("zero2", "grown", ZERO2, None),
    ("zero2_resumed", "grown", ZERO2, "zero2/ckpt/epoch-0_step-2"),
    ("gemini", "plain", GEMINI, None),
    ("gemini_resumed", "plain", GEMINI, "gemini/ckpt/epoch-0_step-2"),
    ("rows", "grown", ROWS, None),
    ("tied", "tied", TIED, None),
    ("further", "plain", [*GEMINI, "--plugin", "zero2"], "gemini/ckpt/modeling"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    plain = tiny.make_model(folder / "plain", tokenizer)
    tied = tiny.make_model(folder / "tied", tokenizer, tie=True)
    return {
        "plain": plain,
        "grown": tiny.with_new_rows(shutil.copytree(plain, folder / "grown"), first=NEW_ROWS_FROM),
        "tied": tiny.with_new_rows(tied, first=NEW_ROWS_FROM),
    }


@pytest.fixture(scope="module")
def home(models, tmp_path_factory) -> Path:
    """All runs, each in a folder of its name."""
    home = tmp_path_factory.mktemp("runs")
    parts = training_jobs.write_data(home / "data", models["plain"], STEPS)
    specs = []
    for name, model, flags, loaded in RUNS:
        every = training_jobs.common_flags(home / name, models[model], parts)
        every += [*flags, "--save_interval", 2, *(["--load_checkpoint", home / loaded] if loaded else [])]
        specs.append({"name": name, "script": "train_sft.py", "flags": list(map(str, every))})
    launching.launch(home, specs)
    jobs = {spec["name"]: training_jobs.finished(home, spec) for spec in specs}
    assert {name: job.error for name, job in jobs.items() if job.error} == {}
    return home


def job_of(home: Path, name: str) -> Job:
    return Job(home / name, None, None, None)


def adapter_of(home: Path, name: str) -> Path:
    return home / name / "ckpt" / "modeling"


def merged(home: Path, base: Path, name: str, target: Path) -> Path:
    merge_lora.merge_lora(MergeSettings(str(base), str(adapter_of(home, name)), str(target)))
    return target


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def with_peft(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, autocast_adapter_dtype=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "gemini"])
def test_a_resumed_run_repeats_the_uninterrupted_one(home, name):
    whole, resumed = (home / run / "ckpt" / f"epoch-0_step-{STEPS}" for run in (name, f"{name}_resumed"))
    for folder in ("modeling", "optimizer", "master_weights"):
        files = sorted((whole / folder).glob("*.safetensors"))
        assert files
        for path in files:
            found, expected = load_file(resumed / folder / path.name), load_file(path)
            assert found.keys() == expected.keys()
            assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    losses = job_of(home, name).scalars("Loss")
    assert job_of(home, f"{name}_resumed").scalars("Loss") == losses[2:] and len(losses) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "gemini", "rows", "tied", "further"])
def test_peft_and_the_merged_model_compute_the_same(home, models, tmp_path, name):
    base = models[next(model for run, model, *_ in RUNS if run == name)]
    adapted = with_peft(base, adapter_of(home, name))
    logits = logits_of(adapted)
    before = logits_of(AutoModelForCausalLM.from_pretrained(base))
    assert float((logits - before).abs().max()) > 1e-3
    folder = merged(home, base, name, tmp_path / "merged")
    check_model(str(folder), "--pretrained")
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert float((logits_of(found) - logits).abs().max()) < 1e-5
    expected = dict(adapted.merge_and_unload().named_parameters())
    assert dict(found.named_parameters()).keys() == expected.keys()
    for key, param in found.named_parameters():
        assert float((param - expected[key]).abs().max()) < 1e-6, key


@pytest.mark.slow
def test_the_merged_folder_has_all_that_a_trained_model_has(home, models, tmp_path):
    folder, adapter = merged(home, models["grown"], "zero2", tmp_path / "merged"), adapter_of(home, "zero2")
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.model", "tokenizer_config.json", "generation_config.json", "model.safetensors"} <= names
    assert not [name for name in names if name.startswith("adapter")]
    config, expected = (json.loads((path / "config.json").read_text()) for path in (folder, adapter))
    # The weights are in float32, as the base's, though the run was in bf16.
    assert config == {**expected, "torch_dtype": "float32"} and expected["torch_dtype"] == "bfloat16"
    stages, before = read_history(folder).stages, read_history(adapter).stages
    assert [stage["stage"] for stage in stages] == ["sft"] and list(stages[0]["weights"]) == ["model.safetensors"]
    assert {**stages[0], "weights": None} == {**before[0], "weights": None}
    # The next run finds its parent unchanged.
    assert "as_recorded" not in merge_lora.training_history.describe_parent(str(folder), read_history(folder))


@pytest.mark.slow
def test_a_checkpoint_holds_only_what_is_trained(home, models):
    facts, folder = facts_of_config(models["plain"]), home / "gemini" / "ckpt" / f"epoch-0_step-{STEPS}"
    trainable = engine_settings(used_args_of("--pretrained", "m", *LORA)).trainable
    trained = trainable.parameters(facts)
    # Two layers of four square matrices, and three between 64 and 128 channels.
    assert trained == 2 * 4 * (4 * 128 + 3 * 192) and trainable.saved_parameters(facts) == trained
    assert (
        sum(tensor.numel() for tensor in load_file(folder / "modeling" / "adapter_model.safetensors").values())
        == trained
    )
    moments = [load_file(path) for path in folder.glob("optimizer/pytorch_optim-*.safetensors")]
    assert sum(tensor.numel() for file in moments for tensor in file.values() if tensor.dim()) == 2 * trained
    assert [line for line in verify.verify(str(folder)) if "adapter" in line]


@pytest.mark.slow
def test_only_new_rows_of_the_embeddings_change(home, models):
    trained, base = load_file(adapter_of(home, "rows") / "adapter_model.safetensors"), load_weights(models["grown"])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (trained[f"base_model.model.{name}"] != base[name]).any(1)
        assert not changed[:NEW_ROWS_FROM].any() and changed[NEW_ROWS_FROM:].any()
    matrices = {name.split(".")[-3] for name in trained if ".lora_A." in name}
    assert matrices == {"q_proj", "down_proj"}


def load_weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def args_of(*flags):
    return train_flags.train_sft_parser().parse_args([*map(str, flags), "--dataset", "d"])


def used_args_of(*flags):
    return with_defaults(args_of(*flags))


@pytest.mark.slow
def test_an_adapter_is_no_model(home, models, tmp_path):
    """One line names the command that makes a model of it."""
    adapter = adapter_of(home, "gemini")
    with pytest.raises(
        UserError, match=r"merge it into its base: .*colossal_llama2\.model\.merge_lora .*--adapter_path"
    ):
        check_model(str(adapter), "--model_path")
    assert inference_flags.inference_parser().parse_args(["--model_path", str(adapter)]).model_path == str(adapter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loaded", "flags", "problem"),
    [
        ("gemini/ckpt/modeling", [], "holds an adapter; give the --lora_rank of its run, or merge it"),
        ("gemini/ckpt/epoch-0_step-2", [], "holds an adapter; give the --lora_rank of its run, or merge it"),
        ("gemini/ckpt/modeling", ["--lora_rank", 8], "was trained with --lora_rank 4, not 8; give 4"),
        ("gemini/ckpt/epoch-0_step-2", [*LORA, "--lora_alpha", 3], "was trained with --lora_alpha 8.0, not 3.0"),
        ("rows/ckpt/modeling", LORA, "--lora_targets q_proj,down_proj, not q_proj,k_proj,"),
        ("whole", LORA, "holds a whole model, but --lora_rank trains an adapter of --pretrained"),
    ],
)
def test_what_a_run_cannot_continue_is_refused(home, models, tmp_path, loaded, flags, problem):
    folder = models["grown"] if loaded == "whole" else home / loaded
    given = ["--pretrained", models["plain"], "--load_checkpoint", folder, "--save_dir", tmp_path / "new"]
    args = args_of(*given, *layouts.flags("bf16 zero2"), "--max_length", 48, *flags)
    with pytest.raises(UserError, match=problem):
        resolve(args)


@pytest.mark.slow
def test_only_its_own_base_is_merged(home, models, tmp_path):
    other = shutil.copytree(models["plain"], tmp_path / "other")
    weights = load_weights(other)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"is not the model that .* was trained on, model\.safetensors differs \(sha256\)"
    ):
        merged(home, other, "gemini", tmp_path / "merged")
    with pytest.raises(UserError, match="already exists; give a new folder"):
        merged(home, models["plain"], "gemini", other)
    with pytest.raises(UserError, match=r"has no adapter_config\.json; give .*gemini/ckpt/modeling"):
        merge_lora.merge_lora(MergeSettings(str(other), str(home / "gemini" / "ckpt"), str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


def change_config(folder: Path, **entries) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HOSTILE = {
    "of another shape": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({FIRST: torch.zeros(4, 63)})),
        r"q_proj\.lora_A\.weight of shape \(4, 63\), which should be \(4, 64\)",
    ),
    "without a tensor": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.pop(FIRST)),
        r"lacks base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight",
    ),
    "with another tensor": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({"x" * 5000: torch.zeros(1)})),
        r"has the unknown weight x{5}",
    ),
    "with NaN": (
        lambda folder: change_tensors(folder, lambda tensors: tensors[FIRST].fill_(torch.nan)),
        r"q_proj\.lora_A\.weight has 256 numbers that are NaN or infinite",
    ),
    "of integers": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({FIRST: torch.zeros(4, 64).int()})),
        r"q_proj\.lora_A\.weight of I32",
    ),
    "for other targets": (
        lambda folder: change_config(folder, target_modules=["q_proj"]),
        r"has the unknown weight base_model\.model\.model\.layers\.0\.",
    ),
    "for unknown targets": (
        lambda folder: change_config(folder, target_modules=["q_proj", "../x"]),
        r"target_modules is .* a list of q_proj, .* is allowed",
    ),
    "of a huge rank": (
        lambda folder: change_config(folder, r=10**9),
        "r is 1000000000, a whole number from 1 to 65536",
    ),
    "of an infinite scale": (lambda folder: change_config(folder, lora_alpha=-1), "lora_alpha is -1, a number of at"),
    "of another kind": (
        lambda folder: change_config(folder, use_dora=True),
        "use_dora is true, which is not supported",
    ),
    "with an option of a later PEFT": (
        lambda folder: change_config(folder, new_scale=7, arrow_config=None),
        "new_scale is 7, which is not known here",
    ),
    "with a scale that overflows": (
        lambda folder: change_config(folder, lora_alpha=1e300),
        "is NaN or infinite",
    ),
    "without a tokenizer": (
        lambda folder: (folder / "tokenizer.model").unlink(),
        "tokenizer.json",
    ),
    "with ranks by layer": (
        lambda folder: change_config(folder, rank_pattern={"q_proj": 2}),
        "rank_pattern is .* which is not supported here",
    ),
    "of another model": (
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**json.loads((folder / "config.json").read_text()), "rope_theta": 7.5})
        ),
        "rope_theta is 7.5, that of --base_model_path",
    ),
    "pickled": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        r"has no adapter_model\.safetensors, only adapter_model\.bin, which is never unpickled here",
    ),
    "without its base": (
        lambda folder: (folder / "adapter_base.json").unlink(),
        r"has no adapter_base\.json, so it is unknown which weights",
    ),
    "with a wrong note": (
        lambda folder: (folder / "adapter_base.json").write_text('{"version": 1, "weights": {"../x": {}}}'),
        "does not name the base of the adapter",
    ),
    "cut off": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\0" * 100),
        r"adapter_model\.safetensors: cannot be read",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_adapters_end_in_one_line(home, models, tmp_path, kind):
    change, problem = HOSTILE[kind]
    folder = shutil.copytree(adapter_of(home, "gemini"), tmp_path / "adapter")
    change(folder)
    with pytest.raises(UserError, match=problem) as caught:
        merge_lora.merge_lora(MergeSettings(str(models["plain"]), str(folder), str(tmp_path / "merged")))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--plugin", "3d", "--tp", "2"], "--tp 2 is not available with --lora_rank"),
        (["--plugin", "3d", "--pp", "2", "--micro_batch_size", "2"], "--pp 2 is not available with --lora_rank"),
        (
            ["--plugin", "3d", "--tp", "2", "--enable_sequence_parallelism", "--sp_mode", "ring"],
            "--tp 2 is not available with --lora_rank",
        ),
        (["--freeze_non_embeds_params"], "--freeze_non_embeds_params nothing of them; give one of them"),
        (["--train_new_rows_only", "--chunked_loss", "off"], "--train_new_rows_only needs the chunked loss"),
    ],
)
def test_settings_that_an_adapter_cannot_have(flags, problem):
    args = args_of("--pretrained", "m", "--num_ranks", 2, "--dry_run", *LORA, *flags)
    with pytest.raises(UserError, match=problem):
        resolve(args)


def test_flags_of_an_adapter_need_a_rank(models, tmp_path):
    given = ["--pretrained", models["plain"], "--save_dir", tmp_path / "new", "--max_length", 48]
    with pytest.raises(UserError, match="--lora_alpha 16.0 needs --lora_rank; leave it out"):
        resolve(args_of(*given, "--lora_alpha", 16))
    with pytest.raises(UserError, match="--lora_rank 65 is more than the hidden size of .*, 64; give less"):
        resolve(args_of(*given, "--lora_rank", 65))
    with pytest.raises(UserError, match="--train_new_rows_only: .* does not list the new rows"):
        resolve(args_of(*given, *LORA, "--train_new_rows_only"))


def test_what_the_flags_mean():
    trainable = engine_settings(used_args_of("--pretrained", "m", "--lora_rank", 16, "--lora_dropout", 0)).trainable
    assert (trainable.adapter.rank, trainable.adapter.alpha, trainable.adapter.dropout) == (16, 32, 0)
    assert trainable.description == "LoRA of rank 16 and alpha 32 on all matrices of the layers"
    chosen = args_of("--pretrained", "m", "--lora_rank", 8, "--lora_targets", "v_proj,q_proj,v_proj")
    assert engine_settings(with_defaults(chosen)).trainable.adapter.targets == ("q_proj", "v_proj")
    assert engine_settings(used_args_of("--pretrained", "m")).trainable.adapter is None
