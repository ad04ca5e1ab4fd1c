"""Runs that end early: by a signal, after which all ranks save, or because a rank dies or hangs."""

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from colossal_llama2.engine.ranks import liveness
from colossal_llama2.train.run_folder import checkpoint_files, file_names, run_lock
from tests.connections import is_connected
from tests.faults.processes import START_SECONDS, TORCHRUN, ForkedRun, Run
from tests.launching import free_port
from tests.training_jobs import write_short_documents

FLAGS = ["--plugin", "zero2", "--mixed_precision", "fp32", "--num_epochs", "400", "--max_length", "64"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory, tokenizer_dir, model_dir):
    """A long run, saved every 24 steps, or every 12 on two ranks."""
    part = write_short_documents(tmp_path_factory.mktemp("prepared"), tokenizer_dir)
    return [*FLAGS, "--pretrained", str(model_dir), "--dataset", part]


@pytest.fixture
def start(tmp_path, flags):
    """Start a run in a named folder; all runs are ended with the test."""
    runs = []

    def start_one(name, *more, launcher=None, **options):
        runs.append(Run(tmp_path / name, [*flags, *more], launcher, **options))
        return runs[-1]

    yield start_one
    for run in runs:
        run.kill()


@pytest.fixture
def start_forked(tmp_path, flags):
    """Start a run of two ranks, or another number, without a launcher, whose part in what follows is not tested."""
    runs = []

    def start_ranks(name, *more, ranks=2, **options):
        runs.append(ForkedRun(tmp_path / name, [*flags, *more], ranks, **options))
        return runs[-1]

    yield start_ranks
    for run in runs:
        run.kill()


def assert_saved(run, number):
    """Everything that was trained is in the last checkpoint, which the message names, and nothing else remains."""
    line = rf"train.py: stopped: {number.name} after step (\d+), which is saved; .*_step-\1$"
    found = re.search(line, run.output, re.M)
    assert found, run.output
    newest = checkpoint_files.complete_checkpoints(run.save_dir)[-1]
    assert checkpoint_files.step_of(newest) == int(found[1]) and checkpoint_files.sizes_problem(newest) is None
    assert json.loads((newest / "running_states.json").read_text())["step"] == int(found[1])
    assert not [path.name for path in run.save_dir.iterdir() if path.suffix == ".tmp" or path.name == ".lock"]
    assert "Traceback" not in run.output and run.output.count("stopped:") == 1
    assert {path.name for path in run.save_dir.iterdir()} >= {"train_log.jsonl", *file_names.REPORT_NAMES}


def test_a_signal_to_a_single_process(start_forked):
    """At random moments, and with each signal: tests/faults/starts.py."""
    run = start_forked("single", ranks=0)
    run.wait_for("epoch-0_step-24")
    # A checkpoint may be moved while its run continues.
    (run.save_dir / "epoch-0_step-24").rename(run.save_dir.with_name("moved"))
    run.wait_for("epoch-2_step-72")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130, run.output
    assert_saved(run, signal.SIGINT)


def test_a_signal_to_one_rank_stops_all(start_forked):
    run = start_forked("one")
    run.wait_for("epoch-0_step-12")
    os.kill(run.pid_of(rank=1), signal.SIGUSR1)
    assert run.end() == 0, run.output
    assert_saved(run, signal.SIGUSR1)


def test_a_second_interrupt_ends_a_rank_that_waits_for_another(start_forked):
    run = start_forked("twice")
    run.wait_for("epoch-0_step-12")
    first, second = run.pid_of(rank=0), run.pid_of(rank=1)
    os.kill(second, signal.SIGSTOP)
    # By then rank 0 is inside a reduction, where Python runs no handler.
    time.sleep(1.0)
    os.kill(first, signal.SIGINT)
    time.sleep(0.5)
    assert run.code_of(rank=0) is None and "interrupted again" not in run.output
    os.kill(first, signal.SIGINT)
    wait_for_line(run, "interrupted again")
    assert checkpoint_files.sizes_problem(checkpoint_files.complete_checkpoints(run.save_dir)[-1]) is None
    assert_unlocked(run)


def wait_for_line(run, words, seconds=30.0):
    """Return when a run has written these words."""
    deadline = time.monotonic() + seconds
    while words not in run.output:
        assert time.monotonic() < deadline, run.output
        time.sleep(0.02)


def wait_for_end(run, processes, seconds=30.0):
    """Return when these processes of a run have ended."""
    deadline = time.monotonic() + seconds
    while any(os.path.exists(f"/proc/{pid}") for pid in processes):
        assert time.monotonic() < deadline, run.output
        time.sleep(0.02)


def assert_unlocked(run):
    """A run on another host would not know that the one that left the lock is dead."""
    deadline = time.monotonic() + 30.0
    while (run.save_dir / ".lock").exists():
        assert time.monotonic() < deadline, run.output
        time.sleep(0.02)


def test_a_signal_to_torchrun_reaches_the_ranks(start):
    run = start("torchrun", launcher=TORCHRUN)
    run.wait_for("epoch-0_step-12")
    run.process.send_signal(signal.SIGTERM)
    # torchrun has its own exit codes.
    assert run.end() == 1, run.output
    assert re.search(r"stopped: SIGTERM after step \d+, which is saved", run.output), run.output


def test_two_interrupts_to_torchrun_leave_no_rank_and_complete_checkpoints(start):
    run = start("interrupts", launcher=TORCHRUN)
    run.wait_for("epoch-0_step-12")
    ranks = [run.pid_of(rank) for rank in range(2)]
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(60.0) == 1
    wait_for_end(run, ranks)
    for checkpoint in checkpoint_files.complete_checkpoints(run.save_dir):
        assert checkpoint_files.sizes_problem(checkpoint) is None


def test_under_colossalai_run_a_signal_to_a_rank_stops_all(start):
    launcher = [str(Path(sys.executable).with_name("colossalai")), "run", "--nproc_per_node", "2"]
    run = start("colossalai", launcher=[*launcher, "--master_port", "29634"])
    run.wait_for("epoch-0_step-12")
    os.kill(run.pid_of(rank=0), signal.SIGUSR1)
    assert run.end() == 0, run.output
    assert re.search(r"stopped: SIGUSR1 after step \d+, which is saved", run.output), run.output


def test_a_dead_rank_ends_the_job_and_is_named(start_forked):
    runs = [start_forked(f"dead-{rank}") for rank in range(2)]
    for run in runs:
        run.wait_for("epoch-0_step-12")
    for rank, run in enumerate(runs):
        os.kill(run.pid_of(rank), signal.SIGKILL)
        run.end()
        assert (run.code_of(rank), run.code_of(1 - rank)) == (-signal.SIGKILL, 1), run.output
        assert (
            f"train.py: error: rank {rank} on {socket.gethostname()} died; earlier checkpoints are complete"
            in run.output
        )
    assert_unlocked(runs[1])


def test_killing_torchrun_saves_and_a_restart_waits_for_it(start, start_forked):
    run = start("orphans", launcher=TORCHRUN)
    run.wait_for("epoch-0_step-12")
    ranks = [run.pid_of(rank) for rank in range(2)]
    run.process.kill()
    wait_for_line(run, "torchrun, which started this process, was killed")
    # The restart finds the ranks that save, or that they have ended.
    again = start_forked("orphans", "--resume", "auto")
    wait_for_end(run, ranks)
    found = re.search(r"stopped: SIGTERM after step (\d+), which is saved", run.output)
    assert found, run.output
    deadline = time.monotonic() + START_SECONDS
    while not re.search(rf"Resumed .*_step-{found[1]}$", again.output, re.M):
        assert again.process.poll() is None and time.monotonic() < deadline, again.output
        time.sleep(0.05)


def test_a_restart_that_waited_for_the_lock_resumes_what_was_saved_meanwhile_on_all_ranks(start_forked, tmp_path):
    """Only rank 0 waits; the others have looked for the newest checkpoint before."""
    assert start_forked("waits", "--max_steps", "24").end() == 0
    folder = tmp_path / "waits" / "save_dir"
    (last,) = folder.glob("epoch-*_step-24")
    last.rename(tmp_path / "unsaved")
    with run_lock.locked(folder):
        run_lock.mark_ending()
        again = start_forked("waits", "--resume", "auto", "--max_steps", "25")
        wait_for_line(again, "waiting for its lock")
        time.sleep(1.0)
        (tmp_path / "unsaved").rename(last)
    assert again.end() == 0, again.output
    assert re.search(r"Resumed .*_step-24$", again.output, re.M), again.output


def test_a_rank_that_dies_before_the_ranks_meet_ends_the_others(start, start_forked):
    """Started by hand, without a launcher that would notice it: while it imports and the other waits for it."""
    port = free_port()
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    second = start("early", environment={**place, "RANK": "1"})
    first = start_forked("early", ranks=0, environment={**place, "RANK": "0"})
    deadline = time.monotonic() + START_SECONDS
    while not is_connected(second.process.pid):
        assert time.monotonic() < deadline, first.output + second.output
        time.sleep(0.02)
    second.process.kill()
    assert first.end() == 1
    line = f"train.py: error: rank 1 on {socket.gethostname()} died; nothing was trained, start again"
    assert line in first.output, first.output
    assert_unlocked(first)


def test_a_rank_that_hangs_is_noticed(start_forked):
    runs = [start_forked(f"hung-{rank}", "--dist_timeout", "10") for rank in range(2)]
    for rank, run in enumerate(runs):
        run.wait_for("epoch-0_step-12")
        os.kill(run.pid_of(rank), signal.SIGSTOP)
    for run in runs:
        wait_for_line(run, "did not answer", seconds=120.0)
        assert "--dist_timeout 10 s" in run.output and "Traceback" not in run.output


def test_a_timeout_is_recognised_behind_later_errors():
    """A rank that gives up while it saves tries to reach the others, which it no longer can, to report that."""
    try:
        try:
            raise RuntimeError("[unbound_buffer.cc:133] Timed out waiting 6000ms for send operation to complete")
        except RuntimeError:
            raise RuntimeError("Application timeout caused pair closure")
    except RuntimeError as error:
        assert liveness.is_timeout(error) and liveness.is_timeout(error.__context__)
    try:
        try:
            raise RuntimeError("[unbound_buffer.cc:133] Timed out waiting 6000ms for send operation to complete")
        except RuntimeError as first:
            raise RuntimeError("saving failed") from first
    except RuntimeError as error:
        assert liveness.is_timeout(error)
    assert not liveness.is_timeout(RuntimeError("Connection closed by peer"))
