"""The forward pass of a LLaMA that ColossalAI has split over ranks, for --plugin 3d.

ColossalAI has one of its own (shardformer/modeling/llama.py), which imports and calls code of transformers 4.51 that
later versions lack or have changed without an error: a decoder layer that returns a tensor would be trained on its
first sample. This one calls only the modules of the model, by their names in a checkpoint, and ColossalAI's
communication. Its operations, and their order, are those of ColossalAI (llama_model_forward:39,
llama_for_causal_lm_forward:275, get_llama_flash_attention_forward:500), and, where nothing is split, those of
transformers.

Shapes: hidden states are (batch, length, width). Where ranks share a sample, length is that of this rank's part.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama2.dataset.layout.columns import IGNORE_INDEX

if TYPE_CHECKING:
    import torch

# Both use the ranks of tensor parallelism.
SHARING_TENSOR_RANKS = ("split_gather", "ring")


@dataclass(frozen=True)
class Stage:
    """The layers of this rank: all of them without a pipeline.

    Attributes:
        begin, end: the range of the model's layers.
        is_first, is_last: whether the embeddings, or the norm and the head, are here.
    """

    begin: int
    end: int
    is_first: bool = True
    is_last: bool = True


def causal_lm_forward(
    model: Any,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    hidden_states: Any = None,
    labels: Any = None,
    use_cache: bool = False,
    *,
    stage: Stage,
    shard: Any,
) -> Any:
    """The forward method of a LlamaForCausalLM.

    Args:
        input_ids: (batch, length) of whole samples, on every stage.
        attention_mask: as `attention_inputs` of model/documents.py returns it, on every stage.
        position_ids: (batch, length) of whole samples; None for 0, 1, 2 ...
        hidden_states: what the stage before has returned.
        labels: (batch, length) of whole samples; None for no loss.
        use_cache: accepted as by other plugins; keys and values are never kept.
        stage: this rank's layers.
        shard: ColossalAI's ShardConfig.

    Returns:
        On the last stage transformers' output with `logits`, (batch, length, this rank's part of the vocabulary), and
        `loss`, the mean over the predicted tokens or None. On the others {"hidden_states": ...}, which the pipeline
        sends on.
    """
    from colossalai.shardformer.layer._operation import gather_sp_output
    from transformers.modeling_outputs import CausalLMOutputWithPast

    hidden = hidden_states_of(model.model, input_ids, attention_mask, position_ids, hidden_states, stage, shard)
    if not stage.is_last:
        return {"hidden_states": hidden}
    # --sp_mode all_to_all computes the loss of each rank's part. With the others a rank has a part of the vocabulary.
    if shard.sequence_parallelism_mode in SHARING_TENSOR_RANKS:
        hidden = gather_sp_output(hidden, shard)
    logits = model.lm_head(hidden)
    loss = None if labels is None else mean_loss(logits, labels, model.lm_head.out_features, shard)
    return CausalLMOutputWithPast(loss=loss, logits=logits)


def mean_loss(logits: "torch.Tensor", labels: "torch.Tensor", vocab_size: int, shard: Any) -> "torch.Tensor":
    """The mean cross-entropy over the tokens that are predicted, as a scalar, the same on all ranks of a sample."""
    import torch
    from colossalai.shardformer.layer import dist_cross_entropy

    logits = in_float32(logits)
    is_split = shard.enable_tensor_parallelism or shard.enable_sequence_parallelism
    if is_split or shard.pipeline_stage_manager is not None:
        return dist_cross_entropy(labels, logits, shard, vocab_size, logits.dtype)
    targets = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets, ignore_index=IGNORE_INDEX)


def in_float32(logits: "torch.Tensor") -> "torch.Tensor":
    """Logits in float32, in which transformers computes the loss.

    ColossalAI does not convert them: shardformer/layer/loss.py:235 sums the losses of a batch in their dtype. 6.9223
    becomes 6.9062 in bf16, and in fp16 the sum overflows. Line 240 rounds the number of tokens as well.
    """
    return logits.float()


def hidden_states_of(
    decoder: Any, input_ids: Any, attention_mask: Any, position_ids: Any, hidden: Any, stage: Stage, shard: Any
) -> "torch.Tensor":
    """The hidden states after the layers of this stage, and after the norm if it is the last one.

    Args:
        decoder: the LlamaModel.
        hidden: those of the stage before; None on the first.
        input_ids, attention_mask, position_ids, stage, shard: as in `causal_lm_forward`.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    if stage.is_first:
        hidden = decoder.embed_tokens(input_ids)
        length = hidden.shape[1]
    else:
        length = hidden.shape[1] * shard.sequence_parallel_size
    if position_ids is None:
        position_ids = torch.arange(length, device=hidden.device)[None]
    visible = what_is_visible(attention_mask, hidden, length, shard)
    # The other stages receive parts.
    if stage.is_first:
        hidden = split_samples(hidden, shard)
    rotation = decoder.rotary_emb(hidden, position_ids)
    for layer in decoder.layers[stage.begin : stage.end]:
        if decoder.gradient_checkpointing and decoder.training:
            hidden = checkpoint(layer.__call__, hidden, visible, rotation, use_reentrant=False)
        else:
            hidden = layer(hidden, visible, rotation)
    return decoder.norm(hidden) if stage.is_last else hidden


def what_is_visible(attention_mask: Any, hidden: "torch.Tensor", length: int, shard: Any) -> Any:
    """What `attend` needs to know of which tokens see which: keyword arguments of ColoAttention, or a mask for SDPA.

    A mask for SDPA is (batch, 1, length, length), 0 or the type's minimum; None if every token sees all before it.
    """
    import torch
    from colossalai.shardformer.layer import ColoAttention

    if shard.enable_flash_attention:
        shape = (hidden.shape[0], 1, length, length)
        return ColoAttention.prepare_attn_kwargs(
            shape, hidden.dtype, hidden.device, q_padding_mask=attention_mask, is_causal=True
        )
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    # `Batch` has no mask where nothing is padded; only the parts that a pipeline cuts it into may have such a one.
    # Otherwise the host would wait here.
    if attention_mask is None or (shard.pipeline_stage_manager is not None and bool(attention_mask.all())):
        return None
    sees = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
    sees = sees & attention_mask[:, None, None, :].bool()
    mask = torch.full(sees.shape, torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    return mask.masked_fill_(sees, 0.0)


def split_samples(hidden: "torch.Tensor", shard: Any) -> "torch.Tensor":
    """This rank's part of whole samples' hidden states; all of them where ranks do not share samples."""
    from colossalai.shardformer.layer._operation import split_forward_gather_backward

    mode, group = shard.sequence_parallelism_mode, shard.sequence_parallel_process_group
    if mode in SHARING_TENSOR_RANKS:
        return split_forward_gather_backward(hidden, 1, group)
    if mode == "all_to_all":
        return split_forward_gather_backward(hidden, 1, group, 1 / shard.sequence_parallel_size)
    return hidden


def layer_forward(layer: Any, hidden: "torch.Tensor", visible: Any, rotation: Any) -> "torch.Tensor":
    """The forward method of a LlamaDecoderLayer; `visible` and `rotation` are those of `attention_forward`."""
    hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), visible, rotation)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def attention_forward(
    attention: Any, hidden: "torch.Tensor", visible: Any, rotation: tuple[Any, Any], *, shard: Any
) -> "torch.Tensor":
    """The forward method of a LlamaAttention, with this rank's heads.

    Args:
        visible: what `what_is_visible` returned.
        rotation: cosines and sines of the positions, (batch or 1, length of a whole sample, head_dim) each.
    """
    from colossalai.shardformer.layer._operation import all_to_all_comm

    states = [projection(hidden) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    exchanges = shard.sequence_parallelism_mode == "all_to_all"
    if exchanges:
        # From a part of the sample with all heads to the whole sample with a part of the heads.
        states = [all_to_all_comm(state, shard.sequence_parallel_process_group) for state in states]
    batch, length, _ = states[0].shape
    query, key, value = (state.view(batch, length, -1, attention.head_dim).transpose(1, 2) for state in states)
    query, key = rotated(query, *rotation), rotated(key, *rotation)
    groups = query.shape[1] // key.shape[1]
    dropout = attention.attention_dropout if attention.training else 0.0
    out = attend(query, repeated(key, groups), repeated(value, groups), visible, dropout)
    out = out.transpose(1, 2).contiguous().reshape(batch, length, -1)
    if exchanges:
        out = all_to_all_comm(out, shard.sequence_parallel_process_group, scatter_dim=1, gather_dim=2)
    return attention.o_proj(out)


def rotated(states: "torch.Tensor", cosines: "torch.Tensor", sines: "torch.Tensor") -> "torch.Tensor":
    """Rotary positions (Su et al., arXiv 2104.09864) of (batch, heads, length, head_dim), in transformers' layout."""
    import torch

    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return (states * cosines[:, None]) + (turned * sines[:, None])


def repeated(states: "torch.Tensor", groups: int) -> "torch.Tensor":
    """(batch, heads, length, head_dim) with each head `groups` times in a row, for the queries that share it."""
    if groups == 1:
        return states
    batch, heads, length, width = states.shape
    return states[:, :, None].expand(batch, heads, groups, length, width).reshape(batch, heads * groups, length, width)


def attend(query: Any, key: Any, value: Any, visible: Any, dropout: float) -> "torch.Tensor":
    """Attention of (batch, heads, length, head_dim) states; `visible` is what `what_is_visible` returned."""
    import torch
    from colossalai.shardformer.layer import ColoAttention

    if isinstance(visible, dict):
        return ColoAttention.attention(query, key, value, dropout_p=dropout, **visible)
    return torch.nn.functional.scaled_dot_product_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        attn_mask=visible,
        dropout_p=dropout,
        scale=query.shape[-1] ** -0.5,
        is_causal=visible is None and query.shape[2] > 1,
    )
