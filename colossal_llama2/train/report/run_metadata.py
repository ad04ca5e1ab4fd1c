"""What a run says of itself: in its checkpoints, in its settings, and in its first lines."""

import argparse
import contextlib
import platform
from importlib import metadata
from typing import Any

from colossal_llama2 import __version__, logs
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import dataset_fingerprints
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.encoding.encoder import fingerprint
from colossal_llama2.engine import resume_state
from colossal_llama2.engine.settings import Ranks
from colossal_llama2.model.loading import ModelFacts
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.settings import flags
from colossal_llama2.train.stepping.schedule import CosineSchedule


def describe_run(
    args: argparse.Namespace, engine: Ranks, order: SampleOrder, tokenizer_path: str, data: Data
) -> dict[str, Any]:
    """What running_states.json says of the whole run."""
    return {
        "num_samples": order.num_samples,
        "dataset_fingerprints": dataset_fingerprints(data.paths),
        **data.facts(),
        "tokenizer": fingerprint(tokenizer_path),
        "pretrained_tokenizer": fingerprint(args.pretrained) if flags.has_tokenizer(args.pretrained) else None,
        "model_shape": resuming.model_shape(args.pretrained),
        "seed": order.seed,
        "freeze_non_embeds_params": flags.trains_embeddings_alone(args),
        "trained_rows": engine.settings.trained_rows and [list(borders) for borders in engine.settings.trained_rows],
        "world_size": engine.world_size,
        "data_parallel_size": engine.data_size,
        "numerics": resuming.NUMERICS,
        "layout": resume_state.layout(engine),
        "settings": vars(args),
        "versions": versions(),
        "machine": resuming.machine(),
    }


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on, by name; None for a kernel that is not installed."""
    found = {name: metadata.version(name) for name in ("colossalai", "torch", "transformers", "datasets")}
    kernels: dict[str, str | None] = dict.fromkeys(("flash-attn", "liger-kernel"))
    for name in kernels:
        with contextlib.suppress(metadata.PackageNotFoundError):
            kernels[name] = metadata.version(name)
    return {**found, **kernels, "python": platform.python_version(), "colossal_llama2": __version__}


def tell_plan(
    args: argparse.Namespace, engine: Ranks, order: SampleOrder, schedule: CosineSchedule, facts: ModelFacts
) -> None:
    """Log what the run is going to do."""
    batch = order.samples_per_micro_step * args.accumulation_steps
    logs.get_logger().info(
        "%.1f M parameters, vocabulary %d; plugin %s, %s; %d processes, data parallel over %d",
        facts.parameters / 1e6,
        facts.vocab_size,
        args.plugin,
        args.mixed_precision,
        engine.world_size,
        engine.data_size,
    )
    logs.get_logger().info(
        "%d samples; epochs: %d; samples a step: %d (%d per rank x %d ranks x %d accumulated); steps: %d, warm-up: %d",
        order.num_samples,
        args.num_epochs,
        batch,
        args.micro_batch_size,
        engine.data_size,
        args.accumulation_steps,
        schedule.total_steps,
        schedule.warmup_steps,
    )
