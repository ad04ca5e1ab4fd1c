"""The memory forecast of --dry_run, compared with the measured memory of training.

    python benchmarks/bench_memory.py --work_dir /tmp/bench_memory

train.py --benchmark, started on one or two ranks of the CPU, for models of at least 500 MB predicted per rank. For each
rank: its highest resident memory (VmHWM) during four steps, minus the memory after imports. The prediction is that of
colossal_llama2/train/forecast/memory.py for the same flags on a CPU, computed from sizes: nothing in it is fitted to
these results. The last column is the peak while the model is loaded and split, which the prediction does not cover.

glibc keeps freed memory, more of it after larger blocks were freed. MALLOC_MMAP_THRESHOLD_ makes it return all blocks
of at least 64 KB, so that the resident memory is the memory in use. With --kept_memory glibc is set as in train.py,
which shows how much more a rehearsal holds than it uses.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inputs import add_smallest, benchmark_parser, make_folder, print_note  # noqa: E402

# hidden_size, intermediate_size, layers, heads, key-value heads, vocabulary, tied embeddings. The last is SmolLM2-135M.
MODELS = {
    "45 M": (512, 1376, 4, 8, 8, 32000, False),
    "85 M": (768, 2048, 5, 12, 12, 32000, False),
    "161 M": (1024, 2752, 8, 16, 16, 29000, False),
    "135 M": (576, 1536, 30, 9, 3, 49152, True),
}
# Name: model, ranks, tokens of a sample, samples of a micro batch, flags.
CASES: dict[str, tuple[str, int, int, int, str]] = {
    "ddp, fp32": ("45 M", 2, 512, 1, "--plugin ddp --mixed_precision fp32"),
    "ddp, fp32, accumulated": ("45 M", 2, 512, 1, "--plugin ddp --mixed_precision fp32 --accumulation_steps 2"),
    "ddp, bf16": ("45 M", 2, 16, 1, "--plugin ddp --mixed_precision bf16"),
    "zero2, fp32": ("45 M", 2, 512, 2, "--plugin zero2 --mixed_precision fp32"),
    "zero2, fp32, 85 M": ("85 M", 2, 512, 2, "--plugin zero2 --mixed_precision fp32"),
    "zero2, fp32, 161 M": ("161 M", 2, 256, 2, "--plugin zero2 --mixed_precision fp32"),
    "zero2, fp32, checkpointing": ("85 M", 2, 512, 1, "--plugin zero2 --mixed_precision fp32 --use_grad_checkpoint"),
    "zero2, fp32, all logits": ("45 M", 2, 512, 1, "--plugin zero2 --mixed_precision fp32 --chunked_loss off"),
    "zero2, fp32, accumulated": ("85 M", 2, 256, 1, "--plugin zero2 --mixed_precision fp32 --accumulation_steps 2"),
    "zero2_cpu, fp32": ("85 M", 2, 256, 1, "--plugin zero2_cpu --mixed_precision fp32"),
    "zero2, bf16": ("85 M", 2, 16, 1, "--plugin zero2 --mixed_precision bf16"),
    "gemini, bf16": ("85 M", 2, 16, 1, "--plugin gemini --mixed_precision bf16"),
    "gemini_auto, bf16": ("85 M", 2, 16, 1, "--plugin gemini_auto --mixed_precision bf16"),
    "3d, tp 2, fp32": ("85 M", 2, 512, 1, "--plugin 3d --tp 2 --zero 0 --mixed_precision fp32"),
    "3d, fp32": ("45 M", 2, 512, 1, "--plugin 3d --zero 0 --mixed_precision fp32"),
    "3d, fp32, its own attention": ("45 M", 2, 512, 1, "--plugin 3d --zero 0 --mixed_precision fp32 --use_flash_attn"),
    "3d, zero 1, bf16": ("85 M", 2, 16, 1, "--plugin 3d --zero 1 --mixed_precision bf16"),
    "zero2, fp32, LoRA": ("161 M", 2, 512, 1, "--plugin zero2 --mixed_precision fp32 --lora_rank 8"),
    "zero2, fp32, LoRA, dropout": (
        "161 M",
        2,
        512,
        1,
        "--plugin zero2 --mixed_precision fp32 --lora_rank 8 --lora_dropout 0.1",
    ),
    "zero2, one rank": ("45 M", 1, 512, 1, "--plugin zero2 --mixed_precision fp32"),
    "zero2, fp32, 135 M": ("135 M", 2, 256, 2, "--plugin zero2 --mixed_precision fp32"),
    "zero2, bf16, 135 M": ("135 M", 2, 16, 1, "--plugin zero2 --mixed_precision bf16"),
    "gemini, bf16, 135 M": ("135 M", 2, 16, 1, "--plugin gemini --mixed_precision bf16"),
    "3d, fp32, 135 M": ("135 M", 2, 256, 2, "--plugin 3d --zero 0 --mixed_precision fp32"),
}
# With --smallest: the model of every case, and the only case unless others are given.
SMALLEST_MODEL, SMALLEST_CASE = (64, 128, 1, 4, 4, 512, False), "zero2, fp32"
STEPS = 6
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_ARENA_MAX": "1"}


def main() -> None:
    """Measure each case and print a line for it."""
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
        return
    parser = benchmark_parser(__doc__)
    add_smallest(parser)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="which (default: all)")
    parser.add_argument("--kept_memory", action="store_true", help="let glibc keep freed memory, as train.py does")
    args = parser.parse_args()
    models = dict.fromkeys(MODELS, SMALLEST_MODEL) if args.smallest else MODELS
    work_dir, malloc = make_folder(parser, args.work_dir), {} if args.kept_memory else MALLOC
    try:
        print_note(args)
        print(f"{'MB per rank':32}  predicted   measured  predicted / measured   while loading", flush=True)
        for name in args.cases or ([SMALLEST_CASE] if args.smallest else CASES):
            predicted, measured = compare(name, work_dir, models=models, malloc=malloc)
            steps, loading = measured["steps"], measured["loading"]
            first, second, last = (f"{size / 1e6:,.0f}" for size in (predicted, steps, loading))
            print(f"{name:32} {first:>10} {second:>10} {predicted / steps:>21.3f} {last:>15}", flush=True)
    finally:
        shutil.rmtree(work_dir)


def compare(
    name: str, work_dir: Path, *, models: dict[str, tuple], malloc: dict[str, str]
) -> tuple[int, dict[str, int]]:
    """Bytes predicted and measured, of the rank that needs the most."""
    model, ranks, length, batch, flags = CASES[name]
    model_dir = work_dir / model.replace(" ", "")
    if not model_dir.exists():
        make_model(model_dir, *models[model])
    accumulated = 2 if "--accumulation_steps" in flags else 1
    samples = STEPS * batch * (1 if "--tp" in flags else ranks) * accumulated
    words = ["--benchmark", "--pretrained", str(model_dir), "--max_length", str(length), "--num_samples", str(samples)]
    words += ["--micro_batch_size", str(batch), *flags.split()]
    return predict(words, ranks), launch(words, ranks, malloc)


def make_model(
    folder: Path,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    is_tied: bool,
    *,
    shards: int | None = None,
) -> None:
    """Write a LLaMA of random weights in float32; with `shards` in bfloat16, in about that many files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=is_tied,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config)
    if shards is None:
        model.save_pretrained(folder)
    else:
        model.bfloat16().save_pretrained(folder, max_shard_size=2 * model.num_parameters() // shards)


def predict(words: list[str], ranks: int) -> int:
    """Bytes by the formulas, for the flags of a run on a CPU."""
    from colossal_llama2.cli import train_flags
    from colossal_llama2.model.loading import model_without_weights
    from colossal_llama2.train.forecast.activations import ModelShape
    from colossal_llama2.train.forecast.memory import rank_memory
    from colossal_llama2.train.forecast.memory_report import memory_plan
    from colossal_llama2.train.settings.from_flags import resolve_with_problems

    args = train_flags.train_parser().parse_args(words)
    shape = ModelShape.of(model_without_weights(args.pretrained).config)
    return rank_memory(shape, memory_plan(resolve_with_problems(args)[0], ranks, has_documents=False, on_cpu=True)).peak


def launch(
    words: list[str], ranks: int, malloc: dict[str, str], *, script: str = __file__, marker: str = '{"steps"'
) -> dict[str, int]:
    """Run train.py on `ranks` ranks; returns the bytes of the rank with the most: in its steps, and while loading.

    Args:
        script: whose --measure each rank runs.
        marker: the beginning of the line that each rank prints.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **malloc}
    environment.update(CUDA_VISIBLE_DEVICES="", TORCHINDUCTOR_COMPILE_THREADS="1")
    done = subprocess.run(
        [*command, script, "--measure", *words], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(marker)]
    assert len(found) == ranks, done.stdout
    return {name: max(row[name] for row in found) for name in found[0]}


def import_all(words: list[str]) -> None:
    """Import what training imports, so that it is not counted."""
    import datasets  # noqa: F401
    import torch.distributed.optim  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import train  # noqa: F401
    from colossal_llama2.engine.patches import placeholders
    from colossal_llama2.train import benchmark, run  # noqa: F401

    placeholders.import_colossalai()
    import colossalai.legacy.core  # noqa: F401

    if "--lora_rank" in words:
        # PEFT would import it with the first adapter, where it is installed. It is not among the requirements.
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
        import peft  # noqa: F401


def measure(words: list[str]) -> None:
    """One rank: import, read the resident memory, train, and report the peaks while loading and during the steps."""
    import_all(words)
    import torch.distributed

    import train
    from colossal_llama2.engine import device
    from colossal_llama2.train import benchmark

    before = reset_peak()
    run_steps = benchmark.measure
    loading = 0

    def measure_steps(*args, **keywords):
        nonlocal loading
        loading = device.peak_memory() - before
        reset_peak()
        return run_steps(*args, **keywords)

    def report_peak() -> None:
        # Called after the timed steps and before those under the profiler.
        # One write: ranks share their output, and print writes the end of a line by itself.
        os.write(1, (json.dumps({"steps": device.peak_memory() - before, "loading": loading}) + "\n").encode())
        torch.distributed.barrier()
        time.sleep(1)
        os._exit(0)

    benchmark.measure, benchmark.peak_memory = measure_steps, report_peak
    train.main(words)


def reset_peak() -> int:
    """Reset the peak; returns the resident memory."""
    from colossal_llama2.engine.device import resident_memory

    # 5 resets it (Linux, Documentation/filesystems/proc.rst).
    Path("/proc/self/clear_refs").write_text("5")
    return resident_memory()


if __name__ == "__main__":
    main()
