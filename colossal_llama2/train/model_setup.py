"""Load the weights and hand them to the engine."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.engine.engine import Engine
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.model.freezing import freeze_non_embedding_parameters
from colossal_llama2.model.loading import load_llama
from colossal_llama2.model.neftune import NoNoise, embedding_noise
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.checkpointer import OPTIMIZER_NAME, LoadPlan
from colossal_llama2.train.settings import flags

if TYPE_CHECKING:
    pass


def load_model(
    args: argparse.Namespace,
    plan: LoadPlan,
    engine: Engine,
    attention: str,
    run_facts: dict[str, Any],
    *,
    ties_embeddings: bool,
) -> None:
    """Load the weights and hand them to the engine; when resuming, the optimizer's state too."""
    with collectives.all_or_none(), engine.initializing(ties_embeddings=ties_embeddings):
        model = load_llama(plan.model_path, precision=args.mixed_precision, attention=attention)
    if args.use_grad_checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if flags.trains_embeddings_alone(args):
        trainable, frozen = freeze_non_embedding_parameters(model)
        rows = sum(end - begin for begin, end in engine.settings.trained_rows or ())
        logs.get_logger().info(
            "%s alone are trained: %.1f M parameters, %.1f M frozen",
            f"{rows:,} new rows of the embeddings" if rows else "Embeddings",
            trainable / 1e6,
            frozen / 1e6,
        )
    model.train()
    engine.boost(model)
    if plan.resume_path is not None:
        engine.load_optimizer(str(Path(plan.resume_path, OPTIMIZER_NAME)))
        resuming.restore_exactly(plan, engine, run_facts)
        logs.get_logger().info("Resumed %s", plan.resume_path)
    elif plan.model_path != args.pretrained:
        logs.get_logger().info("Took the weights of %s, and nothing else of that run", plan.model_path)


def noise_of(args: argparse.Namespace, engine: Engine) -> contextlib.AbstractContextManager:
    """NEFTune if it was asked for."""
    if not getattr(args, "use_neft", False):
        return contextlib.nullcontext(NoNoise())
    logs.get_logger().info("NEFTune: noise of alpha %g on the embeddings", args.neft_alpha)
    return embedding_noise(engine.unwrapped_model, alpha=args.neft_alpha, seed=args.seed, data_rank=engine.data_rank)
