"""Which parameters are trained: all of them, the embeddings, or only the rows of the embeddings that are new.

Training only the embeddings is the first stage after a vocabulary was extended.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama2.errors import UserError
from colossal_llama2.model.config_fields import opened
from colossal_llama2.model.loading import NEW_ROWS_KEY, ModelFacts
from colossal_llama2.model.model_folder import StrPath
from colossal_llama2.plurals import counted

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
# [begin, end) ranges of token ids.
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Trainable:
    """A choice of what is trained. The base class trains everything.

    To add a choice, write a subclass here and construct it in `from_flags`.

    Attributes:
        rows: the only rows of the embeddings that are trained; None for all rows.
        trains_layers: whether the decoder layers and the last norm are trained.
    """

    rows: Ranges | None = None

    @staticmethod
    def from_flags(*, embeddings: bool, new_rows: bool) -> "Trainable":
        """The choice of --freeze_non_embeds_params and --train_new_rows_only, which exclude each other."""
        if new_rows:
            return NewRows()
        return Embeddings() if embeddings else Trainable()

    @property
    def trains_layers(self) -> bool:
        return True

    @property
    def decays(self) -> bool:
        """Whether the optimizer may decay weights: Adam cannot exclude rows, and decay would change them all."""
        return self.rows is None

    def of_model(self, model_path: StrPath) -> "Trainable":
        """The same choice, completed from the model's folder. Raises UserError if the folder lacks what it needs."""
        return self

    def problems(self, *, pp_size: int, chunked_loss: str) -> list[str]:
        """Why these settings of the engine cannot train this choice, one sentence each."""
        return []

    def prepare(self, model: "LlamaForCausalLM") -> tuple[int, int]:
        """Set `requires_grad` of a loaded LLaMA model's parameters.

        Returns:
            Numbers of trainable and of frozen elements.
        """
        return sum(param.numel() for param in model.parameters()), 0

    def prepare_embedding(self, embedding: "torch.nn.Module", *, vocab_size: int) -> None:
        """Prepare the input embedding once it is split over the ranks."""

    def parameters(self, model: ModelFacts) -> int:
        """Number of elements that have an optimizer state."""
        return model.parameters

    @property
    def description(self) -> str:
        """What is trained, for the log."""
        return "all parameters"

    def layout(self) -> dict[str, Any]:
        """How this affects which parts of the optimizer a rank holds, as JSON values."""
        return {"embeddings_only": not self.trains_layers}


@dataclass(frozen=True)
class Embeddings(Trainable):
    """The input and output embeddings (--freeze_non_embeds_params)."""

    @property
    def trains_layers(self) -> bool:
        return False

    def problems(self, *, pp_size: int, chunked_loss: str) -> list[str]:
        if pp_size <= 2:
            return []
        return [
            f"--pp {pp_size} leaves stages that train nothing, with --freeze_non_embeds_params or "
            f"--train_new_rows_only; give --pp 2"
        ]

    def prepare(self, model: "LlamaForCausalLM") -> tuple[int, int]:
        trainable = frozen = 0
        for name, param in model.named_parameters():
            param.requires_grad_(any(part in EMBEDDING_NAMES for part in name.split(".")))
            if param.requires_grad:
                trainable += param.numel()
            else:
                frozen += param.numel()
        return trainable, frozen

    def parameters(self, model: ModelFacts) -> int:
        return model.embedding_parameters

    @property
    def description(self) -> str:
        return "the embeddings"


@dataclass(frozen=True)
class NewRows(Embeddings):
    """The rows that init_model.py added to the embeddings (--train_new_rows_only); `of_model` reads which.

    The optimizer holds the complete embeddings.
    """

    def of_model(self, model_path: StrPath) -> "NewRows":
        return NewRows(read_new_rows(model_path))

    @property
    def decays(self) -> bool:
        return False

    def problems(self, *, pp_size: int, chunked_loss: str) -> list[str]:
        problems = super().problems(pp_size=pp_size, chunked_loss=chunked_loss)
        if chunked_loss == "off":
            problems.append("--train_new_rows_only needs the chunked loss; leave out --chunked_loss off")
        return problems

    def prepare_embedding(self, embedding: "torch.nn.Module", *, vocab_size: int) -> None:
        assert self.rows is not None, "of_model reads which rows are new"
        train_rows_only(embedding, self.rows, vocab_size=vocab_size)

    @property
    def description(self) -> str:
        return f"{counted(sum(end - begin for begin, end in self.rows or ()), 'new row')} of the embeddings"


def read_new_rows(model_path: StrPath) -> Ranges:
    """The rows of the embeddings that init_model.py added to a model, from its config.json.

    Raises:
        UserError: it has no such entry, or an impossible one.
    """
    folder = opened(model_path)
    path, config = folder.config_file, folder.content
    ranges = config.get(NEW_ROWS_KEY)
    size: int = config.get("vocab_size", 0)
    if not ranges:
        raise UserError(
            f"--train_new_rows_only: {path} does not list the new rows; initialize the model with init_model.py, "
            f'or add to that file: "{NEW_ROWS_KEY}": [[FIRST, {size}]], where FIRST is the first new token id'
        )
    try:
        pairs = tuple((int(begin), int(end)) for begin, end in ranges)
    except (TypeError, ValueError):
        pairs = ()
    borders = [0, *(border for pair in pairs for border in pair), size]
    if not pairs or borders != sorted(borders) or any(begin == end for begin, end in pairs):
        raise UserError(
            f'{path}: "{NEW_ROWS_KEY}" is {ranges}; ascending [begin, end) ranges of token ids from 0 to {size} are '
            f"needed, as init_model.py writes them"
        )
    return pairs


def train_rows_only(embedding: "torch.nn.Module", trained: Ranges, *, vocab_size: int) -> None:
    """Make an input embedding pass gradients to the rows of these token ids only.

    The embeddings of all other tokens are detached from their rows. So the gradient of these rows is exactly 0, Adam's
    moments for them stay 0, and no bit of them changes. The output is detached, not the weight, since the output is the
    same tensor no matter how the rows are split over ranks.
    """
    import torch

    is_trained = torch.zeros(vocab_size, dtype=torch.bool)
    for begin, end in trained:
        is_trained[begin:end] = True
    on_device = {}

    def cut_off(_module: Any, args: Any, output: "torch.Tensor") -> "torch.Tensor":
        (ids,) = args
        if ids.device not in on_device:
            on_device[ids.device] = is_trained.to(ids.device)
        return torch.where(on_device[ids.device][ids][..., None], output, output.detach())

    embedding.register_forward_hook(cut_off)
