"""The pretended hosts themselves: separate networks, names and processes; shared files; nothing left at the end."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from tests.cluster.hosts import Cluster
from tests.conftest import ROOT


def ssh(cluster: Cluster, host: int, command: str) -> tuple[int, str]:
    """Run a command on a host from node1. Returns exit code and output."""
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=1", cluster.name(host), command]
    process = cluster.run(1, words, timeout=20)
    return process.returncode, process.stdout.strip()


def test_hosts_are_apart_and_can_be_cut_off(make_cluster, tmp_path):
    cluster = make_cluster(2)
    (tmp_path / "shared").write_text("seen by all")
    assert ssh(cluster, 2, f"hostname; cat {tmp_path}/shared") == (0, "node2\nseen by all")
    assert cluster.run(1, ["hostname"]).stdout == "node1\n"
    # The processes of one are not those of the other.
    assert "sshd" in cluster.run(2, ["ps", "ax"]).stdout and len(cluster.run(2, ["ps", "ax"]).stdout.splitlines()) < 10
    cluster.hide(2, tmp_path)
    assert ssh(cluster, 2, f"ls {tmp_path}") == (0, "") and (tmp_path / "shared").exists()
    cluster.cut(2)
    assert ssh(cluster, 2, "hostname")[0] == 255
    cluster.restore(2)
    assert ssh(cluster, 2, "hostname") == (0, "node2")
    cluster.authorize(2, False)
    assert ssh(cluster, 2, "hostname")[0] == 255
    cluster.authorize(2, True)
    cluster.kill(2)
    assert ssh(cluster, 2, "hostname")[0] == 255


def test_nothing_is_left_of_a_test_that_was_killed(make_cluster, tmp_path):
    make_cluster(1)
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom tests.cluster.hosts import Cluster\n"
        "cluster = Cluster(1, Path(sys.argv[1])); cluster.up()\nprint(cluster.process(1), flush=True)\ninput()\n"
    )
    folder = tmp_path / "cluster"
    words = [sys.executable, "-c", script, folder]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = int(process.stdout.readline())
    waiting = os.pidfd_open(first)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # A descriptor of a process becomes readable when the process has ended.
    assert select.select([waiting], [], [], 10)[0]
    os.close(waiting)
    assert not Path(f"/proc/{first}/ns/net").exists()
    # Its folder can be removed by the next one.
    Cluster.load(folder).down()
    assert not folder.exists()
