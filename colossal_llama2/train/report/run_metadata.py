"""Facts about a run for its checkpoints and settings, and the first lines that it logs."""

import contextlib
import platform
from importlib import metadata
from typing import Any

from colossal_llama2 import __version__, logs
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.prepared_data import dataset_fingerprints
from colossal_llama2.encoding.registry import fingerprint
from colossal_llama2.engine import resume_state
from colossal_llama2.engine.settings import Ranks
from colossal_llama2.model.config_fields import ModelFolder
from colossal_llama2.model.loading import ModelFacts
from colossal_llama2.plurals import counted
from colossal_llama2.train.checkpointing.run_facts import NUMERICS, RunFacts
from colossal_llama2.train.settings.config import TrainConfig
from colossal_llama2.train.settings.model_source import has_tokenizer
from colossal_llama2.train.stepping.schedule import CosineSchedule

SHAPE_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def describe_run(config: TrainConfig, ranks: Ranks, order: SampleOrder, base_model: str) -> RunFacts:
    """The facts of a run that begins at the first sample, see RunFacts.with_first_sample."""
    source, data = config.source, config.data.parts
    trainable = ranks.settings.trainable
    return RunFacts(
        num_samples=order.num_samples,
        dataset_fingerprints=dataset_fingerprints(data.paths),
        **data.facts(),
        tokenizer=fingerprint(source.tokenizer) if config.has_tokenizer else "",
        pretrained_tokenizer=fingerprint(source.pretrained) if has_tokenizer(source.pretrained) else None,
        model_shape=model_shape(source.pretrained_folder),
        seed=order.seed,
        freeze_non_embeds_params=not trainable.trains_layers,
        trained_rows=None if trainable.rows is None else [list(borders) for borders in trainable.rows],
        adapter=trainable.adapter_facts(),
        world_size=ranks.world_size,
        data_parallel_size=ranks.data_size,
        numerics=NUMERICS,
        layout=resume_state.layout(ranks),
        settings=dict(config.flags),
        versions=versions(),
        machine=machine(),
        base_model=base_model,
    )


def model_shape(folder: ModelFolder) -> dict[str, Any]:
    """The sizes in a model's config.json that decide the shapes of its weights."""
    return {key: folder.content.get(key) for key in SHAPE_KEYS}


def machine() -> dict[str, Any]:
    """The hardware that the last bits of a sum depend on: the device, and on a CPU the number of threads."""
    import torch

    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "threads": None}
    return {"device": "cpu", "threads": torch.get_num_threads()}


def versions() -> dict[str, str | None]:
    """Versions of the software that a result depends on, by name; None for a kernel that is not installed."""
    found = {name: metadata.version(name) for name in ("colossalai", "torch", "transformers", "datasets")}
    kernels: dict[str, str | None] = dict.fromkeys(("flash-attn", "liger-kernel"))
    for name in kernels:
        with contextlib.suppress(metadata.PackageNotFoundError):
            kernels[name] = metadata.version(name)
    return {**found, **kernels, "python": platform.python_version(), "colossal_llama2": __version__}


def log_sizes(config: TrainConfig, ranks: Ranks, model: ModelFacts) -> None:
    """Log the sizes of the model and of the job."""
    logs.get_logger().info(
        "%.1f M parameters, vocabulary %d; plugin %s, %s; %s, data parallel over %d",
        model.parameters / 1e6,
        model.vocab_size,
        config.engine.plugin,
        config.engine.precision,
        counted(ranks.world_size, "process"),
        ranks.data_size,
    )


def log_steps(config: TrainConfig, ranks: Ranks, order: SampleOrder, schedule: CosineSchedule) -> None:
    """Log the numbers of samples and steps."""
    accumulated = config.engine.accumulation_steps
    logs.get_logger().info(
        "%s; epochs: %d; samples a step: %d (%d per rank x %s x %d accumulated); steps: %d, warm-up: %d",
        counted(order.num_samples, "sample"),
        config.recipe.num_epochs,
        order.samples_per_micro_step * accumulated,
        config.engine.micro_batch_size,
        counted(ranks.data_size, "rank"),
        accumulated,
        schedule.total_steps,
        schedule.warmup_steps,
    )
