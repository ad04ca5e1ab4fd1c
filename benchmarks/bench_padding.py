"""The padding and the speed of fine-tuning on conversations of many lengths, for four ways to make batches.

    python benchmarks/bench_padding.py --work_dir /tmp/bench_padding

ShareGPT's conversations (requirements-real.txt), cut after the last turn that fits into --max_length, two ranks on the
CPU, a LLaMA of 8 million parameters, zero2 in float32:

- to max_length: every sample is padded to --max_length, as many recipes do. Such a step takes as long as one of full
  samples, so its speed is that of train_sft.py --benchmark, times the share of its places that hold a token.
- to the longest: each micro batch is padded to its longest sample, which is what train_sft.py does.
- by length: the same with --group_by_length.
- packed: prepare_sft_dataset.py --splicing best_fit, with documents kept apart.

Speed counts tokens that are not padding, as a ratio to the first way; each way runs once in every turn, and the medians
are printed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from inputs import add_smallest, benchmark_parser, make_folder, print_note  # noqa: E402

BASELINE = "to max_length"
# Name: the splicing of the data, and further flags.
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "to the longest": ("none", ()),
    "by length": ("none", ("--group_by_length",)),
    "packed": ("best_fit", ()),
}
RANKS = 2
MODEL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 5, "num_attention_heads": 4}
SMALLEST_MODEL = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Size:
    """What is trained.

    Attributes:
        micro_batch: samples of each rank.
        warmup_steps: at the beginning of a run, which are not measured.
    """

    model: dict[str, int] = field(default_factory=lambda: MODEL)
    vocabulary: int = 4000
    conversations: int = 600
    max_length: int = 1024
    micro_batch: int = 4
    warmup_steps: int = 1
    steps: int = 6
    turns: int = 2


SMALLEST = Size(SMALLEST_MODEL, vocabulary=600, conversations=40, max_length=256, steps=2, warmup_steps=2, turns=1)


def main() -> None:
    """Prepare the conversations in both ways, train in each way by turns, and print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    add_smallest(parser)
    args = parser.parse_args()
    size = SMALLEST if args.smallest else Size()
    work_dir = make_folder(parser, args.work_dir)
    try:
        print_note(args)
        parts = prepare(work_dir, size, is_smallest=args.smallest)
        found: dict[str, list[tuple[float, float]]] = {}
        for turn in range(size.turns):
            full = full_speed(work_dir, size)
            share = share_of_tokens(parts["none"], size)
            found.setdefault(BASELINE, []).append((1 - share, full * share))
            for name, (splicing, flags) in WAYS.items():
                found.setdefault(name, []).append(trained(work_dir, parts[splicing], flags, size))
            print(f"turn {turn + 1} of {size.turns} done", file=sys.stderr, flush=True)
        print("batches           padding    tokens/s over the first  (least-most)")
        for name, rows in found.items():
            ratios = [speed / base for (_, speed), (_, base) in zip(rows, found[BASELINE], strict=True)]
            padding = f"{median(padding for padding, _ in rows):.1%}"
            print(f"{name:<16}{padding:>9}{median(ratios):>27.2f}  ({min(ratios):.2f}-{max(ratios):.2f})")
    finally:
        shutil.rmtree(work_dir)


def conversations(size: Size, *, is_smallest: bool) -> list[dict[str, Any]]:
    """Records of conversations; with --smallest, of text that Python includes."""
    if is_smallest:
        from pydoc_data.topics import topics

        texts = list(islice(topics.values(), size.conversations))
        return [{"messages": [{"role": "user", "content": "?"}, {"role": "gpt", "content": t[:300]}]} for t in texts]
    from neutral_english import find_data, records

    own = (record for record in records(find_data()) if any(turn["from"] == "gpt" for turn in record["conversations"]))
    return list(islice(own, size.conversations))


def prepare(folder: Path, size: Size, *, is_smallest: bool) -> dict[str, Path]:
    """Write a model, its tokenizer and the conversations as one bin for each splicing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from colossal_llama2.encoding.from_text import train_vocabulary, write_tokenizer

    rows = conversations(size, is_smallest=is_smallest)
    (folder / "in").mkdir()
    (folder / "in" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line for row in rows for line in json.dumps(row, ensure_ascii=False).split("\\n") if line.strip()]
    torch.manual_seed(0)
    heads = size.model["num_attention_heads"]
    config = LlamaConfig(vocab_size=size.vocabulary, num_key_value_heads=heads, **size.model)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_tokenizer(train_vocabulary(lines, size.vocabulary), folder / "model")
    parts = {}
    for splicing in ("none", "best_fit"):
        command = ["prepare_sft_dataset.py", "--data_input_dirs", folder / "in", "--tokenizer_dir", folder / "model"]
        for name in ("cache", "jsonl_output", "arrow_output"):
            command += [f"--data_{name}_dir", folder / splicing / name]
        command += ["--max_length", size.max_length, "--splicing", splicing, "--num_spliced_dataset_bins", 1]
        run([*command, "--on_bad_row", "skip"])
        parts[splicing] = folder / splicing / "arrow_output" / "part-00000"
    return parts


def share_of_tokens(part: Path, size: Size) -> float:
    """The share of places that hold a token if every sample is padded to max_length."""
    (entry,) = json.loads((part.parent / "manifest.json").read_text())["bins"]
    return entry["tokens"] / (entry["samples"] * size.max_length)


def full_speed(folder: Path, size: Size) -> float:
    """Tokens per second of samples of max_length tokens."""
    samples = size.micro_batch * RANKS * (size.warmup_steps + size.steps + 2)
    output = launch([*common_flags(folder, size), "--benchmark", "--num_samples", samples])
    found = re.search(r"^ *tokens/s {2,}([\d,.]+)", output, re.MULTILINE)
    assert found, output
    return float(found[1].replace(",", ""))


def trained(folder: Path, part: Path, flags: Sequence[str], size: Size) -> tuple[float, float]:
    """The share of padding, and the tokens per second, of a run."""
    places = [word for name in ("save_dir", "tensorboard_dir") for word in (f"--{name}", folder / "run" / name)]
    places += ["--config_file", folder / "run" / "config.json", "--dataset", part]
    steps = ["--max_steps", size.warmup_steps + size.steps, "--save_interval", 10**6, "--skip_save_each_epoch"]
    launch([*common_flags(folder, size), *places, *steps, *flags])
    lines = (folder / "run" / "save_dir" / "train_log.jsonl").read_text().splitlines()
    shutil.rmtree(folder / "run")
    records = [record for record in map(json.loads, lines) if "tokens_per_second" in record][size.warmup_steps :]
    tokens = sum(record["tokens"] for record in records)
    seconds = sum(record["tokens"] / record["tokens_per_second"] for record in records)
    places_read = sum(record["tokens"] / (1 - record["padding_share"]) for record in records)
    return 1 - tokens / places_read, tokens / seconds


def common_flags(folder: Path, size: Size) -> list[object]:
    """The flags of every run."""
    flags: list[object] = ["train_sft.py", "--pretrained", folder / "model", "--plugin", "zero2"]
    flags += ["--mixed_precision", "fp32", "--max_length", size.max_length, "--use_flash_attn"]
    return [*flags, "--micro_batch_size", size.micro_batch, "--accumulation_steps", 1]


def launch(words: Sequence[object]) -> str:
    """Run a script on all ranks, and return what it prints."""
    return run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", RANKS, *words])


def run(words: Sequence[object]) -> str:
    """Run Python, and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


if __name__ == "__main__":
    main()
