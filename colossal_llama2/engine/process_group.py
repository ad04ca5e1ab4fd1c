"""Join the process group of the launcher, and leave it."""

import atexit
import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NoReturn

from colossal_llama2 import launcher, logs
from colossal_llama2.engine.patches import adam_kernels, bug_fixes, placeholders
from colossal_llama2.engine.ranks import interfaces
from colossal_llama2.errors import LaunchError, UserError
from colossal_llama2.plurals import counted

# ColossalAI logs this to the root logger for every model whose weights are in a single file. A logger's filter only
# applies to messages that are logged to that logger itself.
UNSHARDED_ADVICE = "Please avoid using unsharded checkpointing methods when dealing with large models!"
# gloo's message if ranks cannot connect to each other.
UNCONNECTED = "connectFullMesh failed"


def _is_not_advice(record: logging.LogRecord) -> bool:
    return record.msg != UNSHARDED_ADVICE


@contextlib.contextmanager
def _no_toolkit_named() -> Iterator[None]:
    """Without a GPU, hide the CUDA toolkit while torch.utils.cpp_extension is imported.

    If one is installed, it would print "No CUDA runtime is found". Nothing here is compiled for CUDA without a GPU.
    """
    import torch

    names = () if torch.cuda.is_available() else ("CUDA_HOME", "CUDA_PATH")
    before = {name: os.environ.get(name) for name in names}
    # Empty, not unset: it would look for nvcc.
    os.environ.update(dict.fromkeys(names, ""))
    try:
        import torch.utils.cpp_extension

        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def launch(seed: int, *, timeout_seconds: float | None = None, meet: Callable[[], None] = lambda: None) -> None:
    """Join the process group of the launcher; without a launcher, make one of this process alone.

    Args:
        timeout_seconds: how long ranks wait for each other at most; None is PyTorch's default.
        meet: called when the libraries are imported, before the ranks are joined.

    Raises:
        UserError: there are more processes on this host than GPUs, or this version of ColossalAI is not supported.
        LaunchError: the ranks cannot connect.
    """
    here = launcher.settle()
    # ColossalAI warns about missing packages (apex, tensornvme), though only apex's norms would be used. PyTorch
    # warns of TorchScript in a module that ColossalAI imports.
    with warnings.catch_warnings(record=True), _no_toolkit_named():
        import torch.distributed.optim

        placeholders.import_colossalai()
    import colossalai
    from colossalai.logging import get_dist_logger

    # Its hints are about calls that this file makes on purpose.
    get_dist_logger().set_level("ERROR")
    logging.getLogger().addFilter(_is_not_advice)
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
    if not torch.cuda.is_available():
        from colossal_llama2.engine.patches import cpu_device

        cpu_device.install()
    adam_kernels.install()
    bug_fixes.install()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        os.environ.setdefault(name, str(value))
    if here.world_size == 1 and not here.uses_agent_store:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(_free_port()))
    if timeout_seconds is not None:
        _set_timeout(timeout_seconds)
    if torch.cuda.is_available() and here.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={here.local_rank}, but {socket.gethostname()} has "
            f"{counted(torch.cuda.device_count(), 'GPU')}; start one process for each GPU, such as with "
            f"--nproc_per_node {torch.cuda.device_count()}"
        )
    meet()
    with _failing_in_words():
        colossalai.launch(
            rank=here.rank,
            world_size=here.world_size,
            local_rank=here.local_rank,
            host=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            seed=seed,
            verbose=False,
        )
    if not torch.cuda.is_available():
        logs.get_logger().info("No GPU: this is a rehearsal on the CPU (gloo, PyTorch's Adam and attention kernels)")


@contextlib.contextmanager
def _failing_in_words() -> Iterator[None]:
    """Turn gloo's failure to connect the ranks into a LaunchError that names the interface."""
    try:
        yield
    except RuntimeError as error:
        if UNCONNECTED not in str(error):
            raise
        name = os.environ.get(interfaces.GLOO)
        raise LaunchError(
            f"{socket.gethostname()} cannot connect to the other ranks through gloo "
            f"({f'{interfaces.GLOO}={name}' if name else f'{interfaces.GLOO} is not set'}); set {interfaces.GLOO} on "
            f"each host to the network interface that the other hosts reach, as listed by `ip address`"
        )


def _set_timeout(seconds: float) -> None:
    """Set PyTorch's defaults, one per kind of network, which colossalai.launch and its process groups use."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=seconds)


def current_device():
    """The torch.device of this rank."""
    from colossalai.accelerator import get_accelerator

    return get_accelerator().get_current_device()


def leave() -> None:
    """Leave the process group, once all ranks are done.

    gloo sometimes waits forever, with all threads, for connections that the other end has closed (measured in one of
    about 40 short runs). Everything is done by then, so a process with partners exits without closing them.
    """
    import torch.distributed as dist

    dist.barrier()
    if dist.get_world_size() > 1 and dist.get_backend() == "gloo":
        atexit.register(_end_without_closing)
    else:
        dist.destroy_process_group()


def _end_without_closing() -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
