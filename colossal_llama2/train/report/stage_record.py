"""What a run adds to the training history of its model, and the card that tells all of it.

A run is one stage, however often it is resumed: its parent, its first loss and the stages before it are taken from the
checkpoint that it goes on from.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama2 import logs
from colossal_llama2.dataset.read.buckets import MeasuredPart
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.dataset.read.token_counts import SourceRead, read_by_source
from colossal_llama2.errors import UserError
from colossal_llama2.model import training_history
from colossal_llama2.model.training_history import History, Weights, describe_parent, encodable, read_history
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.report import model_card, train_log
from colossal_llama2.train.report.run_report import RunReport, in_words
from colossal_llama2.train.run_folder.checkpoint_files import LOG_NAME, MANIFEST_NAME, MODEL_NAME, recorded_weights

if TYPE_CHECKING:
    from colossal_llama2.train.checkpointing.checkpointer import LoadPlan
    from colossal_llama2.train.stepping.state import TrainState


@dataclass
class Beginning:
    """Where a stage begins.

    Attributes:
        history: the stages before it.
        parent: the model whose weights it took.
        kept: of a resumed run, its stage as the checkpoint has it.
        resumed: the steps at which it was resumed with other settings, and what changed.
    """

    history: History = field(default_factory=History)
    parent: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    resumed: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class StageRecord:
    """Builds the stage record of a run. For rank 0.

    `state` is that of the run, which goes on; what is asked for is as of then.
    """

    report: RunReport
    beginning: Beginning
    data: Data
    measured: Sequence[MeasuredPart]
    order: SampleOrder
    state: "TrainState"
    facts: dict[str, Any]

    def read(self) -> list[SourceRead]:
        """What the run has read of each source."""
        return read_by_source(
            self.measured,
            self.order,
            first_sample=self.facts.get("first_sample", 0),
            samples_seen=self.state.samples_seen,
        )

    def stage(self) -> dict[str, Any]:
        """The run as a stage of training_history.json."""
        losses, _ = model_card.curves(train_log.read(Path(self.report.save_dir, LOG_NAME)))
        first = self.beginning.kept.get("first_loss")
        final, count = model_card.final_loss(losses) if losses else (None, 0)
        epoch, sample = divmod(self.facts.get("first_sample", 0), self.order.num_samples)
        settings, state = self.report.settings, self.state
        stage = {
            "stage": settings["stage"],
            "parent": self.beginning.parent,
            "data": self._sources(),
            "begins": {"epoch": epoch, "sample": sample},
            "ends": {"epoch": state.epoch, "sample": state.sample_start_index},
            "steps": state.step,
            "updates": state.updates,
            "samples": state.samples_seen,
            "tokens": state.tokens_seen,
            "first_loss": losses[0] if first is None and losses else first,
            "final_loss": final,
            "final_loss_steps": count,
            "settings": model_card.told_settings(settings),
            "world_size": settings["world_size"],
            "versions": settings["versions"],
            "tokenizer_sha256": self.facts["tokenizer"],
        }
        return {**stage, "resumed": self.beginning.resumed} if self.beginning.resumed else stage

    def _sources(self) -> list[dict[str, Any]]:
        fingerprints: dict[str, list[str]] = {}
        for part, fingerprint in zip(self.data.parts, self.facts["dataset_fingerprints"], strict=True):
            fingerprints.setdefault(part.source, []).append(fingerprint)
        shown = max(training_history.MAX_FINGERPRINTS // len(fingerprints), 1)
        return [
            {
                "source": encodable(one.source),
                "parts": len(fingerprints[one.source]),
                "fingerprints": fingerprints[one.source][:shown],
                "samples_there": one.samples_there,
                "samples": one.samples,
                "tokens": one.tokens,
            }
            for one in self.read()
        ]

    def history(self) -> dict[str, Any] | None:
        """What training_history.json says of a model that is saved now; None, which is logged, if it cannot be made."""
        try:
            content = self.beginning.history.followed_by(self.stage(), base_model=encodable(self.report.base_model))
            return training_history.as_written(content)
        except Exception as error:  # a bug of ours must not cost a checkpoint
            logs.get_logger().warning(
                "%s: the model gets no %s (%s)", self.report.save_dir, training_history.HISTORY_FILE, in_words(error)
            )
            return None

    def stages(self) -> list[dict[str, Any]]:
        """All stages, the last of which is the run."""
        return [*self.beginning.history.stages, self.stage()]

    def card(self) -> str | None:
        """The README.md of the model as it is now; None, which is logged, if it cannot be made."""
        skipped = self.state.step - self.state.updates
        return self.report.card(
            tokens_seen=self.state.tokens_seen, skipped_steps=skipped, read=self.read, stages=self.stages
        )


def begin_stage(args: argparse.Namespace, plan: "LoadPlan", state: "TrainState", facts: dict[str, Any]) -> Beginning:
    """Read the history of the folder that the weights come from. For rank 0; never raises, what is wrong is logged."""
    recorded = read_history(Path(plan.model_path))
    training_history.log_problem(recorded)
    if plan.resume_path is None:
        return Beginning(recorded, describe_parent(plan.model_path, recorded, _in_manifest(plan.model_path)))
    _, saved = plan.read_states()
    changed = [encodable(change)[: training_history.MAX_TEXT] for change in resuming.changes(saved, facts)]
    resumed = [{"step": state.step, "changed": changed}] if changed else []
    if recorded.stages:
        *before, kept = recorded.stages
        resumed = [*kept.get("resumed", ()), *resumed]
        return Beginning(recorded._replace(stages=before), kept["parent"], kept, resumed)
    return _begin_unrecorded(args, plan, saved, resumed)


def _begin_unrecorded(
    args: argparse.Namespace, plan: "LoadPlan", saved: dict[str, Any], resumed: list[dict[str, Any]]
) -> Beginning:
    """Where a run began whose checkpoint has no history, as those of earlier versions; --pretrained, if it can be."""
    settings = saved.get("settings")
    if isinstance(settings, dict) and settings.get("load_checkpoint", "") is None:
        history = read_history(Path(args.pretrained))
        return Beginning(history, describe_parent(args.pretrained, history), resumed=resumed)
    logs.get_logger().warning(
        "%s has no %s, so the card cannot tell which stages came before this run",
        plan.model_path,
        training_history.HISTORY_FILE,
    )
    return Beginning(parent={"name": "not recorded"}, resumed=resumed)


def _in_manifest(model_path: str) -> Weights:
    """The hashes of a checkpoint's weights, which its manifest has."""
    folder = Path(model_path).absolute()
    if folder.name != MODEL_NAME or not (folder.parent / MANIFEST_NAME).is_file():
        return {}
    try:
        return recorded_weights(folder.parent)
    except (OSError, UserError):
        return {}
