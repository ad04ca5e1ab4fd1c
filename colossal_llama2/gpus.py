"""GPUs that a run can be planned for: memory, speed and links by name, for the flags and the planner. Imports nothing.

Peaks are dense, without sparsity. Links are counted in one direction. Both are those of NVIDIA's data sheets: A100
(2021), A800 (NVLink of 400 instead of 600 GB/s), H100 and H200 SXM, H800 (NVLink of 400 GB/s), H20, L40S, and for the
GeForce RTX 4090 the Ada architecture white paper (tensor cores with FP32 accumulation). The network is that of NVIDIA's
DGX of the same generation, one adapter for each GPU: 200 Gb/s for A100, 400 Gb/s for H100. For hosts without such
adapters it is one of 100 Gb/s for all GPUs of a host. Memory is what drivers report, in whole GiB, rounded down.
"""

from dataclasses import dataclass

GPUS_PER_HOST = 8
GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as --gpu gives it.
        word: in the name that PyTorch reports.
        memory: GiB.
        peak_tflops: dense bf16 and fp16.
        host_link: bytes a second to another GPU of the same host.
        network: bytes a second to another host, for each GPU.
        relative_speed: share of its peak that a step reaches, relative to that of an A100.
    """

    name: str
    word: str
    memory: int
    peak_tflops: float
    host_link: float
    network: float
    relative_speed: float = 1.0


# Tensor cores of Hopper wait for memory more often. llm-foundry (scripts/train/benchmarking/README.md) trains its 7B on
# samples of 4,096 tokens, on 8 GPUs, at 53.9 % of an H100's peak and 73.1 % of an A100's, recomputation counted.
HOPPER = 0.74
ONE_ADAPTER = 100 / 8 / GPUS_PER_HOST * GB
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a800-80g", "A800", 79, 312, 200 * GB, 25 * GB),
        Gpu("a100-80g", "A100", 79, 312, 300 * GB, 25 * GB),
        Gpu("a100-40g", "A100", 39, 312, 300 * GB, 25 * GB),
        Gpu("h800", "H800", 79, 989, 200 * GB, 50 * GB, HOPPER),
        Gpu("h100", "H100", 79, 989, 450 * GB, 50 * GB, HOPPER),
        Gpu("h200", "H200", 139, 989, 450 * GB, 50 * GB, HOPPER),
        Gpu("h20", "H20", 95, 148, 450 * GB, 50 * GB),
        Gpu("l40s", "L40S", 44, 362, 32 * GB, ONE_ADAPTER),
        Gpu("4090", "4090", 23, 165, 32 * GB, ONE_ADAPTER),
    )
}
DEFAULT_GPU = "a800-80g"
