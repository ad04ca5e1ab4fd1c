"""One rank of a test job: a model loaded into Gemini's chunks by ColossalAI, and by engine/patches/chunk_loading.py.

    torchrun --standalone --nproc_per_node 3 tests/loading_worker.py NAME.job

NAME.job is JSON: {"name", "flags", "model"}, flags of train.py --benchmark and the folder to load. Rank 0 writes
NAME.json: "differing", the tensors that the two loaded differently, and "zeros", those without a number, both of each
rank; "tensors", how many each rank has, chunks and parameters without one; and "ours" and "theirs", the most resident
memory that loading took on any rank besides these tensors.
"""

import ctypes
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2.engine.patches import chunk_loading, patching
from colossal_llama2.engine.ranks import collectives
from tests.saving_worker import resident, run_job


def tensors_of(model) -> list:
    """This rank's parts of all chunks, of half precision and of master weights, and the parameters without a chunk."""
    from colossalai.utils import is_ddp_ignored

    manager = model.chunk_manager
    chunks = [*manager.get_chunks(model.fp16_params), *manager.get_chunks(model.fp32_params)]
    alone = [parameter.data for parameter in model.parameters() if is_ddp_ignored(parameter)]
    return [*(chunk.payload for chunk in chunks), *alone]


def peak_of_loading(engine, path: str) -> int:
    """Load into tensors of zeros; the most memory that it took on a rank besides what the rank held."""
    for tensor in tensors_of(engine.model):
        tensor.zero_()
    engine.barrier()
    ctypes.CDLL(None).malloc_trim(0)
    # Resets VmHWM.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    engine._booster.load_model(engine.model, path)
    return max(collectives.gather_values(resident("VmHWM") - before))


def compare(engine, path: str) -> dict:
    """Load in both ways."""
    with patching.replaced({target: patching.original_of(target) for target in chunk_loading.TARGETS}):
        # What is imported and allocated once is not counted.
        peak_of_loading(engine, path)
        theirs = peak_of_loading(engine, path)
        wanted = [tensor.clone() for tensor in tensors_of(engine.model)]
    ours = peak_of_loading(engine, path)
    found = tensors_of(engine.model)
    differing = [place for place, pair in enumerate(zip(wanted, found, strict=True)) if not pair[0].equal(pair[1])]
    return {
        "differing": collectives.gather_values(differing),
        "zeros": collectives.gather_values([place for place, tensor in enumerate(found) if not tensor.any()]),
        "tensors": len(found),
        "ours": ours,
        "theirs": theirs,
    }


def loaded_twice(parts: Any, job: dict, path: Path) -> dict:
    """Load in both ways."""
    # So that a tensor is read in several pieces.
    chunk_loading.PIECE_NUMBERS = 2**16
    return compare(parts.engine, job["model"])


if __name__ == "__main__":
    run_job(loaded_twice)
