"""Which precision and how many threads generate fastest on this machine's CPUs, measured in a second.

One token at a time, generation reads every weight for each token, so half as many bytes can be twice as fast; on CPUs
without instructions for bf16 it is many times slower instead. The trial computes some layers with the model's sizes,
as many as are far larger than a cache.
"""

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from colossal_llama2.logs import get_logger
from colossal_llama2.model.config_fields import llama_config
from colossal_llama2.model.loading import dtype_of, stored_weights
from colossal_llama2.model.tied_weights import INPUT_EMBEDDING, OUTPUT_EMBEDDING

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaModel

ROUNDS = 4
SECONDS_A_PRECISION = 0.8
# Numbers in the layers of a trial. A smaller model is not measured: its answers take less time than a trial.
TRIAL_NUMBERS = 60_000_000
SMALLEST = 20_000_000
# Another choice than float32 with PyTorch's own number of threads must be this much faster, so that the choice does not
# change from run to run.
MARGIN = 1.15
MOST_THREAD_COUNTS = 3


class Choice(NamedTuple):
    """A precision, fp32 or bf16, and a number of threads."""

    precision: str
    threads: int

    def __str__(self) -> str:
        return f"{self.precision} with {self.threads} thread{'' if self.threads == 1 else 's'}"


def choose_on_cpu(folder: Path, *, rows: int) -> str:
    """Set the number of PyTorch's threads to the fastest, and return the fastest precision; both are logged.

    Weights are never rounded by this choice: bf16 is tried only where all of them are stored as bf16. With
    OMP_NUM_THREADS in the environment, the number of threads is left alone.

    Args:
        rows: how many prompts are continued together.
    """
    import torch

    default = Choice("fp32", torch.get_num_threads())
    choices = _choices(folder, default)
    if len(choices) == 1 or _layer_numbers(folder) < SMALLEST:
        get_logger().info(f"computing in {default}")
        return default.precision
    speeds = _measured(folder, choices, rows)
    best = max(choices, key=lambda choice: speeds[choice] * (MARGIN if choice == default else 1))
    torch.set_num_threads(best.threads)
    ratio = speeds[best] / speeds[default]
    found = (
        f"the fastest of {len(choices)} in a trial" if best == default else f"{ratio:.1f} times as fast as {default}"
    )
    get_logger().info(f"computing in {best}, {found}")
    return best.precision


def _choices(folder: Path, default: Choice) -> list[Choice]:
    """What is measured, the default first."""
    stored = {weight.dtype for weight in stored_weights(folder).values()}
    precisions = ["fp32", *(["bf16"] if stored == {"BF16"} else [])]
    counts = [default.threads]
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Fewer threads can be faster, since they share the memory; so can threads on all logical cores.
        counts = list(dict.fromkeys([default.threads, max(default.threads // 2, 1), cores]))[:MOST_THREAD_COUNTS]
    return [Choice(precision, count) for precision in precisions for count in counts]


def _layer_numbers(folder: Path) -> int:
    """The numbers of a model's layers, without its embeddings."""
    stored = stored_weights(folder).items()
    return sum(math.prod(weight.shape) for name, weight in stored if name not in (INPUT_EMBEDDING, OUTPUT_EMBEDDING))


def _measured(folder: Path, choices: list[Choice], rows: int) -> dict[Choice, float]:
    """Steps per second of each choice, measured by turns; the fastest turn of each counts."""
    import torch

    config = llama_config(folder, attn_implementation="sdpa")
    layers_of_trial = TRIAL_NUMBERS * config.num_hidden_layers // _layer_numbers(folder)
    config.num_hidden_layers = max(1, min(config.num_hidden_layers, layers_of_trial))
    config.vocab_size, config.pad_token_id = 8, None
    speeds = dict.fromkeys(choices, 0.0)
    before = torch.get_num_threads()
    try:
        # One after the other, since both would need the memory of both.
        for precision in dict.fromkeys(choice.precision for choice in choices):
            layers = _layers(config, precision)
            inputs = torch.full((rows, 1, config.hidden_size), 0.1, dtype=dtype_of(precision))
            start = time.perf_counter()
            for _ in range(ROUNDS):
                for choice in (choice for choice in choices if choice.precision == precision):
                    torch.set_num_threads(choice.threads)
                    begin = time.perf_counter()
                    with torch.inference_mode():
                        layers(inputs_embeds=inputs, use_cache=False)
                    speeds[choice] = max(speeds[choice], 1 / (time.perf_counter() - begin))
                # bf16 can be very slow.
                if time.perf_counter() - start > SECONDS_A_PRECISION:
                    break
    finally:
        torch.set_num_threads(before)
    return speeds


def _layers(config: "LlamaConfig", precision: str) -> "LlamaModel":
    """Layers of a model with one number in all weights: filling them with random ones would take longer."""
    import torch
    from transformers import LlamaModel

    with torch.device("meta"):
        layers = LlamaModel(config).to(dtype_of(precision))
    layers = layers.to_empty(device="cpu").eval()
    for tensor in (*layers.parameters(), *layers.buffers()):
        tensor.data.fill_(0.01)
    return layers
