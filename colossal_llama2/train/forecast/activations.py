"""The memory that one micro batch keeps between forward and backward, and what backward needs in addition.

Counted tensor by tensor from what autograd saves for the LLaMA of transformers 4.51 (modeling_llama.py) and for the
loss of engine/chunked_loss.py, as Korthikanti et al. count them for GPT ("Reducing activation recomputation in large
transformer models", arXiv 2205.05198, section 4). Their 34 bytes per token and channel do not apply: LLaMA's gated MLP
keeps four matrices instead of two and a half, its norms compute in float32, and there is no dropout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from colossal_llama2.engine.chunked_loss import BLOCKS
from colossal_llama2.model.lora import LoraShape

if TYPE_CHECKING:
    from transformers import LlamaConfig

FLOAT32 = 4


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a LLaMA, from its config.json."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocab_size: int
    ties_embeddings: bool

    @classmethod
    def of(cls, config: "LlamaConfig | SimpleNamespace") -> "ModelShape":
        """The shape of a transformers LlamaConfig, or of another object with its attributes."""
        heads = config.num_attention_heads
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=heads,
            key_value_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            ties_embeddings=config.tie_word_embeddings,
        )

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> "ModelShape":
        """The shape of the fields of a config.json, as `read_fields` returns them."""
        return cls.of(SimpleNamespace(**fields))


@dataclass(frozen=True)
class StageShape:
    """One rank's part of a model: its part of each matrix, its layers, and whether it has embeddings or the head.

    Attributes:
        model: the whole model.
        layers: number of layers here.
        splits: ranks that share each matrix (tensor parallelism).
    """

    model: ModelShape
    layers: int
    splits: int
    has_embeddings: bool
    has_head: bool

    @property
    def vocab_rows(self) -> int:
        """Rows of the embeddings on this rank; the vocabulary is padded to a multiple of `splits`."""
        return -(-self.model.vocab_size // self.splits)

    @property
    def query_width(self) -> int:
        """Channels of the queries on this rank."""
        return self.model.heads * self.model.head_size // self.splits

    @property
    def key_width(self) -> int:
        """Channels of the keys on this rank, and of the values."""
        return self.model.key_value_heads * self.model.head_size // self.splits

    @property
    def inner_width(self) -> int:
        """Channels inside the MLP on this rank."""
        return self.model.intermediate_size // self.splits

    def layer_weights(self) -> list[tuple[str, int]]:
        """Names and elements of one layer's weights on this rank, in the order in which they compute."""
        hidden, query, key, inner = self.model.hidden_size, self.query_width, self.key_width, self.inner_width
        return [
            ("norm", hidden),
            ("q", hidden * query),
            ("k", hidden * key),
            ("v", hidden * key),
            ("o", hidden * query),
            ("norm", hidden),
            ("gate", hidden * inner),
            ("up", hidden * inner),
            ("down", hidden * inner),
        ]

    def adapter_weights(self, adapter: LoraShape) -> list[tuple[str, int]]:
        """Names and elements of the adapters of one layer, in the order in which they compute."""
        hidden, query, key, inner = self.model.hidden_size, self.query_width, self.key_width, self.inner_width
        outputs = {"q": query, "k": key, "v": key, "o": hidden, "gate": inner, "up": inner, "down": hidden}
        names = [target.removesuffix("_proj") for target in adapter.targets]
        return [(name, adapter.elements((outputs[name], self.input_width(name)))) for name in names]

    def input_width(self, name: str) -> int:
        """Channels that a matrix of `layer_weights` multiplies."""
        return {"o": self.query_width, "down": self.inner_width}.get(name, self.model.hidden_size)

    def embedding_weights(self) -> int:
        """Elements of the input embeddings on this rank; the head has as many."""
        return self.vocab_rows * self.model.hidden_size


ATTENTIONS = ("sdpa", "flash")


@dataclass(frozen=True)
class MicroBatch:
    """How one micro batch passes through a rank.

    Attributes:
        samples, length: of the batch, in samples and tokens.
        element: bytes of a number in the working precision.
        attention: "sdpa" or "flash", neither of which keeps a matrix of length x length per head.
        chunked_loss: the loss is computed without all logits.
        checkpointing: only the input of each layer is kept; the rest is computed again.
        has_documents: documents in a sample are kept apart; also true where a causal mask is materialized; ignored with
            "flash".
        trains_layers: False if only the embeddings are trained.
        trains_embeddings: False if they are frozen.
        adapter: what is trained of the layers instead of their own weights; None for these.
        hidden_splits: ranks among which the residual stream is split along the sample (sequence parallelism).
        sample_splits: ranks among which everything is split along the sample, and attention by heads (all_to_all).
        on_cpu: a rehearsal, in which the loss is computed by smaller blocks.
    """

    samples: int
    length: int
    element: int
    attention: str
    chunked_loss: bool
    checkpointing: bool
    has_documents: bool
    trains_layers: bool = True
    trains_embeddings: bool = True
    adapter: LoraShape | None = None
    hidden_splits: int = 1
    sample_splits: int = 1
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention is {self.attention!r}, one of {', '.join(ATTENTIONS)} expected")

    @property
    def tokens(self) -> int:
        """Positions in this rank's part of the batch."""
        return self.samples * self.length // self.sample_splits


@dataclass(frozen=True)
class Moment:
    """One operation of backward: bytes that exist while it runs, and the weights whose gradients it computes."""

    activations: int
    logits: int
    weights: tuple[tuple[str, int], ...] = ()


class _Tape:
    """Tracks the live bytes from one operation to the next."""

    def __init__(self, live: int):
        self.live = live
        self.moments: list[Moment] = []

    def do(
        self, *, new: int = 0, free: int = 0, passing: int = 0, logits: int = 0, weights: Sequence[tuple[str, int]] = ()
    ) -> None:
        """An operation that allocates `new` bytes, releases `free`, and holds `passing` and `logits` while it runs."""
        self.moments.append(Moment(self.live + new + passing, logits, tuple(weights)))
        self.live += new - free


class _Sizes:
    """Bytes of the tensors of one layer, under the names that the comments below use."""

    def __init__(self, stage: StageShape, batch: MicroBatch):
        tokens, element = batch.tokens, batch.element
        hidden_tokens = tokens // batch.hidden_splits
        self.hidden = element * hidden_tokens * stage.model.hidden_size
        self.hidden32 = FLOAT32 * hidden_tokens * stage.model.hidden_size
        self.query = element * tokens * stage.query_width
        self.key = element * tokens * stage.key_width
        # Keys and values are repeated for each query head, but not for flash-attn.
        self.shown_key = self.key if batch.attention == "flash" else self.query
        self.inner = element * tokens * stage.inner_width
        self.log_sums = FLOAT32 * tokens * (stage.model.heads // stage.splits)
        self.is_half = element < FLOAT32
        # The input that a matrix saves for its own gradient, or for that of its adapter, is not kept if it is frozen.
        is_kept = {name for name, _ in trained_layer_weights(stage, batch)}
        self.norm_output = self.hidden if is_kept & {"q", "k", "v", "gate", "up"} else 0
        self.product = self.inner if "down" in is_kept else 0
        # The output of attention, which it keeps for itself.
        self.mixed = self.query
        # RMSNorm: its float32 input (the residual stream itself in fp32), its output before and after the weight.
        self.norm = self.hidden32 + ("norm" in is_kept) * self.hidden + self.norm_output
        self.attention = self.query + 2 * self.shown_key + self.mixed + self.log_sums
        # Gate, its SiLU, up, and the product of both.
        self.mlp = 3 * self.inner + self.product
        adapters = _adapter_bytes(stage, batch)
        self.attention_adapters = sum(adapters.get(name, 0) for name in ("q", "k", "v", "o"))
        self.mlp_adapters = sum(adapters.values()) - self.attention_adapters
        self.layer = 2 * self.norm + self.attention + self.mlp + sum(adapters.values())


def trained_layer_weights(stage: StageShape, batch: MicroBatch) -> list[tuple[str, int]]:
    """Names and elements of what is trained in one layer, in the order in which it computes."""
    if batch.adapter is not None:
        return stage.adapter_weights(batch.adapter)
    return stage.layer_weights() if batch.trains_layers else []


def _adapter_bytes(stage: StageShape, batch: MicroBatch) -> dict[str, int]:
    """Bytes that the adapters of one layer keep, by matrix: A's outputs, and with dropout its inputs and a mask."""
    if batch.adapter is None:
        return {}
    found = {}
    for name, _ in stage.adapter_weights(batch.adapter):
        dropped = (batch.element + 1) * stage.input_width(name) if batch.adapter.dropout else 0
        found[name] = batch.tokens * (batch.element * batch.adapter.rank + dropped)
    return found


def mask_bytes(batch: MicroBatch) -> int:
    """Bytes of the dense mask that all layers share, (samples, 1, length, length); 0 without one."""
    is_there = batch.has_documents and batch.attention == "sdpa"
    return batch.element * batch.length**2 * batch.samples * is_there


def kept_bytes(stage: StageShape, batch: MicroBatch) -> int:
    """Bytes that one micro batch keeps from forward to backward, without those of the loss."""
    sizes = _Sizes(stage, batch)
    layer = sizes.hidden if batch.checkpointing else sizes.layer
    # Cosines and sines of the rotary embedding, which all layers share.
    shared = 2 * batch.element * batch.tokens * stage.model.head_size + mask_bytes(batch)
    return stage.layers * layer + shared + (sizes.norm if stage.has_head else 0)


def loss_bytes(stage: StageShape, batch: MicroBatch) -> tuple[int, int]:
    """Peak bytes of the head and the loss, without hidden states, in forward and in backward."""
    if not stage.has_head:
        return 0, 0
    tokens, element = batch.tokens, batch.element
    half = element if element < FLOAT32 else 0
    if not batch.chunked_loss:
        logits = tokens * stage.vocab_rows
        # Forward: logits, the same in float32, log-probabilities. Backward: log-probabilities, two gradients of them,
        # the second of which is rounded to half precision.
        return logits * (2 * FLOAT32 + half), logits * (3 * FLOAT32 + half)
    blocks = BLOCKS["cpu" if batch.on_cpu else "cuda"]
    rows = min(blocks.rows(tokens), stage.vocab_rows)
    block = tokens * rows
    kept = FLOAT32 * block * min(blocks.kept // block, stage.vocab_rows // rows)
    hidden = tokens * stage.model.hidden_size
    # Forward: a block of logits, the same in float32, then exponentials, of which the first blocks' are kept. Backward:
    # the same; the gradient of the hidden states is summed in float32 and has a block's share beside it.
    logits = kept + block * (FLOAT32 + half)
    return logits, logits + hidden * (FLOAT32 + element)


def backward_moments(stage: StageShape, batch: MicroBatch) -> list[Moment]:
    """The operations of backward on one rank, in order: loss, final norm, layers from the last, embeddings."""
    sizes = _Sizes(stage, batch)
    tape = _Tape(kept_bytes(stage, batch))
    # The head's gradient waits for that of the embeddings if they are one weight.
    tied = stage.model.ties_embeddings and stage.has_embeddings and stage.has_head
    embeddings = [("embeddings", stage.embedding_weights())] if batch.trains_embeddings else []
    waiting = batch.element * stage.embedding_weights() if tied and embeddings else 0
    if stage.has_head:
        _, logits = loss_bytes(stage, batch)
        head = [] if tied or not embeddings else [("head", stage.embedding_weights())]
        tape.do(new=sizes.hidden + waiting, logits=logits, weights=head)
        _norm(tape, sizes, batch, meets_residual=False)
    else:
        tape.do(new=sizes.hidden)
    for _ in range(stage.layers):
        if batch.checkpointing:
            tape.do(new=sizes.layer, free=sizes.hidden)
        _mlp(tape, sizes, stage, batch)
        _norm(tape, sizes, batch)
        _attention(tape, sizes, stage, batch)
        _norm(tape, sizes, batch)
    if stage.has_embeddings:
        tape.do(free=waiting, weights=embeddings)
    return tape.moments


def _weights(stage: StageShape, batch: MicroBatch, *names: str) -> list[tuple[str, int]]:
    return [pair for pair in trained_layer_weights(stage, batch) if pair[0] in names]


def _norm(tape: _Tape, sizes: _Sizes, batch: MicroBatch, *, meets_residual: bool = True) -> None:
    """The gradient of an RMSNorm, added to that of the residual stream; in float32 inside."""
    rounded = sizes.hidden if sizes.is_half else 0
    # The gradient behind the weight, then that of x * 1/rms by each factor, and that of the mean of squares.
    weights = [("norm", sizes.hidden // batch.element // max(batch.tokens // batch.hidden_splits, 1))]
    tape.do(
        new=sizes.hidden32,
        free=sizes.norm_output,
        passing=2 * sizes.hidden32 + rounded,
        weights=weights if batch.trains_layers and batch.adapter is None else (),
    )
    # Both gradients of the residual stream become one: that from the norm's output was made by the block before.
    merged = sizes.hidden if meets_residual else 0
    tape.do(free=sizes.hidden32 + sizes.norm - sizes.norm_output + merged, passing=rounded)


def _mlp(tape: _Tape, sizes: _Sizes, stage: StageShape, batch: MicroBatch) -> None:
    inner = sizes.inner
    tape.do(new=inner, free=sizes.product, weights=_weights(stage, batch, "down"))
    # The product's gradient becomes those of its factors, SiLU(gate) and up, which were kept for it.
    tape.do(new=2 * inner, free=3 * inner)
    tape.do(new=sizes.hidden, free=inner, weights=_weights(stage, batch, "up"))
    tape.do(new=inner, free=2 * inner)
    tape.do(free=inner + sizes.mlp_adapters, passing=sizes.hidden, weights=_weights(stage, batch, "gate"))


def _attention(tape: _Tape, sizes: _Sizes, stage: StageShape, batch: MicroBatch) -> None:
    query, key, shown = sizes.query, sizes.key, sizes.shown_key
    tape.do(new=query, free=sizes.mixed, weights=_weights(stage, batch, "o"))
    tape.do(new=query + 2 * shown, free=2 * query + 2 * shown + sizes.log_sums)
    # Repeated keys and values are summed; the rotary embedding rotates queries and keys back.
    if shown != key:
        tape.do(new=2 * key, free=2 * shown)
    tape.do(passing=2 * query)
    tape.do(new=sizes.hidden, free=key, weights=_weights(stage, batch, "v"))
    tape.do(free=key, passing=sizes.hidden, weights=_weights(stage, batch, "k"))
    tape.do(free=query + sizes.attention_adapters, passing=sizes.hidden, weights=_weights(stage, batch, "q"))
