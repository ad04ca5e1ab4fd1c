"""What one host reports about itself: a program of its own, which `survey` sends to each host over ssh.

It uses only the standard library, since the package itself may be missing or differ there. Its answer is one line of
JSON after MARK, so that whatever a login prints around it does no harm. Each part of the report runs in a thread: one
that hangs, such as on a dead network file system, leaves the others intact.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pwd
import resource
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

MARK = "colossal_llama2.host_report "
PACKAGE = "colossal_llama2"
DISTRIBUTIONS = ("torch", "colossalai", "transformers")
NCCL_PREFIX = "nvidia-nccl-"
# Files of a folder that are compared one by one. Of more, only names and sizes are, together.
MAX_FILES = 5000
# Another host's file may appear late on a network file system.
APPEARS_SECONDS = 3.0
RETRY_SECONDS = 0.05
# Linux: the ioctl that returns an interface's IPv4 address.
SIOCGIFADDR = 0x8915
# A shell that understands what `colossalai run` sends prints nothing and ends with 0.
SHELL_TEST = 'cd / && export COLOSSAL_LLAMA2_TEST="a b" && test "$COLOSSAL_LLAMA2_TEST" = "a b"'
SHELL_SECONDS = 3.0
GPU_QUERY = "name,driver_version,memory.total,memory.used"
GPU_SECONDS = 8.0


def main(request_text: str) -> None:
    """Print the report that a request (JSON) asks for, and exit even if a part of it hangs."""
    print(MARK + json.dumps(report(json.loads(request_text))), flush=True)
    os._exit(0)


def report(request: dict) -> dict:
    """All parts of the report, by name. A part that failed is {"failed": reason}, one that hangs is missing."""
    parts: dict = {"started": time.time()}
    threads = []
    for name, part in PARTS.items():
        threads.append(threading.Thread(target=_run, args=(name, part, request, parts), daemon=True))
        threads[-1].start()
    begin = time.monotonic()
    for name, thread in zip(PARTS, threads, strict=True):
        # Model and data may be many files.
        seconds = request["path_seconds"] if name == "paths" else request["seconds"]
        thread.join(max(begin + seconds - time.monotonic(), 0))
    return {**parts, "ended": time.time()}


def _run(name: str, part, request: dict, parts: dict) -> None:  # type: ignore[no-untyped-def]
    try:
        result = part(request)
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {error}"}
    parts[name] = result


def host(request: dict) -> dict:
    """Name, login shell and limits of the host."""
    name, user = socket.gethostname(), pwd.getpwuid(os.getuid())
    try:
        addresses, problem = _addresses(name), None
    except OSError as error:
        addresses, problem = [], error.strerror
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return {
        "name": name,
        "user": user.pw_name,
        "addresses": addresses,
        "name_problem": problem,
        "shell": user.pw_shell,
        "shell_problem": _shell_problem(user.pw_shell),
        "locked_memory": None if soft == resource.RLIM_INFINITY else soft,
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
    }


def _addresses(name: str) -> list:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(entry[4][0] for entry in found))


def _shell_problem(shell: str) -> str | None:
    """Why the login shell does not run what `colossalai run` sends; None if it does."""
    try:
        done = subprocess.run(
            [shell or "/bin/sh", "-c", SHELL_TEST],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SHELL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = done.stdout.decode(errors="replace").split("\n")
    return next((line.strip() for line in lines if line.strip()), f"exit code {done.returncode}")


def software(request: dict) -> dict:
    """Versions by metadata, the commands of the environment, and the hash of each file of the package."""
    versions = {name: _version(name) for name in DISTRIBUTIONS}
    nccl = [
        found.version
        for found in importlib.metadata.distributions()
        if (found.metadata["Name"] or "").lower().startswith(NCCL_PREFIX)
    ]
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "executable": sys.executable,
        "versions": {**versions, "NCCL": nccl[0] if nccl else None},
        "torchrun": shutil.which("torchrun", path=request["path"]),
        "package": _package_files(),
        "scripts": {name: _digest(Path(name)) for name in request["scripts"] if Path(name).is_file()},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_files() -> dict | None:
    """Hashes of the package's source, by path below it; None if Python does not find the package."""
    found = importlib.util.find_spec(PACKAGE)
    places = list(found.submodule_search_locations or []) if found else []
    if not places:
        return None
    top = Path(places[0])
    return {str(path.relative_to(top)): _digest(path) for path in sorted(top.rglob("*.py"))}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def gpus(request: dict) -> dict:
    """What nvidia-smi lists: name, driver, memory in MiB. Without it, an empty list."""
    program = shutil.which("nvidia-smi", path=f"{request['path']}:{os.defpath}:/usr/local/nvidia/bin")
    if program is None:
        return {"list": []}
    words = [program, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=GPU_SECONDS)
    except subprocess.TimeoutExpired:
        return {"slow": GPU_SECONDS}
    text = done.stdout.decode(errors="replace").strip()
    if done.returncode:
        lines = (text or done.stderr.decode(errors="replace").strip()).split("\n")
        return {"failed": f"nvidia-smi: {lines[0].strip() or f'exit code {done.returncode}'}"}
    rows = [[cell.strip() for cell in line.split(",")] for line in text.split("\n") if line.strip()]
    return {"list": [row for row in rows if len(row) == 4]}


def paths(request: dict) -> dict:
    """For each path of the request: sizes of its files and hashes of the small ones; None where nothing is there."""
    return {path: _contents(Path(path), request["hash_bytes"]) for path in request["paths"]}


def _contents(path: Path, hash_bytes: int) -> dict | None:
    if path.is_file():
        return {"bytes": path.stat().st_size, "files": {path.name: _size_and_hash(path, hash_bytes)}}
    if not path.is_dir():
        return None
    files: dict = {}
    total, rest = 0, hashlib.sha256()
    for folder, names, entries in os.walk(path):
        # In a fixed order on every host.
        names.sort()
        for entry in sorted(entries):
            file = Path(folder, entry)
            # A named pipe or a device would block its reader.
            size = file.stat().st_size if file.is_file() else 0
            total += size
            name = str(file.relative_to(path))
            if len(files) < MAX_FILES:
                files[name] = _size_and_hash(file, hash_bytes)
            else:
                rest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
    return {"bytes": total, "files": files, "rest": rest.hexdigest()[:16]}


def _size_and_hash(path: Path, hash_bytes: int) -> list:
    size = path.stat().st_size if path.is_file() else 0
    return [size, _digest(path) if 0 < size <= hash_bytes else None]


def save_folder(request: dict) -> dict | None:
    """Whether the folder of the checkpoints is the same one here: its probe file appears, files can be written."""
    asked = request["save"]
    if asked is None:
        return None
    folder, probe = Path(asked["folder"]), Path(asked["probe"])
    end = time.monotonic() + APPEARS_SECONDS
    while not probe.is_file() and time.monotonic() < end:
        time.sleep(RETRY_SECONDS)
    is_there = folder.is_dir()
    return {
        "exists": is_there,
        "sees_probe": probe.is_file(),
        "write_problem": _write_problem(folder) if is_there else None,
        "flock": _flock(probe) if probe.is_file() else None,
        "free": shutil.disk_usage(folder).free if is_there else None,
        "owner_alive": _is_alive(asked["owner"], Path(asked["lock"])) if asked["owner"] else None,
    }


def _write_problem(folder: Path) -> str | None:
    path = folder / f".token-{secrets.token_hex(4)}"
    try:
        path.write_bytes(b"doctor")
    except OSError as error:
        return error.strerror
    finally:
        if path.exists():
            path.unlink()
    return None


def _flock(path: Path, kind: int = fcntl.LOCK_EX) -> str:
    """The word held if the lock of another process on the file is seen here, free if not, or the error."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        except OSError as error:
            return error.strerror or str(error)
    return "free"


def _is_alive(owner: dict, lock: Path) -> bool | None:
    """Whether a lock's process runs here and still has the lock; None if it is of another host, or cannot be told.

    A host that was started again, or a container, has the name of the lock's host, but other processes.
    """
    if owner["host"] != socket.gethostname():
        return None
    flock = _flock(lock, fcntl.LOCK_SH) if lock.is_file() else "free"
    is_elsewhere = owner.get("kernel") not in (None, _boot_id()) or owner.get("processes") not in (None, _namespace())
    if is_elsewhere and flock not in ("free", "held"):
        return None
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    # Another process may have got its number since.
    return flock != "free" or not lock.is_file()


def _boot_id() -> str | None:
    """As lock_record.kernel_id of train/run_folder/."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    """As lock_record.process_namespace."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def network(request: dict) -> dict:
    """Interfaces, adapters, and how this host reaches the first one."""
    interfaces = {name: _state(name) for _, name in socket.if_nameindex()}
    adapters = Path("/sys/class/infiniband")
    try:
        addresses, problem = _addresses(request["master"]), None
    except OSError as error:
        addresses, problem = [], error.strerror
    return {
        "interfaces": interfaces,
        "adapters": sorted(path.name for path in adapters.iterdir()) if adapters.is_dir() else [],
        "master_addresses": addresses,
        "master_problem": problem,
        "route": route_to(addresses[0]) if addresses else None,
    }


def _state(name: str) -> str:
    try:
        return Path("/sys/class/net", name, "operstate").read_text().strip()
    except OSError:
        return "unknown"


def route_to(address: str) -> list | None:
    """This host's own address and interface on the way to another address; None if there is no way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing, but chooses the way.
            probe.connect((address, 9))
        except OSError:
            return None
        own = probe.getsockname()[0]
    return [own, next((name for _, name in socket.if_nameindex() if own in _interface_addresses(name)), None)]


def _interface_addresses(name: str) -> list:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            found.append(socket.inet_ntoa(answer[20:24]))
        except OSError:
            pass
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        digits, *_, interface = line.split()
        if interface == name:
            found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def port(request: dict) -> dict | None:
    """On the first host, serve MASTER_PORT until all others have connected; on the others, connect to it."""
    asked = request["port"]
    if asked is None:
        return None
    begin, end = time.time(), time.monotonic() + asked["seconds"]
    if asked["callers"] is None:
        problem = _call(request["master"], asked["number"], asked["token"], end)
    else:
        problem = _serve(asked["number"], asked["callers"], asked["token"], end)
    return {"problem": problem, "from": begin, "until": time.time()}


def _serve(number: int, callers: int, token: str, end: float) -> str | None:
    """Answer as many callers, or until the time is over. Returns why the port cannot be used, or None."""
    try:
        server = _listen(number)
    except OSError as error:
        # Python's own text names the address as well.
        return os.strerror(error.errno or 0)
    answers = []
    with server:
        for _ in range(callers):
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                connection, _address = server.accept()
            except OSError:
                break
            answers.append(threading.Thread(target=_answer, args=(connection, token), daemon=True))
            answers[-1].start()
        # The process ends after this part, perhaps before the last caller has its answer.
        for answer in answers:
            answer.join()
    return None


def _listen(number: int) -> socket.socket:
    """Listen on all interfaces, as torchrun and rank 0 do."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", number), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return socket.create_server(("", number), backlog=1024)


def _answer(connection: socket.socket, token: str) -> None:
    with connection:
        connection.settimeout(2)
        try:
            connection.sendall(token.encode())
            # The caller closes first, so that no closed connection lingers at this port.
            connection.recv(1)
        except OSError:
            pass


def _call(address: str, number: int, token: str, end: float) -> str | None:
    """Why the first host's port cannot be reached within the time; None if it can."""
    problem = "timed out"
    while time.monotonic() < end:
        try:
            with socket.create_connection((address, number), timeout=max(end - time.monotonic(), 0.1)) as connection:
                answer = connection.recv(len(token))
                if answer.decode(errors="replace") == token:
                    return None
                problem = "another program answers there"
        except OSError as error:
            problem = error.strerror or str(error)
        # The first host may be the last to be asked.
        time.sleep(RETRY_SECONDS)
    return problem


PARTS = {
    "port": port,
    "host": host,
    "software": software,
    "gpus": gpus,
    "paths": paths,
    "save_folder": save_folder,
    "network": network,
}
