"""The baselines of benchmarks/bench_training.py on one rank: a bare PyTorch loop, and the Hugging Face Trainer."""

import argparse
import os
import sys
from pathlib import Path

from tests.fork_server import ROOT
from tests.gpu.parts import print_figures

BASELINES = ("bare", "trainer")


def main() -> None:
    """Measure one baseline and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.baselines", description=__doc__)
    parser.add_argument("baseline", choices=BASELINES, help="which")
    parser.add_argument("--model_dir", type=Path, required=True, help="model to train")
    parser.add_argument("--length", type=int, required=True, help="tokens of a sample")
    parser.add_argument("--batch", type=int, required=True, help="samples of a step")
    args = parser.parse_args()
    # The benchmark numbers its random tokens by rank.
    os.environ["RANK"] = "0"
    if args.baseline == "bare":
        # accelerate would read it as a launcher's.
        os.environ["LOCAL_RANK"] = "0"
    sys.path.insert(0, str(ROOT / "benchmarks"))

    import bench_training

    from colossal_llama2.engine.device import peak_memory
    from colossal_llama2.model.config_fields import llama_config

    vocabulary = llama_config(args.model_dir).vocab_size
    size = bench_training.Size(ranks=1, tokens=args.length * args.batch, vocabulary=vocabulary)
    tokens, seconds = bench_training.BASELINES[args.baseline](args.model_dir, args.length, "bf16", size)
    print_figures(
        tokens_per_second=tokens / seconds,
        step_seconds=seconds / size.timed_steps,
        memory_bytes=peak_memory(),
    )


if __name__ == "__main__":
    main()
