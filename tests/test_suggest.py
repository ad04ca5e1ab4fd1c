"""--dry_run --suggest, the forecasts of speed and failures behind it, and the page that is made of them."""

import contextlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import replace

import pytest

from colossal_llama2.cli import train_flags
from colossal_llama2.engine import device
from colossal_llama2.engine.settings_problems import settings_problems, split_problems
from colossal_llama2.errors import UserError
from colossal_llama2.gpus import GPUS
from colossal_llama2.model.loading import facts_of_config, model_without_weights
from colossal_llama2.storage.files import write_json
from colossal_llama2.train import start
from colossal_llama2.train import suggest as command
from colossal_llama2.train.forecast import failures, layouts, speed
from colossal_llama2.train.forecast.activations import ModelShape
from colossal_llama2.train.forecast.memory import loss_memory, rank_memory
from colossal_llama2.train.forecast.suggestion import needed_gib, suggest
from colossal_llama2.train.settings import flag_problems
from colossal_llama2.train.settings.from_flags import resolve
from tests import fake_world, fork_server, scaling_page
from tests.conftest import ROOT
from tests.scaling_page import LENGTH, job


def words(*more):
    return ["--dry_run", "--suggest", "--mixed_precision", "bf16", "--use_flash_attn", *map(str, more)]


def printed(capsys, *more, parser=train_flags.train_parser):
    command.plan_layouts(parser().parse_args(words(*more)))
    return capsys.readouterr().out


def test_without_a_model_the_three_sizes_are_planned(run_script, tmp_path):
    """With both vocabularies, at 80 columns, in an environment without torch."""
    for name in ("torch", "transformers", "datasets"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')\n")
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    flags = words("--num_ranks", 64, "--gpu", "a800-80g")
    done = run_script("train.py", *flags, cwd=tmp_path / "work", env=environment)
    assert done.returncode == 0, done.stderr
    row = r"^  (\w+) +([\d,]+)  (\S.*?) {2,}(\d+ x \d+(?: r)?) +[\d.]+ +\d+% "
    rows = re.findall(row, done.stdout, re.MULTILINE)
    assert [row[:2] for row in rows] == [(s, v) for s in ("7b", "13b", "70b") for v in ("69,104", "128,256")]
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not list((tmp_path / "work").iterdir())


def test_all_about_one_model(capsys):
    out = printed(capsys, "--model_size", "7b", "--num_ranks", 64, "--tokens", 8.5e9, "--gpu_hour_price", 2)
    assert "7b: 7,042.4 M parameters, vocabulary 69,104" in out and "64 x a800-80g" in out
    assert max(map(len, out.splitlines())) <= 80
    # One row for each other plugin; what does not fit comes last, with the memory that it needs.
    for plugin in ("zero2", "zero2_cpu", "gemini", "gemini_auto"):
        assert re.search(rf"^  {plugin} +\d+ x \d+", out, re.MULTILINE)
    assert re.search(r"^  ddp +1 x 16 r +1\d\d\.\d  too large$", out, re.MULTILINE)
    hours, gpu_hours, money = re.search(
        r"^training: 2,027 steps, ([\d.]+) hours, ([\d,]+) GPU hours x 2 = ([\d,]+)$", out, re.MULTILINE
    ).groups()
    assert int(gpu_hours) == pytest.approx(64 * float(hours), rel=0.01) and int(money.replace(",", "")) > 2 * 700
    assert "checkpoint: 98.6 GB, 49 s at 2 GB/s" in out and "--save_interval" in out
    assert "memory per rank, GiB (64 x GPU)" in out and "sending, data" in out


def test_the_step_is_the_real_one(capsys):
    """64 ranks with a sample of 4,096 tokens each have 0.26 M tokens at least."""
    out = printed(capsys, "--model_size", "7b", "--num_ranks", 64, "--step_tokens", 1000)
    assert ", steps of 0.26 M tokens" in out
    with pytest.raises(UserError, match="--tokens 100000: less than one step, which has 262,144 tokens; give more"):
        printed(capsys, "--model_size", "7b", "--num_ranks", 64, "--step_tokens", 1000, "--tokens", 1e5)


def test_the_memory_of_hosts_is_named(capsys):
    out = " ".join(printed(capsys, "--model_size", "7b", "--num_ranks", 64).split())
    # Master weights and moments in float32, 12 bytes of each parameter, of an eighth of 64 ranks.
    needed = round(7.0424e9 * 12 / 8 / 2**30)
    (found,) = re.findall(r"host's memory, which is not compared with any host: (.*?) cheapest", out)
    zero2_cpu = re.search(r"zero2_cpu (\d+)", found)
    assert int(zero2_cpu[1]) == pytest.approx(needed, abs=1)


def test_the_suggested_flags_are_accepted(capsys, model_dir, tmp_path, monkeypatch):
    """What is printed for a folder with only a config.json is a command that a dry run accepts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = json.loads((model_dir / "config.json").read_text())
    write_json(tmp_path / "model" / "config.json", {**config, "max_position_embeddings": 4096})
    out = printed(capsys, "--pretrained", "model", "--num_ranks", 4, "--step_tokens", 2**17)
    cheapest = re.search(r"^cheapest:\n((?:  --.*\n)+)", out, re.MULTILINE)[1].split()
    args = ["--pretrained", "model", "--benchmark", "--num_samples", "1000", "--dry_run", "--num_ranks", "4", *cheapest]
    assert resolve(train_flags.train_parser().parse_args(args)).engine.accumulation_steps >= 1


def test_pickled_weights_are_no_obstacle(capsys, model_dir, tmp_path):
    """They are never read, and the folder of an original LLaMA may have nothing else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"")
    out = printed(capsys, "--pretrained", tmp_path / "model", "--num_ranks", 2, "--max_length", 64)
    assert "cheapest:" in out


def test_what_does_not_fit_is_reported(capsys):
    flags = ["--model_size", "70b", "--num_ranks", 8, "--gpu", "4090"]
    out = printed(capsys, *flags, parser=train_flags.train_sft_parser)
    assert re.search(r"no layout fits: the smallest needs \d+ GiB of a GPU, 4090 has 23$", out, re.MULTILINE)
    assert "cheapest" not in out


@pytest.mark.parametrize(
    "given, named",
    [
        ("--dry_run --suggest --vocab_size 9", "--vocab_size 9 needs --model_size"),
        ("--dry_run --suggest --model_size 7b --pretrained m", "takes the place of --pretrained m; give one"),
        ("--dry_run --suggest --plugin zero2 --tp 2", "--tp 2 has no effect with --suggest, which compares all"),
        ("--dry_run --suggest --dataset d", "has no effect with --suggest, which reads no data"),
        ("--dry_run --suggest --save_dir s", "--save_dir s has no effect with --suggest, which writes nothing"),
        ("--dry_run --suggest --lr 1e-4", "--lr 0.0001 has no effect with --suggest, since it changes neither"),
        ("--dry_run --suggest --bucketed", "--bucketed has no effect with --suggest, which reads no data"),
        ("--dry_run --suggest --eval_interval 3", "--eval_interval 3 has no effect with --suggest, which evaluates"),
        ("--dry_run --suggest --mixed_precision fp32", "--mixed_precision fp32 is for tests"),
        ("--dry_run --suggest --train_new_rows_only", "--train_new_rows_only needs --pretrained"),
        ("--dry_run --suggest --pretrained nowhere", "--pretrained nowhere: no such folder"),
        ("--suggest", "--suggest needs --dry_run"),
    ],
)
def test_mistakes_are_one_line(given, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(named)) as error:
        start._dry_run(train_flags.train_parser().parse_args(given.split()))
    assert "\n" not in str(error.value)


def test_every_flag_has_an_effect_or_is_refused():
    used = {"pretrained", "max_length", "mixed_precision", "use_flash_attn", "use_grad_checkpoint", "chunked_loss"}
    used |= {"train_new_rows_only", "freeze_non_embeds_params", "lora_rank", "lora_targets", "lora_dropout"}
    used |= {"gradient_clipping", "dry_run", "suggest", "num_ranks", "model_size", "vocab_size", "gpu", "tokens"}
    used |= {"step_tokens", "gpu_hour_price", "storage_gb_per_s", "load_config"}
    assert used | flag_problems._NOT_SUGGESTED.keys() == train_flags.train_sft_parser().traits.keys()
    assert not used & flag_problems._NOT_SUGGESTED.keys()


def test_a_mistake_ends_the_command(run_script, assert_user_error, tmp_path):
    done = run_script("train.py", "--suggest", "--gpu", "h100", cwd=tmp_path)
    assert_user_error(done, "--suggest needs --dry_run")
    with pytest.raises(UserError, match="--gpu h100 needs --suggest"):
        resolve(train_flags.train_parser().parse_args("--pretrained m --dataset d --gpu h100".split()))


def test_only_accepted_layouts_are_compared():
    """No combination that training refuses, and none that the model's 8 key-value heads do not allow."""
    planned = job("70b", 128_256, 64)
    found = list(layouts.layouts(planned.base, ranks=64, model=planned.facts, max_length=LENGTH))
    assert len(set(found)) == len(found) > 50
    for settings in found:
        assert not settings_problems(settings, 64) + split_problems(settings, planned.facts)
        assert settings.tp_size * settings.sp_size <= 8
    assert {settings.zero_stage for settings in found if settings.pp_size > 1} == {0, 1}
    labels = [layouts.label(settings) for settings in found]
    assert len(set(labels)) == len(labels) and "3d tp8 pp8 zero1" in labels and "3d tp8 split_gather zero1" in labels


def test_memory_is_that_of_the_dry_run_and_larger_batches_were_tried():
    planned = job("7b", 69_104, 64)
    found, compared = suggest(planned, most_hybrid=3)
    assert compared > 100 and [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    for one in found:
        memory = rank_memory(planned.shape, one.plan)
        assert one.memory.peak == memory.peak >= loss_memory(planned.shape, one.plan)
        assert one.fits == (needed_gib(memory.peak) <= 79)
        assert one.step_tokens == 2**22
    zero2 = next(one for one in found if one.plan.settings.plugin == "zero2")
    settings = zero2.plan.settings
    twice = replace(settings, micro_batch_size=2 * settings.micro_batch_size)
    assert needed_gib(rank_memory(planned.shape, replace(zero2.plan, settings=twice)).peak) > 79


def test_the_original_run_is_forecast_as_it_was():
    """64 A800, 8.5 B tokens, 15 hours, as the original's README states: 2,459 tokens/s a GPU, of 47.0 GFLOP each."""
    hours, mfu, implied = scaling_page._original_forecast(64)
    assert implied == pytest.approx(8.5e9 / (15 * 3600 * 64) * 47.0e9 / 312e12, rel=0.002)
    assert hours == pytest.approx(15, rel=0.02) and mfu == pytest.approx(implied, rel=0.02)


def test_flops_of_a_shape_are_those_of_its_model(model_dir):
    config = model_without_weights(model_dir).config
    flops = device.flops_per_token(config, facts_of_config(model_dir).parameters, 512)
    config.tie_word_embeddings = False
    shape = ModelShape.of(config)
    norms = 6 * 2 * shape.layers * shape.hidden_size
    assert speed.token_flops(shape, 512) == pytest.approx(flops, abs=norms)


def test_what_ranks_send_by_hand():
    planned = job("7b", 69_104, 64)
    base, by_label = suggest_plan(planned), {}
    for settings in layouts.layouts(planned.base, ranks=64, model=planned.facts, max_length=LENGTH):
        plan = replace(base, checkpointing=False, settings=replace(settings, accumulation_steps=4))
        step = speed.step_forecast(planned.shape, plan, planned.gpu, step_tokens=4 * plan.data_ranks * LENGTH)
        by_label[layouts.label(settings)] = step.sent
    weights = 2 * planned.facts.parameters * 63 / 64
    of_data = {name: sent["data"] / weights for name, sent in by_label.items()}
    assert of_data["ddp"] == pytest.approx(2) and of_data["3d zero1"] == pytest.approx(3)
    # Gradients of four micro batches, and weights once; Gemini's weights twice for each.
    assert of_data["zero2"] == pytest.approx(5) and of_data["gemini"] == pytest.approx(12)
    # Four all-reduces in each of 32 layers and two outside, of 4,096 tokens with 4,096 channels of 2 bytes.
    assert by_label["3d tp2 zero1"]["tensor"] == pytest.approx(4 * (4 * 32 + 2) * 2 * 4096 * 4096 * 2 / 2)
    assert by_label["zero2"]["tensor"] == by_label["zero2"]["pipeline"] == 0
    assert by_label["3d pp2 zero1"]["pipeline"] == 4 * 2 * 4096 * 4096 * 2


def suggest_plan(planned):
    return suggest(planned, most_hybrid=1)[0][0].plan


def test_a_group_over_hosts_is_as_fast_as_its_adapters():
    planned = job("7b", 69_104, 64)
    plan = suggest_plan(planned)
    tp8 = replace(plan, settings=replace(plan.settings, plugin="3d", tp_size=8))
    inside, adapter = GPUS["a800-80g"].host_link, GPUS["a800-80g"].network
    share = speed.LINK_SHARE
    assert speed._bandwidth("tensor", tp8, planned.gpu) == share * inside
    assert speed._bandwidth("data", tp8, planned.gpu) == share * adapter
    whole = replace(plan, settings=replace(plan.settings, tp_size=1, pp_size=1, sp_size=1, sp_mode=None))
    assert speed._bandwidth("data", whole, planned.gpu) == share * min(inside, 8 * adapter)


def test_the_best_interval_loses_the_least():
    for save, between in ((49.0, 3e6), (487.0, 3e5), (600.0, 2e4)):
        best = failures.best_interval(save, between)
        assert best == pytest.approx(math.sqrt(2 * save * between), rel=0.2)

        def lost(interval, save=save, between=between):
            # Daly's equation 20: the expected time of a unit of work, without restarts.
            return between * math.expm1((interval + save) / between) / interval

        assert lost(best) <= min(lost(0.9 * best), lost(1.1 * best))
    assert failures.failures(16_384, 60).per_day * 54 == pytest.approx(419)


@pytest.mark.slow
def test_the_page_of_scaling_is_up_to_date():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert text == scaling_page.page(), "run python -m tests.scaling_page --output docs/scaling.md"


@pytest.mark.slow
def test_rank_0_of_64_holds_what_is_forecast():
    """Real plugins on the meta device, with two layers; the command's own comparison decides its exit code."""
    names = ["zero2", "ddp", "gemini", "3d tp8 zero1"]
    done = fork_server.run(["-m", "tests.fake_world", "--layers", "2", "--only", *names], timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(re.findall(r"^(\S.*?) {2,}[\d.]+ +[\d.]+ +([\d.]+) ", done.stdout, re.MULTILINE))
    assert rows == dict.fromkeys(names, "1.000")
    # Both are offloaded to a host whose memory is real.
    for name in ("zero2_cpu: not built: NotImplementedError", "gemini_auto: not built: "):
        assert f"\n{name}" in done.stdout


@pytest.mark.parametrize("name, code", [("3d sp2 zero2", 1), ("zero2_cpu", 0)])
def test_only_layouts_that_offload_may_fail_to_be_built(name, code, monkeypatch, capsys):
    """The first one is none of those that are built by default."""

    def fail(settings, planned):
        raise RuntimeError("not here")

    monkeypatch.setattr(fake_world, "prepare", lambda: None)
    monkeypatch.setattr(fake_world, "world", lambda ranks: contextlib.nullcontext())
    monkeypatch.setattr(fake_world, "held_bytes", fail)
    assert fake_world.main(["--only", name]) == code
    assert f"{name}: not built: RuntimeError" in capsys.readouterr().out


def test_a_layout_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        fake_world.main(["--only", "zero2", "zero9"])
    assert end.value.code == 2 and "--only zero9: no layout begins so; give one of" in capsys.readouterr().err


def test_a_layout_that_holds_something_else_fails(monkeypatch, capsys):
    monkeypatch.setattr(fake_world, "prepare", lambda: None)
    monkeypatch.setattr(fake_world, "world", lambda ranks: contextlib.nullcontext())
    monkeypatch.setattr(fake_world, "held_bytes", lambda settings, planned: Counter(bfloat16=1, float32=1))
    assert fake_world.main(["--only", "zero2"]) == 1
    assert "zero2 " in capsys.readouterr().out
