"""When a checkpoint's exact state can be used: layouts stored by earlier versions, and fields that are added later."""

import json
from dataclasses import dataclass, fields

import pytest
import torch

from colossal_llama2.engine import resume_state
from colossal_llama2.engine.patches.checkpoint_io import alone_in_memory, read_object, write_object
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.model.trainable import Embeddings, NewRows, Trainable

# `layout` in running_states.json, as written by both commits 6778aa0 and 7761401.
STORED = {
    "zero2": {
        "plugin": "zero2",
        "precision": "bf16",
        "tp_size": 1,
        "zero_stage": 1,
        "pp_size": 1,
        "sp_size": 1,
        "sp_mode": None,
        "embeddings_only": False,
        "world_size": 2,
    },
    "gemini": {
        "plugin": "gemini",
        "precision": "fp16",
        "tp_size": 1,
        "zero_stage": 1,
        "pp_size": 1,
        "sp_size": 1,
        "sp_mode": None,
        "embeddings_only": True,
        "world_size": 8,
        "chunks": "layers by use",
    },
    "3d": {
        "plugin": "3d",
        "precision": "bf16",
        "tp_size": 2,
        "zero_stage": 2,
        "pp_size": 1,
        "sp_size": 4,
        "sp_mode": "all_to_all",
        "embeddings_only": False,
        "world_size": 16,
    },
}
# Values of another run on the same ranks.
UNRELATED = {
    "max_norm": 0.5,
    "accumulation_steps": 3,
    "use_flash_attn": True,
    "chunked_loss": "off",
    "learning_rate": 1.0,
    "weight_decay": 0.7,
    "micro_batch_size": 5,
    "microbatch_size": 5,
}


@dataclass(frozen=True)
class LaterSettings(EngineSettings):
    """Settings with a field that does not exist yet."""

    lora_rank: int = 0


@dataclass(frozen=True)
class Job:
    """Ranks of a job, which need no process group."""

    settings: EngineSettings
    world_size: int
    rank: int = 0
    data_size: int = 1


def job(stored: dict, kind: type[EngineSettings] = EngineSettings, **changes) -> Job:
    """The job of a stored layout, with other values for fields that should not count."""
    names = {field.name for field in fields(EngineSettings)}
    values = {name: value for name, value in stored.items() if name in names}
    values["trainable"] = NewRows(((3, 4),)) if stored["embeddings_only"] else Trainable()
    return Job(kind(**{**UNRELATED, **values, **changes}), stored["world_size"])


@pytest.mark.parametrize("kind", [EngineSettings, LaterSettings])
@pytest.mark.parametrize("name", STORED)
def test_stored_layouts_are_still_those_of_the_same_job(name, kind):
    assert json.loads(json.dumps(resume_state.layout(job(STORED[name], kind)))) == STORED[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"plugin": "zero2_cpu"},
        {"plugin": "gemini"},
        {"precision": "fp16"},
        {"tp_size": 2},
        {"pp_size": 2},
        {"zero_stage": 0},
        {"sp_size": 2},
        {"sp_mode": "ring"},
        {"trainable": Embeddings()},
    ],
)
def test_another_split_is_another_layout(changes):
    assert resume_state.layout(job(STORED["zero2"], **changes)) != STORED["zero2"]


def test_another_number_of_ranks_is_another_layout():
    assert resume_state.layout(Job(job(STORED["zero2"]).settings, 4)) != STORED["zero2"]


def test_only_tensors_that_share_memory_are_copied_for_a_file(tmp_path):
    """A copy of each would double the memory that a save needs; safetensors refuses shared memory."""
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "again": base, "part": base[1:], "turned": base.t(), "scalar": torch.tensor(3.0)}
    found = alone_in_memory(tensors)
    assert found["whole"].data_ptr() == base.data_ptr() and found["scalar"] is not None
    memories = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(memories) == len(found)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())
    write_object(tensors, tmp_path / "state.safetensors")
    for name, tensor in read_object(tmp_path / "state.safetensors").items():
        assert torch.equal(tensor, tensors[name])
