"""torchrun's store without PyTorch: its client against PyTorch's own store, and what ranks exchange through it."""

import os
import socket
import subprocess
import sys
import threading
import time

import datasets
import pytest

from colossal_llama2.engine.ranks import meeting, torchrun_store
from colossal_llama2.engine.ranks.torchrun_store import StoreError
from colossal_llama2.errors import LaunchError
from colossal_llama2.launcher import Place
from tests import fork_server
from tests.conftest import ROOT
from tests.launching import free_port

SERVER = """
import sys
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("localhost", int(sys.argv[1]), None, True, timedelta(seconds=60), wait_for_workers=False)
store.set("of PyTorch", "words")
print("serves", flush=True)
sys.stdin.readline()
print(store.get("of ours").decode(), store.add("number", 1), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def server():
    """A process that serves PyTorch's store, and its port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "serves\n"
    yield process, port
    process.kill()
    process.communicate()


@pytest.fixture
def address(monkeypatch, server):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(server[1]))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")


@pytest.fixture
def store(address):
    return torchrun_store.connect(attempt_seconds=5.0)


def test_ranks_of_an_attempt_find_its_rank_0_among_dead_ones(store):
    """A store outlives the processes that torchrun starts again, so it has the ports of dead ones."""
    assert meeting.published(store) is None
    dead = meeting.publish(store, free_port())
    found = []

    def call():
        until = time.monotonic() + 30.0
        own = torchrun_store.connect(attempt_seconds=5.0)
        found.append(meeting.introduce_through(own, Place(1, 1, 2), "host", until=until, on_retry=lambda reason: None))

    caller = threading.Thread(target=call)
    caller.start()
    time.sleep(0.5)
    with socket.create_server(("localhost", 0)) as listener:
        living = meeting.publish(store, listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(200) == f"hello {living.secret} 1 2 host\n".encode()
            connection.sendall(b"welcome node1\n")
            caller.join(30.0)
    ((_, answer, published),) = found
    assert answer == "welcome node1" and published == living and living.attempt == dead.attempt + 1


def test_a_rank_without_a_route_reports_it_to_the_others(store, monkeypatch):
    monkeypatch.setattr(meeting, "REFUSED_SECONDS", 0.5)
    published = meeting.publish(store, free_port())
    with pytest.raises(meeting.NoRoute) as error:
        meeting.introduce_through(store, Place(1, 1, 2), "host", until=time.monotonic() + 30.0, on_retry=lambda _: None)
    assert error.value.attempt == published.attempt and not meeting.has_no_route(store, published.attempt)
    meeting.report_no_route(store, published.attempt)
    assert meeting.has_no_route(store, published.attempt) and not meeting.has_no_route(store, published.attempt + 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert meeting.published(store) is None
    with pytest.raises(LaunchError, match="rank 0 did not start"):
        meeting.introduce_through(store, Place(1, 1, 2), "host", until=0.0, on_retry=lambda _: None)


def test_another_program_on_the_port_is_no_store(monkeypatch, address):
    with socket.create_server(("localhost", 0)) as listener:
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))

        def answer():
            connection, _ = listener.accept()
            connection.recv(100)
            connection.close()

        threading.Thread(target=answer).start()
        with pytest.raises(StoreError):
            torchrun_store.connect(attempt_seconds=5.0)
    monkeypatch.setenv("MASTER_ADDR", "a..b")
    with pytest.raises(StoreError):
        torchrun_store.connect(attempt_seconds=5.0)


def test_ranks_that_torchrun_counts_differently_start_together(tmp_path, model_dir, server, address):
    """A host that joins again counts other restarts than one that failed. The store holds keys of earlier attempts."""
    part = tmp_path / "part-00000"
    datasets.Dataset.from_dict({"input_ids": [[1, 5, 6, 2]] * 4, "labels": [[1, 5, 6, 2]] * 4}).save_to_disk(part)
    words = [ROOT / "train.py", "--pretrained", model_dir, "--dataset", part, "--max_length", 64, "--max_steps", 1]
    words += ["--plugin", "zero2", "--mixed_precision", "fp32", "--save_dir", tmp_path / "save"]
    words += ["--tensorboard_dir", tmp_path / "tb", "--config_file", tmp_path / "json", "--dist_timeout", 60]
    ranks = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(1 - rank)}
        (tmp_path / str(rank)).mkdir()
        ranks.append(fork_server.start(words, tmp_path / str(rank), env={**os.environ, **variables}))
    assert [rank.wait(90.0) for rank in ranks] == [0, 0], ranks[0].errors + ranks[1].errors


def test_values_are_exchanged_with_pytorchs_client_until_the_server_ends(server, store):
    process, _ = server
    assert store.get("of PyTorch") == b"words" and store.get("missing") is None
    store.set("of ours", b"more words")
    assert store.add("number", 2) == 2 and store.add("number", 3) == 5
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "more words 6\n"
    assert store.is_open()
    process.kill()
    process.wait()
    assert not store.is_open()
    with pytest.raises(StoreError):
        store.get("number")
