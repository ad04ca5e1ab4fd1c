"""The in-context-learning probe with a model that can copy: two attention layers with weights made by hand.

The first layer attends to the token before, and writes what that token is beside each token. The second one attends to
where the last token came before, and writes the token there to the output: an induction head (Olsson et al. 2022).
"""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colossal_llama2.evaluation.compute import records_of
from colossal_llama2.evaluation.icl_task import IclTask
from colossal_llama2.evaluation.results import result_of

# Channels of a token itself, of the token before, and of the output; and one that is the same everywhere.
SIZE = 128
CONSTANT = 3 * SIZE
ITSELF, BEFORE, OUTPUT = (slice(start, start + SIZE) for start in range(0, CONSTANT, SIZE))
HEAD, BASE = 256, 1e12
# Pairs of channels of a head that positions do not turn, since their frequencies are at most 1e-6.
STILL = [*range(64, 128), *range(192, 256)]


def copying_model(vocabulary: int) -> LlamaForCausalLM:
    """One head in each layer."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4 * SIZE,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        head_dim=HEAD,
        rope_theta=BASE,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 2, (vocabulary, SIZE), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    frequencies = BASE ** (-torch.arange(HEAD // 2) / (HEAD // 2))
    one = torch.eye(SIZE)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        model.model.embed_tokens.weight[:, ITSELF] = tokens
        model.model.embed_tokens.weight[:, CONSTANT] = SIZE**0.5
        model.lm_head.weight[:, OUTPUT] = tokens
        first, second = (layer.self_attn for layer in model.model.layers)
        # The product of query and key is largest at a distance of 1.
        first.q_proj.weight[:, CONSTANT] = 2 * torch.cat([frequencies.cos(), -frequencies.sin()])
        first.k_proj.weight[: HEAD // 2, CONSTANT] = 2
        first.v_proj.weight[:SIZE, ITSELF] = one
        first.o_proj.weight[BEFORE, :SIZE] = one
        second.q_proj.weight[STILL, ITSELF] = 4 * one
        second.k_proj.weight[STILL, BEFORE] = 4 * one
        second.v_proj.weight[:SIZE, ITSELF] = one
        second.o_proj.weight[OUTPUT, :SIZE] = one
    return model


def test_a_model_that_copies_is_right(tokenizer_dir):
    """Retrieval needs two tokens, a key and a colon, of which its heads see the last only."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model, task = copying_model(len(tokenizer)), IclTask(seed=3, limit=90)
    found = [record for some in records_of(model, tokenizer, "", task, batch_size=None) for record in some]
    score = result_of("m", task, found)
    assert (score.subjects["copy"].value, score.subjects["induction"].value) == (1, 1)
    assert score.subjects["retrieval"].value < 0.5
    assert score.chance == pytest.approx((1 / 32 + 1 / 64 + 1 / 16) / 3)
