"""--report_to: which trackers are accepted, that none of them can hold up or end a run, and the real ones offline.

The tests of real packages are skipped where these are not installed; requirements-trackers.txt has them.
"""

import contextlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from colossal_llama2 import tracker_names
from colossal_llama2.cli import train_flags
from colossal_llama2.model.trainable import Trainable
from colossal_llama2.train.report import reporter, run_report, trackers
from colossal_llama2.train.report.metric_writers import SeveralWriters
from colossal_llama2.train.report.trackers import BackgroundWriter, TrackerIds, metric_name
from colossal_llama2.train.run_folder.run_folder import RunFolder
from colossal_llama2.train.settings import flag_problems
from colossal_llama2.train.settings.config import ReportConfig
from colossal_llama2.train.stepping.state import TrainState
from tests import launching, layouts, training_jobs
from tests.conftest import ROOT

SETTINGS = {"lr": 1e-4, "dataset": ["zh=arrow_zh"], "max_steps": None}
FIGURES = {"Loss": 2.5, "Loss by Source/网页": 3.25}
# With these, trackers write to files and use no network.
OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "SWANLAB_MODE": "offline",
    "MLFLOW_TRACKING_URI": "",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
RUN_ID = "0123456789abcdef"
# train.py in an environment without W&B, and whether it had imported PyTorch when it ended.
WITHOUT_WANDB = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "wandb" else found(name, *more)
import train
try:
    train.main()
finally:
    print("torch" in sys.modules)
"""


@pytest.fixture
def offline(monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_DIR", "WANDB_PROJECT", "SWANLAB_LOG_DIR", "SWANLAB_PROJ_NAME", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def parsed(*words: str):
    return train_flags.train_parser().parse_args(["--pretrained", "m", "--dataset", "d", *words])


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_trackers_are_a_list_of_names(capsys):
    assert parsed().report_to == "tensorboard"
    assert parsed("--report_to", "wandb, mlflow,wandb").report_to == "wandb,mlflow"
    with pytest.raises(SystemExit) as ended:
        parsed("--report_to", "tensorboard,neptune")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "'neptune' given, a comma-separated list of tensorboard, wandb, mlflow, swanlab allowed" in error


@pytest.mark.slow
def test_a_missing_package_is_one_line_before_torch_is_imported(tmp_path, model_dir, assert_user_error):
    flags = ["--pretrained", model_dir, "--dataset", tmp_path, "--plugin", "ddp", "--report_to", "tensorboard,wandb"]
    command = [sys.executable, "-c", WITHOUT_WANDB, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert_user_error(done, "--report_to wandb: its package is not installed; run pip install wandb")
    assert done.stdout == "False\n"


def test_the_packages_to_install_are_the_pinned_ones(monkeypatch):
    monkeypatch.setattr(tracker_names, "is_installed", lambda name: False)
    pins = (ROOT / "requirements-trackers.txt").read_text()
    problems = flag_problems._tracker_problems(parsed("--report_to", "wandb,mlflow"))
    for name, problem in zip(("wandb", "mlflow"), problems, strict=True):
        package = problem.partition("run pip install ")[2].partition(",")[0]
        assert problem.startswith(f"--report_to {name}: ") and f"\n{package}==" in pins


def test_a_folder_named_like_a_package_is_none(tmp_path, monkeypatch):
    """W&B makes a folder "wandb" where it runs, and Python imports a folder as an empty package."""
    (tmp_path / "no_such_tracker").mkdir()
    (tmp_path / "real_tracker.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("no_such_tracker") is not None
    assert not tracker_names.is_installed("no_such_tracker")
    assert tracker_names.is_installed("real_tracker") and "real_tracker" not in sys.modules
    assert all(tracker_names.is_installed(name) for name in ("tensorboard",))


class Recorder:
    """A tracker that fails when it is asked to."""

    id, place = "abc", "here"

    def __init__(self, *, fails_at: int | None = None, fails_to_close: bool = False):
        self.figures, self.threads, self.is_closed = [], set(), False
        self._fails_at, self._fails_to_close = fails_at, fails_to_close

    def write(self, step, figures):
        self.threads.add(threading.current_thread())
        if step == self._fails_at:
            raise ConnectionError("no route\nto host")
        self.figures.append((step, figures))

    def close(self):
        if self._fails_to_close:
            raise OSError(28, "No space left on device")
        self.is_closed = True


def report(writer, steps: int) -> None:
    for step in range(1, steps + 1):
        writer.write(step, {"Loss": float(step)})
    writer.close()


def test_a_tracker_gets_everything_in_order_from_one_thread(caplog):
    recorder = Recorder()
    report(BackgroundWriter("wandb", lambda: recorder), 5)
    assert recorder.figures == [(step, {"Loss": float(step)}) for step in range(1, 6)] and recorder.is_closed
    assert threading.main_thread() not in recorder.threads and warnings(caplog) == []


@pytest.mark.parametrize("fails_at, written", [(1, 0), (3, 2)])
def test_a_failing_tracker_is_logged_once_and_the_others_go_on(fails_at, written, caplog):
    failing, other = Recorder(fails_at=fails_at), Recorder()
    writers = [BackgroundWriter("mlflow", lambda: failing), BackgroundWriter("wandb", lambda: other)]
    report(SeveralWriters(writers), 6)
    assert len(failing.figures) == written and len(other.figures) == 6 and other.is_closed
    (warning,) = warnings(caplog)
    assert warning == "mlflow: ConnectionError: no route to host; it will lack all later figures, and the run continues"


def test_a_tracker_that_cannot_be_closed_or_opened_is_logged_once(caplog):
    report(BackgroundWriter("wandb", lambda: Recorder(fails_to_close=True)), 2)
    assert ["No space left" in warning for warning in warnings(caplog)] == [True]
    caplog.clear()
    # SwanLab ends the process where it finds no login.
    report(BackgroundWriter("swanlab", lambda: sys.exit("no login")), 2)
    assert ["swanlab: SystemExit: no login" in warning for warning in warnings(caplog)] == [True]


def test_no_step_waits_for_a_tracker(caplog):
    release = threading.Event()
    slow = SimpleNamespace(id="a", place="b", write=lambda *_: release.wait(30), close=lambda: None)
    writer = BackgroundWriter("wandb", lambda: slow, close_seconds=0.05)
    start = time.monotonic()
    report(writer, 1000)
    assert time.monotonic() - start < 10
    assert ["wandb: not finished after 0.05 s" in warning for warning in warnings(caplog)] == [True]
    release.set()


def test_trackers_share_the_time_at_the_end(caplog):
    release = threading.Event()
    slow = SimpleNamespace(id="a", place="b", write=lambda *_: release.wait(30), close=lambda: None)
    several = SeveralWriters([BackgroundWriter(str(number), lambda: slow, close_seconds=1.0) for number in range(20)])
    several.write(1, {"Loss": 1.0})
    start = time.monotonic()
    several.begin_close()
    several.close()
    assert time.monotonic() - start < 10
    assert ["not finished after 1 s" in warning for warning in warnings(caplog)] == [True] * 20
    release.set()


def test_the_files_of_a_run_do_not_wait_for_its_trackers(tmp_path, monkeypatch):
    """A launcher may kill a run that was stopped before a tracker has sent all."""
    settings = SimpleNamespace(trainable=Trainable())
    first = lambda: contextlib.nullcontext(True)  # noqa: E731
    order, engine = [], SimpleNamespace(first_rank_only=first, world_size=1, settings=settings)
    folder = RunFolder(tmp_path / "ckpt")
    folder.path.mkdir()
    run = run_report.RunReport(folder, settings={"total_steps": 1}, environment={}, amounts=None, base_model="x")
    monkeypatch.setattr(run, "write_files", lambda: order.append("files"))
    monkeypatch.setattr(reporter, "llama_config", lambda folder: None)
    tracker = Recorder()
    monkeypatch.setattr(
        reporter,
        "open_trackers",
        lambda *_, **others: [SlowToClose("wandb", lambda: tracker, order)],
    )
    settings = ReportConfig(["wandb"], str(tmp_path / "tb"), "config", None)
    source = SimpleNamespace(weights_folder=None, checkpoint=None)
    samples = SimpleNamespace(buckets=None)
    with reporter.reporting(
        engine=engine, state=TrainState(), report=run, source=source, order=samples, parameters=1, settings=settings
    ):
        pass
    assert order == ["begin", "files", "begin", "wait"] and tracker.is_closed


class SlowToClose(BackgroundWriter):
    """Records when it is asked to close, and when it is waited for."""

    def __init__(self, name, open_tracker, order):
        super().__init__(name, open_tracker)
        self._order = order

    def begin_close(self):
        self._order.append("begin")
        super().begin_close()

    def close(self):
        self._order.append("wait")
        BackgroundWriter.begin_close(self)
        self._thread.join()


def test_a_tracker_cannot_ask_the_terminal(caplog):
    report(BackgroundWriter("wandb", lambda: input("API key: ")), 1)
    assert ["wandb: EOFError" in warning for warning in warnings(caplog)] == [True]


def test_trackers_that_open_at_once_leave_standard_input_as_it_was(caplog):
    """The first to start is the first to finish, while the other one still opens."""
    before, are_open, first_is_closed = sys.stdin, threading.Barrier(2), threading.Event()

    def first():
        are_open.wait(30)
        return Recorder()

    def second():
        are_open.wait(30)
        assert first_is_closed.wait(30)
        return input("API key: ")

    writers = [BackgroundWriter("mlflow", first), BackgroundWriter("wandb", second)]
    writers[0].close()
    first_is_closed.set()
    writers[1].close()
    assert ["wandb: EOFError" in warning for warning in warnings(caplog)] == [True]
    assert sys.stdin is before


def test_ids_are_those_of_the_run_and_no_other(tmp_path):
    path = tmp_path / "trackers.json"
    ids = TrackerIds(path, RUN_ID)
    assert ids.read() == {}
    ids.store("wandb", "w1")
    ids.store("mlflow", "m-1")
    assert TrackerIds(path, RUN_ID).read() == {"wandb": "w1", "mlflow": "m-1"}
    # A copy of the folder is another run.
    assert TrackerIds(path, "f" * 16).read() == {}
    path.write_text(json.dumps({"run_id": RUN_ID, "ids": {"wandb": "../x", "mlflow": 3, "swanlab": "s1"}}))
    assert TrackerIds(path, RUN_ID).read() == {"swanlab": "s1"}
    for damaged in ("{", "[]", json.dumps({"run_id": RUN_ID, "ids": 1})):
        path.write_text(damaged)
        assert TrackerIds(path, RUN_ID).read() == {}


def test_names_of_figures_stay_different():
    assert metric_name("Loss by Source/zh-news_1.0") == "Loss by Source/zh-news_1.0"
    changed = [metric_name(f"Loss by Source/{name}") for name in ("网页", "新闻", "a:b", "a;b")]
    assert len(set(changed)) == 4 and all(name.isascii() for name in changed)


def reported(name: str, folder: Path, steps: range, *, run_id: str = RUN_ID) -> str:
    """Report some steps to a real tracker; returns its id of the run, as the file in the run's folder has it."""
    folder.mkdir(exist_ok=True)
    ids = TrackerIds(folder / "trackers.json", run_id)
    (writer,) = trackers.open_trackers([name], ids, name="a run", settings=SETTINGS, folder=folder / "tb")
    for step in steps:
        writer.write(step, {**FIGURES, "Step Figure": float(step)})
    writer.close()
    return ids.read()[name]


def test_mlflow_gets_figures_and_settings_and_continues_its_run(tmp_path, offline, caplog):
    pytest.importorskip("mlflow", reason="mlflow is not installed (requirements-trackers.txt)")
    from mlflow.tracking import MlflowClient

    first = reported("mlflow", tmp_path, range(1, 4))
    assert reported("mlflow", tmp_path, range(4, 6)) == first and warnings(caplog) == []
    client = MlflowClient((tmp_path / "tb" / "mlflow").as_uri())
    run = client.get_run(first)
    assert run.info.status == "FINISHED" and run.info.run_name == "a run"
    assert run.data.params == {"lr": "0.0001", "dataset": "['zh=arrow_zh']", "max_steps": "None"}
    history = client.get_metric_history(first, "Step Figure")
    assert [(entry.step, entry.value) for entry in history] == [(step, float(step)) for step in range(1, 6)]
    assert run.data.metrics[metric_name("Loss by Source/网页")] == 3.25
    # A server that does not have the run, as after a change of MLFLOW_TRACKING_URI.
    (stored,) = (tmp_path / "tb" / "mlflow").glob(f"*/{first}")
    shutil.rmtree(stored)
    assert reported("mlflow", tmp_path, range(6, 7)) != first
    assert ["is not there" in warning for warning in warnings(caplog)] == [True]


def test_wandb_writes_an_offline_run_and_continues_it(tmp_path, offline, caplog, capfd):
    pytest.importorskip("wandb", reason="wandb is not installed (requirements-trackers.txt)")
    assert reported("wandb", tmp_path, range(1, 4)) == RUN_ID
    assert reported("wandb", tmp_path, range(4, 6)) == RUN_ID and warnings(caplog) == []
    assert capfd.readouterr() == ("", "")
    files = sorted((tmp_path / "tb" / "wandb").glob(f"offline-run-*-{RUN_ID}/run-{RUN_ID}.wandb"))
    content = b"".join(path.read_bytes() for path in files)
    assert content.count(b"Step Figure") >= 5 and "Loss by Source/网页".encode() in content
    assert b"arrow_zh" in content


def test_swanlab_writes_an_offline_run(tmp_path, offline, caplog):
    pytest.importorskip("swanlab", reason="swanlab is not installed (requirements-trackers.txt)")
    assert reported("swanlab", tmp_path, range(1, 4)) == RUN_ID
    assert reported("swanlab", tmp_path, range(4, 6)) == RUN_ID and warnings(caplog) == []
    files = [path for path in (tmp_path / "tb" / "swanlab").rglob("*") if path.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert b"Step Figure" in content and b"arrow_zh" in content


@pytest.mark.slow
def test_a_run_trains_the_same_whatever_it_reports_to(tmp_path, tokenizer_dir, model_dir, offline):
    """With every tracker that is installed; a resumed run continues each of them."""
    installed = [name for name in tracker_names.TRACKER_NAMES if tracker_names.is_installed(name)]
    if installed == ["tensorboard"]:
        pytest.skip("no other tracker is installed (requirements-trackers.txt)")
    parts = training_jobs.write_data(tmp_path / "data", tokenizer_dir, 3)
    layout = layouts.flags("fp32 ddp", "--save_interval", 2, batch=training_jobs.GLOBAL_BATCH)
    specs = []
    for home, more in (
        ("plain", []),
        ("tracked", ["--report_to", ",".join(installed), "--max_steps", 2]),
        ("tracked", ["--report_to", ",".join(installed), "--resume", "auto"]),
    ):
        flags = [*training_jobs.common_flags(tmp_path / home, model_dir, parts), *layout, *more]
        specs.append({"name": f"{home}{len(specs)}", "script": "train.py", "flags": [str(flag) for flag in flags]})
    launching.launch(tmp_path, specs)
    plain, _, tracked = (training_jobs.finished(tmp_path, spec) for spec in specs)
    assert plain.error is None and tracked.error is None
    assert tracked.scalars("Loss") == plain.scalars("Loss") and len(plain.scalars("Loss")) == 3
    ids = json.loads((tracked.folder / "ckpt" / "trackers.json").read_text())["ids"]
    assert list(ids) == installed[1:] and not (plain.folder / "ckpt" / "trackers.json").exists()
    if "mlflow" in ids:
        from mlflow.tracking import MlflowClient

        history = MlflowClient((tracked.folder / "tb" / "mlflow").as_uri()).get_metric_history(ids["mlflow"], "Loss")
        assert [entry.value for entry in history] == pytest.approx(plain.scalars("Loss"))
