"""--dry_run of the training commands, and the formulas behind its memory forecast, against sums computed by hand."""

import json
import os
import re
import shutil
import struct
from dataclasses import asdict, replace

import datasets
import pytest

from colossal_llama2.cli import train_flags
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.engine.patches.checkpoint_io import OPTIMIZER_INDEX
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.errors import UserError
from colossal_llama2.model.loading import inspect_weights
from colossal_llama2.model.lora import LoraShape
from colossal_llama2.model.trainable import Lora, Trainable
from colossal_llama2.storage.files import write_json
from colossal_llama2.train import dry_run
from colossal_llama2.train.checkpointing.checkpoint_writer import expected_bytes
from colossal_llama2.train.forecast import activations, memory
from colossal_llama2.train.forecast.activations import MicroBatch, ModelShape
from colossal_llama2.train.forecast.data_plan import make_order
from colossal_llama2.train.forecast.disk_space import most_kept, saved_steps
from colossal_llama2.train.forecast.memory_report import memory_plan
from colossal_llama2.train.report import run_metadata
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.settings.from_flags import resolve, resolve_with_problems
from colossal_llama2.train.settings.ranks import PlannedRanks
from colossal_llama2.train.stepping.schedule import CosineSchedule
from colossal_llama2.train.stepping.state import TrainState
from tests.training_jobs import write_data

LLAMA_7B = ModelShape(
    hidden_size=4096,
    intermediate_size=11008,
    layers=32,
    heads=32,
    key_value_heads=32,
    head_size=128,
    vocab_size=32000,
    ties_embeddings=False,
)
# LLaMA-2-7B has this many, as in its authors' checkpoint.
PARAMETERS_7B = 6_738_415_616
ADAPTER = LoraShape(rank=8, alpha=16)
SETTINGS = EngineSettings(
    plugin="zero2",
    precision="bf16",
    tp_size=1,
    zero_stage=1,
    max_norm=1.0,
    accumulation_steps=1,
    use_flash_attn=True,
    chunked_loss="auto",
    learning_rate=1e-4,
    weight_decay=0.1,
)


def plan(ranks, *, checkpointing=False, on_cpu=False, chunked_loss=True, attention="flash", **settings):
    return memory.Plan(
        settings=replace(SETTINGS, **settings),
        ranks=ranks,
        max_length=4096,
        attention=attention,
        chunked_loss=chunked_loss,
        checkpointing=checkpointing,
        has_documents=True,
        on_cpu=on_cpu,
    )


def found(ranks, *, shape=LLAMA_7B, **others):
    return memory.rank_memory(shape, plan(ranks, **others))


@pytest.mark.parametrize("ranks", [8, 64])
def test_zero2_of_a_7b_is_that_of_the_zero_paper(ranks):
    """Section 3 of arXiv 1910.02054, stage 2: 2 bytes of weights, 2 + 12 over the ranks of gradients and states."""
    parts = found(ranks).device["update"]
    assert parts["weights"] == 2 * PARAMETERS_7B
    assert parts["master weights"] + parts["optimizer"] == 12 * PARAMETERS_7B // ranks
    # The half-precision gradients and their float32 copies at the norm, or less when weights are gathered.
    assert 2 * PARAMETERS_7B // ranks <= parts["gradients"] <= 6 * PARAMETERS_7B // ranks
    # A bucket of 12 Mi elements of each rank's share is gathered at once: small beside weights, not beside shares. One
    # weight of it at a time is put together, the embeddings at most.
    assert parts["buffers"] <= (2 + ranks) * 2 * memory.ZERO_BUCKET + 2 * 32000 * 4096


def test_what_plugins_keep_of_a_7b():
    tp = found(8, plugin="3d", tp_size=8, zero_stage=0).device["update"]
    norms = 65 * 4096
    assert tp["weights"] == 2 * ((PARAMETERS_7B - norms) // 8 + norms)
    assert tp["optimizer"] == 2 * tp["master weights"] == 4 * tp["weights"]
    half = found(8, plugin="3d", pp_size=2, zero_stage=0, micro_batch_size=2)
    assert half.device["update"]["weights"] == 2 * (16 * 202_383_360 + 32000 * 4096 + 4096 * (half.peak_moment == ""))
    # The microbatches of a pipeline add their gradients, as accumulated micro batches do.
    assert half.device["loss"]["gradients"] == half.device["update"]["weights"]
    offloaded = found(64, plugin="zero2_cpu")
    assert offloaded.host["optimizer"] == 8 * PARAMETERS_7B // 64
    assert "optimizer" not in offloaded.device["update"]


@pytest.mark.parametrize("plugin", ["zero2", "zero2_cpu", "gemini", "ddp", "3d"])
def test_an_adapter_alone_has_gradients_and_states(plugin):
    """Rank 8 on all matrices of a 7B: 20 M of 6.7 B parameters, which every rank holds whole."""
    adapter = 32 * 8 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    settings = {"plugin": plugin, "zero_stage": 2, "trainable": Lora(shape=ADAPTER)}
    memory_of_it = found(8, **settings)
    parts = {**memory_of_it.device["update"], **memory_of_it.host}
    split = 1 if plugin == "ddp" else 8
    # Gemini's chunks of it are padded, and its weights are split too.
    most = 1.3 if plugin == "gemini" else 1
    assert adapter / split <= parts["optimizer"] / 8 <= most * adapter / split
    assert parts["optimizer"] == 2 * parts["master weights"]
    assert 2 * PARAMETERS_7B < parts["weights"] <= 2 * (PARAMETERS_7B + adapter)
    assert sum(memory_of_it.device["backward"].get(name, 0) for name in ("gradients", "buffers")) < 20 * adapter
    embeddings = found(8, **{**settings, "trainable": Lora(shape=ADAPTER, with_embeddings=True)})
    more = {**embeddings.device["update"], **embeddings.host}["optimizer"] - parts["optimizer"]
    assert more == pytest.approx(8 * 2 * 32000 * 4096 / split, rel=0.1 if plugin == "gemini" else 1e-6)


def test_an_adapter_keeps_less_of_a_micro_batch_than_full_training():
    whole, adapted = (found(8, trainable=choice).device["loss"] for choice in (Trainable(), Lora(shape=ADAPTER)))
    # Without the result of each norm before its weight, and with the outputs of A: 8 channels for each of 7 matrices.
    more = 32 * 7 * 2 * 8 * 4096
    assert adapted["activations"] == whole["activations"] - 65 * 2 * 4096 * 4096 + more
    dropping = found(8, trainable=Lora(shape=replace(ADAPTER, dropout=0.1))).device["loss"]
    # The inputs that are left, and a mask of them, for each matrix.
    assert dropping["activations"] == adapted["activations"] + 32 * 3 * 4096 * (6 * 4096 + 11008)


def test_ddp_keeps_everything_on_each_rank():
    """Gradients lie in the buckets, beside which only those of earlier micro batches exist."""
    for ranks in (1, 8):
        half, full = (found(ranks, plugin="ddp", precision=precision) for precision in ("bf16", "fp32"))
        parts = half.device["update"]
        assert parts["weights"] == 2 * PARAMETERS_7B and parts["master weights"] == 4 * PARAMETERS_7B
        assert parts["optimizer"] == 8 * PARAMETERS_7B and parts["gradients"] == 4 * PARAMETERS_7B
        embeddings = 32000 * 4096
        assert parts["buffers"] == 2 * PARAMETERS_7B + 8 * embeddings
        # One gradient at a time is on its way into the buckets.
        assert half.device["backward"]["gradients"] <= 2 * embeddings
        parts = full.device["update"]
        assert parts["master weights"] == parts["gradients"] == 0
        assert parts["buffers"] == 4 * PARAMETERS_7B + 8 * embeddings
    accumulating = found(8, plugin="ddp", accumulation_steps=2)
    assert accumulating.device["loss"]["gradients"] == 2 * PARAMETERS_7B


@pytest.mark.slow
def test_gemini_shards_everything_and_gathers_a_chunk():
    parts = found(64, plugin="gemini").device["backward"]
    # Chunks hold two or three matrices; the rest of a chunk is padding.
    assert 2 * PARAMETERS_7B / 64 <= parts["weights"] < 1.15 * 2 * PARAMETERS_7B / 64
    assert parts["optimizer"] == 2 * parts["master weights"] == 4 * parts["weights"]
    assert parts["buffers"] < 3 * 2 * 64 * 2**20 * 2
    accumulating = found(64, plugin="gemini", accumulation_steps=2).device["backward"]
    assert accumulating["gradients"] >= parts["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("plugin", "steps", "copies"), [("gemini", 1, 3), ("gemini", 2, 4), ("gemini_auto", 1, 1)])
def test_gemini_page_locks_a_copy_of_each_shard_for_a_gpu(plugin, steps, copies):
    parts = found(8, plugin=plugin, accumulation_steps=steps)
    assert parts.host["page-locked copies"] == copies * parts.device["update"]["weights"]
    assert found(8, plugin=plugin, accumulation_steps=steps, on_cpu=True).host == {}


@pytest.mark.slow
def test_gemini_holds_a_chunk_and_the_next_one_in_backward():
    """Three chunks of one weight each, halved over two ranks: computed by hand."""
    (stage,) = memory.stage_shapes(LLAMA_7B, SETTINGS)
    keeper = memory._keeper(stage, plan(2, plugin="gemini", on_cpu=True))
    keeper.chunks, keeper.left, keeper.waiting = [100, 200, 400], [1, 1, 1], {"down": [0, 1, 2]}
    moments = keeper.after([("down", 90), ("down", 190), ("down", 390)])
    # Of gathered ones the halves that are not there anyway, of one that is under way the half that is sent, too. When a
    # chunk's gradients are reduced, what comes from the other rank, half of it and the sum, halves as well.
    last, middle, first = 2 * (200 + 100 + 100), 2 * (100 + 50 + 50), 2 * 50
    assert [parts["buffers"] for parts in moments] == [
        last,
        last + 2 * (200 + 400),
        middle,
        middle + 2 * (100 + 200),
        first,
        first + 2 * (50 + 100),
    ]


def test_chunks_hold_every_weight_and_divide_among_ranks():
    sizes = (5000, 700, 700, 300, 900, 20, 5000)
    for shards in (1, 2, 3):
        chunks = memory.chunk_sizes(sizes, minimum_m=1024 / 2**20, shards=shards)
        assert sum(chunks) >= sum(sizes) and all(size % shards == 0 for size in chunks)
    assert memory.chunk_sizes(sizes, minimum_m=1, shards=2) == (sum(sizes),)


def test_activations_of_a_layer_by_hand():
    """One more token costs what autograd saves for it, counted here again from the code of the layer."""
    batch = MicroBatch(
        samples=1,
        length=1024,
        element=2,
        attention="flash",
        chunked_loss=True,
        checkpointing=False,
        has_documents=False,
    )
    stage = memory.stage_shapes(LLAMA_7B, SETTINGS)[0]
    one, two = (activations.kept_bytes(replace(stage, layers=layers), batch) for layers in (1, 2))
    hidden, inner = 4096, 11008
    # Two norms (float32 input, result before and after the weight), q, k, v and the input of o_proj, four of the MLP,
    # and the attention's log-sum-exp.
    assert (two - one) // 1024 == 2 * (4 + 2 + 2) * hidden + 4 * 2 * hidden + 4 * 2 * inner + 4 * 32
    kept = activations.kept_bytes(stage, replace(batch, checkpointing=True))
    # The inputs of 32 layers, the last norm, and the cosines and sines of one head.
    assert kept // 1024 == 32 * 2 * hidden + (4 + 2 + 2) * hidden + 2 * 2 * 128
    # The same with another kernel, and one mask for all layers.
    whole = activations.kept_bytes(stage, batch)
    fused = replace(batch, attention="sdpa")
    assert activations.kept_bytes(stage, fused) == whole
    assert activations.kept_bytes(stage, replace(fused, has_documents=True)) == whole + 2 * 1024**2


@pytest.mark.parametrize(
    "words, on_cpu, attention, has_mask",
    [
        ("--plugin zero2", False, "sdpa", False),
        ("--plugin zero2 --use_flash_attn", False, "flash", False),
        ("--plugin zero2 --use_flash_attn --mixed_precision fp32", False, "sdpa", False),
        ("--plugin zero2 --use_flash_attn", True, "sdpa", False),
        ("--plugin 3d", False, "sdpa", False),
        ("--plugin 3d --use_flash_attn", True, "sdpa", False),
        ("--plugin 3d --tp 2 --enable_sequence_parallelism --sp_mode ring", False, "sdpa", True),
    ],
)
def test_attention_is_fused_with_and_without_its_flag(words, on_cpu, attention, has_mask):
    """ColossalAI's own attention makes a dense mask for PyTorch's kernel on GPUs."""
    args = train_flags.train_parser().parse_args(["--pretrained", "m", "--dataset", "d", *words.split()])
    planned = memory_plan(resolve_with_problems(args)[0], 2, has_documents=False, on_cpu=on_cpu)
    assert planned.attention == attention
    assert bool(activations.mask_bytes(planned.micro_batch())) == has_mask


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("key_value_heads", [32, 8])
@pytest.mark.parametrize("trains_layers", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("adapter", [None, ADAPTER, replace(ADAPTER, targets=("v_proj", "down_proj"))])
def test_backward_releases_everything_that_forward_kept(
    attention, element, key_value_heads, trains_layers, checkpointing, adapter
):
    batch = MicroBatch(
        samples=2,
        length=512,
        element=element,
        attention=attention,
        chunked_loss=True,
        checkpointing=checkpointing,
        has_documents=True,
        trains_layers=trains_layers,
        trains_embeddings=adapter is None,
        adapter=adapter,
    )
    (stage,) = memory.stage_shapes(replace(LLAMA_7B, key_value_heads=key_value_heads), SETTINGS)
    moments = activations.backward_moments(stage, batch)
    shared = activations.kept_bytes(replace(stage, layers=0, has_head=False), batch)
    # The rest is the mask, the rotary embedding, and the gradient of the embeddings' output.
    assert moments[-1].activations == shared + element * batch.tokens * 4096
    weights = [size for moment in moments for _, size in moment.weights]
    if adapter is None:
        assert sum(weights) == activations_weights(stage, trains_layers)
    else:
        assert sum(weights) == stage.layers * sum(size for _, size in stage.adapter_weights(adapter))


def activations_weights(stage, trains_layers):
    layers = stage.layers * sum(size for _, size in stage.layer_weights()) + 4096
    return 2 * stage.embedding_weights() + trains_layers * layers


def test_chunked_loss_and_checkpointing_save_the_forecast_memory():
    whole = found(8, chunked_loss=False).device["loss"]["logits"]
    assert whole == 4096 * 32000 * 10 and found(8).device["loss"]["logits"] < whole / 15
    assert found(8, checkpointing=True).peak < 0.7 * found(8).peak


def test_checkpoints_on_the_disk():
    order = SampleOrder(num_samples=103, micro_batch_size=2, data_size=5, accumulation_steps=1, seed=0)
    begin = TrainState()
    assert saved_steps(order, begin, 2, 4, total_steps=20) == [4, 8, 10, 12, 16, 20]
    assert saved_steps(order, begin, 2, 4, total_steps=11) == [4, 8, 10, 11]
    # Started in the middle of the first epoch's data, resumed there, and resumed at its end.
    middle = TrainState(sample_start_index=70)
    assert saved_steps(order, middle, 2, 4, total_steps=13) == [3, 4, 8, 12, 13]
    assert saved_steps(order, replace(middle, step=7), 2, 4, total_steps=20) == [8, 10, 12, 16, 20]
    end = TrainState(step=10, sample_start_index=100)
    assert saved_steps(order, end, 2, 4, total_steps=20) == [12, 16, 20]
    assert saved_steps(order, begin, 2, 4, total_steps=20, skip_epochs=True) == [4, 8, 12, 16, 20]
    assert saved_steps(order, replace(middle, step=10**15), 1, 4, total_steps=10**15 + 4)[-1] == 10**15 + 4
    steps = [10, 20, 30, 40, 50]
    assert most_kept(steps, keep_last=None, keep_every=None) == 5
    assert most_kept(steps, keep_last=2, keep_every=None) == 3
    assert most_kept(steps, keep_last=1, keep_every=10) == 5
    assert most_kept(steps, keep_last=1, keep_every=20) == 3


def test_a_checkpoint_of_only_embeddings_has_their_states():
    embeddings = 2 * 69_104 * 4096
    whole = PARAMETERS_7B - 2 * 32_000 * 4096 + embeddings
    assert expected_bytes(whole, "bf16", trained=embeddings) == 2 * whole + 12 * embeddings
    assert expected_bytes(whole, "fp32", trained=whole) == 12 * whole


def hollow_model(folder, model_dir, **sizes):
    """A model folder whose safetensors have a header and holes instead of weights."""
    from colossal_llama2.model.loading import model_without_weights

    folder.mkdir()
    for path in model_dir.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((folder / "config.json").read_text()), **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, tensor in model_without_weights(str(folder)).state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer_dir):
    return write_data(tmp_path_factory.mktemp("dry") / "arrow", tokenizer_dir, steps=20)


def test_a_7b_on_64_gpus_is_planned_here(run_forked, model_dir, data, tmp_path):
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    hollow = hollow_model(tmp_path / "7b", model_dir, **sizes, num_key_value_heads=32, head_dim=128)
    before = sorted(path.name for path in tmp_path.iterdir())
    words = ["--pretrained", hollow, "--dataset", *data, "--dry_run", "--num_ranks", 64, "--plugin", "3d", "--tp", 8]
    done = run_forked("train.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "64 processes, data parallel over 8" in done.stderr
    assert "steps: 40, warm-up: 1" in done.stderr
    table = re.findall(r"^  (\w[\w ]*?) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    *parts, (name, *totals) = [(name, *map(float, figures)) for name, *figures in table]
    assert name == "total" and len(parts) == len(memory.PARTS)
    assert totals == pytest.approx([sum(part[column] for part in parts) for column in (1, 2, 3)], abs=0.05)
    assert f"peak: {max(totals):.2f} GiB" in done.stdout
    assert "computed, not measured; expect +-20 %" in done.stdout
    assert re.search(r"disk: 1 checkpoint of \S+ GB, at most 1 at once", done.stdout)
    assert done.stdout.endswith("dry run: nothing was trained, nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_dry_run_of_several_ranks_is_printed_only_by_the_first(run_forked, model_dir, data, tmp_path):
    words = ["--pretrained", model_dir, "--dataset", *data, "--dry_run", "--plugin", "zero2"]
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}
    other = {**os.environ, **place, "RANK": "1", "LOCAL_RANK": "1"}
    done = run_forked("train.py", *words, cwd=tmp_path, env=other)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run_forked("train.py", *words, "--max_length", "16", cwd=tmp_path, env=other)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_fine_tuning_is_planned_for_this_machine(model_dir, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--pretrained", str(model_dir), "--dataset", *data, "--dry_run", "--plugin", "zero2"]
    dry_run.dry_run(*resolve_with_problems(train_flags.train_sft_parser().parse_args(words)))
    output = capsys.readouterr().out
    assert "(1 x CPU)" in output
    peak = float(re.search(r"^peak: ([\d.]+) GiB, .* expect \+-10 %$", output, re.MULTILINE)[1])
    whole, libraries = re.search(
        r"^a process takes about ([\d.]+) GiB: 1\.32 times the peak, since it keeps freed memory,\n"
        r"and ([\d.]+) GiB for Python and libraries; expect \+-15 %$",
        output,
        re.MULTILINE,
    ).groups()
    assert abs(float(whole) - 1.32 * peak - float(libraries)) < 0.02
    assert 0.2 < float(libraries) < 8
    assert not list(tmp_path.iterdir())


def test_changes_and_failures_of_a_save_are_reported_before_it(model_dir, data, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(model_dir, tmp_path / "model")
    write_json(model / "generation_config.json", {"temperature": 0.9, "top_p": 0.6, "pad_token_id": -1})
    words = ["--pretrained", str(model), "--dataset", *data, "--dry_run", "--plugin", "zero2"]
    with caplog.at_level("INFO"):
        dry_run.dry_run(*resolve_with_problems(train_flags.train_parser().parse_args(words)))
    assert "do_sample is now true" in caplog.text and "pad_token_id -1 is now None" in caplog.text
    (model / "generation_config.json").write_text('{"note": "\\ud800"}')
    with pytest.raises(UserError, match="generation_config.json: .* is not UTF-8"):
        dry_run.dry_run(*resolve_with_problems(train_flags.train_parser().parse_args(words)))
    with pytest.raises(UserError, match="--tensorboard_dir: the name 'tb.udcff' is not UTF-8"):
        resolve(train_flags.train_parser().parse_args([*words, "--tensorboard_dir", "tb\udcff"]))


def test_all_problems_are_reported_at_once(model_dir, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def message(*words):
        args = train_flags.train_parser().parse_args(["--pretrained", str(model_dir), "--dataset", *data, *words])
        with pytest.raises(UserError) as error:
            dry_run.dry_run(*resolve_with_problems(args)) if args.dry_run else resolve(args)
        return str(error.value)

    tp = ["--dry_run", "--num_ranks", "6", "--plugin", "3d", "--tp", "4", "--zero", "2"]
    output = message(*tp, "--max_length", "16", "--save_dir", data[0] + "/state.json")
    for words in ("--tp 4 does not divide the 6 processes", "is a file", "--max_length 16 given"):
        assert words in output
    untrained = shutil.copytree(data[0], tmp_path / "untrained")
    samples = datasets.load_from_disk(data[0])
    samples.map(lambda row: {"labels": [-100] * len(row["labels"])}).save_to_disk(untrained)
    output = message("--dry_run", "--tp", "2", "--dataset", str(untrained))
    assert "--tp 2 needs --plugin 3d" in output and "no trained token in 161 samples" in output
    shutil.rmtree(untrained)
    assert "has 323 samples, one micro batch needs 4096" in message("--dry_run", "--num_ranks", "4096")
    assert "--num_ranks 8 needs --dry_run" in message("--num_ranks", "8")
    both = message("--train_new_rows_only", "--freeze_non_embeds_params")
    assert "--train_new_rows_only trains new rows of the embeddings" in both and "give one of them" in both
    output = message("--dry_run", "--benchmark", "--num_samples", "4", "--profile", "trace", "--continue_data")
    for words in (
        "--num_samples 4: only 4 steps; give at least 6",
        "--profile trace has no effect",
        "--continue_data has no effect",
    ):
        assert words in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make_parser", [train_flags.train_parser, train_flags.train_sft_parser])
def test_a_run_is_planned_from_only_a_config(make_parser, model_dir, data, tmp_path, monkeypatch, capsys, caplog):
    """The same plan as from the whole folder; what is not compared is logged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone").mkdir()
    shutil.copy(model_dir / "config.json", tmp_path / "alone")
    printed = []
    for folder in (str(model_dir), "alone"):
        words = ["--pretrained", folder, "--dataset", *data, "--dry_run", "--num_ranks", "2", "--plugin", "zero2"]
        with caplog.at_level("INFO"):
            dry_run.dry_run(*resolve_with_problems(make_parser().parse_args(words)))
        printed.append(re.sub(r"\d+\.\d+ GiB|\d+\.\d+ GB free", "", capsys.readouterr().out))
    assert printed[0] == printed[1] and "memory per rank" in printed[0] and "disk: " in printed[0]
    assert "alone has no tokenizer, so none is compared" in caplog.text
    assert "alone has no weights: planned only from its config.json" in caplog.text
    # A run needs both. It refuses weights that would be unpickled, of which a dry run reads none.
    with pytest.raises(UserError, match="alone: has no safetensors weights"):
        resolve(make_parser().parse_args([word for word in words[:-4] if word != "--dry_run"]))
    (tmp_path / "alone" / "pytorch_model.bin").write_bytes(b"")
    with caplog.at_level("INFO"):
        dry_run.dry_run(*resolve_with_problems(make_parser().parse_args(words)))
    assert "alone has only pickled weights, which a run refuses: planned only from its config.json" in caplog.text
    with pytest.raises(UserError, match="pickled weights can run code"):
        resolve(make_parser().parse_args([word for word in words[:-4] if word != "--dry_run"]))


def test_a_benchmark_is_planned_from_only_a_config(run_forked, model_dir, tmp_path):
    """LLaMA-2-7B on 8 GPUs: known sizes, and the FLOPs that test_benchmark.py computes."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = json.loads((model_dir / "config.json").read_text()) | sizes
    config.update(num_key_value_heads=32, head_dim=128, vocab_size=32000, max_position_embeddings=4096)
    (tmp_path / "7b").mkdir()
    write_json(tmp_path / "7b" / "config.json", config)
    words = ["--pretrained", tmp_path / "7b", "--benchmark", "--dry_run", "--num_ranks", 8, "--peak_tflops", 312]
    # In a shell of another job.
    environment = {**os.environ, "WORLD_SIZE": "3", "RANK": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = run_forked("train.py", *words, "--plugin", "zero2", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "6738.4 M parameters" in done.stderr and "planned only from its config.json" in done.stderr
    assert "ignoring RANK=1, WORLD_SIZE=3" in done.stderr
    peak = memory.rank_memory(LLAMA_7B, replace(plan(8, attention="sdpa", precision="fp16"), has_documents=False)).peak
    assert f"peak: {peak / 2**30:.2f} GiB" in done.stdout and "(8 x GPU)" in done.stdout
    assert "there is no GPU here" in done.stdout and "a rehearsal with 8 processes on this CPU needs" in done.stdout
    assert "500 samples of 4,096 tokens make 62 steps of 8" in done.stdout
    assert "46.1 GFLOP a token, 1.51 PFLOP a step, 189 TFLOP of them on each rank" in done.stdout
    assert "at 312 TFLOPS of each rank, a step takes at least 0.605 s" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["7b"]


def write_checkpoint(folder, words, model, dataset_samples, **state):
    """A checkpoint of a run with these flags: everything that a resume checks before it loads, weights included."""
    config = resolve(train_flags.train_parser().parse_args(words))
    settings, ranks = config.engine, PlannedRanks(config.engine, 1)
    sizes = {"micro_batch_size": settings.micro_batch_size, "accumulation_steps": settings.accumulation_steps}
    order = make_order(dataset_samples, **sizes, data_size=ranks.data_size, seed=config.recipe.seed)
    facts = run_metadata.describe_run(config, ranks, order, base_model="llama")
    shutil.copytree(model, folder / "modeling")
    write_json(folder / "running_states.json", {**facts.entries(), **TrainState(**state).to_dict()})
    write_json(folder / "lr_scheduler", asdict(CosineSchedule(settings.learning_rate, 40, 1)))
    (folder / "optimizer").mkdir()
    write_json(folder / "optimizer" / OPTIMIZER_INDEX, {})
    files = checkpoint_files.file_entries(folder, checkpoint_files.list_files(folder))
    write_json(folder / "manifest.json", {"files": files, "saved_at": 1.0})


def test_a_resume_of_new_rows_is_planned_until_nothing_is_left(model_dir, data, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["initialized_rows"] = [[config["vocab_size"] - 9, config["vocab_size"]]]
    write_json(model / "config.json", config)
    words = ["--pretrained", str(model), "--dataset", *data, "--dry_run", "--plugin", "zero2", "--save_interval", "5"]
    words += ["--train_new_rows_only", "--micro_batch_size", "8", "--accumulation_steps", "1"]
    saved = tmp_path / "checkpoint_dir" / "epoch-0_step-12"
    write_checkpoint(saved, words, model, 323, step=12, sample_start_index=96)

    def output(*more):
        dry_run.dry_run(*resolve_with_problems(train_flags.train_parser().parse_args([*words, *more])))
        return capsys.readouterr().out

    with caplog.at_level("INFO"):
        out = output("--load_checkpoint", str(saved))
    # After steps 15, 20, 25, 30, 35 and 40.
    assert "disk: 6 checkpoints" in out and "it begins with sample 96 of epoch 0" in caplog.text
    embeddings = 2 * config["vocab_size"] * config["hidden_size"]
    facts = inspect_weights(str(model))
    assert facts.embedding_parameters == embeddings < facts.parameters
    assert "disk: 6 checkpoints" in output("--resume", "auto")
    assert f"{saved.relative_to(tmp_path)} is the end of its run" in output("--resume", "auto", "--max_steps", "12")
    with pytest.raises(UserError, match="trained_rows was"):
        words.remove("--train_new_rows_only")
        output("--resume", "auto")


def test_flags_without_effect_and_names_given_twice(model_dir, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def message(*words):
        with pytest.raises(UserError) as error:
            words = ["--pretrained", str(model_dir), "--dataset", *words]
            resolve(train_flags.train_parser().parse_args(words))
        return str(error.value)

    output = message(*data, "--mixture_end", "stop", "--on_forgetting", "warn")
    assert "--mixture_end stop needs --mixture" in output and "--on_forgetting warn needs --forgetting_alarm" in output
    output = message(*data, "--eval_dataset", f"en={data[0]}", "--forgetting_alarm", "en=.1", "en=.2", "zh=1")
    assert "en is named 2 times" in output and "--forgetting_alarm zh: there is no" in output
    args = train_flags.train_parser().parse_args(["--pretrained", "m", "--dataset", f"a={data[0]}", "--mixture", "a=1"])
    assert resolve_with_problems(args)[0].data.parts.mixture.end == "repeat"


def test_matrices_and_norms_have_separate_buckets():
    """As bug_fixes.fill_buckets leaves them: small ones until the end of backward."""
    (stage,) = memory.stage_shapes(LLAMA_7B, SETTINGS)
    keeper = memory._keeper(stage, plan(2))
    moments = keeper.after([("down", 1000), ("norm", 10)] * 5)
    assert [parts["buffers"] for parts in moments[::2]] == [2 * (1010 * pairs) for pairs in range(6)]
    matrices, norms = keeper.end()
    # The flat copy, and this rank's half of the sum, beside the buckets.
    assert matrices["buffers"] == 2 * (5050 + 5000 + 2500) and norms["buffers"] == 2 * (50 + 50 + 25)
    full = keeper.after([("down", memory.ZERO_BUCKET)] * 2)
    assert max(parts["buffers"] for parts in full) == 2 * 2.5 * memory.ZERO_BUCKET
