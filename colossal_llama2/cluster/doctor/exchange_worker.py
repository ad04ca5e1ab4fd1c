"""One rank of `exchange`: it joins the others, exchanges data, and prints what it measured, a line for each stage.

    RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=node1 MASTER_PORT=29500 \\
        python -m colossal_llama2.cluster.doctor.exchange_worker SECONDS

The bandwidth of the all-reduce is that of the slowest link. The one from the rank before, which all ranks measure at
the same time around a ring, shows which link that is.
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

if TYPE_CHECKING:
    import torch

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
    # In one call: several ranks write into the same pipe.
    sys.stdout.write(f"{WORKER_MARK}{json.dumps(note)}\n")
    sys.stdout.flush()


def _exchange(rank: int, world_size: int, end: float) -> None:
    address, interface = _choose_interface()
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
        _note(rank, "gloo", interface=interface or address, **_figures(rank, world_size, "gloo", torch.device("cpu")))
        if not torch.cuda.is_available():
            _note(rank, "nccl")
            return
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=timeout)
        figures = _figures(rank, world_size, "nccl", device, group)
        _note(rank, "nccl", interface=_nccl_network(log) or "in one host", **figures)
        dist.barrier()


def _choose_interface() -> tuple[str, str | None]:
    """Let gloo use the interface that leads to rank 0, unless a variable names one. Returns its address and name."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    addresses = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)
    route = route_to(str(addresses[0][4][0]))
    address, interface = route or ("", None)
    if interface and not named:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return address, named or interface


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
    received = torch.empty_like(many)
    link = timed(lambda: _pass_on(many, received, rank, world_size, group), repeats) if world_size > 1 else 0.0
    return {"latency": latency, "all_reduce": bandwidth, "receive": size / link if link else 0.0}


def _pass_on(sent: "torch.Tensor", received: "torch.Tensor", rank: int, world_size: int, group: Any) -> None:
    """Send to the next rank and receive from the one before."""
    import torch.distributed as dist

    work = [
        dist.P2POp(dist.isend, sent, (rank + 1) % world_size, group),
        dist.P2POp(dist.irecv, received, (rank - 1) % world_size, group),
    ]
    for request in dist.batch_isend_irecv(work):
        request.wait()


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
