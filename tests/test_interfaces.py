"""The network interface that gloo uses, and variables that name one."""

import os
import socket
from unittest import mock

import pytest

from colossal_llama2.cluster.hostfile import is_loopback
from colossal_llama2.engine.ranks import interfaces
from colossal_llama2.errors import LaunchError

TABLE = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.9.0.1", "fe80::1%eth0"], "ib0": ["fd00::7"]}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with these interfaces, and neither variable."""
    import ipaddress

    parsed = {name: {ipaddress.ip_address(word.partition("%")[0]) for word in words} for name, words in TABLE.items()}
    monkeypatch.setattr(interfaces, "_addresses", lambda: parsed)
    with mock.patch.dict(os.environ):
        for name in (interfaces.GLOO, interfaces.NCCL):
            os.environ.pop(name, None)
        yield


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ({"node1": "10.9.0.1"}, "eth0"),
        ({"node1": "fd00::7"}, "ib0"),
        ({"node1": "fe80::1%eth0"}, "eth0"),
        # As Debian's /etc/hosts has it on the host of rank 0: the way to a rank on another host decides.
        ({"node1": "127.0.1.1", "10.9.0.2": "10.9.0.1"}, "eth0"),
        ({"node1": "127.0.1.1"}, None),
        ({"node1": None, "10.9.0.2": "10.9.0.1"}, "eth0"),
        ({"node1": "10.200.0.1"}, None),
    ],
)
def test_gloo_uses_the_interface_of_the_route(monkeypatch, routes, expected):
    monkeypatch.setattr(interfaces, "address_towards", routes.get)
    assert interfaces.use_route_to(list(routes)) == expected
    assert os.environ.get(interfaces.GLOO) == expected


def test_a_given_interface_is_kept(monkeypatch):
    monkeypatch.setenv(interfaces.GLOO, "ib0")
    monkeypatch.setattr(interfaces, "address_towards", {"node1": "10.9.0.1"}.get)
    assert interfaces.use_route_to(["node1"]) is None and os.environ[interfaces.GLOO] == "ib0"


@pytest.mark.parametrize(
    ("name", "value", "missing"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", None),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", None),
        ("GLOO_SOCKET_IFNAME", "eth0,eth9", "eth9"),
        ("GLOO_SOCKET_IFNAME", "eth", "eth"),
        ("GLOO_SOCKET_IFNAME", " ", None),
        ("NCCL_SOCKET_IFNAME", "eth", None),
        ("NCCL_SOCKET_IFNAME", "ens,ib", None),
        ("NCCL_SOCKET_IFNAME", "ens,bond", "ens, bond"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", None),
        ("NCCL_SOCKET_IFNAME", "=eth0", None),
        ("NCCL_SOCKET_IFNAME", "=eth", "eth"),
    ],
)
def test_interfaces_that_do_not_exist_are_refused(monkeypatch, name, value, missing):
    monkeypatch.setenv(name, value)
    if missing is None:
        return interfaces.check_given()
    with pytest.raises(LaunchError) as error:
        interfaces.check_given()
    text = f"{name}={value}: {socket.gethostname()} has no network interface {missing}, it has eth0, ib0, lo; name one"
    assert text in str(error.value)


def test_addresses_of_one_host_alone_are_known():
    assert all(map(is_loopback, ("127.0.0.1", "127.0.1.1", "::1", "::ffff:127.0.1.1")))
    assert not any(map(is_loopback, ("10.0.0.1", "fe80::1%eth0", "::ffff:10.0.0.1")))


def test_the_route_to_this_host_itself():
    assert interfaces.address_towards("127.0.0.1") == "127.0.0.1"
    assert interfaces.address_towards("no-such-host.invalid") is None
    assert interfaces.address_towards("a..b") is None
