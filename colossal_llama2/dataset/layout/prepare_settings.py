"""The settings of a prepare command: those that decide its output, and those that do not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from colossal_llama2.chat.templates import COLOSSAL
from colossal_llama2.corpus.conversation import speakers_of
from colossal_llama2.corpus.data_files import UNIT_BYTES
from colossal_llama2.encoding.safe_cuts import PART_CHARACTERS


@dataclass(frozen=True)
class Settings:
    """The settings that, besides input and tokenizer, decide the output. The cache and manifest.json record them.

    Attributes:
        stage: "pretrain" or "sft".
        overlong: "split" cuts a document over `max_length` into pieces, "truncate" drops the rest of it.
        splicing: "best_fit", "sequential" or "none".
        on_bad_row: "fail" or "skip".
        eval_fraction: share of the documents of each category that goes to eval/.
        writes_jsonl: whether the samples are also written as jsonl.
        prefix_after_marks: whether each text of a conversation is encoded with its own prefix; see `Encoder`.
        eval_dedup: whether held-out text is compared with the training text (`overlap`).
        assistant_roles: other names of the assistant in conversations, sorted, with commas between them.
        assistant_first: "mask" or "train": what to do with answers before the first human message.
        chat_template: the name of the chat template.
        template_text: its text in Jinja; "" for that of `corpus.conversation`.
    """

    stage: str
    max_length: int
    num_bins: int
    seed: int
    overlong: str
    splicing: str
    on_bad_row: str
    eval_fraction: float
    writes_jsonl: bool
    prefix_after_marks: bool = False
    eval_dedup: bool = False
    assistant_roles: str = ""
    assistant_first: str = "mask"
    chat_template: str = COLOSSAL
    template_text: str = ""

    # How error messages name each field, if not by the flag of the same name.
    FLAGS = {
        "stage": "the command",
        "num_bins": "--num_spliced_dataset_bins",
        "writes_jsonl": "writing jsonl",
        "prefix_after_marks": "a text's leading space in tokenizer.json",
        "template_text": "the text of --chat_template",
    }

    # The values of fields that earlier versions did not have.
    LATER_DEFAULTS = {
        "eval_dedup": False,
        "assistant_roles": "",
        "assistant_first": "mask",
        "chat_template": COLOSSAL,
        "template_text": "",
    }

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)

    @property
    def speakers(self) -> Mapping[str, str]:
        """The known roles, with the speaker of each."""
        return speakers_of(filter(None, self.assistant_roles.split(",")))

    @property
    def masks_opening(self) -> bool:
        """Whether answers before the first human message carry no loss."""
        return self.assistant_first == "mask"

    @property
    def has_eval(self) -> bool:
        """Whether documents are held out."""
        return self.eval_fraction > 0

    def bin_name(self, number: int) -> str:
        """part-00000, ...; the one after the last bin is eval."""
        return f"part-{number:05d}" if number < self.num_bins else "eval"

    @property
    def all_bins(self) -> range:
        """The numbers of all bins, the held-out one last."""
        return range(self.num_bins + self.has_eval)


@dataclass(frozen=True)
class Execution:
    """How the work is done. These settings do not change the output.

    Attributes:
        num_workers: processes on this machine, or cores of a Ray that the command starts.
        executor: "local", or "ray".
        ray_address: HOST:PORT of the Ray cluster that does the work, or "auto"; None for this machine alone.
        shard: (i, n) with i from 1 to n, to do the i-th of n shares of the units.
    """

    num_workers: int
    executor: str = "local"
    ray_address: str | None = None
    shard: tuple[int, int] | None = None


@dataclass(frozen=True)
class WorkSizes:
    """How much is processed at a time, which bounds memory. No flag sets these sizes; tests use small ones.

    Attributes:
        unit_bytes: input of a unit of work. It decides in which steps pieces are dealt, so plan.json records it.
        part_characters: a longer text is encoded in parts.
        batch_characters: texts of a batch that have more characters together are encoded to arrays.
        held_pieces: pieces that are held in memory while they are dealt to bins.
        max_grams: of more held-out n-grams, --eval_dedup compares a sample.
        lookup_grams, lookup_characters, lookup_documents: limits of what --eval_dedup looks up in one batch.
    """

    unit_bytes: int = UNIT_BYTES
    part_characters: int = PART_CHARACTERS
    batch_characters: int = 4 << 20
    held_pieces: int = 1 << 18
    max_grams: int = 1 << 24
    lookup_grams: int = 1 << 18
    lookup_characters: int = 8 << 20
    lookup_documents: int = 1 << 16
