"""A hostfile as typed hosts, and each mistake in it as one line `hostfile:LINE: ...`.

Accepted on each line: NAME, USER@NAME, NAME:PORT, [IPV6]:PORT, followed by slots=N, as in hostfiles of MPI and
DeepSpeed. `#` begins a comment. `colossalai run` itself resolves each whole line as a name (cli/launcher/hostinfo.py),
so it gets the names alone, and a user or port has to be in ~/.ssh/config, which it reads.
"""

import concurrent.futures
import contextlib
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colossal_llama2.errors import UserError

MAX_BYTES = 1 << 20
MAX_PORT = 65535
SSH_PORT = 22
LOOKUPS_AT_ONCE = 64
# Underscores are no letters of host names, but /etc/hosts and Docker accept them.
NAME = re.compile(r"(?!-)[\w.-]{1,253}")
USER = re.compile(r"[A-Za-z_][\w.-]*\$?")
# In hostfiles of MPI, these follow a host. Only the number of slots concerns a launch of ours.
MPI_WORD = re.compile(r"(slots|max_slots|max-slots)=(.*)")
EXAMPLE = "cp hostfile.example hostfile and write your hosts into it"


class HostfileError(UserError):
    """Mistakes in a hostfile. `lines` has one for each, which begins with the file's name and the line's number."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = list(lines)


@dataclass(frozen=True)
class Host:
    """One host of a job.

    Attributes:
        name: its name or address, without the brackets of IPv6.
        line: the number of its line in the hostfile.
        user, port: the login, where the hostfile has it.
        slots: the number of processes, where the hostfile has it.
    """

    name: str
    line: int = 0
    user: str | None = None
    port: int | None = None
    slots: int | None = None

    @property
    def destination(self) -> str:
        """The host as OpenSSH's `ssh` and `ssh://` addresses have it."""
        user = f"{self.user}@" if self.user else ""
        if self.port is None:
            return f"{user}{self.name}"
        return f"ssh://{user}{f'[{self.name}]' if ':' in self.name else self.name}:{self.port}"


class _LineError(Exception):
    """What is wrong with one line."""


def read(path: Path | str) -> list[Host]:
    """The hosts of a file, in order. No name is looked up.

    Raises:
        HostfileError: the file cannot be read, names no host, or has lines that are wrong.
    """
    hosts: list[Host] = []
    mistakes: list[str] = []
    for number, line in enumerate(_lines(path), start=1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        try:
            host = _host(words, number)
            twin = next((other for other in hosts if _login(other) == _login(host)), None)
            if twin is not None:
                raise _LineError(
                    f"{host.name} is on line {twin.line} already; name each host once, with slots=N for its processes"
                )
            hosts.append(host)
        except _LineError as error:
            mistakes.append(f"{path}:{number}: {error}")
    if not hosts and not mistakes:
        mistakes.append(f"{path}: names no host; {EXAMPLE}")
    if mistakes:
        raise HostfileError(mistakes)
    return hosts


def read_and_resolve(path: Path | str) -> dict[Host, list[str]]:
    """The hosts of a file with the addresses of each, looked up all at once.

    Raises:
        HostfileError: as `read`, and for a host without an address, two lines of one host, and hosts of a loopback
            address among others.
    """
    hosts = read(path)
    with concurrent.futures.ThreadPoolExecutor(min(len(hosts), LOOKUPS_AT_ONCE)) as pool:
        answers = dict(zip(hosts, pool.map(lambda host: addresses(host.name), hosts), strict=True))
    mistakes = []
    owners: dict[tuple[str, int], Host] = {}
    for host, found in answers.items():
        if isinstance(found, str):
            mistakes.append(
                f"{path}:{host.line}: this host cannot find {host.name} ({found}); write a name that /etc/hosts or DNS "
                "has on every host (a Host entry of ~/.ssh/config is not enough), or an address"
            )
            continue
        # All names of this host's loopback are one host.
        places = {("loopback" if is_loopback(address) else address, host.port or SSH_PORT) for address in found}
        twin = next((owners[place] for place in places if place in owners), None)
        if twin is not None:
            mistakes.append(
                f"{path}:{host.line}: {host.name} and {twin.name} of line {twin.line} are one host "
                f"({', '.join(found)}); name each host once"
            )
        owners.update(dict.fromkeys(places, host))
    mistakes += _loopback_mistakes(path, hosts)
    if mistakes:
        raise HostfileError(sorted(mistakes, key=_line_number))
    return {host: found for host, found in answers.items() if not isinstance(found, str)}


def addresses(name: str) -> list[str] | str:
    """The addresses of a name, IPv4 first as libraries return them, or the reason why there are none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_this_host(name: str) -> bool:
    """Whether a name or address is one of this host: a socket can be bound to it."""
    found = addresses(name)
    if isinstance(found, str):
        return False
    for address in found:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            return True
    return False


def is_loopback(address: str) -> bool:
    """Whether only the host itself reaches an IP address, by its form. False for other texts."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def launcher_lines(path: Path | str, hosts: Sequence[Host], launcher: str) -> list[str]:
    """The lines for a launcher: names for colossalai, and what `ssh` accepts as its destination for ssh.

    Raises:
        HostfileError: a user or a port, which colossalai would look up as a part of the name.
    """
    if launcher != "colossalai":
        return [host.destination for host in hosts]
    mistakes = []
    for host in hosts:
        entry = [f"User {host.user}"] if host.user else []
        entry += [f"Port {host.port}"] if host.port not in (None, SSH_PORT) else []
        if entry:
            mistakes.append(
                f"{path}:{host.line}: colossalai run takes no user or port from a hostfile; write {host.name} alone, "
                f'and "{"; ".join([f"Host {host.name}", *entry])}" into ~/.ssh/config, each on a line of its own'
            )
    if mistakes:
        raise HostfileError(mistakes)
    return [host.name for host in hosts]


def check_slots(path: Path | str, hosts: Sequence[Host], per_host: int) -> None:
    """Raise HostfileError for each host with another number of slots than the processes that it is going to get."""
    mistakes = [
        f"{path}:{host.line}: slots={host.slots} for {host.name}, but NPROC_PER_NODE is {per_host}, the same for all "
        "hosts; make them equal, or leave slots out"
        for host in hosts
        if host.slots not in (None, per_host)
    ]
    if mistakes:
        raise HostfileError(mistakes)


def _lines(path: Path | str) -> list[str]:
    """The lines of a file, whatever ends them. Raises HostfileError if it is not a small text file."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise HostfileError([f"no file {path}; {EXAMPLE}"]) from None
    except OSError as error:
        raise HostfileError([f"{path}: {error.strerror}; give a text file with one host per line"]) from error
    if len(content) > MAX_BYTES:
        raise HostfileError([f"{path}: more than {MAX_BYTES >> 20} MiB; give a text file with one host per line"])
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise HostfileError([f"{path}: not UTF-8 text; save it as UTF-8 without further marks"])
    return re.split(r"\r\n|\r|\n", text)


def _host(words: Sequence[str], line: int) -> Host:
    """The host that the words of a line describe. Raises _LineError."""
    first, *rest = words
    if re.search(r"[,\[\]{}*]", first) and not first.startswith("[") and "@[" not in first:
        raise _LineError(
            f"{first!r} is not one host; write one per line (Slurm's lists: scontrol show hostnames {first!r})"
        )
    slots = None
    for word in rest:
        found = MPI_WORD.fullmatch(word)
        if found is None:
            raise _LineError(f"{word!r} after {first}; only slots=N and a comment may follow; write one host per line")
        number = _whole(found[2], most=1_000_000)
        if number is None:
            raise _LineError(f"{word!r}; give a whole number of processes from 1 on, such as slots=8")
        slots = number if found[1] == "slots" else slots
    user, at, place = first.rpartition("@")
    if at and not USER.fullmatch(user):
        raise _LineError(f"{first!r}: {user!r} is not a valid user name; write user@host")
    name, port = _name_and_port(place)
    return Host(name, line, user if at else None, port, slots)


def _name_and_port(place: str) -> tuple[str, int | None]:
    """Split NAME:PORT, [IPV6]:PORT, or a plain IPv6 address, which has no port."""
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", place)
    if bracketed:
        name, port = bracketed[1], bracketed[2]
    elif place.count(":") > 1:
        name, port = place, None
    else:
        name, colon, port_text = place.partition(":")
        port = port_text if colon else None
    if ":" in name:
        name = _ipv6(name)
    elif bracketed:
        raise _LineError(f"{place!r}: brackets are for IPv6 addresses, such as [fd00::1]:22; write a name without them")
    else:
        _check_name(name)
    if port is None:
        return name, None
    number = _whole(port, most=MAX_PORT)
    if number is None:
        raise _LineError(
            f"{place!r}: {port!r} is not a valid port; give a number from 1 to {MAX_PORT}, or leave the colon out"
        )
    # MPICH's hostfiles have the number of processes after the colon.
    if number < 1024 and number != SSH_PORT:
        raise _LineError(
            f"{place!r}: {number} is an unlikely port of ssh; "
            f"if it is the number of processes, write {name} slots={number}"
        )
    return name, number


def _ipv6(text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise _LineError(f"{text!r} is not a valid IPv6 address; write name:port, or [address]:port for IPv6") from None
    if address.is_unspecified:
        raise _LineError(f"{text} is not the address of a host; write the host's own")
    if address.is_link_local and "%" not in text:
        raise _LineError(f"{text} is valid on one link only; write the host's global or unique local address")
    return text


def _check_name(name: str) -> None:
    if re.fullmatch(r"[\d.]+", name):
        try:
            address = ipaddress.IPv4Address(name)
        except ValueError:
            raise _LineError(f"{name!r} is not a valid IPv4 address; write four numbers from 0 to 255") from None
        if address.is_unspecified:
            raise _LineError(f"{name} is not the address of a host; write the host's own")
    elif not NAME.fullmatch(name):
        raise _LineError(
            f"{name!r} is not a valid host name; write letters, digits, dots and hyphens, one host per line"
        )


def _whole(text: str, *, most: int) -> int | None:
    """The number from 1 to `most` that a text is, or None."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) and 1 <= int(text) <= most else None


def _login(host: Host) -> tuple[str, int]:
    return host.name.rstrip(".").casefold(), host.port or SSH_PORT


def _line_number(mistake: str) -> int:
    found = re.search(r":(\d+): ", mistake)
    return int(found[1]) if found else 0


def _loopback_mistakes(path: Path | str, hosts: Sequence[Host]) -> list[str]:
    """A line for each loopback address or "localhost" among several hosts: each host would take it for itself.

    A host's own name that resolves to a loopback address is no mistake of the hostfile.
    """
    if len(hosts) == 1:
        return []
    return [
        f"{path}:{host.line}: {host.name} is a different host on each host; write the name or address by which the "
        "others reach it"
        for host in hosts
        if is_loopback(host.name) or re.fullmatch(r"(localhost|ip6-localhost)(\..*)?", host.name.casefold())
    ]
