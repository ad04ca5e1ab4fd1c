"""The hostfile: what is accepted, one line for each mistake, and what a launcher gets."""

import socket

import pytest

from colossal_llama2.cluster import hostfile
from colossal_llama2.cluster.hostfile import Host, HostfileError, read, read_and_resolve
from colossal_llama2.train import before_launch

# Names of /etc/hosts for these tests.
ADDRESSES = {
    "node1": ["10.0.0.1"],
    "node2": ["10.0.0.2"],
    "alias2": ["10.0.0.2"],
    "10.0.0.1": ["10.0.0.1"],
    "10.0.0.3": ["10.0.0.3"],
    "fd00::4": ["fd00::4"],
    "self": ["127.0.1.1"],
    "localhost": ["::1", "127.0.0.1"],
    "127.0.0.1": ["127.0.0.1"],
}


@pytest.fixture
def write(tmp_path):
    def written(content):
        path = tmp_path / "hostfile"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


@pytest.fixture
def names(monkeypatch):
    def look_up(name, *_, **__):
        if name not in ADDRESSES:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in ADDRESSES[name]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def mistakes(path, reader=read):
    with pytest.raises(HostfileError) as caught:
        reader(path)
    return [line.removeprefix(str(path)).lstrip(":") for line in caught.value.lines]


def test_the_forms_of_mpi_deepspeed_and_windows_are_read(write):
    path = write(
        b"\xef\xbb\xbf# cluster\r\nnode1 slots=8 # first\r\n\r\nuser@node2:2222 slots=8 max_slots=8\r\n"
        b"\t[fd00::4]:22\r\n10.0.0.3"
    )
    assert read(path) == [
        Host("node1", 2, slots=8),
        Host("node2", 4, user="user", port=2222, slots=8),
        Host("fd00::4", 5, port=22),
        Host("10.0.0.3", 6),
    ]
    assert [host.destination for host in read(path)] == [
        "node1",
        "ssh://user@node2:2222",
        "ssh://[fd00::4]:22",
        "10.0.0.3",
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("node1,node2", "1: 'node1,node2' is not one host; write one per line"),
        ("node[1-4]", "scontrol show hostnames 'node[1-4]'"),
        ("node1 node2", "1: 'node2' after node1; only slots=N and a comment may follow"),
        ("node1 slots=many", "1: 'slots=many'; give a whole number of processes"),
        ("node1 slots=0", "1: 'slots=0'; give a whole number"),
        ("node1:8", "if it is the number of processes, write node1 slots=8"),
        ("node1:ssh", "'ssh' is not a valid port; give a number from 1 to 65535"),
        ("node1:99999", "'99999' is not a valid port"),
        ("0.0.0.0", "0.0.0.0 is not the address of a host"),
        ("::", ":: is not the address of a host"),
        ("fe80::1", "fe80::1 is valid on one link only"),
        ("fd00::zz", "'fd00::zz' is not a valid IPv6 address"),
        ("10.0.0.256", "'10.0.0.256' is not a valid IPv4 address"),
        ("[workers]", "brackets are for IPv6 addresses"),
        ("-oProxyCommand=x", "is not a valid host name"),
        ("a b@node1", "'b@node1' after a"),
        ("@node1", "'' is not a valid user name"),
        ("node1\nNODE1.", "2: NODE1. is on line 1 already; name each host once, with slots=N"),
    ],
)
def test_a_mistake_is_reported_with_its_line_and_cure(line, message, write):
    (found,) = mistakes(write(line + "\n"))
    assert message in found


def test_all_mistakes_are_reported_at_once(write):
    assert [line.split(":")[0] for line in mistakes(write("a,b\n\nnode1\nnode1 x\n"))] == ["1", "4"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "names no host; cp hostfile.example hostfile"),
        ("# nothing\r\n \r\n", "names no host"),
        ("node1\n".encode("utf-16"), "not UTF-8 text; save it as UTF-8"),
        (b"n" * (2 << 20), "more than 1 MiB"),
    ],
)
def test_what_is_no_hostfile_is_refused(content, message, write):
    (found,) = mistakes(write(content))
    assert message in found


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "cp hostfile.example hostfile" in mistakes(tmp_path / "none")[0]
    assert "Is a directory; give a text file" in mistakes(tmp_path)[0]


def test_addresses_need_no_reverse_dns(write, names):
    path = write("node1\n10.0.0.3\nfd00::4\n")
    assert list(read_and_resolve(path).values()) == [["10.0.0.1"], ["10.0.0.3"], ["fd00::4"]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("node1\nnode9\n", "2: this host cannot find node9 (Name or service not known)"),
        ("node1\n10.0.0.1\n", "2: 10.0.0.1 and node1 of line 1 are one host (10.0.0.1)"),
        ("node2\nalias2\n", "2: alias2 and node2 of line 1 are one host (10.0.0.2)"),
        ("node1\nlocalhost\n", "2: localhost is a different host on each host"),
        ("127.0.0.1\nnode1\n", "1: 127.0.0.1 is a different host on each host"),
    ],
)
def test_names_are_looked_up_and_compared(content, message, write, names):
    (found,) = mistakes(write(content), read_and_resolve)
    assert message in found


def test_two_ports_of_one_address_and_debian_s_own_name_are_accepted(write, names):
    assert len(read_and_resolve(write("node1:2222\nnode1:2223\nself\n"))) == 3


def test_colossalai_gets_names_and_ssh_gets_logins(write):
    path = write("node1 slots=2\nme@node2:2222\n")
    assert hostfile.launcher_lines(path, read(path), "ssh") == ["node1", "ssh://me@node2:2222"]
    (found,) = mistakes(path, lambda given: hostfile.launcher_lines(given, read(given), "colossalai"))
    assert "2: colossalai run takes no user or port" in found and '"Host node2; User me; Port 2222"' in found


def test_the_world_has_the_processes_of_all_hosts(write):
    path = write("# two\r\nnode1 slots=4\r\nnode2\r\n")
    assert before_launch.world_size("4", str(path)) == 8
    (found,) = mistakes(path, lambda given: before_launch.world_size("8", str(given)))
    assert found.startswith("2: slots=4 for node1, but NPROC_PER_NODE is 8")
