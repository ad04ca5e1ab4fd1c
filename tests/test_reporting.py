"""The reports of a run: losses by source, train_log.jsonl, TensorBoard, the plot, the model card, settings."""

import json
import math
import random
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from colossal_llama2.cli import train_flags
from colossal_llama2.dataset.read.loss_groups import Amount
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.token_counts import SourceRead
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.model.training_history import HISTORY_FILE, vocabulary_stage
from colossal_llama2.storage.files import write_json
from colossal_llama2.train.report import loss_plot, model_card, run_report, train_log
from colossal_llama2.train.report.metric_writers import TensorBoardWriter
from colossal_llama2.train.report.reporter import Reporter, scalars
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.settings.from_flags import resolve
from colossal_llama2.train.stepping.state import StepResult, StepTotals
from tests import launching, layouts, tiny

LENGTH, STEPS, BATCH = 64, 4, 4
GROUPS = [("en", "ref"), ("en", "web"), ("zh", "news")]
ZERO2 = layouts.flags("fp32 zero2")
# Two ranks each; a step has BATCH samples.
RUNS: dict[str, list] = {
    "zero2": layouts.flags("fp32 zero2", "--save_interval", 2, batch=BATCH, accumulation_steps=2),
    "gemini": layouts.flags("bf16 gemini", batch=BATCH),
    "3d_tp2": layouts.flags("fp32 3d tp2", batch=BATCH),
    "3d_all_to_all": layouts.flags("fp32 3d sp2 all_to_all", batch=BATCH),
}
# A model that init_model.py extended, and the models trained from it in turn; a step has BATCH samples.
CHAIN = {
    "chain_1": ["train.py", "--lr", "1e-3", "--save_interval", 2],
    "chain_2": [
        "train.py",
        "--lr",
        "5e-4",
        "--load_checkpoint",
        "chain_1/ckpt/epoch-0_step-2/modeling",
        "--continue_data",
    ],
    "chain_3": [
        "train_sft.py",
        "--load_checkpoint",
        "chain_2/ckpt/modeling",
        "--lr",
        "2e-4",
        "--save_interval",
        1,
        "--max_steps",
        2,
    ],
    "chain_3_resumed": [
        "train_sft.py",
        "--load_checkpoint",
        "chain_3/ckpt/epoch-0_step-1",
        "--lr",
        "2e-4",
        "--max_steps",
        2,
    ],
    "chain_3_changed": [
        "train_sft.py",
        "--load_checkpoint",
        "chain_3/ckpt/epoch-0_step-1",
        "--lr",
        "1e-4",
        "--max_steps",
        2,
    ],
}
UNTOLD = {"3d_pp2": layouts.flags("fp32 3d pp2", batch=BATCH)}


@pytest.fixture(scope="module")
def part(tmp_path_factory, tokenizer_dir) -> str:
    """Samples of one to three documents of two sources; one document is masked, some samples are padded."""
    documents = iter(load_encoder(tokenizer_dir).encode(tiny.english_documents()[:200]))
    chance = random.Random(0)
    names = ["input_ids", "labels", "sequence_lengths", "document_sources", "document_categories"]
    rows: dict[str, list] = {name: [] for name in names}
    for number in range(STEPS * BATCH + 1):
        pieces = [[1, *next(documents)[:18], 2] for _ in range(chance.randint(1, 3))]
        groups = [chance.choice(GROUPS) for _ in pieces]
        labels = [[-100] * len(piece) if number == 1 and i == 0 else piece for i, piece in enumerate(pieces)]
        values = [sum(pieces, []), sum(labels, []), list(map(len, pieces)), *map(list, zip(*groups, strict=True))]
        for name, value in zip(names, values, strict=True):
            rows[name].append(value)
    folder = tmp_path_factory.mktemp("prepared") / "part-00000"
    number, text = (datasets.Sequence(datasets.Value(kind)) for kind in ("int32", "string"))
    kinds = datasets.Features(dict(zip(names, (number, number, number, text, text), strict=True)))
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(folder)
    return str(folder)


def flags_of(home: Path, model_dir: Path, part: str, *more) -> list[str]:
    words = ["--pretrained", model_dir, "--dataset", part, "--max_length", LENGTH, "--lr", 1e-3]
    words += ["--save_dir", home / "ckpt", "--tensorboard_dir", home / "tb", "--config_file", home / "config.json"]
    return [str(word) for word in [*words, "--micro_batch_size", BATCH // 2, "--peak_tflops", 1, *more]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, part, model_dir) -> Path:
    """Run every command on two ranks; returns the folder of their folders."""
    folder = tmp_path_factory.mktemp("jobs")
    runs = {**RUNS, **UNTOLD}
    specs = [
        {"name": name, "script": "train.py", "flags": flags_of(folder / name, model_dir, part, *flags)}
        for name, flags in runs.items()
    ]
    middle = folder / "zero2" / "ckpt" / "epoch-0_step-2"
    more = [*RUNS["zero2"], "--load_checkpoint", middle]
    specs.append({"name": "resumed", "script": "train.py", "flags": flags_of(folder / "zero2", model_dir, part, *more)})
    flags = flags_of(folder / "elsewhere", model_dir, part, *more)
    specs.append({"name": "elsewhere", "script": "train.py", "flags": flags})
    extended = Path(shutil.copytree(model_dir, folder / "extended"))
    write_json(extended / HISTORY_FILE, vocabulary_stage(model_dir, (500, 600), "f00d"))
    for name, (script, *more) in CHAIN.items():
        more = [folder / word if "/ckpt/" in str(word) else word for word in more]
        more = [*ZERO2, "--micro_batch_size", 1, "--accumulation_steps", 2, *more]
        flags = flags_of(folder / name, str(extended), part, *more)
        specs.append({"name": name, "script": script, "flags": flags})
    launching.launch(folder, specs)
    for spec in specs:
        assert json.loads((folder / f"{spec['name']}.json").read_text())["error"] is None
    return folder


def log_of(home: Path) -> list[dict]:
    return [json.loads(line) for line in (home / "ckpt" / "train_log.jsonl").read_text().splitlines()]


def steps_of(home: Path) -> list[dict]:
    return [record for record in log_of(home) if "loss" in record]


@pytest.fixture(scope="module")
def first_step(part, model_dir) -> dict[str, dict[str, float]]:
    """Mean loss of the first step's tokens by name, of the plain model, a document at a time."""
    rows = datasets.load_from_disk(part)
    order = SampleOrder(len(rows), micro_batch_size=BATCH, data_size=1, accumulation_steps=1, seed=1024)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    sums: dict[str, list] = {}
    for row in (rows[int(index)] for index in next(order.steps(0, 0, 0))[0][0]):
        start = 0
        names = zip(row["sequence_lengths"], row["document_sources"], row["document_categories"], strict=True)
        for length, source, category in names:
            ids, labels = (torch.tensor([row[key][start : start + length]]) for key in ("input_ids", "labels"))
            start += length
            logits = model(ids).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
            for key in (f"source {source}", f"category {category}"):
                total = sums.setdefault(key, [0.0, 0])
                total[0], total[1] = total[0] + loss.item(), total[1] + int((labels[0, 1:] != -100).sum())
    means = {key: loss / count for key, (loss, count) in sums.items() if count}
    kinds = ("source", "category")
    return {kind: {key.split()[1]: mean for key, mean in means.items() if key.startswith(kind)} for kind in kinds}


@pytest.mark.parametrize("name", RUNS)
def test_losses_by_source_and_category_are_those_of_the_plain_model(jobs, first_step, name):
    record, rel = steps_of(jobs / name)[0], 2e-3 if name == "gemini" else 1e-5
    assert len(first_step["source"]) == 2 and len(first_step["category"]) == 3
    for kind, expected in first_step.items():
        assert record[f"loss_by_{kind}"] == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("name", UNTOLD)
def test_without_loss_by_source_the_rest_is_reported(jobs, name):
    assert len(steps_of(jobs / name)) == STEPS
    assert not [key for record in steps_of(jobs / name) for key in record if key.startswith("loss_by")]


def test_log_and_tensorboard_have_the_same_figures(jobs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = steps_of(jobs / "zero2")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    parts = {"data", "forward", "backward", "optimizer"}
    for record in records:
        assert set(record["seconds"]) == parts and all(value >= 0 for value in record["seconds"].values())
        assert 0 < record["padding_share"] < 1 and record["mfu"] > 0 and record["memory_bytes"] > 2**20
    saves = [record for record in log_of(jobs / "zero2") if "checkpoint" in record]
    assert [(save["step"], save["checkpoint"]) for save in saves] == [(2, "epoch-0_step-2"), (4, "epoch-0_step-4")]
    events = EventAccumulator(str(jobs / "zero2" / "tb"))
    events.Reload()
    found = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found["Loss"] == pytest.approx([record["loss"] for record in records])
    for name, key in (("Loss by Source/zh", "loss_by_source"), ("Loss by Category/web", "loss_by_category")):
        assert found[name] == pytest.approx([record[key][name.split("/")[1]] for record in records])
    assert set(found) >= {f"Seconds/{part}" for part in [*parts, "save"]} | {"MFU", "Padding Share", "Memory in Bytes"}


def test_documents_without_a_category_have_no_category_called_none():
    record = {"loss_by_source": {"None": 1.0}, "loss_by_category": {"None": 2.0, "web": 3.0}}
    assert scalars(record) == {
        "Loss by Source/None": 1.0,
        "Loss by Category/no category": 2.0,
        "Loss by Category/web": 3.0,
    }


def test_a_resumed_run_shows_one_complete_curve(jobs):
    """The first run made all steps; lines after the resumed one were removed. A new folder begins with a copy."""
    for home in ("zero2", "elsewhere"):
        records = log_of(jobs / home)
        assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
        assert [record["step"] for record in records if "checkpoint" in record] == [2, 4]


def test_the_card_is_one_for_hubs(jobs, part):
    card = ModelCard.load(jobs / "zero2" / "ckpt" / "modeling" / "README.md")
    assert card.data.language == ["en", "zh"] and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation" and card.data.base_model == "model"
    rows = datasets.load_from_disk(part)
    tokens = sum(map(sum, rows["sequence_lengths"]))
    assert f"| {Path(part).parent.name} | {len(rows)} | {BATCH * STEPS} | 0.94 |" in card.text
    assert f"| all |  | {sum(map(len, rows['sequence_lengths']))} | {tokens:,} | 100.0% |" in card.text
    assert "| `--plugin` | zero2 |" in card.text and "| optimizer steps | 4 |" in card.text
    # Not in the checkpoint, whose files are listed, and equal for equal training.
    assert not (jobs / "zero2" / "ckpt" / "epoch-0_step-4" / "modeling" / "README.md").exists()
    assert (jobs / "elsewhere" / "ckpt" / "modeling" / "README.md").read_text() == card.content


def history_of(model: Path) -> list[dict]:
    return json.loads((model / HISTORY_FILE).read_text())["stages"]


def test_a_card_lists_all_stages(jobs, part):
    """Every figure of every stage is that of the stage's own log, plan and checkpoint."""
    stages = history_of(jobs / "chain_3" / "ckpt" / "modeling")
    assert [stage["stage"] for stage in stages] == ["vocabulary", "pretrain", "pretrain", "sft"]
    names = ["model", "extended", "ckpt/epoch-0_step-2", "ckpt"]
    assert [stage["parent"]["name"] for stage in stages] == names
    text = (jobs / "chain_3" / "ckpt" / "modeling" / "README.md").read_text()
    fingerprint = json.loads((Path(part) / "state.json").read_text())["_fingerprint"]
    rows = ["| 1. Extension of the vocabulary | model | vocabulary of 500, now 600 |  |  |  |  |"]
    # The second run loaded the weights after step 2; its parent's folder continued from there.
    steps = 2
    for number, (home, kind) in enumerate((("chain_1", "pretrain"), ("chain_2", "pretrain"), ("chain_3", "sft"))):
        stage, shown = stages[number + 1], steps_of(jobs / home)[:steps]
        tokens = sum(record["tokens"] for record in shown)
        assert (stage["steps"], stage["samples"], stage["tokens"]) == (steps, steps * BATCH, tokens)
        assert (stage["first_loss"], stage["final_loss"]) == (shown[0]["loss"], shown[-1]["loss"])
        assert stage["begins"] == {"epoch": 0, "sample": 8 if home == "chain_2" else 0}
        (source,) = stage["data"]
        assert (source["fingerprints"], source["samples"], source["tokens"]) == ([fingerprint], steps * BATCH, tokens)
        assert stage["settings"]["lr"] == json.loads((jobs / home / "config.json").read_text())["lr"]
        how = model_card.HOW[kind]
        rows.append(
            f"| {number + 2}. {how} | {names[number + 1]} | {source['source']} {tokens:,} | {steps} | {tokens:,} | "
            f"{shown[0]['loss']:.4f} | {shown[-1]['loss']:.4f} |"
        )
    rows.append(f"| all |  |  | 6 | {sum(stage.get('tokens', 0) for stage in stages):,} |  |  |")
    assert "\n".join(rows) in text
    assert "# Extension of the vocabulary, continued pre-training and supervised fine-tuning of model\n" in text
    assert "## Training of the last stage" in text and "## Settings of the last stage" in text
    assert ModelCard(text).data.base_model == "model"


def test_hashes_chain_the_stages(jobs):
    stages = history_of(jobs / "chain_3" / "ckpt" / "modeling")
    manifest = json.loads((jobs / "chain_1" / "ckpt" / "epoch-0_step-2" / "manifest.json").read_text())
    sha256 = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    weights = stages[2]["parent"]["weights"]
    assert weights and all(sha256[f"modeling/{name}"] == entry["sha256"] for name, entry in weights.items())
    assert f"modeling/{HISTORY_FILE}" in sha256
    assert stages[2]["weights"] == stages[3]["parent"]["weights"]
    assert all(stage["parent"].get("as_recorded", True) for stage in stages) and stages[3]["weights"]


def test_a_resumed_run_is_one_stage(jobs):
    whole, resumed, changed = (
        history_of(jobs / name / "ckpt" / "modeling") for name in ("chain_3", "chain_3_resumed", "chain_3_changed")
    )
    assert whole == resumed and whole[:3] == changed[:3]
    assert changed[3]["parent"] == whole[3]["parent"] and changed[3]["first_loss"] == whole[3]["first_loss"]
    assert changed[3]["resumed"] == [{"step": 1, "changed": ["lr 0.0002 -> 0.0001"]}]
    cards = [jobs / name / "ckpt" / "modeling" / "README.md" for name in ("chain_3", "chain_3_resumed")]
    assert cards[0].read_text() == cards[1].read_text()


def test_card_with_evaluations_and_a_base_that_has_a_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: meta-llama/Llama-2-7b-hf\n---\n# x\n")
    figures = {f"Evaluation/zh/{name}": value for name, value in (("loss", 3.5), ("bits_per_byte", 1.25))}
    records = [train_log.evaluation_record(step, figures) for step in (0, 5, 10)]
    records += [{"step": step, "loss": 20.0 - step} for step in range(1, 11)]
    settings = dict(stage="sft", plugin="gemini", mixed_precision="bf16", world_size=8, total_steps=10, num_epochs=1)
    settings.update(versions={"torch": "2.5.1", "flash-attn": None}, mixture=["zh=0.8", "b=0.2"], mixture_end="stop")
    settings.update(eval_interval=5, forgetting_alarm=None, save_interval=3)
    text = model_card.render(
        settings=settings,
        base_model=model_card.base_model(str(tmp_path)),
        sources=["fr", "x.y"],
        amounts=[Amount("b|d", "x", 2, 20), Amount("b|d", "None", 1, 10)],
        records=records,
        tokens_seen=30,
        read=[SourceRead("zh", 9, 18, 2400), SourceRead("b", 4, 3, 600)],
    )
    assert "base_model: meta-llama/Llama-2-7b-hf\nlanguage:\n- fr\n- zh\n" in text
    listed = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `--")]
    assert "Asked for: `zh=0.8 b=0.2`." in text and "The available data" in text and "One epoch" not in text
    assert "| zh | 9 | 18 | 2.00 | 2,400 | 80.0% |\n| b | 4 | 3 | 0.75 | 600 | 20.0% |\n" in text
    assert "| all | 13 | 21 |  | 3,000 | 100.0% |" in text
    names = ("plugin", "mixed_precision", "num_epochs", "mixture", "mixture_end")
    assert listed == [f"--{name}" for name in names]
    assert "| zh | 0 | 3.5000 | 1.2500 |\n| zh | 10 | 3.5000 | 1.2500 |\n" in text and "| zh | 5 |" not in text
    assert "| b\\|d | x | 2 | 20 | 66.7% |\n| b\\|d | no category | 1 | 10 | 33.3% |" in text
    assert "final loss | 10.0000 |" in text


def test_a_checkpoint_s_model_is_named_after_the_start_of_its_run(jobs, tmp_path):
    states = json.loads((jobs / "elsewhere" / "ckpt" / "epoch-0_step-4" / "running_states.json").read_text())
    assert states["base_model"] == "model"
    folder = tmp_path / "epoch-0_step-2" / "modeling"
    folder.mkdir(parents=True)
    assert model_card.base_model(str(folder)) == f"{tmp_path.name}/epoch-0_step-2"
    for states, expected in (
        ({"settings": {"pretrained": str(jobs / "zero2" / "ckpt" / "modeling")}}, "model"),
        ({"settings": {"pretrained": "some/where"}, "base_model": "named"}, "named"),
    ):
        (folder.parent / "running_states.json").write_text(json.dumps(states))
        assert model_card.base_model(str(folder)) == expected


@pytest.mark.parametrize("name", ["gemini", "3d_all_to_all"])
def test_what_a_run_writes_can_be_loaded(jobs, tmp_path, name):
    home = jobs / name
    written = json.loads((home / "config.json").read_text())
    assert ("zero" in written, "sp_mode" in written) == (name.startswith("3d"),) * 2
    words = ["--load_config", str(home / "config.json"), "--save_dir", str(tmp_path / "new")]
    again = train_flags.train_parser().parse_args(words)
    again.num_ranks, again.dry_run = 2, True
    assert resolve(again).source.checkpoint is None
    assert (again.lr, again.plugin, again.eval_dataset) == (1e-3, name.split("_")[0], None)


def test_run_folder_and_settings(jobs):
    folder = jobs / "zero2" / "ckpt"
    assert json.loads((folder / "settings.json").read_text()) == json.loads((jobs / "zero2/config.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    (host,) = environment["hosts"].values()
    assert environment["world_size"] == 2 and list(host["ranks"]) == ["0", "1"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_one_warning(tmp_path, monkeypatch, caplog):
    train_log.TrainLog(tmp_path / "train_log.jsonl").write({"step": 1, "loss": 2.0})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = run_report.RunReport(RunFolder(tmp_path), settings={}, environment={}, amounts=None, base_model="x")
    report.write_files()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environment.json", "settings.json", "train_log.jsonl"]
    assert [message for message in caplog.messages if "No loss curve is drawn: loss.png needs matplotlib" in message]


def test_torn_and_late_lines_are_removed_with_a_message(tmp_path, caplog):
    caplog.set_level("INFO")
    log = train_log.TrainLog(tmp_path / "train_log.jsonl")
    for step in range(1, 6):
        log.write({"step": step, "loss": math.nan if step == 2 else 1.0})
    log.close()
    with open(tmp_path / "train_log.jsonl", "ab") as file:
        file.write(b'{"step": 6, "lo')
    assert [record["loss"] for record in train_log.read(tmp_path / "train_log.jsonl")] == [1.0, None, 1.0, 1.0, 1.0]
    path = train_log.begin(RunFolder(tmp_path), last_step=3, resumed_from=str(tmp_path / "epoch-0_step-3"))
    assert [record["step"] for record in train_log.read(path)] == [1, 2, 3] and path.read_bytes().endswith(b"}\n")
    assert "removed 3 lines after step 3" in caplog.text
    assert [child.name for child in tmp_path.iterdir()] == ["train_log.jsonl"]
    # A run that died before its first checkpoint leaves evaluations of step 0.
    train_log.TrainLog(path).write({"step": 0, "evaluation": {}})
    assert train_log.begin(RunFolder(tmp_path), last_step=0).read_bytes() == b""
    assert "removed 4 lines of an earlier run" in caplog.text


def test_a_full_disk_ends_no_run(tmp_path, caplog):
    log = train_log.TrainLog(Path("/dev/full"))
    for step in range(3):
        log.write({"step": step})
    log.sync()  # The device does not support sync either.
    assert caplog.text.count("cannot be written (No space left on device)") == 1


def test_tensorboard_on_a_full_disk_ends_no_run(tmp_path, caplog):
    writer, limits = TensorBoardWriter(str(tmp_path), last_step=-1), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        for step in range(1000):
            writer.write(step, {"x" * 100: 1.0})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caplog.text.count("cannot be written (File too large)") == 1


def test_a_new_run_replaces_what_one_before_it_has_shown(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for last_step, steps in ((-1, (0, 1, 2)), (1, (2, 3)), (-1, (0,))):
        writer = TensorBoardWriter(str(tmp_path), last_step=last_step)
        for step in steps:
            writer.write(step, {"x": 10.0 * last_step + step})
        writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("x")] == [(0, -10.0)]


def test_an_error_in_plot_or_card_does_not_lose_the_model(tmp_path, caplog, monkeypatch):
    train_log.TrainLog(tmp_path / "train_log.jsonl").write({"step": 1, "loss": 2.0})
    monkeypatch.setattr(loss_plot, "RAW", "no colour")
    report = run_report.RunReport(RunFolder(tmp_path), settings={}, environment={}, amounts=None, base_model="x")
    report.write_files()
    assert report.card(tokens_seen=1, read=list) is None
    assert [text.split(": ")[1].split(" (")[0] for text in caplog.messages] == [
        "not all of settings.json, environment.json, loss.png could be written",
        "the model gets no card",
    ]


class LateTimer:
    """A timer like that of a GPU, whose marks can be read only in the next step."""

    is_late = True

    def take(self):
        return [("forward", 0.0, 1.5)]


def test_a_gpu_s_times_are_read_one_step_later(tmp_path):
    written = SimpleNamespace(write=lambda step, figures: steps.append((step, figures["Bucket"])), close=lambda: None)
    steps: list[tuple] = []
    reporter = Reporter(
        writer=written,
        log=train_log.TrainLog(tmp_path / "log"),
        progress=SimpleNamespace(update=lambda **shown: None),
        bucket_of=lambda position: 10 + position,
        flops_per_token=lambda length: 1.0,
        peak_flops=None,
    )
    reporter.timer = LateTimer()
    totals = StepTotals(predicted=8, tokens=8, places=10, untrained_micro_batches=0, signal=None)
    result = StepResult(loss=1.0, grad_norm=1.0, tokens=8)
    for step in (1, 2, 3):
        state = SimpleNamespace(step=step, epoch=1, sample_start_index=2 * step)
        reporter.step(state, totals, result, learning_rate=0.1, taken=2, seconds=2.0)
        assert steps == [(done, 10 + 2 * (done - 1)) for done in range(1, step)]
    assert next(train_log.read(tmp_path / "log"))["seconds"] == {"forward": 1.5}
