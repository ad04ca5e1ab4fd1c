"""The trackers besides TensorBoard: W&B, MLflow and SwanLab, each as a metrics writer that cannot hold up a run.

Their packages are optional, and imported when a run reports to them. Server, project and mode (such as offline) are
those of the tracker's own environment variables. Local files are in a folder of the run.
"""

import contextlib
import os
import queue
import re
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from colossal_llama2 import logs, tracker_names
from colossal_llama2.storage import json_input
from colossal_llama2.storage.files import replace_file, to_json
from colossal_llama2.train.stepping.silent_reporter import SilentWriter

# Where the tracker's environment variables name none.
PROJECT = "colossal-llama2"
# How long the end of a run waits for trackers to send what they have.
CLOSE_SECONDS = 60.0
TRACKER_ID = re.compile(r"[A-Za-z0-9][\w-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is given of a run.

    Attributes:
        run_id: the id of the run in settings.json.
        name: for people.
        settings: the content of --config_file.
        folder: of the run, in which the tracker has a folder for its local files.
        known_id: the id that the tracker gave the run before it was resumed; None for a new run.
    """

    run_id: str
    name: str
    settings: dict[str, Any]
    folder: Path
    known_id: str | None = None


class Tracker(Protocol):
    """A run that is open in a tracker. Each method may raise any error.

    Attributes:
        id: what the tracker needs to continue the run.
        place: where people find the run: an address or a folder.
    """

    id: str
    place: str

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Record figures by name at an optimizer step."""

    def close(self) -> None:
        """Send what is left, and mark the run as finished."""


class WandbTracker:
    """A W&B run. Figures are drawn over "step", which may go back when an earlier checkpoint is resumed."""

    def __init__(self, run: TrackedRun):
        import wandb

        run.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.known_id or run.run_id,
            resume="allow",
            # W&B adds a folder "wandb" itself.
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=run.settings,
            # The log of a run is its own; W&B would replace standard output to have it too.
            settings=wandb.Settings(console="off", silent=True, save_code=False),
        )
        self._run.define_metric("*", step_metric="step")
        self.id = str(self._run.id)
        # Offline it has no address, and W&B prints a warning where one is asked for.
        self.place = str((None if self._run.offline else self._run.url) or self._run.dir)

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """An MLflow run, on the server of MLFLOW_TRACKING_URI or in files."""

    # Of a parameter's value, by MLflow's rules; and how many it accepts in one call.
    longest, batch = 500, 100

    def __init__(self, run: TrackedRun):
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            # MLflow 3 asks for this before it writes files. Its database would need more packages.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            address = (run.folder.resolve() / tracker_names.MLFLOW).as_uri()
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient(address)
        known = None if run.known_id is None else self._known(run.known_id)
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            known = self._client.create_run(number, run_name=run.name)
            # MLflow refuses a parameter that changes, so a resumed run keeps those of its start.
            params = [Param(metric_name(key), str(value)[: self.longest]) for key, value in run.settings.items()]
            for start in range(0, len(params), self.batch):
                self._client.log_batch(known.info.run_id, params=params[start : start + self.batch])
        self.id = str(known.info.run_id)
        self.place = f"{address}, run {self.id}"

    def _known(self, tracker_id: str) -> Any | None:
        """The run that is continued; None, with the reason logged, if this server does not have it."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(tracker_id, status="RUNNING")
            return self._client.get_run(tracker_id)
        except MlflowException as error:
            logs.get_logger().warning("mlflow: run %s is not there (%s); a new one is made", tracker_id, _line(error))
            return None

    def write(self, step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(metric_name(name), float(value), now, step) for name, value in figures.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id)


class SwanlabTracker:
    """A SwanLab experiment."""

    def __init__(self, run: TrackedRun):
        import swanlab

        folder = run.folder / tracker_names.SWANLAB
        folder.mkdir(parents=True, exist_ok=True)
        self._run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            name=run.name,
            id=run.known_id or run.run_id,
            resume="allow",
            log_dir=os.environ.get("SWANLAB_LOG_DIR", str(folder)),
            config=run.settings,
            settings=swanlab.Settings(interactive=False),
        )
        self.id = run.known_id or run.run_id
        self.place = str(folder)
        # Without a server it has no address, and raises an error where one is asked for.
        with contextlib.suppress(ValueError):
            self.place = str(self._run.url)

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    tracker_names.WANDB: WandbTracker,
    tracker_names.MLFLOW: MlflowTracker,
    tracker_names.SWANLAB: SwanlabTracker,
}


def metric_name(name: str) -> str:
    """A name as MLflow accepts it; where that needs a change, with a checksum, so that names stay different."""
    plain = re.sub(r"[^\w.\- /]", "_", name, flags=re.ASCII)
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode(errors='surrogatepass')):08x}"


class BackgroundWriter(SilentWriter):
    """Reports to a tracker from a thread of its own, so that no step waits for a network or a disk.

    The first failure, also that of opening the tracker, is logged and ends the reporting to it. The run continues.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], *, close_seconds: float = CLOSE_SECONDS):
        self._name, self._open, self._close_seconds = name, open_tracker, close_seconds
        self._has_failed = False
        self._deadline: float | None = None
        self._figures: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._report, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, figures: dict[str, float]) -> None:
        if not self._has_failed:
            self._figures.put((step, dict(figures)))

    def begin_close(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._close_seconds
            self._figures.put(None)

    def close(self) -> None:
        self.begin_close()
        assert self._deadline is not None
        self._thread.join(max(self._deadline - time.monotonic(), 0.0))
        if self._thread.is_alive():
            logs.get_logger().warning(
                "%s: not finished after %g s; it may lack the last figures", self._name, self._close_seconds
            )

    def _report(self) -> None:
        try:
            with _no_questions:
                tracker = self._open()
            logs.get_logger().info("%s: %s", self._name, tracker.place)
            while (item := self._figures.get()) is not None:
                tracker.write(*item)
            tracker.close()
        except (Exception, SystemExit) as error:  # packages of others raise anything, and one of them exits
            self._has_failed = True
            logs.get_logger().warning(
                "%s: %s: %s; it will lack all later figures, and the run continues",
                self._name,
                type(error).__name__,
                _line(error),
            )


class _NoQuestions(contextlib.AbstractContextManager[None]):
    """A context in which nothing can ask the terminal, such as for an API key: nobody may be there.

    Several threads may be in it at once. The last to leave restores standard input.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                nothing = self._stack.enter_context(open(os.devnull))
                self._stack.callback(setattr, sys, "stdin", sys.stdin)
                sys.stdin = nothing

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stack.close()


_no_questions = _NoQuestions()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@dataclass
class TrackerIds:
    """The ids of a run in its trackers, in a file of its --save_dir, so that a resumed run continues them.

    Attributes:
        path: the file (JSON).
        run_id: the id of the run; ids of another run, of which the folder is a copy, are not used.
    """

    path: Path
    run_id: str
    _lock: Any = field(default_factory=threading.Lock)

    def read(self) -> dict[str, str]:
        """The ids by tracker; none if there is no such file, or it is damaged or of another run."""
        try:
            content = json_input.read_object(self.path)
        except (OSError, ValueError):
            return {}
        ids = content.get("ids")
        if content.get("run_id") != self.run_id or not isinstance(ids, dict):
            return {}
        return {name: value for name, value in ids.items() if isinstance(value, str) and TRACKER_ID.fullmatch(value)}

    def store(self, tracker: str, tracker_id: str) -> None:
        """Record an id. Raises UserError or OSError if the file cannot be written."""
        with self._lock:
            ids = self.read()
            if ids.get(tracker) != tracker_id:
                content = {"run_id": self.run_id, "ids": {**ids, tracker: tracker_id}}
                replace_file(self.path, to_json(content).encode())


def open_trackers(
    names: Sequence[str], ids: TrackerIds, *, name: str, settings: dict[str, Any], folder: Path
) -> list[SilentWriter]:
    """A writer for each of these trackers, which opens it in its thread. For rank 0.

    Args:
        name: of the run, for people.
        settings: the content of --config_file.
        folder: of the run, in which each tracker has a folder for its local files.
    """
    known = ids.read()

    def opener(tracker: str) -> Callable[[], Tracker]:
        def open_and_record() -> Tracker:
            run = TrackedRun(ids.run_id, name, settings, folder, known.get(tracker))
            opened = TRACKERS[tracker](run)
            ids.store(tracker, opened.id)
            return opened

        return open_and_record

    return [BackgroundWriter(tracker, opener(tracker)) for tracker in names]
