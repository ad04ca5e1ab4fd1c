"""Tied embeddings (tie_word_embeddings): one matrix with two names, which transformers stores under the first one.

Other tools and earlier versions of this suite store it under both. Such folders are read too, if both are equal.
"""

from collections.abc import Sequence
from pathlib import Path

INPUT_EMBEDDING = "model.embed_tokens.weight"
OUTPUT_EMBEDDING = "lm_head.weight"
BLOCK_ROWS = 4096


def check_is_one_matrix(folder: Path, shards: Sequence[str]) -> str | None:
    """Why the matrices of a folder, whose config.json ties them, cannot be one; None if they can.

    Reads nothing if the output embedding is not stored.

    Args:
        shards: names of the folder's safetensors.
    """
    import torch
    from safetensors import safe_open

    place = {}
    for name in shards:
        with safe_open(str(folder / name), framework="pt") as file:
            place.update(dict.fromkeys({INPUT_EMBEDDING, OUTPUT_EMBEDDING} & set(file.keys()), folder / name))
    if len(place) < 2:
        return None
    with (
        safe_open(str(place[INPUT_EMBEDDING]), framework="pt") as first,
        safe_open(str(place[OUTPUT_EMBEDDING]), framework="pt") as second,
    ):
        rows, head = first.get_slice(INPUT_EMBEDDING), second.get_slice(OUTPUT_EMBEDDING)
        is_same = rows.get_shape() == head.get_shape() and all(
            torch.equal(rows[start : start + BLOCK_ROWS], head[start : start + BLOCK_ROWS])
            for start in range(0, rows.get_shape()[0], BLOCK_ROWS)
        )
    if is_same:
        return None
    return (
        f"{folder}: config.json ties the embeddings (tie_word_embeddings), but the weights have an {OUTPUT_EMBEDDING} "
        f"that differs from {INPUT_EMBEDDING}; set tie_word_embeddings to false to keep both, or save the model again "
        f"with transformers, which keeps {INPUT_EMBEDDING} alone"
    )
