"""Preparation on a real Ray: a cluster of two nodes on loopback, and one that the command starts itself."""

import contextlib
import importlib.metadata
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from colossal_llama2.cli import data_flags
from colossal_llama2.dataset.layout import store
from colossal_llama2.dataset.layout.locks import RefusedError
from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write import prepare, ray_driver, ray_node
from colossal_llama2.dataset.write.tokenize_unit import Progress
from colossal_llama2.errors import RunError, UserError
from tests import tiny
from tests.conftest import ROOT
from tests.preparing import contents, flags, settings, write_lines

UNIT_BYTES = 40_000
SMALL_UNITS = WorkSizes(unit_bytes=UNIT_BYTES)
# The command, with units so small that there are many.
COMMAND = f"""
from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write import prepare
import prepare_pretrain_dataset

command = prepare.prepare_pretrain
prepare.prepare_pretrain = lambda **flags: command(**flags, sizes=WorkSizes(unit_bytes={UNIT_BYTES}))
if __name__ == "__main__":
    prepare_pretrain_dataset.main()
"""
DEADLINE_SECONDS = 120
# Runs in which a task is looked for.
MAX_ATTEMPTS = 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    texts = tiny.english_documents()
    rows = [{"target": "\n".join(texts[n % 1500 : n % 1500 + 3]), "category": f"topic-{n % 3}"} for n in range(3000)]
    folder = tmp_path_factory.mktemp("inputs") / "in"
    write_lines(folder / "large.jsonl", rows[:2990])
    write_lines(folder / "small.jsonl", rows[2990:])
    return folder


@pytest.fixture
def of_local(inputs, tokenizer_dir, tmp_path) -> dict:
    """The files of the local run."""
    prepare.prepare_pretrain(**options(inputs, tokenizer_dir, tmp_path / "local"), num_workers=2, sizes=SMALL_UNITS)
    return contents(tmp_path / "local")


@pytest.fixture(scope="module")
def cluster():
    """A head node of one core. Tests add the second."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=node_options())
    yield cluster
    cluster.shutdown()


def node_options() -> dict:
    # For Ray, 127.0.0.1 is the address at which other machines reach this one.
    return {"num_cpus": 1, "node_ip_address": "127.0.0.2", "include_dashboard": False}


def options(inputs, tokenizer_dir, output, **others) -> dict:
    keywords = settings([inputs], tokenizer_dir, output, max_length=256, bins=4, eval_fraction=0.2, **others)
    del keywords["num_workers"]
    return keywords


def start(keywords: dict, cwd) -> subprocess.Popen:
    path = cwd / "command.py"
    path.write_text(COMMAND)
    return subprocess.Popen(
        [sys.executable, str(path), *map(str, flags({**keywords, "executor": "ray"}))],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def found(look, process: subprocess.Popen):
    """The result of `look`, as soon as there is one, while the command runs."""
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end and process.poll() is None:
        result = look()
        if result:
            return result
        time.sleep(0.005)
    process.kill()
    raise AssertionError(process.communicate())


def workers_at(title: str, parent: psutil.Process) -> list:
    """The Ray workers below a process that are running a task."""
    workers = []
    for child in parent.children(recursive=True):
        try:
            workers += [child] if child.cmdline()[:1] == [title] else []
        except psutil.Error:
            pass
    return workers


def stop_worker_at(title: str, node, process: subprocess.Popen) -> psutil.Process:
    """Stop a node's worker that is writing a task's files, so that the task cannot end. Returns the raylet."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)

    def stopped():
        for worker in workers_at(title, raylet):
            worker.suspend()
            if worker.cmdline()[:1] == [title] and any("/.tmp-" in file.path for file in worker.open_files()):
                return True
            worker.resume()

    found(stopped, process)
    return raylet


def kill_node_at(title: str, node, cluster, process: subprocess.Popen) -> None:
    """Kill a node whose worker is writing a task's files."""
    workers = stop_worker_at(title, node, process).children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    # As on a machine that is gone: workers otherwise end by themselves, but a stopped one cannot.
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()


@pytest.mark.parametrize(("title", "lost"), [("ray::do_unit", "unit-"), ("ray::write_bin", "part-")])
def test_the_task_of_a_killed_node_is_done_again(title, lost, cluster, inputs, tokenizer_dir, tmp_path, of_local):
    node = cluster.add_node(**node_options())
    for attempt in range(MAX_ATTEMPTS):
        folder = tmp_path / f"output-{attempt}"
        process = start(options(inputs, tokenizer_dir, folder, ray_address=cluster.address), tmp_path)
        # A short task may begin and end between two looks, or on the other node.
        with contextlib.suppress(AssertionError):
            kill_node_at(title, node, cluster, process)
            break
    else:
        pytest.fail(f"no {title} seen on the node in {MAX_ATTEMPTS} runs")
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, err
    assert contents(folder) == of_local
    assert all("|" in line for line in err.splitlines()) and "ray" not in out + err, out + err
    assert re.search(rf"WARNING: 1 task lost with a worker or node of Ray, done again: {lost}", err), err
    assert re.search(r"\d+ tasks on 1 Ray node: \S+ \d+", err), err


def test_a_bad_row_is_reported_as_on_one_machine(cluster, inputs, tokenizer_dir, tmp_path, assert_user_error):
    write_lines(tmp_path / "bad" / "rows.jsonl", [{"target": "fine"}] * 9000 + [{"target": 3}])
    keywords = options(inputs, tokenizer_dir, tmp_path / "out", ray_address=cluster.address)
    # Paths are relative to the folder in which the command is started.
    process = start({**keywords, "data_input_dirs": [str(inputs), "bad"]}, tmp_path)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    # Ray may notice only now that the nodes of the test above were killed.
    err = re.sub(r".* the Ray node .* is lost\n", "", err)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    assert_user_error(done, "bad/rows.jsonl:9001: ")
    assert not (tmp_path / "out").exists()


def test_terminated_it_leaves_no_task_at_work(cluster, inputs, tokenizer_dir, tmp_path):
    process = start(options(inputs, tokenizer_dir, tmp_path / "out", ray_address=cluster.address), tmp_path)
    raylet = psutil.Process(cluster.head_node.all_processes["raylet"][0].process.pid)
    found(lambda: workers_at("ray::do_unit", raylet), process)
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, err.splitlines()[-1]) == (143, "prepare_pretrain_dataset.py: error: terminated")
    assert not psutil.wait_procs(descendants, timeout=20)[1]
    end = time.monotonic() + 20
    while workers_at("ray::do_unit", raylet):
        assert time.monotonic() < end
        time.sleep(0.1)


def left_without_driver(process: subprocess.Popen) -> list:
    """Kill the driver of the Ray that a command has started, which ends the command; return the remaining processes."""
    command = psutil.Process(process.pid)
    descendants = command.children(recursive=True)
    (driver,) = [child for child in command.children() if "spawn_main" in " ".join(child.cmdline())]
    driver.kill()
    _, err = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 1 and "Ray has ended" in err.splitlines()[-1], err
    return psutil.wait_procs(descendants, timeout=20)[1]


@pytest.mark.slow
def test_when_ray_dies_as_it_starts_nothing_stays(inputs, tokenizer_dir, tmp_path):
    """Its agents, whose parents are dead, would wait long for their node."""
    process = start(options(inputs, tokenizer_dir, tmp_path / "ray"), tmp_path)
    found(lambda: workers_at("ray::RuntimeEnvAgent", psutil.Process(process.pid)), process)
    assert left_without_driver(process) == []


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_of_its_ray(inputs, tokenizer_dir, tmp_path):
    process = start(options(inputs, tokenizer_dir, tmp_path / "ray"), tmp_path)
    found(lambda: workers_at("ray::do_unit", psutil.Process(process.pid)), process)
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=DEADLINE_SECONDS)
    assert not psutil.wait_procs(descendants, timeout=20)[1]


@pytest.mark.slow
def test_when_ray_dies_the_same_command_continues(inputs, tokenizer_dir, tmp_path, of_local):
    """A Ray that the command starts itself, without an address."""
    keywords = options(inputs, tokenizer_dir, tmp_path / "ray")
    process = start(keywords, tmp_path)
    found(lambda: list((tmp_path / "ray" / "cache").glob("unit-*.json")), process)
    assert left_without_driver(process) == []
    assert not (tmp_path / "ray" / "arrow").exists()
    prepare.prepare_pretrain(**keywords, num_workers=1, sizes=SMALL_UNITS)
    assert contents(tmp_path / "ray") == of_local


@pytest.mark.slow
def test_mistakes_with_ray_are_one_line(inputs, tokenizer_dir, tmp_path, monkeypatch, capsys):
    keywords = {**options(inputs, tokenizer_dir, tmp_path / "out"), "executor": "ray"}

    def refused(message: str, **others) -> None:
        with pytest.raises(UserError, match=message):
            prepare.prepare_pretrain(**{**keywords, **others})
        assert not (tmp_path / "out").exists()

    refused("--ray_address 127.0.0.1:1: no Ray cluster answers there", ray_address="127.0.0.1:1")
    refused("needs --executor ray, local given", ray_address="127.0.0.1:1", executor="local")
    refused("--num_workers 2 given, but the cores of the cluster", ray_address="127.0.0.1:1", num_workers=2)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.53.0")
    refused("Ray 2.53.0 is installed, which is older than 2.54; run pip install --no-deps -r requirements-ray.txt")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    refused("Ray is not installed; run pip install --no-deps -r requirements-ray.txt")
    for address in ("ray://127.0.0.1:10001", "somewhere"):
        with pytest.raises(SystemExit):
            data_flags.prepare_sft_parser().parse_args(["--ray_address", address])
        assert "HOST:PORT such as 10.0.0.1:6379, or auto allowed" in capsys.readouterr().err


def test_a_node_that_is_not_like_the_others_is_refused_by_name(tmp_path, monkeypatch):
    """Both refusals keep what is prepared so far."""
    (tmp_path / "plan.json").write_text("{}")
    expected = ray_node.expected_here(str(tmp_path))
    ray_node.check_node(expected, str(tmp_path))
    monkeypatch.setattr(ray_node, "SHARED_SECONDS", 0)
    with pytest.raises(RefusedError, match=rf"Ray node {socket.gethostname()}: does not see the files in .*/other;"):
        ray_node.check_node(expected, str(tmp_path / "other"))
    ray_node.check_node.cache_clear()
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0" if name == "numpy" else version(name))
    with pytest.raises(RefusedError, match=rf"has numpy 1\.0, but this machine numpy {version('numpy')}; install"):
        ray_node.check_node(expected, str(tmp_path))


def test_an_error_of_a_node_s_system_names_the_node(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_node, "_node_id", lambda: "1")
    expected = ray_node.expected_here(str(tmp_path))

    def read(task):
        return (tmp_path / "input").read_bytes()

    with pytest.raises(RunError, match=rf"Ray node {socket.gethostname()}: .*/input: No such file"):
        ray_node.run_on_node(read, SimpleNamespace(cache_dir=str(tmp_path)), expected, tmp_path / "claim")


def test_units_that_were_written_elsewhere_are_an_error(inputs, tokenizer_dir, tmp_path, monkeypatch):
    """A node has another folder at the path of the cache."""
    monkeypatch.setattr(prepare, "do_unit", lambda task: Progress(task.unit.size, 0, 0))
    with pytest.raises(RunError, match=r"\d+ units of \d+, such as unit-0+, cannot be seen in .*/cache after they"):
        prepare.prepare_pretrain(**options(inputs, tokenizer_dir, tmp_path), num_workers=1, sizes=SMALL_UNITS)


def test_bins_that_were_written_elsewhere_are_an_error(inputs, tokenizer_dir, tmp_path, monkeypatch):
    """A node shares the cache, but has another folder at the path of the output. The same command continues."""
    (tmp_path / "node").mkdir()
    write_bin = prepare.write_bin

    def write_elsewhere(task):
        return write_bin(task._replace(arrow_dir=str(tmp_path / "node")) if task.number == 1 else task)

    monkeypatch.setattr(prepare, "write_bin", write_elsewhere)
    keywords = {**options(inputs, tokenizer_dir, tmp_path / "out"), "num_workers": 1, "sizes": SMALL_UNITS}
    with pytest.raises(RunError, match=r"1 bin of 5, such as part-00001, cannot be seen in .*\.arrow\.partial and .*"):
        prepare.prepare_pretrain(**keywords)
    assert not (tmp_path / "out" / "arrow").exists()
    monkeypatch.undo()
    prepare.prepare_pretrain(**keywords)
    assert (tmp_path / "out" / "arrow" / "part-00001").is_dir()


def test_files_that_appear_later_are_waited_for(monkeypatch):
    """NFS shows another machine's files after some time."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(prepare, "time", clock)
    run = SimpleNamespace(execution=SimpleNamespace(executor="ray"))
    assert prepare._Run._unseen(run, [20, 60, 1000], lambda second: now[0] >= second, waits=True) == [1000]
    assert now[0] == 90
    run.execution.executor = "local"
    assert prepare._Run._unseen(run, [1000], lambda second: now[0] >= second, waits=True) == [1000]
    assert now[0] == 90


def test_a_late_second_attempt_keeps_the_first_folder(tmp_path):
    """The second one's may be removed at any time, since its worker counts as lost. A damaged one is replaced."""
    path = tmp_path / "part-00000"

    def write(content: bytes, *, is_removed: bool = False) -> int:
        with store.appearing_folder(path, needed_bytes=1) as folder:
            (folder / "data").write_bytes(content)
            if is_removed:
                (folder / "data").unlink()
        assert list(tmp_path.iterdir()) == [path]
        return path.stat().st_ino

    first = write(b"all")
    assert write(b"all") == first
    assert write(b"all", is_removed=True) == first
    (path / "data").write_bytes(b"alt")
    assert write(b"all") != first and (path / "data").read_bytes() == b"all"


def test_without_a_core_the_command_ends(monkeypatch):
    """After all nodes were lost; a cluster that has had none yet may be growing."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def node(alive: bool) -> dict:
        names = {"NodeID": "1", "NodeManagerHostname": "node1", "NodeManagerAddress": "10.0.0.1"}
        return {**names, "Alive": alive, "Resources": {"CPU": 4.0} if alive else {}}

    found: list[dict] = []
    nodes = ray_driver._Nodes(SimpleNamespace(nodes=lambda: found))
    assert nodes.look(True) == []
    now[0] = 9
    assert (nodes.look(True), nodes.take_warnings()) == ([], ())
    now[0] = 10
    waiting = "the Ray cluster has no node with a core; start nodes within 600 s"
    assert (nodes.look(True), nodes.take_warnings()) == ([], (waiting,))
    now[0] = 599
    assert (nodes.look(True), nodes.take_warnings()) == ([], ())
    found[:] = [node(True)]
    assert (nodes.look(True), nodes.slots) == ([], 8)
    found[:] = [node(False)]
    assert nodes.look(True) == ["node1 (10.0.0.1)"]
    now[0] += 59
    assert nodes.look(True) == []
    now[0] += 2
    assert nodes.take_warnings() == (waiting.replace("600", "60"),)
    with pytest.raises(RunError, match=r"no node with a core for 60 s; start nodes, and run the same command again"):
        nodes.look(True)


def accepted(ray: SimpleNamespace, cache_dir: Path, count: int) -> tuple:
    """A driver with tasks of a Ray that is not one: the driver, the command's end of the pipe, each attempt's claim."""
    claims: list[Path] = []
    remote = SimpleNamespace(options=lambda name: SimpleNamespace(remote=lambda *given: claims.append(given[3])))
    ray.remote = lambda **given: lambda function: remote
    ours, theirs = multiprocessing.Pipe()
    tasks = ray_driver._Tasks(ray, theirs)
    for number in range(count):
        data = SimpleNamespace(name=f"unit-{number}", cache_dir=str(cache_dir))
        ours.send(ray_driver.Request(len, data, ray_node.Expected((), None)))
    tasks._accept()
    return tasks, ours, claims


def test_the_tasks_of_a_node_that_does_not_answer_are_done_again(tmp_path, monkeypatch):
    """Ray waits for them without end. tests/cluster/run.sh cuts a real node off; this is the decision alone."""
    names = {"NodeID": "1", "NodeManagerHostname": "node1", "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 1.0}}
    nodes = [{**names, "Alive": True}, {**names, "NodeID": "2", "NodeManagerHostname": "node2", "Alive": True}]
    ray = SimpleNamespace(nodes=lambda: nodes, cancel=lambda given: None)
    tasks, ours, claims = accepted(ray, tmp_path, 3)
    claims[0].write_text("1")
    claims[1].write_text("2")

    def warnings() -> tuple[str, ...]:
        tasks._look()
        return ours.recv().warnings

    assert (warnings(), len(claims)) == ((), 3)
    nodes[1]["Alive"] = False
    # Pauses would add up, and the command would hear nothing meanwhile.
    tasks._running[1].lost = 2
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: pytest.fail("a pause"))
    monkeypatch.setattr(ray_driver, "time", clock)
    lost = "1 task lost with a worker or node of Ray, done again: unit-1"
    assert (warnings(), len(claims)) == (("the Ray node node2 (10.0.0.1) is lost", lost), 4)
    # The third may have been on its way to that node, since no other has begun it.
    assert (warnings(), len(claims)) == ((), 4)
    monkeypatch.setattr(ray_driver, "DOUBT_SECONDS", 0)
    claims[2].touch()
    assert (warnings(), len(claims)) == ((), 5)
    assert not claims[2].exists()


def test_what_each_attempt_would_meet_ends_the_run_at_once(tmp_path):
    from ray import exceptions

    def get(reference):
        raise exceptions.RuntimeEnvSetupError("no package at the given address")

    tasks, _, claims = accepted(SimpleNamespace(nodes=list, exceptions=exceptions, get=get), tmp_path, 1)
    tasks._finish(tasks._running[0])
    assert len(claims) == 1
    with pytest.raises(RunError, match=r"Ray cannot run unit-0 \(Failed to set up .*no package at the given address\)"):
        tasks.serve()
