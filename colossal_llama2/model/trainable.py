"""Which parameters are trained: all of them, the embeddings, only their new rows, or an adapter.

Training only the embeddings is the first stage after a vocabulary was extended.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from colossal_llama2.errors import UserError
from colossal_llama2.layer_matrices import LAYER_MATRICES
from colossal_llama2.model import lora
from colossal_llama2.model.config_fields import opened
from colossal_llama2.model.loading import NEW_ROWS_KEY, ModelFacts
from colossal_llama2.model.lora import LoraShape
from colossal_llama2.model.model_folder import StrPath
from colossal_llama2.plurals import counted

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

EMBEDDING_NAMES = ("embed_tokens", "lm_head")
# [begin, end) ranges of token ids.
Ranges = tuple[tuple[int, int], ...]
ROWS_NEED_CHUNKED_LOSS = "--train_new_rows_only needs the chunked loss; leave out --chunked_loss off"


@dataclass(frozen=True)
class Trainable:
    """A choice of what is trained. The base class trains everything.

    To add a choice, write a subclass here and construct it in `from_flags`.

    Attributes:
        rows: the only rows of the embeddings that are trained; None for all rows.
        trains_layers: whether the decoder layers and the last norm are trained, or an adapter of the layers.
    """

    rows: Ranges | None = None

    @staticmethod
    def from_flags(*, embeddings: bool, new_rows: bool, adapter: LoraShape | None = None) -> "Trainable":
        """The choice of --lora_rank, --freeze_non_embeds_params and --train_new_rows_only.

        Only the first and the last may be given together.
        """
        if adapter is not None:
            return Lora(shape=adapter, only_new_rows=new_rows)
        if new_rows:
            return NewRows()
        return Embeddings() if embeddings else Trainable()

    @property
    def trains_layers(self) -> bool:
        return True

    @property
    def trains_embeddings(self) -> bool:
        """Whether rows of the embeddings are trained."""
        return True

    @property
    def decays(self) -> bool:
        """Whether the optimizer may decay weights: Adam cannot exclude rows, and decay would change them all."""
        return self.rows is None

    @property
    def adapter(self) -> LoraShape | None:
        """The adapter that is trained and saved instead of the model's own weights; None for no adapter."""
        return None

    def of_model(self, model_path: StrPath) -> "Trainable":
        """The same choice, completed from the model's folder. Raises UserError if the folder lacks what it needs."""
        return self

    def problems(self, *, pp_size: int, chunked_loss: str, tp_size: int = 1) -> list[str]:
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

    def saved_parameters(self, model: ModelFacts) -> int:
        """Number of elements in a saved model."""
        return model.parameters

    def saved_name(self, name: str) -> str | None:
        """The name under which a parameter of the prepared model is saved; None if it is not saved."""
        return name

    @property
    def description(self) -> str:
        """What is trained, for the log."""
        return "all parameters"

    def layout(self) -> dict[str, Any]:
        """How this affects which parts of the optimizer a rank holds, as JSON values."""
        return {"embeddings_only": not self.trains_layers}

    def adapter_facts(self) -> dict[str, Any] | None:
        """What a resumed run must have as it was, as JSON values; None without an adapter."""
        return None


@dataclass(frozen=True)
class Embeddings(Trainable):
    """The input and output embeddings (--freeze_non_embeds_params)."""

    @property
    def trains_layers(self) -> bool:
        return False

    def problems(self, *, pp_size: int, chunked_loss: str, tp_size: int = 1) -> list[str]:
        if pp_size <= 2:
            return []
        return [
            f"--pp {pp_size} leaves stages that train nothing, with --freeze_non_embeds_params or "
            f"--train_new_rows_only; give --pp 2"
        ]

    def prepare(self, model: "LlamaForCausalLM") -> tuple[int, int]:
        for name, param in model.named_parameters():
            param.requires_grad_(_is_embedding(name))
        return _counts(model)

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

    def problems(self, *, pp_size: int, chunked_loss: str, tp_size: int = 1) -> list[str]:
        problems = super().problems(pp_size=pp_size, chunked_loss=chunked_loss)
        if chunked_loss == "off":
            problems.append(ROWS_NEED_CHUNKED_LOSS)
        return problems

    def prepare_embedding(self, embedding: "torch.nn.Module", *, vocab_size: int) -> None:
        assert self.rows is not None, "of_model reads which rows are new"
        train_rows_only(embedding, self.rows, vocab_size=vocab_size)

    @property
    def description(self) -> str:
        return _rows_in_words(self.rows)


@dataclass(frozen=True)
class Lora(Trainable):
    """An adapter of the decoder layers' matrices (--lora_rank), and the embeddings of a model whose vocabulary grew.

    Attributes:
        shape: of the adapter.
        only_new_rows: of the embeddings only the rows that init_model.py added are trained (--train_new_rows_only).
        with_embeddings: whether the model has such rows; `of_model` finds out.
    """

    shape: LoraShape = LoraShape(rank=8, alpha=16)
    only_new_rows: bool = False
    with_embeddings: bool = False

    @property
    def adapter(self) -> LoraShape:
        return self.shape

    @property
    def trains_embeddings(self) -> bool:
        return self.with_embeddings

    def of_model(self, model_path: StrPath) -> "Lora":
        """Raises UserError if --train_new_rows_only finds no new rows, or the rank is larger than the matrices."""
        folder = opened(model_path)
        width = folder.content.get("hidden_size", self.shape.rank)
        if self.shape.rank > width:
            raise UserError(
                f"--lora_rank {self.shape.rank} is more than the hidden size of {model_path}, {width}; give less"
            )
        rows = read_new_rows(model_path) if self.only_new_rows else None
        return replace(self, rows=rows, with_embeddings=bool(rows or folder.content.get(NEW_ROWS_KEY)))

    def problems(self, *, pp_size: int, chunked_loss: str, tp_size: int = 1) -> list[str]:
        given = [f"--tp {tp_size}"] if tp_size > 1 else []
        given += [f"--pp {pp_size}"] if pp_size > 1 else []
        problems = [
            f"{flag} is not available with --lora_rank, whose adapter is not split; leave it out, more GPUs then share "
            f"the batch"
            for flag in given
        ]
        if self.only_new_rows and chunked_loss == "off":
            problems.append(ROWS_NEED_CHUNKED_LOSS)
        return problems

    def prepare(self, model: "LlamaForCausalLM") -> tuple[int, int]:
        lora.inject(model, self.shape)
        for name, param in model.named_parameters():
            if self.with_embeddings and _is_embedding(name):
                param.requires_grad_(True)
        return _counts(model)

    def prepare_embedding(self, embedding: "torch.nn.Module", *, vocab_size: int) -> None:
        if self.rows is not None:
            train_rows_only(embedding, self.rows, vocab_size=vocab_size)

    def parameters(self, model: ModelFacts) -> int:
        layer = sum(self.shape.elements(model.layer_matrices[target]) for target in self.shape.targets)
        return model.layers * layer + (model.embedding_parameters if self.with_embeddings else 0)

    def saved_parameters(self, model: ModelFacts) -> int:
        return self.parameters(model)

    def saved_name(self, name: str) -> str | None:
        is_saved = lora.is_of_adapter(name) or (self.with_embeddings and _is_embedding(name))
        return lora.saved_name(name) if is_saved else None

    @property
    def description(self) -> str:
        targets = "all matrices" if self.shape.targets == LAYER_MATRICES else ", ".join(self.shape.targets)
        text = f"LoRA of rank {self.shape.rank} and alpha {self.shape.alpha:g} on {targets} of the layers"
        if self.rows is not None:
            return f"{text} and {_rows_in_words(self.rows)}"
        return f"{text} and the embeddings" if self.with_embeddings else text

    def layout(self) -> dict[str, Any]:
        return {**super().layout(), "adapter": self.adapter_facts()}

    def adapter_facts(self) -> dict[str, Any]:
        targets = list(self.shape.targets)
        facts = {"rank": self.shape.rank, "alpha": self.shape.alpha, "targets": targets}
        return {**facts, "embeddings": self.with_embeddings}


def _is_embedding(name: str) -> bool:
    return any(part in EMBEDDING_NAMES for part in name.split("."))


def _counts(model: "LlamaForCausalLM") -> tuple[int, int]:
    """Numbers of trainable and of frozen elements."""
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    return trained, sum(param.numel() for param in model.parameters()) - trained


def _rows_in_words(rows: Ranges | None) -> str:
    return f"{counted(sum(end - begin for begin, end in rows or ()), 'new row')} of the embeddings"


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
