"""The facts that do not change during a run, as each of its checkpoints records them."""

from dataclasses import dataclass, fields, replace
from typing import Any

# Increased when a version computes different numbers from the same flags; checkpoints without it are of version 1.
# Version 2 has SDPA as default attention, float32 rotary frequencies, NEFTune by document and repeated fp16 steps.
NUMERICS = 2


@dataclass(frozen=True)
class RunFacts:
    """The entries of running_states.json that a run writes to all of its checkpoints, under these names.

    Attributes:
        num_samples: of an epoch.
        dataset_fingerprints: one for each folder of --dataset; with bucketed, mixture, mixture_end, sources,
            groups_by_length and seed they decide the order of samples. None stands for what is off.
        tokenizer: the fingerprint of the run's tokenizer; pretrained_tokenizer: that of --pretrained, None if it has no
            tokenizer.
        model_shape: the sizes in the config.json of --pretrained that decide the shapes of its weights.
        freeze_non_embeds_params: only the embeddings are trained; trained_rows: of these the ranges of rows, None for
            all of them.
        adapter: its rank, alpha and targets, and whether embeddings are trained with it; None without an adapter.
        world_size, data_parallel_size: numbers of ranks.
        numerics: see NUMERICS.
        layout: what decides which part of the float32 weights a rank holds.
        settings: all flags by name.
        versions, machine: software and device, on which the last bits of a sum depend.
        base_model: the name of the model that the stages began with.
        first_sample: the sample at which the run began to read, counted over all epochs.
    """

    num_samples: int
    dataset_fingerprints: list[str]
    bucketed: bool | None
    mixture: list[list[Any]] | None
    mixture_end: str | None
    sources: list[str] | None
    groups_by_length: bool | None
    tokenizer: str
    pretrained_tokenizer: str | None
    model_shape: dict[str, Any]
    seed: int
    freeze_non_embeds_params: bool
    trained_rows: list[list[int]] | None
    adapter: dict[str, Any] | None
    world_size: int
    data_parallel_size: int
    numerics: int
    layout: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str | None]
    machine: dict[str, Any]
    base_model: str
    first_sample: int = 0

    def with_first_sample(self, first_sample: int) -> "RunFacts":
        """The facts of a run that begins to read at that sample."""
        return replace(self, first_sample=first_sample)

    def entries(self) -> dict[str, Any]:
        """By name, as running_states.json holds them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
