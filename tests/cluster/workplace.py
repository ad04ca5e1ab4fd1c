"""A folder with everything that a launch needs: the scripts as a user has them, a tiny model, and prepared data."""

import shutil
import sys
from pathlib import Path

import datasets

from colossal_llama2.encoding.registry import load_encoder
from tests import tiny
from tests.conftest import ROOT

# The shell scripts are copied and renamed, as their comments say; the rest is the repository's own.
COPIES = {
    "train.example.sh": "train.sh",
    "train_sft.example.sh": "train_sft.sh",
    "launch.sh": "launch.sh",
    "train.example.sbatch": "train.sbatch",
}
LINKS = ("train.py", "train_sft.py", "colossal_llama2")
# 64 steps on two ranks, which ends by itself if nothing ends it.
FLAGS = (
    "--plugin zero2 --mixed_precision fp32 --max_length 64 --micro_batch_size 2 --warmup_steps 1 --dist_timeout 30 "
    "--save_interval 10 --num_epochs 4"
).split()


def make_workplace(folder: Path) -> Path:
    """Write scripts, model and data into a new folder."""
    folder.mkdir(parents=True)
    for name, copy in COPIES.items():
        shutil.copy(ROOT / name, folder / copy)
    for name in LINKS:
        (folder / name).symlink_to(ROOT / name)
    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    tiny.make_model(folder / "model", tokenizer)
    encoder = load_encoder(tokenizer)
    rows = [[1, *ids[:60], 2] for ids in encoder.encode(tiny.english_documents()[:64])]
    table = {"input_ids": rows, "labels": rows}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(table).save_to_disk(folder / "arrow" / "part-00000")
    return folder


def variables(hosts: int, **more: str) -> dict[str, str]:
    """The environment of `bash train.sh` in a workplace."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PRETRAINED_MODEL_PATH": "model",
        "DATASET": "arrow/part-00000",
        "NPROC_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "-1",
        **more,
    }
