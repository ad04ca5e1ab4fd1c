"""The flags of a prepare command, checked once, as one typed value."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from colossal_llama2.chat.templates import COLOSSAL, ChatTemplate
from colossal_llama2.cli.data_flags import prepare_pretrain_parser, prepare_sft_parser
from colossal_llama2.corpus.conversation import HUMAN, ROLES, SYSTEM_ROLE, TOOL_ROLES, canonical_role
from colossal_llama2.dataset.layout.prepare_settings import Execution, Settings, WorkSizes
from colossal_llama2.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """One prepare command. The fields have the names of its flags, whose defaults are those of the command line.

    Raises:
        UserError: flags contradict each other, or --assistant_roles names the role of another speaker.
    """

    stage: str
    data_input_dirs: Sequence[str]
    tokenizer_dir: str
    data_cache_dir: str
    data_jsonl_output_dir: str
    data_arrow_output_dir: str
    max_length: int
    num_spliced_dataset_bins: int
    splicing: str
    overlong: str
    seed: int
    on_bad_row: str
    on_bad_file: str
    eval_fraction: float
    eval_dedup: bool
    no_jsonl: bool
    num_workers: int | None
    executor: str
    ray_address: str | None
    shard: tuple[int, int] | None
    assistant_roles: Sequence[str] | None
    assistant_first: str
    chat_template: str
    sizes: WorkSizes = WorkSizes()

    @classmethod
    def of_flags(cls, stage: str, flags: Mapping[str, Any]) -> "PrepareConfig":
        """The configuration of a stage, with the command line's defaults for flags that are not given."""
        defaults = prepare_sft_parser().defaults
        if stage == "pretrain":
            # Roles are flags of the other command alone.
            defaults |= prepare_pretrain_parser().defaults
        return cls(stage=stage, **{**defaults, **flags})

    def __post_init__(self) -> None:
        if self.eval_dedup and not self.eval_fraction > 0:
            raise UserError(
                "--eval_dedup compares what --eval_fraction holds out, which is 0; give one or leave it out"
            )
        if self.ray_address is not None and self.executor != "ray":
            raise UserError(
                f"--ray_address {self.ray_address} needs --executor ray, {self.executor} given; add it or leave both "
                "out"
            )
        if self.ray_address is not None and self.num_workers is not None:
            raise UserError(
                f"--num_workers {self.num_workers} given, but the cores of the cluster at --ray_address count; leave "
                "one out"
            )
        _check_assistant_roles(self.assistant_roles or ())

    def settings(self, *, prefix_after_marks: bool, template: ChatTemplate | None = None) -> Settings:
        """The part that decides the output.

        Args:
            prefix_after_marks: depends on the tokenizer's folder.
            template: that of --chat_template; None for colossal.
        """
        return Settings(
            stage=self.stage,
            max_length=self.max_length,
            num_bins=self.num_spliced_dataset_bins,
            seed=self.seed,
            overlong=self.overlong,
            splicing=self.splicing,
            on_bad_row=self.on_bad_row,
            eval_fraction=self.eval_fraction,
            writes_jsonl=not self.no_jsonl,
            prefix_after_marks=prefix_after_marks,
            eval_dedup=self.eval_dedup,
            assistant_roles=",".join(sorted(set(map(canonical_role, self.assistant_roles or ())))),
            assistant_first=self.assistant_first,
            chat_template=template.name if template else COLOSSAL,
            template_text=template.text if template else "",
        )

    @property
    def execution(self) -> Execution:
        """The part that does not change the output."""
        num_workers = self.num_workers or len(os.sched_getaffinity(0))
        return Execution(num_workers, self.executor, self.ray_address, self.shard)

    @property
    def jsonl_dir(self) -> str | None:
        """The folder for jsonl; None if none is to be written."""
        return None if self.no_jsonl else self.data_jsonl_output_dir


def _check_assistant_roles(names: Sequence[str]) -> None:
    """Raise UserError for a role that belongs to another speaker."""
    others = {role for role, speaker in ROLES.items() if speaker == HUMAN} | {SYSTEM_ROLE, *TOOL_ROLES}
    for role in sorted(set(map(canonical_role, names))):
        if role in others:
            raise UserError(f"--assistant_roles: {role} is not a role of the assistant; give only names of its roles")
