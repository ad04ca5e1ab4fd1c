"""The stage that a run adds to the training history of its model, and the card made from that history.

A run is one stage, however often it is resumed: its parent, its first loss and the stages before it come from the
checkpoint that it resumes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.dataset.read.buckets import MeasuredPart
from colossal_llama2.dataset.read.order import SampleOrder
from colossal_llama2.dataset.read.sources import Data
from colossal_llama2.dataset.read.token_counts import SourceRead, read_by_source
from colossal_llama2.errors import UserError
from colossal_llama2.model import training_history
from colossal_llama2.model.training_history import History, Weights, describe_parent, encodable, read_history
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.checkpointing.resuming import Start
from colossal_llama2.train.checkpointing.run_facts import RunFacts
from colossal_llama2.train.report import model_card, train_log
from colossal_llama2.train.report.run_report import RunReport, in_words
from colossal_llama2.train.run_folder.checkpoint_files import recorded_weights
from colossal_llama2.train.run_folder.file_names import MANIFEST_NAME, MODEL_NAME
from colossal_llama2.train.settings.model_source import ModelSource
from colossal_llama2.train.stepping.state import TrainState


@dataclass
class Beginning:
    """Where a stage begins.

    Attributes:
        history: the stages before it.
        parent: the model whose weights it started from.
        kept: for a resumed run, its stage as the checkpoint has it.
        resumed: the steps at which it was resumed with other settings, and what changed.
    """

    history: History = field(default_factory=History)
    parent: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    resumed: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class StageRecord:
    """Makes the stage record of a run, for rank 0, from `state` as it is when a method is called."""

    report: RunReport
    beginning: Beginning
    data: Data
    measured: Sequence[MeasuredPart]
    order: SampleOrder
    state: TrainState
    facts: RunFacts

    def read(self) -> list[SourceRead]:
        """Samples and tokens that the run has read from each source."""
        return read_by_source(
            self.measured,
            self.order,
            first_sample=self.facts.first_sample,
            samples_seen=self.state.samples_seen,
        )

    def stage(self) -> dict[str, Any]:
        """The run as a stage of training_history.json."""
        losses, _ = model_card.curves(train_log.read(self.report.folder.log))
        first = self.beginning.kept.get("first_loss")
        final, count = model_card.final_loss(losses) if losses else (None, 0)
        epoch, sample = divmod(self.facts.first_sample, self.order.num_samples)
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
            "settings": model_card.card_settings(settings),
            "world_size": settings["world_size"],
            "versions": settings["versions"],
            "tokenizer_sha256": self.facts.tokenizer,
        }
        return {**stage, "resumed": self.beginning.resumed} if self.beginning.resumed else stage

    def _sources(self) -> list[dict[str, Any]]:
        fingerprints: dict[str, list[str]] = {}
        for part, fingerprint in zip(self.data.parts, self.facts.dataset_fingerprints, strict=True):
            fingerprints.setdefault(part.source, []).append(fingerprint)
        shown = max(training_history.MAX_FINGERPRINTS // len(fingerprints), 1)
        return [
            {
                "source": encodable(read.source),
                "parts": len(fingerprints[read.source]),
                "fingerprints": fingerprints[read.source][:shown],
                "samples_there": read.samples_there,
                "samples": read.samples,
                "tokens": read.tokens,
            }
            for read in self.read()
        ]

    def history(self) -> dict[str, Any] | None:
        """The training_history.json of a model that is saved now; None, with a warning, if it cannot be made."""
        try:
            content = self.beginning.history.followed_by(self.stage(), base_model=encodable(self.report.base_model))
            return training_history.as_written(content)
        except Exception as error:  # a bug of ours here must not lose a checkpoint
            logs.get_logger().warning(
                "%s: the model gets no %s (%s)", self.report.folder, training_history.HISTORY_FILE, in_words(error)
            )
            return None

    def stages(self) -> list[dict[str, Any]]:
        """All stages, the last of which is the run."""
        return [*self.beginning.history.stages, self.stage()]

    def card(self) -> str | None:
        """The README.md of the model as it is now; None, with a warning, if it cannot be made."""
        skipped = self.state.step - self.state.updates
        return self.report.card(
            tokens_seen=self.state.tokens_seen, skipped_steps=skipped, read=self.read, stages=self.stages
        )


def begin_stage(source: ModelSource, start: Start, facts: RunFacts) -> Beginning:
    """Read the history of the folder that the weights come from. For rank 0; problems are logged, never raised."""
    recorded = read_history(Path(source.trained))
    training_history.log_problem(recorded)
    if start.resumed is None:
        return Beginning(recorded, describe_parent(source.trained, recorded, _in_manifest(source.trained)))
    changed = [encodable(change)[: training_history.MAX_TEXT] for change in resuming.changes(start.resumed, facts)]
    resumed = [{"step": start.state.step, "changed": changed}] if changed else []
    if recorded.stages:
        *before, kept = recorded.stages
        resumed = [*kept.get("resumed", ()), *resumed]
        return Beginning(recorded._replace(stages=before), kept["parent"], kept, resumed)
    return _begin_unrecorded(source, start.resumed.entries.get("settings"), resumed)


def _begin_unrecorded(source: ModelSource, settings: Any, resumed: list[dict[str, Any]]) -> Beginning:
    """Where a run began whose checkpoint has no history, as those of earlier versions: --pretrained, if that is known.

    Args:
        settings: the flags that the checkpoint records.
    """
    if isinstance(settings, dict) and settings.get("load_checkpoint", "") is None:
        history = read_history(Path(source.pretrained))
        return Beginning(history, describe_parent(source.pretrained, history), resumed=resumed)
    logs.get_logger().warning(
        "%s has no %s, so the card does not list the stages before this run",
        source.trained,
        training_history.HISTORY_FILE,
    )
    return Beginning(parent={"name": "not recorded"}, resumed=resumed)


def _in_manifest(model_path: str) -> Weights:
    """The hashes of a checkpoint's weights, from its manifest; empty for any other folder."""
    folder = Path(model_path).absolute()
    if folder.name != MODEL_NAME or not (folder.parent / MANIFEST_NAME).is_file():
        return {}
    try:
        return recorded_weights(folder.parent)
    except (OSError, UserError):
        return {}
