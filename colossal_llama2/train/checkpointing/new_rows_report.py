"""With --train_new_rows_only: how the new rows of a saved model have changed, and that no other row has."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama2 import logs
from colossal_llama2.errors import RunError
from colossal_llama2.model.adapter_files import is_adapter
from colossal_llama2.model.loading import dtype_of
from colossal_llama2.model.lora import PEFT_PREFIX
from colossal_llama2.model.model_folder import ADAPTER_WEIGHTS, shard_names
from colossal_llama2.model.trainable import Ranges
from colossal_llama2.plurals import counted

if TYPE_CHECKING:
    import torch

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
BLOCK_ROWS = 4096


class NewRowsReport:
    """Compares saved embeddings with those that a run began with or resumed from. Used on one rank.

    Keeps 8 bytes per row, and reads a block of rows at a time.
    """

    def __init__(self, model_path: str, trained: Ranges, precision: str):
        """
        Args:
            model_path: the folder whose weights the run began with.
            trained: [begin, end) ranges of token ids that are trained.
            precision: fp16, bf16 or fp32; the weights were rounded to it when they were loaded.
        """
        self._origin, self._trained, self._precision = model_path, trained, precision
        self._before = {name: _digests(rows) for name, rows in self._matrices(model_path)}

    def examine(self, folder: Path) -> dict[str, float]:
        """Log and return the figures of a saved model: norms of the new rows, and the share of them that changed.

        Raises:
            RunError: a row changed that is not trained.
        """
        figures: dict[str, float] = {}
        for name, rows in self._matrices(str(folder)):
            if name not in self._before:
                continue  # tied embeddings may be stored under both names
            moved, norms = _compare(rows, self._before[name])
            is_trained = np.zeros(len(moved), dtype=bool)
            for begin, end in self._trained:
                is_trained[begin:end] = True
            if moved[~is_trained].any():
                row = int(np.flatnonzero(moved & ~is_trained)[0])
                raise RunError(f"{folder}: row {row} of {name} changed, but it is not trained")
            new, old = norms[is_trained], norms[~is_trained]
            matrix = name.split(".")[-2]
            share = float(moved[is_trained].mean())
            logs.get_logger().info(
                "%s: %.1f %% of %s changed since %s; norms %.3f to %.3f, mean %.3f; old rows, mean %.3f",
                matrix,
                100 * share,
                counted(len(new), "new row"),
                self._origin,
                new.min(),
                new.max(),
                new.mean(),
                old.mean() if len(old) else float("nan"),
            )
            figures.update({f"Rows/{matrix} moved": share, f"Rows/{matrix} norm": float(new.mean())})
        return figures

    def _matrices(self, folder: str) -> Iterator[tuple[str, Iterator["torch.Tensor"]]]:
        """The embedding matrices of a model folder (one if they are tied), each as blocks of rows in float32.

        Those of an adapter have PEFT's prefix.
        """
        from safetensors import safe_open

        shards, prefix = ((ADAPTER_WEIGHTS,), PEFT_PREFIX) if is_adapter(folder) else (shard_names(folder), "")
        for shard in shards:
            with safe_open(str(Path(folder, shard)), framework="pt") as file:
                for name in sorted({prefix + matrix for matrix in MATRICES} & set(file.keys())):
                    yield name.removeprefix(prefix), self._blocks(file.get_slice(name))

    def _blocks(self, matrix: Any) -> Iterator["torch.Tensor"]:
        for start in range(0, matrix.get_shape()[0], BLOCK_ROWS):
            yield matrix[start : start + BLOCK_ROWS].to(dtype_of(self._precision)).float()


def _digests(blocks: Iterator["torch.Tensor"]) -> np.ndarray:
    """(rows,) uint64: a hash of each row."""
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for block in blocks for row in block.numpy()]
    return np.frombuffer(b"".join(hashes), dtype=np.uint64)


def _compare(blocks: Iterator["torch.Tensor"], before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) whether each row's hash changed, and (rows,) the Euclidean norms."""
    norms, moved, start = [], [], 0
    for block in blocks:
        norms.append(block.norm(dim=1).numpy())
        moved.append(_digests(iter([block])) != before[start : start + len(block)])
        start += len(block)
    return np.concatenate(moved), np.concatenate(norms)
