"""A task that needs exact positions: repeat the token a fixed, large number of places before.

The model is built to solve it: its queries and keys are the same for every token, so the rotary embedding makes its
first layer attend to one distance. If the rotary frequencies are rounded, it attends to others.
"""

from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HEADS, HEAD_SIZE = 2, 32
HIDDEN = HEADS * HEAD_SIZE
# Channels of the hidden states that are equal for all tokens; the others hold the token.
CONSTANT = 4
# LLaMA-3's. The first frequencies distinguish a distance from the next one, each by up to SCORE.
THETA = 500_000.0
FREQUENCIES = 6
SCORE = 10.0


def make_model(folder: Path, tokenizer_dir: Path, *, distance: int) -> Path:
    """Write a LLaMA of two layers whose first one attends `distance` tokens back."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer_dir)),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        rope_theta=THETA,
    )
    model = LlamaForCausalLM(config)
    frequencies = model.model.rotary_emb.inv_freq
    first = model.model.layers[0].self_attn
    with torch.no_grad():
        tokens = torch.randn(config.vocab_size, HIDDEN).sign()
        tokens[:, :CONSTANT] = 1.0
        model.model.embed_tokens.weight.copy_(tokens)
        tokens[:, :CONSTANT] = 0.0
        model.lm_head.weight.copy_(tokens / 16)
        # Each frequency has a pair of channels, half a head apart. A query is rotated back by the distance.
        turned = torch.cat([torch.cos(distance * frequencies), -torch.sin(distance * frequencies)])
        used = (torch.arange(len(frequencies)) < FREQUENCIES).float()
        straight = torch.cat([used, torch.zeros(len(frequencies))])
        turned = turned * used.repeat(2)
        size = (SCORE * HEAD_SIZE**0.5) ** 0.5
        for projection, row in ((first.q_proj, turned), (first.k_proj, straight)):
            projection.weight.zero_()
            projection.weight[:, :CONSTANT] = (row * size / CONSTANT).repeat(HEADS)[:, None]
        first.v_proj.weight.copy_(torch.eye(HIDDEN))
        first.o_proj.weight.copy_(2 * torch.eye(HIDDEN))
    model.save_pretrained(folder)
    for path in tokenizer_dir.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def write_data(folder: Path, *, samples: int, length: int, distance: int) -> list[str]:
    """A prepared part of random tokens that repeat; only the repeated ones are predicted."""
    random = np.random.default_rng(0)
    rows = [np.resize(random.integers(3, 500, distance + 1), length).tolist() for _ in range(samples)]
    labels = [[-100] * (distance + 1) + row[distance + 1 :] for row in rows]
    kind = datasets.Sequence(datasets.Value("int32"))
    features = datasets.Features({"input_ids": kind, "labels": kind})
    part = folder / "part-00000"
    datasets.Dataset.from_dict({"input_ids": rows, "labels": labels}, features=features).save_to_disk(part)
    return [str(part)]
