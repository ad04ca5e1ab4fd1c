"""Load the weights of a run and hand them to its engine; when resuming, the optimizer's state too."""

import contextlib
from pathlib import Path

from colossal_llama2 import logs
from colossal_llama2.engine.engine import Engine
from colossal_llama2.engine.plugins import plugin_of
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.model.adapter_files import load_adapter, read_adapter
from colossal_llama2.model.attention import choose_attention
from colossal_llama2.model.loading import ModelFacts, load_llama, recompute_activations
from colossal_llama2.model.neftune import NoNoise, embedding_noise
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.run_facts import RunFacts
from colossal_llama2.train.checkpointing.saved_run import SavedRun
from colossal_llama2.train.run_folder.file_names import OPTIMIZER_NAME
from colossal_llama2.train.settings.config import TrainConfig


def attention_of(config: TrainConfig) -> str:
    """The attention that transformers uses, or that ColossalAI replaces. Raises UserError if it is not installed."""
    settings = config.engine
    return choose_attention(
        settings.use_flash_attn, precision=settings.precision, replaced=plugin_of(settings).replaces_attention
    )


def load_weights(config: TrainConfig, engine: Engine, model_facts: ModelFacts, *, attention: str) -> None:
    """Load the model into the engine. Called on all ranks."""
    source, settings = config.source, config.engine
    with collectives.all_or_none(), engine.initializing(ties_embeddings=model_facts.ties_embeddings):
        model = load_llama(source.weights_folder, precision=settings.precision, attention=attention)
    if config.recipe.gradient_checkpointing:
        recompute_activations(model)
    trained, frozen = settings.trainable.prepare(model)
    if source.adapter is not None:
        with collectives.all_or_none():
            load_adapter(model, read_adapter(source.adapter), settings.trainable)
    if frozen:
        logs.get_logger().info(
            "Training only %s: %.1f M parameters, %.1f M frozen",
            settings.trainable.description,
            trained / 1e6,
            frozen / 1e6,
        )
    model.train()
    engine.boost(model)
    if settings.trainable.adapter is not None:
        seed_dropout(config.recipe.seed, engine.rank)
    if source.checkpoint is None and source.trained != source.pretrained:
        logs.get_logger().info("Loaded only the weights of %s", source.trained)


def seed_dropout(seed: int, rank: int) -> None:
    """Let ranks, which see other tokens, drop other inputs of an adapter. A resumed run restores its saved states."""
    import numpy as np
    import torch

    torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1)[0]))


def restore(saved: SavedRun, engine: Engine, facts: RunFacts) -> None:
    """Restore the optimizer and, as far as the layout allows, all other state. Called on all ranks."""
    engine.load_optimizer(str(Path(saved.folder, OPTIMIZER_NAME)))
    resuming.restore_exactly(saved, engine, facts)
    logs.get_logger().info("Resumed %s", saved.folder)


def embedding_noise_of(config: TrainConfig, engine: Engine) -> contextlib.AbstractContextManager[NoNoise]:
    """A context in which the embeddings get NEFTune's noise, if it is on."""
    alpha = config.recipe.neft_alpha
    if alpha is None:
        return contextlib.nullcontext(NoNoise())
    logs.get_logger().info("NEFTune: noise of alpha %g on the embeddings", alpha)
    return embedding_noise(engine.unwrapped_model, alpha=alpha, seed=config.recipe.seed, data_rank=engine.data_rank)
