"""Print the faster precision of a model on this CPU, bf16 or fp32, for rehearsals; measured on one layer in a second.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 train.py --pretrained smollm2 --plugin zero2 \\
        --mixed_precision "$(python -m colossal_llama2.train.faster_precision smollm2)" ...

CPUs with bf16 instructions (AVX512-BF16 or AMX) are faster in bf16, others several times slower. The precision alone is
written to stdout, what was measured to stderr.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from colossal_llama2 import errors, logs
from colossal_llama2.cli import train_flags
from colossal_llama2.model.config_fields import llama_config
from colossal_llama2.model.loading import check_model_folder, dtype_of
from colossal_llama2.terminal_text import show_line

if TYPE_CHECKING:
    import torch

COMMAND = "python -m colossal_llama2.train.faster_precision"
PRECISIONS = ("bf16", "fp32")
SECONDS, ROUNDS = 1.0, 3
TOKENS = 256
# The layer has the model's sizes, but embeddings of a few tokens: a large vocabulary would only take memory.
LAYER = {"num_hidden_layers": 1, "vocab_size": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, measure and print."""
    args = train_flags.faster_precision_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors(COMMAND):
        check_model_folder(args.pretrained, "MODEL", needs_weights=False)
        speeds = measure(args.pretrained)
        best = max(speeds, key=speeds.__getitem__)
        figures = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items())
        logs.get_logger().info("tokens per second of one layer on this CPU: %s; so %s", figures, best)
        show_line(best)


def measure(folder: str) -> dict[str, float]:
    """Tokens per second of the forward and backward pass of one layer of a model, by precision.

    The precisions are measured by turns, since other work on the machine comes and goes; the fastest turn counts.
    """
    steps = {name: _layer(folder, name) for name in PRECISIONS}
    for step in steps.values():
        # The first call chooses and prepares kernels.
        _run(*step)
    speeds = dict.fromkeys(steps, 0.0)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < SECONDS / ROUNDS / len(steps):
                _run(*step)
                count += 1
            speeds[name] = max(speeds[name], count * TOKENS / (time.perf_counter() - begin))
    return speeds


def _layer(folder: str, precision: str) -> "tuple[torch.nn.Module, torch.Tensor]":
    import torch
    from transformers import LlamaModel

    config = llama_config(folder, attn_implementation="sdpa")
    for name, value in LAYER.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    layer = LlamaModel(config).to(dtype_of(precision))
    return layer, torch.randn(1, TOKENS, config.hidden_size, dtype=dtype_of(precision))


def _run(layer: "torch.nn.Module", inputs: "torch.Tensor") -> None:
    layer(inputs_embeds=inputs, use_cache=False).last_hidden_state.float().sum().backward()


if __name__ == "__main__":
    main()
