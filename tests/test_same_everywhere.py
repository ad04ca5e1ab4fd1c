"""A job whose ranks differ in code, software, flags or files is refused on all of them before step 1."""

import os
import shutil
import socket

import datasets
import pytest
import safetensors.torch

from colossal_llama2.train import same_everywhere
from tests import fork_server
from tests.conftest import ROOT
from tests.launching import free_port


def test_what_differs_is_named_with_hosts_and_values():
    hosts = ["node1", "node1", "node2", "node3"]
    facts = [{"torch": "2.5.1", "--lr": "0.1"} for _ in hosts]
    assert same_everywhere.differences(hosts, facts) == []
    facts[2] = {"torch": "2.4.0", "--lr": "0.1"}
    assert same_everywhere.differences(hosts, facts) == ["torch: node2 has 2.4.0, node1 (and 1 more) has 2.5.1"]
    # Two ranks of a host, a flag of a newer version, and no majority.
    facts = [{"--lr": "1"}, {"--lr": "2"}, {"--lr": "1", "--new": "3"}]
    assert same_everywhere.differences(["node1", "node1", "node2"], facts) == [
        "--lr: rank 1 on node1 has 2, rank 0 on node1 (and 1 more) has 1",
        "--new: node2 has 3, node1 has none",
    ]
    assert same_everywhere.differences(["node1", "node2"], [{"torch": "1"}, {"torch": "2"}]) == [
        "torch: node2 has 2, node1 has 1"
    ]


@pytest.fixture
def start(tmp_path, model_dir):
    """Start a rank of a job of two, by hand, with data and flags of its own; both are ended with the test."""
    port, ranks = free_port(), []
    places = ["--save_dir", tmp_path / "save", "--tensorboard_dir", tmp_path / "tb", "--config_file", tmp_path / "json"]

    def start_rank(rank, part, *flags):
        words = [ROOT / "train.py", "--pretrained", model_dir, "--dataset", part, "--max_length", 64, "--max_steps", 2]
        words += ["--plugin", "zero2", "--mixed_precision", "fp32", *places, *flags]
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        folder = tmp_path / f"rank-{rank}"
        folder.mkdir()
        ranks.append(fork_server.start(words, folder, env={**os.environ, **variables}))
        return ranks[-1]

    yield start_rank
    for rank in ranks:
        rank.kill()


@pytest.fixture
def parts(tmp_path):
    """Two prepared folders with other samples."""
    paths = [tmp_path / f"part-{number:05d}" for number in range(2)]
    for number, path in enumerate(paths):
        rows = [[1, 5 + number, 6, 2]] * 8
        datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}).save_to_disk(path)
    return paths


def test_ranks_with_other_flags_and_data_are_refused(tmp_path, start, parts):
    ranks = [start(0, parts[0], "--lr", "1e-4"), start(1, parts[1], "--lr", "2e-4")]
    for rank in ranks:
        assert rank.wait(60.0) == 2, rank.errors
    assert "Traceback" not in ranks[0].errors + ranks[1].errors and "error: " not in ranks[1].errors
    host = socket.gethostname()
    assert (
        f"error: the ranks of this job differ, so it would not train one model: --lr: rank 1 on {host} has 0.0002, "
        f"rank 0 on {host} has 0.0001; the samples of --dataset: rank 1 on {host} has "
    ) in ranks[0].errors
    assert not (tmp_path / "save").exists()


def test_other_weights_of_the_same_shape_are_noticed(tmp_path, model_dir):
    shutil.copytree(model_dir, tmp_path / "model")
    assert same_everywhere._weights_digest(str(model_dir)) == same_everywhere._weights_digest(str(tmp_path / "model"))
    file = next((tmp_path / "model").glob("*.safetensors"))
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, file, {"format": "pt"})
    assert same_everywhere._weights_digest(str(model_dir)) != same_everywhere._weights_digest(str(tmp_path / "model"))


def test_a_copy_of_the_data_in_another_place_is_the_same(tmp_path, start, parts):
    shutil.copytree(parts[0], tmp_path / "copy" / "part-00000")
    ranks = [start(0, parts[0]), start(1, tmp_path / "copy" / "part-00000")]
    assert [rank.wait(60.0) for rank in ranks] == [0, 0], ranks[0].errors + ranks[1].errors
