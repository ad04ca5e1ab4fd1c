"""Compare training under every plugin, parallel axis and option with a plain PyTorch loop, step by step.

    python -m tests.equality                          the whole matrix, two or four ranks, on the CPU
    python -m tests.equality --only tp2 --steps 10    the rows whose name has that word
    python -m tests.equality --output docs/equality.md    also writes the page
    python -m tests.equality --only far --unrepaired unrounded_buffers    without one fix of bug_fixes.py

Each row is one training command on real text, run by the real scripts' code (train_worker.py). It is compared with
reference.py: the largest relative difference of the loss and of the gradient norm over all steps, the norm of the
difference of the final weights over the norm of the weights, and Adam's first moment after step 1 over what clipping
should have let through to it. One option is varied at a time.

Allowed in float32: see FLOAT32_ALLOWED. In bfloat16: twice the largest gap between the plain loop and plain loops that
differ only in rounding, on parts of the batches (BFLOAT16_PARTS), by halves of the matrices or with fused attention,
measured again for each model; BFLOAT16_WEIGHTS for weights, if that is more. The command ends with 1 if a row exceeds
this. Combinations that the scripts refuse come last, run without the check that refuses them, to show why. A CPU
without bfloat16 instructions needs more than half an hour for the matrix.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from tests import far_copies, launching, reference, tiny, training_jobs
from tests.layouts import FLOAT32_LAYOUTS, HYBRID, LAYOUTS, PP2, SEQUENCE, Layout
from tests.training_jobs import CLIP, GLOBAL_BATCH, LR, Job

FLOAT32_ALLOWED = {"loss": 1e-5, "norm": 1e-5, "weights": 1e-4}
BFLOAT16_WEIGHTS = 1e-2
# Halves, as many parts as commands accumulate, and single samples, as in pipelines.
BFLOAT16_PARTS = (2, 4, 16)
GAPS = 2.0
MOMENT_ALLOWED = 0.02
ODD_VOCABULARY = 601
# The first row that a model's vocabulary is said to have grown by.
NEW_ROWS_FROM = 500
# At LR, two plain float32 loops that differ in rounding alone may be as far apart in the norm as is allowed, where a
# difference of 1e-7 has grown: with ODD_VOCABULARY 1.1e-5 and with "llama3" 2.0e-5 (halves of the matrices added up),
# with documents 8.2e-6 (fused attention, PyTorch 2.14). At this rate they are at most 1e-6 apart.
LOW_LR = LR / 3
# Samples of one step of the rows "far", whose models attend that far back.
FAR_BATCH, FAR_LENGTH, FAR_DISTANCE = 2, 2048, 1500


@dataclass(frozen=True)
class Option:
    """One difference from the plain command."""

    flags: tuple[str, ...] = ()
    accumulation_steps: int = 1
    model: str = "plain"
    data: str = "ragged"
    clip: float = CLIP
    freeze: bool = False
    lr: float = LR
    batch: int = GLOBAL_BATCH
    lora_rank: int | None = None

    @property
    def reference(self) -> tuple[str, str, float, bool, float, int, int | None]:
        """The options that the plain loop needs."""
        return self.model, self.data, self.clip, self.freeze, self.lr, self.batch, self.lora_rank


# The layouts that are combined with every option, besides float32 on two ranks; others only with some.
EVERY_OPTION = {"fp32": ("3d pp2 tp2",), "bf16": ("gemini", "gemini_auto", "3d tp2 zero1", "3d pp2 zero1")}
SOME_OPTIONS = {"fp32": ("", "accumulating 4", "documents"), "bf16": ("", "accumulating 4")}
# Ranks hold the whole of an adapter.
LORA_LAYOUTS = {
    "fp32": ("ddp", "zero2", "zero2_cpu", "3d", "3d sp2 all_to_all"),
    "bf16": (
        *("ddp", "gemini", "gemini offloaded", "gemini_auto", "zero2", "zero2_cpu"),
        *("3d zero0", "3d zero1", "3d zero2"),
    ),
}
EVERY_LORA_OPTION = {"fp32": LORA_LAYOUTS["fp32"], "bf16": ("gemini", "zero2", "3d zero1")}
LORA_RANK = 4
LORA = ("--lora_rank", str(LORA_RANK))
OPTIONS = {
    "": Option(),
    "unclipped": Option(flags=("--gradient_clipping", "0"), clip=0.0),
    "accumulating 4": Option(accumulation_steps=4),
    "recomputing": Option(flags=("--use_grad_checkpoint",)),
    "frozen": Option(flags=("--freeze_non_embeds_params",), freeze=True),
    "tied": Option(model="tied"),
    "biases": Option(model="biased"),
    "llama3": Option(model="llama3", lr=LOW_LR),
    "full rows": Option(data="full"),
    "documents": Option(flags=("--document_mask", "on"), data="spliced", lr=LOW_LR),
    "with logits": Option(flags=("--chunked_loss", "off")),
    f"vocabulary {ODD_VOCABULARY}": Option(model="odd", lr=LOW_LR),
    "lora": Option(flags=LORA, lora_rank=LORA_RANK),
    "lora accumulating 4": Option(flags=LORA, lora_rank=LORA_RANK, accumulation_steps=4),
    "lora recomputing": Option(flags=(*LORA, "--use_grad_checkpoint"), lora_rank=LORA_RANK),
    "lora documents": Option(flags=(*LORA, "--document_mask", "on"), lora_rank=LORA_RANK, data="spliced", lr=LOW_LR),
    "lora with logits": Option(flags=(*LORA, "--chunked_loss", "off"), lora_rank=LORA_RANK),
    "lora tied": Option(flags=LORA, lora_rank=LORA_RANK, model="tied"),
    "lora llama3": Option(flags=LORA, lora_rank=LORA_RANK, model="llama3", lr=LOW_LR),
    "lora grown": Option(flags=LORA, lora_rank=LORA_RANK, model="grown"),
    "far": Option(flags=("--max_length", str(FAR_LENGTH)), model="far", data="far", batch=FAR_BATCH),
}


# Combinations that are refused before training, and are run here anyway to show why: precision, layout, option.
REFUSED = {
    "fp32 gemini": ("fp32", Layout(("--plugin", "gemini")), Option()),
    "fp32 3d zero1": ("fp32", Layout((*HYBRID, "1")), Option()),
    "bf16 3d pp2 zero2": ("bf16", Layout((*HYBRID, "2", *PP2), data_size=1), Option()),
    "fp32 3d pp2 with one part": (
        "fp32",
        Layout((*HYBRID, "0", *PP2, "--microbatch_size", "16"), data_size=1),
        Option(),
    ),
    "fp32 3d pp3 frozen": (
        "fp32",
        Layout((*HYBRID, "0", "--pp", "3"), ranks=3, data_size=1),
        Option(flags=("--freeze_non_embeds_params",), model="deep", freeze=True),
    ),
    "bf16 3d tp2 dp2 zero2 split_gather accumulating 4": (
        "bf16",
        Layout((*HYBRID, "2", "--tp", "2", *SEQUENCE, "split_gather"), ranks=4),
        Option(accumulation_steps=4),
    ),
}
REFUSED.update(
    (f"fp32 {layout} lora", ("fp32", FLOAT32_LAYOUTS[layout], OPTIONS["lora"])) for layout in ("3d tp2", "3d pp2")
)
REFUSED_SECONDS = 90
ROWS_AT_A_TIME = 16


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    precision: str
    layout: Layout
    option: Option
    is_refused: bool = False

    @property
    def _holds_parts_twice(self) -> bool:
        # Both ends of a pipeline hold tied embeddings, and tensor parallelism splits some of the biases.
        split_by = {"tied": "--pp", "biased": "--tp"}.get(self.option.model)
        return split_by in self.layout.flags

    def spec(
        self, folder: Path, models: dict[str, Path], parts: dict[str, list[str]], unrepaired: Sequence[str] = ()
    ) -> dict:
        """The command, for train_worker.py."""
        home = folder / self.name.replace(" ", "_")
        flags = training_jobs.common_flags(home, models[self.option.model], parts[self.option.data])
        flags += ["--lr", self.option.lr, "--mixed_precision", self.precision, *self.layout.flags, *self.option.flags]
        flags += self.layout.batch_flags(self.option.batch, self.option.accumulation_steps)
        return {
            "name": self.name.replace(" ", "_"),
            "script": "train.py",
            "flags": [str(flag) for flag in flags],
            # A sum over ranks would count them twice.
            "moments": not self._holds_parts_twice,
            "plugin_arguments": dict(self.layout.plugin_arguments),
            "lifted": self.is_refused,
            "unrepaired": list(unrepaired),
        }


def _are_combined(precision: str, layout: str, option: str) -> bool:
    if OPTIONS[option].lora_rank is not None:
        return layout in LORA_LAYOUTS[precision] and (option == "lora" or layout in EVERY_LORA_OPTION[precision])
    is_small = LAYOUTS[precision][layout].ranks == 2
    if option == "far" and is_small:
        return True
    in_full = (precision == "fp32" and is_small) or layout in EVERY_OPTION[precision]
    return in_full or option in SOME_OPTIONS[precision]


def all_cases() -> list[Case]:
    """The matrix."""
    named = [
        (precision, layout, option)
        for precision in ("fp32", "bf16")
        for option in OPTIONS
        for layout in LAYOUTS[precision]
        if _are_combined(precision, layout, option)
    ]
    cases = [
        Case(" ".join(filter(None, names)), names[0], LAYOUTS[names[0]][names[1]], OPTIONS[names[2]]) for names in named
    ]
    return cases + [Case(name, *parts, is_refused=True) for name, parts in REFUSED.items()]


@dataclass(frozen=True)
class Gap:
    """The difference of two runs: relative, the largest over all steps; weights by norm."""

    loss: float
    norm: float
    weights: float

    def within(self, allowed: "Gap") -> bool:
        """True if no figure is above the allowed one; NaN is always above."""
        return self.loss <= allowed.loss and self.norm <= allowed.norm and self.weights <= allowed.weights

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, norm {self.norm:.1e}, weights {self.weights:.1e}"


def largest(values: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(value - other) / abs(other) for value, other in zip(values, expected, strict=True))


def gap_of(trace: reference.Trace, expected: reference.Trace) -> Gap:
    """The difference of a trace from the reference."""
    return Gap(
        largest(trace.losses, expected.losses),
        largest(trace.grad_norms, expected.grad_norms),
        launching.distance(trace.weights, expected.weights),
    )


def trace_of(job: Job) -> reference.Trace:
    """What a finished command logged and saved."""
    return reference.Trace(job.scalars("Loss"), job.scalars("Gradient Norm"), training_jobs.weights_of(job))


class References:
    """Plain loops, each run once: in float32 without padding, in bfloat16 on complete batches."""

    def __init__(self, models: dict[str, Path], parts: dict[str, list[str]]):
        self._models, self._parts, self._known = models, parts, {}

    def of(self, case: Case) -> tuple[reference.Trace, Gap]:
        """The reference trace, and how much a command may differ from it."""
        if case.precision == "fp32":
            return self._run(case, 0), Gap(**FLOAT32_ALLOWED)
        whole = self._run(case, 1)
        others = [(parts, halved) for halved in (False, True) for parts in (1, *BFLOAT16_PARTS) if halved or parts > 1]
        traces = [self._run(case, parts, halved) for parts, halved in others]
        return whole, _bound([gap_of(trace, whole) for trace in [*traces, self._run(case, 1, attention="sdpa")]])

    def of_halves(self, case: Case) -> Gap | None:
        """The narrower bound in bfloat16, from the plain loop on halves of the batches only."""
        # Halves of two samples are each computed as in the whole batch.
        if case.precision == "fp32" or case.option.batch == FAR_BATCH:
            return None
        return _bound([gap_of(self._run(case, 2), self._run(case, 1))])

    def _run(self, case: Case, micro_batches: int, halved: bool = False, attention: str = "eager") -> reference.Trace:
        micro_batches = min(micro_batches, case.option.batch)
        key = (case.precision, case.option.reference, micro_batches, halved, attention)
        if key not in self._known:
            self._known[key] = reference.train(
                self._models[case.option.model],
                self._parts[case.option.data],
                precision=case.precision,
                global_batch=case.option.batch,
                lr=case.option.lr,
                clip=case.option.clip,
                freeze=case.option.freeze,
                micro_batches=micro_batches,
                unsplice=case.option.data == "spliced",
                halved=halved,
                attention=attention,
                lora_rank=case.option.lora_rank,
                trains_embeddings=case.option.model == "grown",
            )
        return self._known[key]


def _bound(gaps: list[Gap]) -> Gap:
    loss, norm, weights = (GAPS * max(values) for values in zip(*map(astuple, gaps), strict=True))
    return Gap(loss, norm, max(weights, BFLOAT16_WEIGHTS))


@dataclass(frozen=True)
class Row:
    """A finished case.

    Attributes:
        moment: Adam's first moment after step 1 over what clipping allows, 1 if it is right.
        narrow: the bound from only halves of the batches, in bfloat16.
    """

    case: Case
    gap: Gap
    allowed: Gap
    moment: float | None
    narrow: Gap | None = None

    @property
    def passed(self) -> bool:
        moment_is_right = self.moment is None or abs(self.moment - 1) <= MOMENT_ALLOWED
        return self.gap.within(self.allowed) and moment_is_right

    def cells(self) -> list[str]:
        """The row of the table."""
        figures = [
            f"{getattr(self.gap, name):.1e} / {getattr(self.allowed, name):.1e}" for name in ("loss", "norm", "weights")
        ]
        moment = "-" if self.moment is None else f"{self.moment:.4f}"
        return [self.case.name, *figures, moment, "equal" if self.passed else "DIFFERENT"]


HEAD = ["configuration", "loss / allowed", "norm / allowed", "weights / allowed", "first moment", "result"]


def compare(case: Case, job: Job, references: References) -> Row:
    """Raises AssertionError if the command ended with an error, or Gemini did not spread its chunks over the ranks."""
    assert job.error is None, f"{case.name}: {job.error}"
    assert job.chunks is None or (len(job.chunks) > 1 and not any(job.chunks)), f"{case.name}: {job.chunks}"
    expected, allowed = references.of(case)
    norm = expected.grad_norms[0]
    moment = job.first_moment_norm
    if moment is not None:
        moment /= min(norm, case.option.clip or norm)
    return Row(case, gap_of(trace_of(job), expected), allowed, moment, references.of_halves(case))


def launches(cases: list[Case]) -> Iterator[tuple[int, list[Case]]]:
    """Yield (ranks, cases), few at a time, so that rows appear regularly."""
    for ranks in sorted({case.layout.ranks for case in cases}):
        chosen = [case for case in cases if case.layout.ranks == ranks]
        for start in range(0, len(chosen), ROWS_AT_A_TIME):
            yield ranks, chosen[start : start + ROWS_AT_A_TIME]


def run_cases(
    cases: list[Case], folder: Path, steps: int, unrepaired: Sequence[str] = ()
) -> tuple[list[Row], dict[str, str]]:
    """Launch all cases and compare each, without these fixes; rows are printed after each launch.

    Returns:
        The rows of allowed combinations, and the reasons of refused ones.
    """
    models, parts = make_inputs(folder, steps)
    references = References(models, parts)
    rows, refused = [], {}
    print_row(HEAD)
    allowed = [case for case in cases if not case.is_refused]
    for number, (ranks, chosen) in enumerate(launches(allowed)):
        home = folder / f"launch-{number}"
        home.mkdir()
        specs = [case.spec(home, models, parts, unrepaired) for case in chosen]
        launching.launch(home, specs, ranks=ranks, timeout=600)
        for case, spec in zip(chosen, specs, strict=True):
            rows.append(compare(case, training_jobs.finished(home, spec), references))
            print_row(rows[-1].cells())
    for case in (case for case in cases if case.is_refused):
        home = folder / case.name.replace(" ", "_")
        home.mkdir()
        refused[case.name] = why_refused(case, home, models, parts, references)
        print(f"{case.name:44s} refused: {refused[case.name]}", flush=True)
    return rows, refused


def why_refused(
    case: Case, home: Path, models: dict[str, Path], parts: dict[str, list[str]], references: References
) -> str:
    """The outcome of a refused command that is run anyway."""
    spec = case.spec(home, models, parts)
    try:
        process = launching.attempt(home, spec, ranks=case.layout.ranks, timeout=REFUSED_SECONDS)
    except subprocess.TimeoutExpired:
        return f"had not ended after {REFUSED_SECONDS} s"
    if process.returncode:
        errors = re.findall(r"^\w*(?:Error|Exception): .*", process.stderr, re.MULTILINE)
        return f"fails: {errors[0] if errors else process.stderr[-200:]}"
    job = training_jobs.finished(home, spec)
    if job.error:
        return f"ends: {job.error}"
    row = compare(case, job, references)
    return f"{row.gap} apart, {row.allowed} allowed" if not row.passed else f"EQUAL, needs no refusal ({row.gap})"


def make_inputs(folder: Path, steps: int) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Models and prepared data, by name."""
    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    plain = tiny.make_model(folder / "plain", tokenizer)
    models = {
        "plain": plain,
        "tied": tiny.make_model(folder / "tied", tokenizer, tie=True),
        "biased": tiny.make_model(folder / "biased", tokenizer, biases=True),
        "llama3": tiny.make_model(folder / "llama3", tokenizer, like_llama3=True),
        "grown": tiny.with_new_rows(shutil.copytree(plain, folder / "grown"), first=NEW_ROWS_FROM),
        "deep": tiny.make_model(folder / "deep", tokenizer, layers=3),
        "odd": training_jobs.with_vocabulary(plain, folder / "odd", ODD_VOCABULARY),
        "far": far_copies.make_model(folder / "far_model", tokenizer, distance=FAR_DISTANCE),
    }
    data = {
        name: training_jobs.write_data(folder / name, tokenizer, steps, full=name == "full")
        for name in ("ragged", "full")
    }
    data["spliced"] = [training_jobs.write_spliced_data(folder / "spliced" / "part-00000", tokenizer, steps)]
    data["far"] = far_copies.write_data(folder / "far", samples=FAR_BATCH, length=FAR_LENGTH, distance=FAR_DISTANCE)
    return models, data


def print_row(cells: list[str]) -> None:
    """Print one line of the table immediately."""
    print(f"{cells[0]:44s} " + " ".join(f"{cell:>18s}" for cell in cells[1:]), flush=True)


PAGE = """# Training is the same under every plugin and option

Written by `python -m tests.equality --output docs/equality.md`. Each row is a run of {steps} optimizer steps of {batch}
samples of real text, with a LLaMA of two layers on two to four CPU ranks. It is compared with a plain PyTorch loop in
one process.

| column | meaning |
|---|---|
| loss, norm | largest relative difference of any step; the norm is that of the gradient before clipping |
| weights | norm of the difference of the final weights, divided by the norm of the weights |
| allowed | the limit, after the slash |
| first moment | norm of Adam's first moment after step 1, divided by its value after correct clipping, so 1 is right; \
"-" if several ranks hold the same parts of the model |

In the names of the rows, "accumulating" and its number are the micro batches of a step, "recomputing" is
`--use_grad_checkpoint`, "frozen" is `--freeze_non_embeds_params`, "tied" is a model with tied embeddings, "biases" one
with biases, and "llama3" one with LLaMA-3's positions, fewer key-value heads than heads, and heads of another size than
hidden_size / heads. The loss is chunked unless the row says "with logits". "documents" are spliced samples, compared
with their documents one by one. "lora" is an adapter of rank {lora_rank}, which the plain loop trains in PEFT's own
model; its weights are those of the adapter. A "grown" model has new rows, and trains its embeddings with the adapter.
"far" is one step of {far_batch} samples of {far_length:,} tokens, with a model that repeats the token {far_distance:,}
positions before. Gemini's models are divided into at least eight chunks, each spread over the ranks. The learning rate
is {lr:g}. For documents and for vocabulary {odd} it is {low_lr:.1g}: there, at the higher rate, rounding alone makes
two plain loops differ by up to 1e-5.

In float32, differences of 1e-5 in loss and norm and of 1e-4 in the weights are allowed. In bf16, the limit is twice the
largest difference between plain loops that differ only in rounding, and for weights at least 1e-2. These loops process
halves, quarters and single samples of the batches, sum rounded halves in each layer, do both, or use fused attention,
which does not round the scores. {equal} of {count} configurations are equal.
{narrow}
{table}
## Positions in bf16 and fp16

ColossalAI's plugins convert a model's rotary frequencies together with its weights. In bf16 the relative error of the
frequencies is up to 3.7e-3. So the model is trained at other positions than those of transformers, which loads the
exported model with float32 frequencies. This affects all runs of ColossalAI's own scripts in bf16 or fp16. The effect
is small in short samples, but large over distances of thousands of tokens. Here the frequencies stay in float32 (the
patch `unrounded_buffers`). Without it, all 18 bf16 rows "far" differ by 0.98 in the loss and 0.47 in the norm, because
the attention finds other tokens. With it, they differ by at most 6.6e-4 and 5.0e-4
(`python -m tests.equality --only bf16 far --unrepaired unrounded_buffers` runs them without it). If a checkpoint was
trained at rounded positions, by an older version of this code, a run that resumes it continues at exact ones.

## Refused before training starts

These combinations are refused. The list shows what happens if they are run anyway:

{refused}"""


def summary_of_halves(rows: list[Row]) -> str:
    """The bf16 rows compared with the narrower bound."""
    narrow = [row for row in rows if row.narrow is not None]
    if not narrow:
        return ""
    passing, outside = ([row for row in narrow if row.gap.within(row.narrow) == good] for good in (True, False))
    text = f"A limit of twice the difference of halves would let {len(passing)} of the {len(narrow)} bf16 rows pass"
    if outside:
        worst = {
            name: max(getattr(row.gap, name) / getattr(row.narrow, name) for row in outside)
            for name in ("loss", "norm", "weights")
        }
        figures = ", ".join(f"{name} {value:.1f}" for name, value in worst.items())
        # The smaller group is listed.
        names, others = ("; ".join(row.case.name for row in part) for part in (passing, outside))
        text += f" ({names})" if passing and len(passing) < len(outside) else ""
        text += f"; the others exceed it by a factor of at most: {figures}"
        text += f" ({others})" if len(outside) <= len(passing) else ""
    return "\n" + textwrap.fill(text + ".", 118) + "\n"


def summary(rows: list[Row]) -> list[str]:
    """A line for each precision: the number of rows, and the largest gap of each kind."""
    lines = []
    for precision in dict.fromkeys(row.case.precision for row in rows):
        found = [row for row in rows if row.case.precision == precision]
        worst = Gap(*map(max, zip(*(astuple(row.gap) for row in found), strict=True)))
        lines.append(f"{precision}: {sum(row.passed for row in found)} of {len(found)} equal; largest: {worst}")
    return lines


def as_page(rows: list[Row], refused: dict[str, str], steps: int) -> str:
    """What was found, as Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return PAGE.format(
        steps=steps,
        batch=GLOBAL_BATCH,
        equal=sum(row.passed for row in rows),
        count=len(rows),
        narrow=summary_of_halves(rows),
        lr=LR,
        odd=ODD_VOCABULARY,
        lora_rank=LORA_RANK,
        low_lr=LOW_LR,
        far_batch=FAR_BATCH,
        far_length=FAR_LENGTH,
        far_distance=FAR_DISTANCE,
        table="".join("| " + " | ".join(cells) + " |\n" for cells in lines),
        refused="".join(f"- {name}: {reason}\n" for name, reason in refused.items()),
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.equality", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each run")
    parser.add_argument("--only", nargs="+", default=[], help="words that a row's name must have")
    parser.add_argument("--unrepaired", nargs="+", default=[], help="repairs to leave out")
    parser.add_argument("--ranks", nargs="+", type=int, default=None, help="only rows with these numbers of ranks")
    parser.add_argument("--output", default=None, help="file for a page in Markdown")
    args = parser.parse_args(argv)
    named = [case for case in all_cases() if all(word in case.name for word in args.only)]
    cases = [case for case in named if args.ranks is None or case.layout.ranks in args.ranks]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, refused = run_cases(cases, Path(folder), args.steps, args.unrepaired)
    failed = [row.case.name for row in rows if not row.passed]
    for line in summary(rows):
        print(line)
    print(f"{len(rows) - len(failed)} of {len(rows)} equal, in {time.monotonic() - start:.0f} s")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(as_page(rows, refused, args.steps), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
