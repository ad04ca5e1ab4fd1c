"""Prove on this very machine that training is correct, before a week of it.

    colossalai run --nproc_per_node 8 --hostfile hostfile -m colossal_llama2.train.selftest \\
        --plugin zero2 --mixed_precision bf16 --work_dir /shared/selftest

It has the flags of train.py that decide how a step is computed, and runs on any devices and ranks. It trains a small
LLaMA on documentation that CPython ships, through the real commands: prepare_pretrain_dataset.py, train.py with a
checkpoint in the middle, and a resume from it. Then rank 0 repeats the steps in a plain PyTorch loop, one document at a
time. The losses, gradient norms and final weights must be equal except for rounding, and the resumed run must repeat
the first bit for bit (on GPUs except for rounding, since the backward pass of fused attention adds up in another order
each time). The exit code is 1 if they differ.
"""

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from colossal_llama2 import errors, launcher, logs
from colossal_llama2.cli import dependent_flags, train_flags
from colossal_llama2.engine.device import repeats_exactly
from colossal_llama2.engine.ranks import meeting, orphans
from colossal_llama2.engine.settings_problems import settings_problems
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.terminal_text import show_line
from colossal_llama2.train import plain_loop
from colossal_llama2.train.plain_loop import Document, Trace

VOCABULARY = 1024
# Wide and deep enough to be split 8 times along every axis, and small enough to be trained on a CPU in seconds.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
}
MAX_LENGTH = 128
# Relative differences of losses, gradient norms and weights that count as rounding. In bf16 these are the least: twice
# the gap between two plain loops that only pad differently is allowed if that is more.
ALLOWED = {"fp32": (1e-5, 1e-4, 1e-4), "bf16": (1e-3, 1e-2, 1e-2)}
GAPS = 2.0
TOGETHER = 8
# The plain loop runs on one rank alone, while the others wait.
WAIT_SECONDS = 3600.0


def main(argv=None) -> None:
    """Parse the flags, and run the test on this rank."""
    launcher.settle()
    args = train_flags.selftest_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("selftest"):
        selftest(args)


def selftest(args: argparse.Namespace) -> None:
    """Train, resume, compare. Called once per process of the job.

    Raises:
        UserError: the flags do not fit each other or the ranks, or --work_dir is not a new folder that all ranks see.
        RunError: a difference that is more than rounding.
    """
    from colossal_llama2.engine.process_group import launch, leave
    from colossal_llama2.engine.ranks.liveness import watching

    work, ranks = Path(args.work_dir), meeting.settled_place().world_size
    problems = dependent_flags.unused_flags(args) + settings_problems(_engine_settings(args), world_size=ranks)
    if logs.is_first_rank() and os.path.lexists(work):
        problems.append(f"--work_dir {work} exists already; give a new folder, which all hosts share")
    if args.mixed_precision == "fp16":
        problems.append("--mixed_precision fp16 is not compared, it is bf16 with a loss scale; give bf16 or fp32")
    if problems:
        raise UserError("; and ".join(problems))
    orphans.end_with_launcher()
    with watching("selftest", timeout_seconds=WAIT_SECONDS) as watch:
        watch.reach_out()
        launch(args.seed, timeout_seconds=WAIT_SECONDS, meet=watch.wait)
        watch.settle()
        run_and_compare(args, work, ranks=ranks)
        leave()


def run_and_compare(args: argparse.Namespace, work: Path, *, ranks: int) -> None:
    """The test itself, inside a process group."""
    from colossal_llama2.engine.ranks import collectives
    from colossal_llama2.train import run
    from colossal_llama2.train.settings import from_flags

    samples = args.micro_batch_size * args.accumulation_steps * (ranks // _engine_settings(args).model_ranks)
    with collectives.all_or_none():
        if logs.is_first_rank():
            make_inputs(work, num_samples=samples * args.steps)
    middle = Path("whole", "checkpoints", f"epoch-0_step-{args.steps // 2}")
    for name, more in (("whole", {}), ("resumed", {"load_checkpoint": str(work / middle)})):
        logs.get_logger().info("### %s: %d steps", name, args.steps)
        run.run(from_flags.resolve(training_flags(args, work, name, **more)))
    with collectives.all_or_none():
        if logs.is_first_rank():
            report(args, work, compare(args, work, samples_a_step=samples))


def _engine_settings(args: argparse.Namespace):
    from colossal_llama2.train.settings import from_flags

    return from_flags.engine_settings(dependent_flags.with_defaults(training_flags(args, Path(args.work_dir), "whole")))


def training_flags(args: argparse.Namespace, work: Path, name: str, **more) -> argparse.Namespace:
    """The flags of one training command in the work folder."""
    home = work / name
    required = ["--pretrained", str(work / "model"), "--dataset", str(work / "part-00000")]
    train_args = train_flags.train_parser().parse_args(required)
    paths = {"save_dir": "checkpoints", "tensorboard_dir": "logs", "config_file": "config.json"}
    given = {key: value for key, value in vars(args).items() if hasattr(train_args, key)}
    given.update({key: str(home / path) for key, path in paths.items()}, max_length=MAX_LENGTH, **more)
    given.update(num_epochs=1, save_interval=max(args.steps // 2, 1))
    vars(train_args).update(given)
    return train_args


def make_inputs(work: Path, *, num_samples: int) -> None:
    """Write the model with its tokenizer, and `num_samples` samples of documents, repeated if there are fewer."""
    import datasets
    import numpy as np

    from colossal_llama2.dataset.write.prepare import prepare_pretrain

    documents = python_documents()
    data_dir, model_dir = work / "documents", work / "model"
    for folder in (data_dir, model_dir):
        folder.mkdir(parents=True)
    make_model(model_dir, documents)
    rows = (json.dumps({"target": document}) + "\n" for document in documents)
    (data_dir / "documents.jsonl").write_text("".join(rows), encoding="utf-8")
    with open(work / "prepared.txt", "w", encoding="utf-8") as account, contextlib.redirect_stdout(account):
        prepare_pretrain(
            data_input_dirs=[str(data_dir)],
            tokenizer_dir=str(model_dir),
            data_cache_dir=str(work / "cache"),
            data_jsonl_output_dir=str(work / "jsonl"),
            data_arrow_output_dir=str(work / "arrow"),
            max_length=MAX_LENGTH,
            num_spliced_dataset_bins=1,
            num_workers=1,
            no_jsonl=True,
        )
    datasets.disable_progress_bars()
    prepared = datasets.load_from_disk(str(work / "arrow" / "part-00000"))
    prepared.select(np.arange(num_samples) % len(prepared)).save_to_disk(str(work / "part-00000"))


def python_documents() -> list[str]:
    """Paragraphs of CPython's own documentation."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return [part.strip() for name in sorted(topics) for part in topics[name].split("\n\n") if part.strip()]


def make_model(folder: Path, documents: list[str]) -> None:
    """Write a tokenizer trained on the documents, and a LLaMA with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from colossal_llama2.encoding.from_text import train_vocabulary, write_tokenizer

    lines = (line for document in documents for line in document.splitlines() if line.strip())
    write_tokenizer(train_vocabulary(lines, VOCABULARY), folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE))
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Row:
    """One comparison: the difference found, and the largest that is allowed."""

    name: str
    found: float
    allowed: float

    @property
    def is_equal(self) -> bool:
        """False if more was found than is allowed, or NaN."""
        return self.found <= self.allowed


def compare(args: argparse.Namespace, work: Path, *, samples_a_step: int) -> list[Row]:
    """Run the plain loop on this rank's device and compare both training runs with it."""
    whole, resumed = (trace_of(work / name) for name in ("whole", "resumed"))
    steps = list(step_documents(args, work, samples_a_step))
    plain = plain_trace(args, work, steps)
    losses, norms, weights = ALLOWED[args.mixed_precision]
    if args.mixed_precision == "bf16":
        padded = plain_trace(args, work, steps, together=TOGETHER)
        losses = max(losses, GAPS * largest(padded.losses, plain.losses))
        norms = max(norms, GAPS * largest(padded.grad_norms, plain.grad_norms))
    later = len(resumed.losses)
    again = (0.0, 0.0, 0.0) if repeats_exactly() else (losses, norms, weights)
    return [
        Row("loss, largest relative difference of a step", largest(whole.losses, plain.losses), losses),
        Row("gradient norm, the same", largest(whole.grad_norms, plain.grad_norms), norms),
        Row("final weights, norm of the difference", distance(whole.weights, plain.weights), weights),
        Row("resumed: loss", largest(resumed.losses, whole.losses[-later:]), again[0]),
        Row("resumed: gradient norm", largest(resumed.grad_norms, whole.grad_norms[-later:]), again[1]),
        Row("resumed: final weights", distance(resumed.weights, whole.weights), again[2]),
    ]


def step_documents(args: argparse.Namespace, work: Path, samples_a_step: int) -> Iterator[list[Document]]:
    """The documents of each optimizer step; its whole samples if documents are not kept apart."""
    from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS
    from colossal_llama2.dataset.read.order import SampleOrder
    from colossal_llama2.dataset.read.prepared_data import load_parts

    rows = load_parts([str(work / "part-00000")], args.document_mask)
    order = SampleOrder(len(rows), samples_a_step, data_size=1, accumulation_steps=1, seed=args.seed)
    for (indices,), _ in order.steps(0, 0, 0):
        samples = rows[indices].to_pydict()
        lengths = samples.get(DOCUMENT_LENGTHS, [[len(ids)] for ids in samples["input_ids"]])
        documents = []
        for ids, labels, own in zip(samples["input_ids"], samples["labels"], lengths, strict=True):
            starts = [sum(own[:index]) for index in range(len(own))]
            documents += [(ids[s : s + n], labels[s : s + n]) for s, n in zip(starts, own, strict=True)]
        yield documents


def plain_trace(args: argparse.Namespace, work: Path, steps: list[list[Document]], *, together: int = 1) -> Trace:
    """The plain loop, in the precision of the test, with its schedule."""
    from colossal_llama2.engine.process_group import current_device
    from colossal_llama2.model.loading import load_llama
    from colossal_llama2.model.trainable import Trainable
    from colossal_llama2.train.stepping.schedule import CosineSchedule, warmup_steps

    model = load_llama(str(work / "model"), precision=args.mixed_precision, attention="eager")
    model = model.to(current_device())
    Trainable.from_flags(embeddings=args.freeze_non_embeds_params, new_rows=False).prepare(model)
    schedule = CosineSchedule(args.lr, len(steps), warmup_steps(args.warmup_steps, len(steps)))
    return plain_loop.train(
        model,
        steps,
        learning_rate=schedule.learning_rate,
        max_norm=args.gradient_clipping,
        weight_decay=args.weight_decay,
        together=together,
    )


def trace_of(home: Path) -> Trace:
    """The losses, gradient norms and weights that a training command logged and saved."""
    from safetensors.torch import load_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(home / "logs"), size_guidance={"scalars": 0})
    events.Reload()
    losses, norms = ([event.value for event in events.Scalars(name)] for name in ("Loss", "Gradient Norm"))
    weights = {}
    for shard in sorted((home / "checkpoints" / "modeling").glob("*.safetensors")):
        weights.update({name: tensor.float() for name, tensor in load_file(shard).items()})
    return Trace(losses, norms, weights)


def largest(values: list[float], expected: list[float]) -> float:
    """Largest relative difference; infinite if the numbers of values differ, or one is NaN."""
    if len(values) != len(expected):
        return float("inf")
    gaps = [abs(value - other) / abs(other) for value, other in zip(values, expected, strict=True)]
    return max(gaps) if all(gap == gap for gap in gaps) else float("inf")


def distance(weights: dict, expected: dict) -> float:
    """Norm of the difference of all weights over the norm of the expected ones."""
    difference = sum(float((weights[name] - tensor).double().square().sum()) for name, tensor in expected.items())
    return (difference / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


def report(args: argparse.Namespace, work: Path, rows: list[Row]) -> None:
    """Print the rows, and remove the work folder. Raises RunError, and keeps the folder, if not all are equal."""
    width = max(len(row.name) for row in rows)
    show_line(f"{'selftest':{width}}     found   allowed")
    for row in rows:
        outcome = "equal" if row.is_equal else "DIFFERENT"
        show_line(f"{row.name:{width}}  {row.found:8.1e}  {row.allowed:8.1e}  {outcome}")
    failed = [row.name for row in rows if not row.is_equal]
    if failed:
        raise RunError(
            f"not equal: {'; '.join(failed)}. Do not train with these flags on this machine; the runs are in {work}"
        )
    shutil.rmtree(work)
    how = "bit for bit" if repeats_exactly() else "except for rounding in fused attention"
    verdict = f"trains here as a plain loop does, and resumes {how}"
    show_line(f"{args.plugin} in {args.mixed_precision} {verdict}")


if __name__ == "__main__":
    main()
