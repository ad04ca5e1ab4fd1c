"""Prove that training is correct on this machine, before a long run.

    colossalai run --nproc_per_node 8 --hostfile hostfile -m colossal_llama2.train.selftest \\
        --plugin zero2 --mixed_precision bf16 --work_dir /shared/selftest

It has the flags of train.py that decide how a step is computed, and runs on any devices and ranks. It trains a small
LLaMA on documentation that CPython ships, through the real commands: prepare_pretrain_dataset.py, train.py with a
checkpoint in the middle, and a resume from it. Then rank 0 repeats the steps in a plain PyTorch loop, one document at a
time. The losses, gradient norms and final weights must be equal except for rounding, and the resumed run must repeat
the first bit for bit (on GPUs except for rounding, since the backward pass of fused attention adds up in another order
each time). The exit code is 1 if they differ.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from colossal_llama2 import errors, launcher, logs
from colossal_llama2.cli import train_flags
from colossal_llama2.engine.device import repeats_exactly
from colossal_llama2.engine.ranks import interfaces, meeting, orphans
from colossal_llama2.errors import RunError
from colossal_llama2.plurals import counted
from colossal_llama2.terminal_text import show_line
from colossal_llama2.train import plain_loop
from colossal_llama2.train.plain_loop import Document, Trace
from colossal_llama2.train.settings import selftest_config
from colossal_llama2.train.settings.selftest_config import MAX_LENGTH, SelftestConfig

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
# Relative differences of losses, gradient norms and weights that count as rounding. In bf16 these are the least: twice
# the gap between two plain loops that only pad differently is allowed if that is more.
ALLOWED = {"fp32": (1e-5, 1e-4, 1e-4), "bf16": (1e-3, 1e-2, 1e-2)}
GAPS = 2.0
TOGETHER = 8
# The plain loop runs only on one rank, while the others wait.
WAIT_SECONDS = 3600.0


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, and run the test on this rank."""
    launcher.settle()
    args = train_flags.selftest_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("selftest"):
        selftest(selftest_config.resolve(args, ranks=meeting.settled_place().world_size))


def selftest(config: SelftestConfig) -> None:
    """Train, resume, compare. Called once per process of the job.

    Raises:
        UserError: --work_dir is not a folder that all ranks see.
        RunError: a difference that is more than rounding.
    """
    from colossal_llama2.engine.process_group import launch, leave
    from colossal_llama2.engine.ranks.liveness import watching

    orphans.end_with_launcher()
    with watching("selftest", timeout_seconds=WAIT_SECONDS) as watch:
        interfaces.check_given()
        watch.reach_out()
        launch(config.seed, timeout_seconds=WAIT_SECONDS, meet=watch.wait)
        watch.settle()
        run_and_compare(config)
        leave()


def run_and_compare(config: SelftestConfig) -> None:
    """The test itself, inside a process group."""
    from colossal_llama2.engine.ranks import collectives
    from colossal_llama2.train import run

    with collectives.all_or_none():
        if logs.is_first_rank():
            make_inputs(config)
    checkpoint = config.home("whole") / "checkpoints" / f"epoch-0_step-{config.middle}"
    for name, begins_at in (("whole", None), ("resumed", checkpoint)):
        logs.get_logger().info("### %s: %s", name, counted(config.steps, "step"))
        run.run(config.run_config(name, load_checkpoint=begins_at))
    with collectives.all_or_none():
        if logs.is_first_rank():
            report(config, compare(config))


def make_inputs(config: SelftestConfig) -> None:
    """Write the model with its tokenizer, and the samples of all steps, repeated if the documents make fewer."""
    import datasets
    import numpy as np

    from colossal_llama2.dataset.write.prepare import prepare_pretrain

    documents, work = python_documents(), config.work_dir
    data_dir = work / "documents"
    for folder in (data_dir, config.model_dir):
        folder.mkdir(parents=True)
    make_model(config.model_dir, documents)
    rows = (json.dumps({"target": document}) + "\n" for document in documents)
    (data_dir / "documents.jsonl").write_text("".join(rows), encoding="utf-8")
    with open(work / "prepared.txt", "w", encoding="utf-8") as output, contextlib.redirect_stdout(output):
        prepare_pretrain(
            data_input_dirs=[str(data_dir)],
            tokenizer_dir=str(config.model_dir),
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
    indices = np.arange(config.samples_per_step * config.steps) % len(prepared)
    prepared.select(indices).save_to_disk(str(config.data_dir))


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


def compare(config: SelftestConfig) -> list[Row]:
    """Run the plain loop on this rank's device and compare both training runs with it."""
    whole, resumed = (trace_of(config.home(name)) for name in ("whole", "resumed"))
    steps = list(step_documents(config))
    plain = plain_trace(config, steps)
    losses, norms, weights = ALLOWED[config.precision]
    if config.precision == "bf16":
        padded = plain_trace(config, steps, together=TOGETHER)
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


def step_documents(config: SelftestConfig) -> Iterator[list[Document]]:
    """The documents of each optimizer step; its whole samples if documents are not kept apart."""
    from colossal_llama2.dataset.layout.columns import DOCUMENT_LENGTHS
    from colossal_llama2.dataset.read.order import SampleOrder
    from colossal_llama2.dataset.read.prepared_data import load_parts

    rows = load_parts([str(config.data_dir)], config.document_mask)
    order = SampleOrder(len(rows), config.samples_per_step, data_size=1, accumulation_steps=1, seed=config.seed)
    for (indices,), _ in order.steps(0, 0, 0):
        samples = rows[indices].to_pydict()
        lengths = samples.get(DOCUMENT_LENGTHS, [[len(ids)] for ids in samples["input_ids"]])
        documents = []
        for ids, labels, own in zip(samples["input_ids"], samples["labels"], lengths, strict=True):
            starts = [sum(own[:index]) for index in range(len(own))]
            documents += [(ids[s : s + n], labels[s : s + n]) for s, n in zip(starts, own, strict=True)]
        yield documents


def plain_trace(config: SelftestConfig, steps: list[list[Document]], *, together: int = 1) -> Trace:
    """The plain loop, in the precision of the test, with its schedule."""
    from colossal_llama2.engine.process_group import current_device
    from colossal_llama2.model.loading import load_llama
    from colossal_llama2.model.trainable import Trainable
    from colossal_llama2.train.stepping.schedule import CosineSchedule, warmup_steps

    model = load_llama(str(config.model_dir), precision=config.precision, attention="eager")
    model = model.to(current_device())
    Trainable.from_flags(embeddings=config.embeddings_only, new_rows=False).prepare(model)
    schedule = CosineSchedule(config.learning_rate, len(steps), warmup_steps(config.warmup_steps, len(steps)))
    return plain_loop.train(
        model,
        steps,
        learning_rate=schedule.learning_rate,
        max_norm=config.max_norm,
        weight_decay=config.weight_decay,
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


def report(config: SelftestConfig, rows: list[Row]) -> None:
    """Print the rows, and remove the work folder. Raises RunError, and keeps the folder, if not all are equal."""
    width = max(len(row.name) for row in rows)
    show_line(f"{'selftest':{width}}     found   allowed")
    for row in rows:
        outcome = "equal" if row.is_equal else "DIFFERENT"
        show_line(f"{row.name:{width}}  {row.found:8.1e}  {row.allowed:8.1e}  {outcome}")
    failed = [row.name for row in rows if not row.is_equal]
    if failed:
        raise RunError(
            f"not equal: {'; '.join(failed)}. Do not train with these flags on this machine; the runs are in "
            f"{config.work_dir}"
        )
    shutil.rmtree(config.work_dir)
    how = "bit for bit" if repeats_exactly() else "except for rounding in fused attention"
    verdict = f"trains here as a plain loop does, and resumes {how}"
    show_line(f"{config.plugin} in {config.precision} {verdict}")


if __name__ == "__main__":
    main()
