"""The speed of training with each plugin, relative to the Hugging Face Trainer and to bare PyTorch loops.

    python benchmarks/bench_training.py --work_dir /tmp/bench_training

Two ranks, one thread each, on the CPU or on the first two GPUs. Two models, two lengths of samples, the same number of
tokens per step; full samples of random tokens, so nothing is padded. Every candidate is a separate job:

- trainer: transformers' Trainer, data parallel (DDP), with autocast for bf16. "Kept" is the same with glibc set to keep
  freed memory, as train.py sets it on a CPU.
- bare loops: forward, backward and PyTorch's AdamW on each rank separately, with freed memory kept. They exchange
  nothing, so this is the limit of the machine.
- the plugins: train.py --benchmark.

--pythons measures them with the packages of several environments, such as those of requirements.txt and
requirements-current.txt; everything is then relative to the first one's Trainer and bare loop.

Prints tokens/s and peak memory of the largest rank as ratios, and each plugin's step by part: medians of rounds in
which every candidate runs once, so that a change in the machine's speed affects all of them. Seconds depend on the
machine, and are not printed. "communication" is contained in the parts before it. It counts from the start of each
message; Gemini starts one chunk ahead and computes meanwhile.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inputs import add_smallest, benchmark_parser, make_folder, print_note, refuse_with_smallest  # noqa: E402

RANKS = 2
MODELS = {
    "8 M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "num_attention_heads": 4},
    "20 M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
}
# Of each rank.
TOKENS_A_STEP = 1024
PLUGINS: dict[str, tuple[str, ...]] = {
    "ddp": ("--plugin", "ddp"),
    "zero2": ("--plugin", "zero2"),
    "zero2_cpu": ("--plugin", "zero2_cpu"),
    "gemini": ("--plugin", "gemini"),
    "gemini_auto": ("--plugin", "gemini_auto"),
    "3d": ("--plugin", "3d"),
    "3d, tp 2": ("--plugin", "3d", "--tp", "2"),
}
SMALLEST_MODEL = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
NAME_WIDTH = 28
PARTS = ("data", "forward", "backward", "optimizer", "rest", "communication")


@dataclass(frozen=True)
class Size:
    """The models and how long each is trained.

    Attributes:
        lengths: tokens of a sample.
        plugins: None for all that have the precision.
        tokens: of each rank and step.
        profiled_steps: those that train.py --benchmark makes after the timed ones.
    """

    models: dict[str, dict[str, int]] = field(default_factory=lambda: MODELS)
    lengths: tuple[int, ...] = (256, 1024)
    plugins: tuple[str, ...] | None = None
    rounds: int = 3
    ranks: int = RANKS
    tokens: int = TOKENS_A_STEP
    vocabulary: int = 8000
    warmup_steps: int = 3
    timed_steps: int = 10
    profiled_steps: int = 2


SMALLEST = Size({"smallest": SMALLEST_MODEL}, (256,), ("zero2",), rounds=1, vocabulary=64, timed_steps=1)


def main() -> None:
    """Measure each candidate and print a table for each model and length."""
    from colossal_llama2.cli.value_types import positive_int

    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of what is computed")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="which (default: both)")
    parser.add_argument("--lengths", nargs="+", type=sample_length, help="tokens of a sample (default: 256 1024)")
    parser.add_argument("--plugins", nargs="+", choices=PLUGINS, help="which (default: all that have the precision)")
    parser.add_argument("--pythons", nargs="+", metavar="PATH", default=[sys.executable], help="of the environments")
    parser.add_argument("--rounds", type=positive_int, help="how often everything is run, by turns (default: 3)")
    add_smallest(parser)
    parser.add_argument("--measure", choices=BASELINES, help=argparse.SUPPRESS)
    parser.add_argument("--model_dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SMALLEST if args.smallest else Size()
    if args.measure:
        if args.measure != "trainer":
            keep_freed_memory()
        print_measurement(*BASELINES[args.measure](args.model_dir, args.lengths[0], args.precision, size))
        return
    refuse_with_smallest(parser, args, "models", "lengths", "rounds")
    # ColossalAI supports Gemini only in half precision.
    fitting = [name for name in PLUGINS if args.precision == "bf16" or not name.startswith("gemini")]
    unfit = sorted(set(args.plugins or ()) - set(fitting))
    if unfit:
        parser.error(f"--plugins {' '.join(unfit)} with --precision fp32 given; allowed: {'; '.join(fitting)}")
    pythons = [Path(found).absolute() for python in args.pythons if (found := shutil.which(python))]
    names = {environment_of(python) for python in pythons}
    if not len(names) == len(pythons) == len(args.pythons):
        parser.error(
            f"--pythons {' '.join(args.pythons)} given; allowed are programs in environments of different names, "
            "such as .venv/bin/python and .venv-current/bin/python"
        )
    work_dir = make_folder(parser, args.work_dir)
    try:
        print_note(args)
        for name in args.models or size.models:
            model_dir = make_model(work_dir / name.replace(" ", ""), size.models[name], size.vocabulary)
            for length in args.lengths or size.lengths:
                run = partial(measure, model_dir=model_dir, length=length, precision=args.precision, size=size)
                candidates = (*BASELINES, *(args.plugins or size.plugins or fitting))
                print_table(f"{name}, {length:,} tokens", run, candidates, pythons, args.rounds or size.rounds)
    finally:
        shutil.rmtree(work_dir)


def environment_of(python: Path) -> str:
    """The name of the virtual environment of a Python."""
    return python.parent.parent.name


def sample_length(text: str) -> int:
    """A length in tokens that divides the tokens of a step."""
    if not text.isdigit() or not int(text) or TOKENS_A_STEP % int(text):
        raise argparse.ArgumentTypeError(f"{text} given, divisors of {TOKENS_A_STEP} are allowed")
    return int(text)


def make_model(folder: Path, shape: dict[str, int], vocabulary: int) -> Path:
    """Write a LLaMA of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = shape["num_attention_heads"]
    config = LlamaConfig(vocab_size=vocabulary, num_key_value_heads=heads, max_position_embeddings=4096, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def print_table(
    title: str, run: Callable[..., dict[str, float]], candidates: Sequence[str], pythons: Sequence[Path], turns: int
) -> None:
    """Run all candidates on one model and length, `turns` times in turn, and print each measurement to stderr."""
    rounds: list[dict[str, dict[str, float]]] = []
    for turn in range(turns):
        rounds.append({})
        # The same candidate of each environment one after the other, so that they meet the same speed of the machine.
        for name, python in itertools.product(candidates, pythons):
            row = name if python == pythons[0] else f"{name}, {environment_of(python)}"
            rounds[-1][row] = figures = run(name, python=str(python))
            over = figures["speed"] / rounds[-1]["trainer"]["speed"]
            print(f"{title}, turn {turn + 1} of {turns}: {row} {over:.2f}", file=sys.stderr, flush=True)
    print(
        f"\n{title:{NAME_WIDTH}} over Trainer  (least-most)  over bare  memory over Trainer   " + "  ".join(PARTS),
        flush=True,
    )
    for name in rounds[0]:
        print_row(name, rounds)


def print_row(name: str, rounds: list[dict[str, dict[str, float]]]) -> None:
    """One candidate beside the baseline and the floor of the same round: medians over the rounds."""
    rows = [found[name] for found in rounds]

    def ratios(figure: str, base: str) -> list[float]:
        return [found[name][figure] / found[base][figure] for found in rounds]

    speeds = ratios("speed", "trainer")
    figures = f"{median(speeds):12.2f}  ({min(speeds):.2f}-{max(speeds):.2f})  {median(ratios('speed', 'bare')):10.2f}"
    figures += f"  {median(ratios('memory', 'trainer')):19.2f}"
    shares = [f"{median(row[part] for row in rows):>{len(part) - 1}.0f}%" for part in PARTS if part in rows[0]]
    print(f"{name:{NAME_WIDTH}} {figures}   {'  '.join(shares)}".rstrip(), flush=True)


def measure(name: str, *, python: str, model_dir: Path, length: int, precision: str, size: Size) -> dict[str, float]:
    """One candidate, once."""
    if name in BASELINES:
        return baseline(name, python, model_dir, length, precision, size)
    # ColossalAI supports ZeRO in 3d only in half precision.
    no_zero = ("--zero", "0") if precision == "fp32" and "3d" in PLUGINS[name] else ()
    return ours(python, model_dir, length, precision, PLUGINS[name] + no_zero, size)


def baseline(name: str, python: str, model_dir: Path, length: int, precision: str, size: Size) -> dict[str, float]:
    """Tokens/s of all ranks, and the memory of the largest."""
    script = [__file__, "--work_dir", "x", "--measure", name, "--model_dir", str(model_dir)]
    script += ["--lengths", str(length), "--precision", precision, *(["--smallest"] if size == SMALLEST else [])]
    done = launch(script, python)
    rows = [json.loads(line) for line in done.splitlines() if line.startswith('{"speed"')]
    combine = sum if name == "bare" else max
    return {"speed": combine(row["speed"] for row in rows), "memory": max(row["memory"] for row in rows)}


def launch(script: list[str], python: str = sys.executable) -> str:
    """Run a script on all ranks with a Python; returns what they print."""
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


def ours(
    python: str, model_dir: Path, length: int, precision: str, flags: tuple[str, ...], size: Size
) -> dict[str, float]:
    """The output of train.py --benchmark. Tensor-parallel partners share samples, so they get twice as many."""
    data_ranks = 1 if "--tp" in flags else size.ranks
    batch = size.tokens // length * (size.ranks // data_ranks)
    samples = batch * data_ranks * (size.warmup_steps + size.timed_steps + size.profiled_steps)
    script = ["train.py", "--benchmark", "--pretrained", model_dir, "--max_length", length, "--num_samples", samples]
    script += ["--micro_batch_size", batch, "--mixed_precision", precision, "--use_flash_attn", *flags]
    output = launch([str(word) for word in script], python)
    printed = dict(re.findall(r"^ *(\S.*?) {2,}([\d,.]+)", output, re.MULTILINE))
    figures = {name: float(printed[name].replace(",", "")) for name in (*PARTS, "tokens/s", "peak memory")}
    return {**figures, "speed": figures["tokens/s"], "memory": figures["peak memory"] * 2**20}


def print_measurement(tokens: int, seconds: float) -> None:
    """One line for the parent process."""
    from colossal_llama2.engine.device import peak_memory

    # One write: ranks share their output, and print writes the end of a line by itself.
    os.write(1, (json.dumps({"speed": tokens / seconds, "memory": peak_memory()}) + "\n").encode())


def keep_freed_memory() -> None:
    """Set glibc as train.py does without a GPU."""
    import torch

    from colossal_llama2.engine.patches import cpu_device

    if not torch.cuda.is_available():
        cpu_device.keep_freed_memory()


def device():
    """This rank's device."""
    import torch

    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def random_tokens(count: int, length: int, vocabulary: int):
    """(count, length) token ids."""
    import torch

    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    return torch.randint(0, vocabulary, (count, length), generator=generator)


def bare_loop(model_dir: Path, length: int, precision: str, size: Size) -> tuple[int, float]:
    """Weights in the precision, AdamW on float32 copies, nothing else."""
    import torch
    from transformers import LlamaForCausalLM

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = LlamaForCausalLM.from_pretrained(model_dir, torch_dtype=dtype, attn_implementation="sdpa").to(device())
    working = list(model.parameters())
    masters = working if precision == "fp32" else [param.detach().float().requires_grad_() for param in working]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    batch = size.tokens // length
    rows = random_tokens(batch * (size.warmup_steps + size.timed_steps), length, size.vocabulary).split(batch)
    for step, ids in enumerate(rows):
        if step == size.warmup_steps:
            start = time.perf_counter()
        ids = ids.to(device())
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if precision != "fp32":
            for master, param in zip(masters, working, strict=True):
                master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if precision != "fp32":
            torch._foreach_copy_([param.data for param in working], [master.data for master in masters])
        loss.item()
    return size.timed_steps * size.tokens, time.perf_counter() - start


def trainer(model_dir: Path, length: int, precision: str, size: Size) -> tuple[int, float]:
    """transformers.Trainer on all ranks."""
    import transformers
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    class Clock(transformers.TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *args, **kwargs) -> None:
            self.times.append(time.perf_counter())

    transformers.logging.set_verbosity_error()
    model = LlamaForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa")
    batch, steps = size.tokens // length, size.warmup_steps + size.timed_steps
    rows = random_tokens(batch * size.ranks * steps, length, size.vocabulary)
    settings = TrainingArguments(
        output_dir=str(model_dir.parent / "trainer"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        bf16=precision == "bf16",
        learning_rate=1e-4,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    clock = Clock()
    Trainer(model=model, args=settings, train_dataset=dataset, callbacks=[clock]).train()
    return size.timed_steps * size.tokens * size.ranks, clock.times[-1] - clock.times[size.warmup_steps - 1]


BASELINES: dict[str, Callable[[Path, int, str, Size], tuple[int, float]]] = {
    "trainer": trainer,
    "trainer, kept": trainer,
    "bare": bare_loop,
}

if __name__ == "__main__":
    main()
