"""3d's own forward pass against that of transformers, on one rank; test_training.py compares it on several."""

import functools
import types
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama2.engine import llama_forward
from colossal_llama2.engine.llama_forward import Stage
from colossal_llama2.engine.patches import cpu_device
from colossal_llama2.model.documents import block_mask, position_ids
from colossal_llama2.model.loading import recompute_activations

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("with_colossalai")]
LAYERS, LENGTH = 3, 12
WHOLE = Stage(0, LAYERS)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    # Heads are together wider than hidden states; the rotation depends on the length, beyond the first positions.
    "wide heads, dynamic rope": {
        "head_dim": 16,
        "max_position_embeddings": LENGTH // 2,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    },
}


def shard(**changes) -> types.SimpleNamespace:
    """What the forward pass reads of ColossalAI's ShardConfig, where nothing is split."""
    values = {
        "enable_flash_attention": False,
        "enable_tensor_parallelism": False,
        "enable_sequence_parallelism": False,
        "sequence_parallelism_mode": None,
        "sequence_parallel_size": 1,
        "sequence_parallel_process_group": None,
        "pipeline_stage_manager": None,
    }
    return types.SimpleNamespace(**{**values, **changes})


def make_model(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, num_key_value_heads=2, **changes)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).train()


def with_own_forward(model, settings, *, stage: Stage = WHOLE):
    """Replace the methods that the policy replaces."""
    for layer in model.model.layers:
        layer.gradient_checkpointing = False
        layer.forward = types.MethodType(llama_forward.layer_forward, layer)
        attention = functools.partial(llama_forward.attention_forward, shard=settings)
        layer.self_attn.forward = types.MethodType(attention, layer.self_attn)
    forward = functools.partial(llama_forward.causal_lm_forward, stage=stage, shard=settings)
    model.forward = types.MethodType(forward, model)
    return model


def batches():
    ids = torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[1, 7:] = 0
    documents = torch.tensor([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    apart = {"attention_mask": block_mask(documents, torch.float32), "position_ids": position_ids(documents)}
    return {
        "full": {"input_ids": ids},
        "all ones": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "padded": {"input_ids": ids, "attention_mask": padding},
        "documents": {"input_ids": ids, **apart},
    }


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_it_computes_what_transformers_does(name, changes, recomputes):
    batch = batches()[name]
    labels = batch["input_ids"].clone()
    labels[1, 7:] = -100
    plain, ours = make_model(**changes), make_model(**changes)
    if recomputes:
        recompute_activations(ours)
    with_own_forward(ours, shard())
    expected, found = (model(**batch, labels=labels, use_cache=False) for model in (plain, ours))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    for output in (expected, found):
        output.loss.backward()
    for parameter, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(ours)[parameter], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["full", "padded"])
def test_with_colossalai_attention(name):
    cpu_device.install()
    batch = batches()[name]
    found = with_own_forward(make_model(), shard(enable_flash_attention=True))(**batch).logits
    visible = batch.get("attention_mask", torch.ones(2, LENGTH)).bool()
    torch.testing.assert_close(found[visible], make_model()(**batch).logits[visible], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flash", [False, True])
def test_attention_dropout_is_applied_in_training_alone(flash):
    cpu_device.install()
    batch = batches()["full"]
    model = with_own_forward(make_model(attention_dropout=0.5), shard(enable_flash_attention=flash))
    expected = make_model()(**batch).logits
    assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
    torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=1e-5, atol=1e-6)


def test_stages_of_a_pipeline_are_one_model():
    batch = batches()["padded"]
    first = with_own_forward(make_model(), shard(), stage=Stage(0, 2, is_last=False))
    last = with_own_forward(make_model(), shard(), stage=Stage(2, LAYERS, is_first=False))
    sent = first(**batch)
    assert list(sent) == ["hidden_states"]
    assert torch.equal(last(**batch, **sent).logits, make_model()(**batch).logits)
