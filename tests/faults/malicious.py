"""Malicious files in checkpoints, models, tokenizers and samples: no payload runs, no file is unpickled, no network."""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from colossal_llama2.train import verify
from colossal_llama2.train.run_folder import checkpoint_files
from tests.conftest import ROOT
from tests.faults import artifacts, network, unpickling, warm
from tests.faults import place as places
from tests.faults.artifacts import Payload
from tests.faults.place import Place
from tests.faults.rows import Row

FLAGS = ["--micro_batch_size", 4, "--save_interval", 2, *places.PLUGINS["zero2"]]
# Where an artifact is put, and which ones.
KINDS = {"checkpoint": artifacts.CHECKPOINT, "model": artifacts.MODEL, "samples": artifacts.SAMPLES}
# Commands that read such files, in processes that import everything themselves, in the full check.
SUBPROCESSES = (
    "pytorch_model.bin alone",
    "auto_map in config.json",
    "pickle as tokenizer.json",
    "pickle as lr_scheduler",
)


class Scene:
    """A copy of a good checkpoint, model and samples, which one artifact is added to."""

    def __init__(self, place: Place, checkpoint: Path):
        self._place, self._checkpoint = place, checkpoint
        self.folder = place.folder / "scene"
        self.payload, self.report = Payload(self.folder / "canary"), self.folder / "unpickled"

    def plant(self, kind: str, name: str) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for source, target in ((self._place.model, "model"), (self._place.samples, "samples")):
            shutil.copytree(source, self.folder / target)
        checkpoint = shutil.copytree(self._checkpoint, self.folder / "save_dir" / self._checkpoint.name)
        target = checkpoint if kind == "checkpoint" else self.folder / kind
        KINDS[kind][name](target, self.payload)
        if "manifest" not in name:
            # An author of such a file can also write a matching manifest.
            sizes = checkpoint_files.list_files(checkpoint)
            entries = checkpoint_files.file_entries(checkpoint, sizes)
            checkpoint_files.write_manifest(checkpoint, entries, saved_at=1.0)

    def commands(self, kind: str) -> dict[str, list[str]]:
        """Scripts that read the artifact, with their flags."""
        train = self._place.flags("unused", *FLAGS)
        save_dir = "save_dir" if kind == "checkpoint" else "new"
        for flag, name in {"--pretrained": "model", "--dataset": "samples", "--save_dir": save_dir}.items():
            train[train.index(flag) + 1] = str(self.folder / name)
        checkpoint = str(self.folder / "save_dir" / self._checkpoint.name)
        if kind == "checkpoint":
            return {
                "train.py": [*train, "--load_checkpoint", checkpoint],
                "train.py --resume": [*train, "--resume", "auto"],
                "verify": [checkpoint],
            }
        if kind == "samples":
            return {"train.py": train}
        (self.folder / "pieces.jsonl").write_text('{"piece": "人工智能"}\n', encoding="utf-8")
        return {
            "train.py": train,
            "inference_example.py": [
                "--model_path",
                str(self.folder / "model"),
                "--device",
                "cpu",
                "--input_txt",
                "a",
                "--max_new_tokens",
                "2",
            ],
            "train.py --dry_run": [*train, "--dry_run"],
            "init_model.py": [
                "--source_model_and_tokenizer_path",
                str(self.folder / "model"),
                "--target_tokenizer_path",
                str(self._place.folder / "tokenizer"),
                "--target_model_path",
                str(self.folder / "extended"),
            ],
            "init_tokenizer.py": [
                "--source_tokenizer_dir",
                str(self.folder / "model"),
                "--target_tokenizer_dir",
                str(self.folder / "target"),
                "--expand_tokens_file",
                str(self.folder / "pieces.jsonl"),
            ],
        }

    def harm(self) -> str | None:
        """What the last commands did that they must not do."""
        if self.payload.canary.exists():
            return "the payload ran"
        return f"unpickled, or asked the network: {self.report.read_text()}" if self.report.exists() else None


def check(place: Place, *, sample: int | None, seed: int) -> list[Row]:
    """Put each artifact, or `sample` of them, before every command that may read it."""
    job = warm.train(place.flags("whole", *FLAGS), place.log("whole"))
    assert job.wait() == 0, job.output
    scene = Scene(place, checkpoint_files.complete_checkpoints(place.save_dir("whole"))[0])
    chosen = [(kind, name) for kind, plants in KINDS.items() for name in plants]
    if sample is not None:
        chosen = random.Random(seed).sample(chosen, sample)
    run = Row("malicious file: no payload runs, nothing is unpickled, no network, one line or ignored")
    guard = Row("the watch over pickle, torch.load and network notices what it must, and payloads do run")
    guard.record("forked", _guard_problem(scene, _notices_in_fork(scene)))
    guard.record("TorchScript", _payload_problem(scene))
    for kind, name in chosen:
        scene.plant(kind, name)
        problems = [_problem(scene, script, flags) for script, flags in scene.commands(kind).items()]
        run.record(name, next(filter(None, problems), None) or scene.harm())
    if sample is None:
        guard.record("started", _guard_problem(scene, _notices_in_subprocess(scene), in_fork=False))
        for kind, name in [(kind, name) for kind, name in chosen if name in SUBPROCESSES]:
            scene.plant(kind, name)
            process = _start(scene, [str(ROOT / "train.py"), *scene.commands(kind)["train.py"]])
            problem = _end_problem(process.returncode, process.stderr)
            run.record(f"{name}, in a process of its own", problem or scene.harm())
    return [run, guard]


def _problem(scene: Scene, script: str, flags: list[str]) -> str | None:
    job = warm.Job(lambda: _main(scene, script, flags), scene.folder / f"{script}.log")
    try:
        code = job.wait()
    except AssertionError as hangs:
        return f"{script}: {hangs}"
    problem = _end_problem(code, job.output)
    return problem and f"{script}: {problem}"


def _main(scene: Scene, script: str, flags: list[str]) -> None:
    unpickling.install(str(scene.report))
    network.install(str(scene.report))
    script = script.split()[0]
    os.chdir(scene.folder)
    sys.argv = [script, *flags]
    mains: dict[str, Callable] = {"verify": verify.main}
    if script not in mains:
        mains[script] = __import__(script.removesuffix(".py")).main
    mains[script](flags)


def _end_problem(code: int, output: str) -> str | None:
    """A command ends well, if it does not read the file, or with one line."""
    errors = re.findall(r"^\S.*: error: .*", output, re.M)
    if "Traceback" in output or code not in (0, 1, 2) or len(errors) != (code != 0):
        return f"exit code {code}: {output[-2000:]}"
    return None


def _notices_in_fork(scene: Scene) -> Callable[[], None]:
    def read_pickles() -> None:
        import pickle

        import torch

        unpickling.install(str(scene.report))
        (scene.folder / "good.pkl").write_bytes(pickle.dumps(1))
        torch.save({"a": 1}, scene.folder / "good.pt")
        torch.load(scene.folder / "good.pt", weights_only=True)
        with suppress(Exception):
            torch.jit.load(scene.folder / "good.pt")
        network.install(str(scene.report))
        with suppress(OSError):
            socket.create_connection(("huggingface.co", 443))
        with open(scene.folder / "good.pkl", "rb") as file:
            pickle.load(file)  # noqa: S301
            file.seek(0)
            pickle.Unpickler(file).load()  # noqa: S301

    def run() -> None:
        scene.folder.mkdir(exist_ok=True)
        job = warm.Job(read_pickles, scene.folder / "guard.log")
        assert job.wait() == 0, job.output

    return run


def _payload_problem(scene: Scene) -> str | None:
    """Whether the TorchScript payload runs when it is loaded, as it must, and not when it is written."""
    scene.payload.canary.unlink(missing_ok=True)

    def load() -> None:
        import torch

        path = scene.folder / "payload.pt"
        path.write_bytes(scene.payload.torchscript)
        assert not scene.payload.canary.exists(), "it runs when it is made"
        torch.jit.load(path)

    job = warm.Job(load, scene.folder / "payload.log")
    ran = job.wait() == 0 and scene.payload.canary.exists()
    scene.payload.canary.unlink(missing_ok=True)
    return None if ran else f"the payload does not run: {job.output}"


def _notices_in_subprocess(scene: Scene) -> Callable[[], None]:
    code = (
        "import pickle, torch; pickle.dump(1, open('good.pkl', 'wb')); torch.save({'a': 1}, 'good.pt')\n"
        "torch.load('good.pt', weights_only=True); pickle.load(open('good.pkl', 'rb'))\n"
        "pickle.Unpickler(open('good.pkl', 'rb')).load()\n"
        "import socket\ntry:\n    socket.getaddrinfo('huggingface.co', 443)\nexcept OSError:\n    pass\n"
    )

    def run() -> None:
        process = _start(scene, ["-c", code])
        assert process.returncode == 0, process.stderr

    return run


def _guard_problem(scene: Scene, run: Callable[[], None], *, in_fork: bool = True) -> str | None:
    scene.report.unlink(missing_ok=True)
    run()
    lines = scene.report.read_text().splitlines() if scene.report.exists() else []
    seen = {line.split()[0].rstrip(":") for line in lines}
    scene.report.unlink(missing_ok=True)
    needed = {"torch.load", "pickle.load", "pickle.Unpickler", "network"} | ({"torch.jit.load"} if in_fork else set())
    missed = needed - seen
    return f"not noticed: {sorted(missed)}" if missed else None


def _start(scene: Scene, words: list[str]) -> subprocess.CompletedProcess:
    """A new Python process, whose calls are watched too."""
    environment = {**os.environ, unpickling.REPORT_VARIABLE: str(scene.report)}
    environment["PYTHONPATH"] = str(ROOT / "tests" / "faults" / "hook")
    return subprocess.run(
        [sys.executable, *words], cwd=scene.folder, env=environment, capture_output=True, text=True, timeout=300
    )
