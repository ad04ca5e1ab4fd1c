"""One rank of `exchange`: it joins the others, exchanges data, and prints what it measured, a line for each stage.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29500 \\
        python -m colossal_llama2.cluster.doctor.exchange_worker SECONDS

The bandwidth of the all-reduce is that of the slowest link. The one from the rank before, around a ring, shows which
link that is.
"""

import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2.cluster.doctor.host_report import route_to
from colossal_llama2.cluster.hostfile import is_loopback
from colossal_llama2.terminal_text import show

if TYPE_CHECKING:
    import torch

# Names of hosts that a rank has to reach.
HOSTS = "COLOSSAL_LLAMA2_EXCHANGE_HOSTS"
WORKER_MARK = "colossal_llama2.exchange "
STAGES = ("started", "imported", "met", "joined", "gloo", "nccl")
# Numbers of 4 bytes: 4 MiB over gloo, 256 MiB over NCCL, which needs large messages for its full speed.
SIZES = {"gloo": 1 << 20, "nccl": 1 << 26}
MEASURED_SECONDS = 0.5
MOST_REPEATS = 20
LATENCY_REPEATS = 10
USED_NETWORK = re.compile(r"NET/(\w+)\s*: Using (.*)")
USED_DEVICE = re.compile(r"\[\d+\]([^\s:<]+)")


def main() -> None:
    """Run all stages. Any error is printed as a line, too, and the process ends with 1."""
    seconds = float(sys.argv[1])
    # The kernel ends this process at the limit, also inside of calls that never return.
    signal.alarm(int(seconds) + 2)
    rank = int(os.environ["RANK"])
    _note(rank, "started")
    try:
        _exchange(rank, int(os.environ["WORLD_SIZE"]), time.monotonic() + seconds)
    # Whatever the libraries raise is the result.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        _print({"rank": rank, "problem": first})
        sys.stdout.flush()
        os._exit(1)
    # Without the farewell of process groups, which waits for others.
    os._exit(0)


def _note(rank: int, stage: str, **figures: Any) -> None:
    _print({"rank": rank, "stage": stage, **figures})


def _print(note: dict) -> None:
    show(f"{WORKER_MARK}{json.dumps(note)}")


def _exchange(rank: int, world_size: int, end: float) -> None:
    interface = _choose_interface()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "nccl.log")
        os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET", NCCL_DEBUG_FILE=str(log))
        import torch
        import torch.distributed as dist

        _note(rank, "imported")
        # A rank reports its own error before the limit ends it.
        timeout = timedelta(seconds=max(end - time.monotonic() - 1, 1))
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], port, world_size, rank == 0, timeout=timeout, wait_for_workers=False
        )
        _note(rank, "met")
        # PyTorch 2.5 fails with a plain TCPStore between hosts: "failed to format addr, unknown family=0".
        store = dist.PrefixStore("exchange", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        _note(rank, "joined")
        dist.barrier()
        _note(rank, "gloo", interface=interface, **_figures(rank, world_size, "gloo", torch.device("cpu")))
        if not torch.cuda.is_available():
            _note(rank, "nccl")
            return
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=timeout)
        figures = _figures(rank, world_size, "nccl", device, group)
        _note(rank, "nccl", interface=_nccl_network(log) or "in one host", **figures)
        dist.barrier()


def _choose_interface() -> str:
    """Let gloo use the interface that leads to another host, unless a variable names one. Returns its name.

    The address of the host's own name, which gloo would take, may be a loopback one.
    """
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    routes = []
    for host in os.environ[HOSTS].split():
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        routes.append(route_to(str(found[0][4][0])) or ["127.0.0.1", None])
    address, interface = next((route for route in routes if not is_loopback(route[0])), routes[0])
    if interface and not named:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return named or interface or address


def _figures(rank: int, world_size: int, kind: str, device: "torch.device", group: Any = None) -> dict[str, float]:
    """Latency of a tiny all-reduce in seconds, and bytes per second of a large one and of the link from rank - 1."""
    import torch
    import torch.distributed as dist

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(action: Callable[[], Any], repeats: int) -> float:
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            action()
        wait()
        return (time.perf_counter() - begin) / repeats

    one, many = torch.ones(1, device=device), torch.ones(SIZES[kind], device=device)
    dist.all_reduce(one, group=group)
    if one.item() != world_size:
        raise ValueError(f"the sum of {world_size} ones over {kind} was {one.item():g}")
    latency = timed(lambda: dist.all_reduce(one, group=group), LATENCY_REPEATS)
    # All ranks have to agree on the number of repeats.
    first = torch.tensor([timed(lambda: dist.all_reduce(many, group=group), 1)], device=device)
    dist.all_reduce(first, op=dist.ReduceOp.MAX, group=group)
    repeats = min(max(int(MEASURED_SECONDS / max(first.item(), 1e-6)), 1), MOST_REPEATS)
    seconds = timed(lambda: dist.all_reduce(many, group=group), repeats)
    size = many.numel() * many.element_size()
    # Each byte travels 2 (n - 1) / n times through each link, as nccl-tests count it.
    bandwidth = size / seconds * 2 * (world_size - 1) / world_size if world_size > 1 else size / seconds
    link = 0.0
    if world_size > 1:
        _time_of_link(one, rank, world_size, 1, wait, group)
        link = _time_of_link(many, rank, world_size, repeats, wait, group)
    return {"latency": latency, "all_reduce": bandwidth, "receive": size / link if link else 0.0}


def _time_of_link(
    values: "torch.Tensor", rank: int, world_size: int, repeats: int, wait: Callable[[], None], group: Any
) -> float:
    """Seconds in which a tensor arrives from the rank before.

    A rank that sends and receives at a time would also wait for the next one. So the links of the ring take turns:
    those of even ranks, those of odd ranks, and with an odd number of ranks that of the last one.
    """
    import torch.distributed as dist

    before, after = (rank - 1) % world_size, (rank + 1) % world_size

    def turn_of(sender: int) -> int:
        return 2 if world_size % 2 and sender == world_size - 1 else sender % 2

    total = 0.0
    for turn in [0, 1, 2] * repeats:
        dist.barrier(group=group)
        wait()
        begin = time.perf_counter()
        if turn_of(rank) == turn:
            dist.send(values, after, group=group)
        elif turn_of(before) == turn:
            dist.recv(values, before, group=group)
            wait()
            total += time.perf_counter() - begin
    return total / repeats


def _nccl_network(log: Path) -> str | None:
    """The network that NCCL's log names, as `Socket eth0`; None if it used none, within one host."""
    text = log.read_text(errors="replace") if log.exists() else ""
    used = USED_NETWORK.findall(text)
    if not used:
        return None
    kind, devices = used[-1]
    return f"{kind} {', '.join(USED_DEVICE.findall(devices)) or devices.strip()}"


if __name__ == "__main__":
    main()
