"""Which network interface the ranks of several hosts use for gloo, and whether the named ones exist.

gloo takes the interface of the address that the host's own name resolves to. Debian and Ubuntu enter that name as
127.0.1.1 in /etc/hosts, an address that other hosts cannot reach. So unless GLOO_SOCKET_IFNAME is set, it is set to the
interface whose route leads to the other hosts. A job on GPUs makes a gloo group as well (engine.py). NCCL looks for
an interface itself, and never takes a loopback one.
"""

import ipaddress
import os
import socket
from contextlib import suppress

from colossal_llama2.cluster.hostfile import is_loopback
from colossal_llama2.errors import LaunchError

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
# Nothing is sent there; UDP only needs some port to choose a route.
ANY_PORT = 9


def check_given() -> None:
    """Raise LaunchError if one of the variables names an interface that this host does not have."""
    given = {name: os.environ.get(name, "").strip() for name in (GLOO, NCCL)}
    if not any(given.values()):
        return
    present = sorted(_addresses())
    for name, value in given.items():
        missing = _missing(name, value, present)
        if missing:
            raise LaunchError(
                f"{name}={value}: {socket.gethostname()} has no network interface {missing}, it has "
                f"{', '.join(present)}; name one of them, or unset the variable to use the route to MASTER_ADDR"
            )


def _missing(name: str, value: str, present: list[str]) -> str | None:
    """The first interface that does not exist.

    gloo reads exact names. NCCL reads prefixes, of which one must match; "=" asks for exact names, "^" excludes them.
    """
    words = [word.strip() for word in value.lstrip("^=").split(",") if word.strip()]
    if not words or (name == NCCL and value.startswith("^")):
        return None
    if name == GLOO:
        return next((word for word in words if word not in present), None)
    is_exact = value.startswith("=")
    names = [word.partition(":")[0] for word in words]
    found = any(other == word if is_exact else other.startswith(word) for word in names for other in present)
    return None if found else ", ".join(names)


def use_route_to(hosts: list[str]) -> str | None:
    """Unless it is set, set GLOO_SOCKET_IFNAME to the interface through which this host reaches others.

    Args:
        hosts: names or addresses; the first whose route is no loopback decides.

    Returns:
        The interface; None if the variable was set, or no route was found.
    """
    if os.environ.get(GLOO, "").strip():
        return None
    for host in hosts:
        address = address_towards(host)
        interface = None if address is None or is_loopback(address) else _interface_of(address)
        if interface is not None:
            os.environ[GLOO] = interface
            return interface
    return None


def address_towards(host: str) -> str | None:
    """The address of this host from which packets to another one are sent; None without a route."""
    with suppress(OSError, UnicodeError):
        for family, kind, protocol, _, target in socket.getaddrinfo(host, ANY_PORT, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return probe.getsockname()[0]
    return None


def _interface_of(address: str) -> str | None:
    wanted = ipaddress.ip_address(address.partition("%")[0])
    for name, addresses in _addresses().items():
        if wanted in addresses:
            return name
    return None


def _addresses() -> dict[str, set[ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """The IP addresses of each interface."""
    import psutil

    found: dict[str, set[ipaddress.IPv4Address | ipaddress.IPv6Address]] = {}
    for name, entries in psutil.net_if_addrs().items():
        numbers = found.setdefault(name, set())
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                numbers.add(ipaddress.ip_address(entry.address.partition("%")[0]))
    return found
