"""Writes docs/scaling.md: layouts, times and failures of large runs, made from the forecasts of --dry_run --suggest.

    python -m tests.scaling_page --output docs/scaling.md

tests/test_suggest.py compares the committed page with the output of this script. It trains nothing and needs no data.
"""

import argparse
import functools
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from colossal_llama2.cli import train_flags
from colossal_llama2.corpus.data_files import UNIT_BYTES
from colossal_llama2.dataset.write.bins import ARROW_BYTES_PER_TOKEN, JSONL_BYTES_PER_TOKEN
from colossal_llama2.gpus import GPUS, GPUS_PER_HOST
from colossal_llama2.model_sizes import MODEL_SIZES, VOCABULARIES
from colossal_llama2.train.forecast.failures import DAY, GPU_DAYS_BETWEEN_FAILURES, failures
from colossal_llama2.train.forecast.layouts import label
from colossal_llama2.train.forecast.speed import EFFICIENCY, step_forecast, token_flops
from colossal_llama2.train.forecast.suggestion import Job, Suggestion, checkpoint_size, suggest
from colossal_llama2.train.forecast.suggestion_report import Budget, batch, saving
from colossal_llama2.train.settings.from_flags import engine_settings
from colossal_llama2.train.suggest import built_in_fields

FLAGS = "--mixed_precision bf16 --use_flash_attn"
STEP_TOKENS, LENGTH = 2**22, 4096
GPU_COUNTS = (8, 64, 512)
# The original's README: tokens, GPUs, hours; its train.example.sh: samples of a micro batch, with recomputation.
ORIGINAL_TOKENS, ORIGINAL_GPUS, ORIGINAL_HOURS, ORIGINAL_MICRO_BATCH, ORIGINAL_COST = 8.5e9, 64, 15.0, 8, 1000
# Touvron et al., arXiv 2307.09288, table 2: GPU hours on A100-80GB for 2 T tokens.
LLAMA_2_TOKENS, LLAMA_2_VOCABULARY = 2e12, 32_000
LLAMA_2_GPU_HOURS = {"7b": 184_320, "13b": 368_640, "70b": 1_720_320}
# mosaicml/llm-foundry, scripts/train/benchmarking/README.md: bf16, FSDP, samples of 4,096 tokens, with recomputation.
FOUNDRY = {("7b", "a100-80g"): 0.548, ("13b", "a100-80g"): 0.576, ("7b", "h100"): 0.404, ("13b", "h100"): 0.416}
# Text of the benchmark of data preparation, in English and Chinese: bytes of text for a token.
BYTES_PER_TOKEN = 3.0
# kitoken encodes 6.6 MB/s on one core of the machine of docs/benchmarks.md, and the whole command takes 1.9 times that.
PREPARED_PER_CORE = 6.6e6 / 1.9
PREPARING_CORES = 512
# In the cache, for each unit of input (dataset/write/unit_files.py), and bytes of a token there.
FILES_PER_UNIT, CACHE_BYTES_PER_TOKEN = 3, 4
# Bytes of the order of samples on each rank (dataset/read/order.py).
ORDER_BYTES = 8
STORAGE = 2e9
SCALES = (("7b", 64), ("7b", 512), ("70b", 512))
TEXTS = (10e9, 100e9, 1e12, 10e12, 100e12)


def job(size: str, vocabulary: int, gpus: int, *, gpu: str = "a800-80g", recomputes: bool = False) -> Job:
    """A built-in model on a number of GPUs, with the flags of this page."""
    args = train_flags.train_parser().parse_args(["--pretrained", "x", "--dataset", "x", *FLAGS.split()])
    return Job(
        name=size,
        fields=built_in_fields(size, vocabulary, LENGTH),
        base=replace(engine_settings(args), zero_stage=1),
        ranks=gpus,
        gpu=GPUS[gpu],
        max_length=LENGTH,
        step_tokens=STEP_TOKENS,
        always_recomputes=recomputes,
    )


@functools.cache
def best(size: str, vocabulary: int, gpus: int, gpu: str = "a800-80g", recomputes: bool = False) -> Suggestion | None:
    """The fastest layout that fits, if any."""
    found, _ = suggest(job(size, vocabulary, gpus, gpu=gpu, recomputes=recomputes), most_hybrid=1)
    return found[0] if found and found[0].fits else None


def page() -> str:
    """The whole of docs/scaling.md."""
    sections = (_original(), _published(), _layouts(), _data(), _failures(), _breaks())
    return "\n\n".join([INTRODUCTION, *("\n".join(section) for section in sections)]) + "\n"


INTRODUCTION = """\
# Scaling: which layout, how long, what breaks first

Written by `python -m tests.scaling_page --output docs/scaling.md` with the code of `--dry_run --suggest`, which answers
the same questions for any model, number of GPUs and budget:

```bash
python train.py --dry_run --suggest --model_size 13b --num_ranks 64 --gpu a800-80g --tokens 25e9 \\
    --mixed_precision bf16 --use_flash_attn
```

**Nothing on this page was measured on a GPU.** Memory is computed as in
[parallelism.md](parallelism.md#dry-run-will-it-fit), times from data sheets and one published run, failures from
published rates. All rows have samples of 4,096 tokens, steps of about 4.2 M tokens, bf16 and flash-attn. A layout fits
if its forecast, 20 % more and 2 GiB are within the memory of the GPU."""


def table(rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Markdown; `align` has a letter, l or r, for each column."""
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [head, f"|{'|'.join({'l': '---', 'r': '--:'}[letter] for letter in align)}|", *rest]


def _original_forecast(gpus: int) -> tuple[float, float, float]:
    """Hours and MFU that are forecast for the original's run on a number of GPUs, and the MFU of 15 x 64 GPU hours."""
    planned = job("7b", VOCABULARIES[0], gpus)
    settings = replace(planned.base, plugin="zero2", micro_batch_size=ORIGINAL_MICRO_BATCH)
    found, _ = suggest(replace(planned, always_recomputes=True), most_hybrid=1)
    plan = replace(found[0].plan, settings=settings, checkpointing=True)
    tokens = gpus * ORIGINAL_MICRO_BATCH * LENGTH
    step = step_forecast(planned.shape, plan, planned.gpu, step_tokens=tokens)
    hours = ORIGINAL_TOKENS / tokens * step.seconds / 3600
    flops = ORIGINAL_TOKENS * token_flops(planned.shape, LENGTH)
    seconds = ORIGINAL_HOURS * 3600 * ORIGINAL_GPUS
    return hours, step.mfu, flops / seconds / (planned.gpu.peak_tflops * 1e12)


def paragraph(*parts: str) -> str:
    """Sentences as lines of the width of the other pages."""
    return "\n".join(textwrap.wrap(" ".join(parts), 120))


def _original() -> list[str]:
    hours, mfu, implied = _original_forecast(ORIGINAL_GPUS)
    one_host, _, _ = _original_forecast(GPUS_PER_HOST)
    gpu_hours = ORIGINAL_HOURS * ORIGINAL_GPUS
    speed = ORIGINAL_TOKENS / gpu_hours / 3600
    return [
        "## A worked example: the original's run",
        "",
        paragraph(
            "The original trained LLaMA-2-7B with 69,104 tokens on 8.5 B tokens in 15 hours on 64 A800, for about",
            f"1,000 USD, and states about 5 days on one host of 8. That is {speed:,.0f} tokens/s on each GPU,",
            f"{implied:.1%} of its peak (MFU, recomputation not counted), and {ORIGINAL_COST / gpu_hours:.2f} USD for",
            "each GPU hour. Its script uses zero2, 8 samples on each GPU and recomputation. With these settings, the",
            "forecast is:",
        ),
        "",
        *table(
            [
                ["run", "stated", "forecast", "MFU, stated", "MFU, forecast"],
                ["64 A800", "15 hours", f"{hours:.1f} hours", f"{implied:.1%}", f"{mfu:.1%}"],
                ["8 A800", "about 5 days", f"{one_host / 24:.1f} days", "", ""],
            ],
            "lrrrr",
        ),
        "",
        paragraph(
            "The first row is no test of the forecast: the share of the peak at which a GPU computes,",
            f"{EFFICIENCY:.2f}, is chosen so that it holds. The second row tests that communication matters little.",
        ),
    ]


def _published() -> list[str]:
    rows = [["run", "GPUs", "published MFU", "forecast MFU", "forecast layout"]]
    differences = []
    for size, gpu_hours in LLAMA_2_GPU_HOURS.items():
        shape = job(size, LLAMA_2_VOCABULARY, 512).shape
        peak = GPUS["a100-80g"].peak_tflops * 1e12
        mfu = LLAMA_2_TOKENS * token_flops(shape, LENGTH) / (gpu_hours * 3600) / peak
        found = best(size, LLAMA_2_VOCABULARY, 512, "a100-80g")
        rows.append([f"LLaMA-2 {size}", "A100, not stated", f"{mfu:.1%}", *_forecast(found)])
        differences += [100 * (found.step.mfu - mfu)] if found else []
    for (size, gpu), mfu in FOUNDRY.items():
        found = best(size, LLAMA_2_VOCABULARY, 8, gpu, recomputes=True)
        rows.append([f"llm-foundry {size}", f"8 x {gpu}", f"{mfu:.1%}", *_forecast(found)])
        differences += [100 * (found.step.mfu - mfu)] if found else []
    return [
        "## Other published runs",
        "",
        *table(rows, "llrrl"),
        "",
        paragraph(
            "LLaMA-2's MFU is that of the GPU hours in its paper (arXiv 2307.09288, table 2), with restarts and all",
            "else; it is forecast for 512 GPUs. The rows of llm-foundry are short benchmarks of models of about these",
            "sizes, with FSDP and recomputation: what tuned kernels reach above the original's run. Over these rows,",
            f"the forecast MFU is from {-min(differences):.1f} percentage points below the published one to",
            f"{max(differences):.1f} above it. `--benchmark` measures the real speed on one host.",
        ),
    ]


def _forecast(found: Suggestion | None) -> tuple[str, str]:
    if found is None:
        return "-", "none fits"
    return f"{found.step.mfu:.1%}", label(found.plan.settings) + ", recomputing" * found.plan.checkpointing


def _layouts() -> list[str]:
    rows = [["model", "vocabulary", "GPUs", "layout", "batch", "GiB", "MFU", "days for 100 B tokens", "GPU hours"]]
    for size in MODEL_SIZES:
        for vocabulary in VOCABULARIES:
            for gpus in GPU_COUNTS:
                rows.append([size, f"{vocabulary:,}", str(gpus), *_layout_cells(best(size, vocabulary, gpus), gpus)])
    return [
        "## Layouts",
        "",
        paragraph(
            "The fastest layout that fits on A800 with 80 GB. batch: samples at a time x passes of a step; r:",
            "recomputation.",
        ),
        "",
        *table(rows, "lrrllrrrr"),
        "",
        paragraph(
            "With 128,256 instead of 69,104 tokens a 7B has 0.48 B parameters more. Half of them belong to the head",
            "and add computation; the other half are embeddings, which add none. `--dry_run --suggest` also lists",
            "layouts that are hardly slower and simpler, such as `zero2`.",
        ),
    ]


def _layout_cells(found: Suggestion | None, gpus: int) -> list[str]:
    if found is None:
        return ["none fits", "", "", "", "", ""]
    hours = found.hours(100e9)
    cells = [label(found.plan.settings), batch(found), f"{found.needed_gib:.0f}", f"{found.step.mfu:.0%}"]
    return [*cells, f"{hours / 24:,.1f}", f"{hours * gpus:,.0f}"]


@dataclass(frozen=True)
class Text:
    """What an amount of text becomes, on a number of GPUs and with PREPARING_CORES cores."""

    size: float

    @property
    def tokens(self) -> float:
        return self.size / BYTES_PER_TOKEN

    @property
    def preparing_hours(self) -> float:
        return self.size / PREPARED_PER_CORE / PREPARING_CORES / 3600

    @property
    def cache_files(self) -> float:
        return FILES_PER_UNIT * max(self.size / UNIT_BYTES, 1)

    @property
    def disk(self) -> float:
        """Bytes of the cache, arrow and jsonl."""
        return self.tokens * (CACHE_BYTES_PER_TOKEN + ARROW_BYTES_PER_TOKEN + JSONL_BYTES_PER_TOKEN)

    @property
    def order_memory(self) -> float:
        """Bytes of the order of samples on the ranks of a host."""
        return self.tokens / LENGTH * ORDER_BYTES * GPUS_PER_HOST

    def days(self, gpus: int, size: str = "7b") -> float:
        """Days of training a built-in model."""
        found = best(size, VOCABULARIES[0], gpus)
        assert found is not None, "only those that fit are listed"
        return found.hours(self.tokens) / 24


def _data() -> list[str]:
    rows = [["text", "tokens", "preparing", "files in the cache", "disk", "order of samples", "7B on 64", "7B on 512"]]
    for text in map(Text, TEXTS):
        cells = [scaled(text.size, "B"), f"{text.tokens / 1e9:,.0f} B", f"{text.preparing_hours:,.1f} h"]
        cells += [scaled(text.cache_files, ""), scaled(text.disk, "B"), scaled(text.order_memory, "B")]
        rows.append([*cells, *(f"{text.days(gpus):,.1f} d" for gpus in (64, 512))])
    return [
        "## From text to tokens",
        "",
        paragraph(
            f"With {PREPARING_CORES} cores (`--executor ray` or `--shard`), {BYTES_PER_TOKEN:g} bytes of text a token,",
            f"and {PREPARED_PER_CORE / 1e6:.1f} MB/s of text on each core. The disk holds the cache, arrow and jsonl;",
            "`--no_jsonl` saves half of it. The order of samples is held in memory by each of the 8 ranks of a host.",
        ),
        "",
        *table(rows, "rrrrrrrr"),
    ]


def scaled(value: float, unit: str) -> str:
    """A number with a prefix, such as 3.3 GB."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:,.3g} P{unit}".rstrip()


def _failures() -> list[str]:
    head = ["model", "GPUs", "checkpoint", "time of a save", "failures a day", "best interval"]
    rows = [[*head, "lost", "lost, OPT's rate"]]
    budget = Budget(1e9, None, STORAGE)
    for size in MODEL_SIZES:
        for gpus in GPU_COUNTS:
            if best(size, VOCABULARIES[0], gpus) is None:
                continue
            planned = job(size, VOCABULARIES[0], gpus)
            save, risk = saving(planned, budget)
            cells = [size, str(gpus), f"{checkpoint_size(planned) / 1e9:,.0f} GB", f"{save:,.0f} s"]
            cells += [f"{risk.per_day:.3f}", f"{risk.interval / 3600:.1f} h", f"{risk.lost:.2%}"]
            rows.append([*cells, f"{failures(4 * gpus, save).lost:.2%}"])
    return [
        "## Failures and saves",
        "",
        paragraph(
            f"One failure in {GPU_DAYS_BETWEEN_FAILURES:,.0f} days of a GPU is the rate of Llama 3 405B (arXiv",
            "2407.21783: 419 interruptions in 54 days on 16,384 GPUs); OPT-175B (arXiv 2205.01068) failed about four",
            "times as often. The best interval between saves is Young's and Daly's; \"lost\" is the share of the time",
            "for saves at that interval, for repeated steps, and for restarts of 15 minutes. A save writes",
            f"{STORAGE / 1e9:g} GB/s.",
        ),
        "",
        *table(rows, "lrrrrrrr"),
        "",
        paragraph(
            "`--save_interval` counts steps; `--dry_run --suggest` prints the best one. `--dist_timeout` must be",
            "longer than a save: 10 minutes by default.",
        ),
    ]


def _breaks() -> list[str]:
    rows = [["text", "model", "GPUs", "first", "then"]]
    for text in map(Text, TEXTS):
        for size, gpus in SCALES:
            first, *rest = [*_broken(text, size, gpus)] or ["nothing"]
            rows.append([scaled(text.size, "B"), size, str(gpus), first, ", ".join(rest)])
    smallest = GPU_COUNTS[-1] * LENGTH / 1e6
    return [
        "## What breaks first",
        "",
        *table(rows, "rlrll"),
        "",
        paragraph(
            "The limits, in this order: preparing takes over a day, a folder holds over 10 M files, prepared data",
            "takes over 100 TB, the order of samples takes over 100 GB of a host, one failure is expected in the run,",
            "a save takes over half of `--dist_timeout` (5 of 10 minutes), training takes over 30 days.",
        ),
        "",
        paragraph(
            f"The global batch does not break: {GPU_COUNTS[-1]} data-parallel ranks with one sample each have",
            f"{smallest:.1f} M tokens in a step, half of LLaMA-2's. Layouts with tensor or pipeline parallelism have",
            "fewer.",
        ),
        "",
        *CURES,
    ]


CURES = [
    "- **Preparing** divides over more cores; each text is read once.",
    "- **Files in the cache**: three for each 4 MiB of text, in one folder. Prepare large corpora in several commands,",
    "  each with its own folders, and name all of them with `--dataset`.",
    "- **Disk**: `--no_jsonl`, and remove the cache of a finished command.",
    "- **The order of samples**: `--bucketed` holds the order of all buckets, so it does not help; longer samples do.",
    "- **Failures**: save at the best interval, and let the job restart with `--resume auto`.",
    "- **Saves** of a 70B: raise `--dist_timeout`, or write to a faster file system.",
]


def _broken(text: Text, size: str, gpus: int) -> Iterator[str]:
    save, risk = saving(job(size, VOCABULARIES[0], gpus), Budget(text.tokens, None, STORAGE))
    days = text.days(gpus, size)
    if text.preparing_hours * 3600 > DAY:
        yield f"preparing ({text.preparing_hours / 24:,.1f} days)"
    if text.cache_files > 10e6:
        yield f"files in the cache ({scaled(text.cache_files, '')})"
    if text.disk > 100e12:
        yield f"disk ({scaled(text.disk, 'B')})"
    if text.order_memory > 100e9:
        yield f"order of samples ({scaled(text.order_memory, 'B')} of a host)"
    if days * risk.per_day >= 1:
        yield f"failures ({days * risk.per_day:,.0f}, every {1 / risk.per_day:,.0f} days)"
    if save > 300:
        yield f"saves ({save:,.0f} s)"
    if days > 30:
        yield f"training ({days:,.0f} days)"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(prog="python -m tests.scaling_page", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="file to write; without it the page is printed")
    args = parser.parse_args(argv)
    if args.output is None:
        sys.stdout.write(page())
    else:
        args.output.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
