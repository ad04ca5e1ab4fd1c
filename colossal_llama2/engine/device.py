"""A rank's device: its peak speed, its memory, and the FLOPs of a model."""

import contextlib

from colossal_llama2.gpus import GPUS

# Dense TFLOPS in half precision by a word in the device's name. The V100, which has no bf16, is not planned for.
PEAK_TFLOPS = {**{gpu.word: gpu.peak_tflops for gpu in GPUS.values()}, "V100": 125}


def peak_memory() -> int:
    """Peak bytes of this rank: allocated by PyTorch on the GPU; without a GPU, resident in the process."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _memory_of_process("VmHWM")


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return _memory_of_process("VmRSS")


def _memory_of_process(name: str) -> int:
    """Bytes under a name in /proc/self/status; the peak by getrusage where there is no such file.

    getrusage's peak may be that of the program that started this one: it outlives the exec of a forked process.
    """
    import resource

    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def repeats_exactly() -> bool:
    """Whether repeating a step on this machine gives bit-identical results."""
    import torch

    # On GPUs the backward pass of fused attention (flash-attn's and PyTorch's) sums in a different order each time.
    return not torch.cuda.is_available()


def flops_per_token(config, parameters: int, length: int, *, trains_weights: bool = True) -> float:
    """FLOPs of forward and backward, as MFU counts them (Chowdhery et al., arXiv 2204.02311, appendix B).

    Six for each weight in a product, which are all but the input embeddings, and twelve for each layer, channel and
    token that attention reads. Recomputation is not counted.

    Args:
        trains_weights: False if an adapter is trained instead: then two of the six, for gradients of weights, are left
            out.
    """
    multiplied = parameters
    if not config.tie_word_embeddings:
        multiplied -= config.vocab_size * config.hidden_size
    return (6.0 if trains_weights else 4.0) * multiplied + 12.0 * config.num_hidden_layers * config.hidden_size * length


def known_peak(given: float | None) -> float | None:
    """Peak TFLOPS of this rank's device: `given`, or by the device's name; None if the name is unknown."""
    import torch

    if given is not None or not torch.cuda.is_available():
        return given
    name = torch.cuda.get_device_name()
    # The longest word first, since H200 begins as H20 does.
    words = sorted((word for word in PEAK_TFLOPS if word in name), key=len, reverse=True)
    return PEAK_TFLOPS[words[0]] if words else None
