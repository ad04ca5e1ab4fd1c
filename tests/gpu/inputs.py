"""Make the models and the text that the parts of the run use, cut to what this machine's memory and disk hold."""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.parts import print_figures

TOKENIZER_PIECES = 1024
# Bytes of a parameter while it is trained in bf16: weight, gradient, float32 weight, two moments, and as much again as
# a float32 gradient, which the bare loop keeps. Bytes of an activation of a layer, for each token and channel.
TRAINED_BYTES, ACTIVATION_BYTES = 20, 34
# Bytes of a parameter in the two runs that save checkpoints.
SAVED_BYTES = 60
# Shares of what is free.
MEMORY_SHARE, DISK_SHARE = 0.6, 0.4
SHARD_BYTES = 2**30


@dataclass(frozen=True)
class Shape:
    """The shape of a LLaMA; `layers` of the `whole` model's are made."""

    hidden: int
    inner: int
    heads: int
    layers: int
    whole: int
    vocabulary: int = 32_000

    @property
    def layer_parameters(self) -> int:
        return 4 * self.hidden**2 + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + 2 * self.vocabulary * self.hidden + self.hidden


# 7B is that of LLaMA-2; 1.3B that of Sheared-LLaMA (Xia et al., arXiv 2310.06694).
SHAPES = {
    "1.3B": Shape(hidden=2048, inner=5504, heads=16, layers=24, whole=24),
    "7B": Shape(hidden=4096, inner=11_008, heads=32, layers=8, whole=32),
    "checkpointed": Shape(hidden=2048, inner=5504, heads=16, layers=4, whole=24),
}
SMALL = Shape(hidden=128, inner=256, heads=4, layers=2, whole=2, vocabulary=TOKENIZER_PIECES)


def main() -> None:
    """Write models/NAME, and documents/documents.jsonl, into the work folder."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.inputs", description=__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder to write into")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of a forward pass")
    parser.add_argument("--small", action="store_true", help="tiny models of two layers")
    args = parser.parse_args()
    tokenizer = write_text(args.work_dir)
    made = {}
    for name, shape in SHAPES.items():
        shape = SMALL if args.small else fitting(shape, args.work_dir, tokens=args.tokens)
        write_model(args.work_dir / "models" / name, shape, tokenizer)
        made[name] = {"layers": shape.layers, "whole": shape.whole, "parameters": shape.parameters}
    print_figures(models=made)


def write_text(work_dir: Path) -> Path:
    """Write documents and a tokenizer trained on them; returns the tokenizer's folder."""
    from colossal_llama2.encoding.from_text import train_vocabulary, write_tokenizer
    from colossal_llama2.train.selftest import python_documents

    documents, folder = python_documents(), work_dir / "documents"
    folder.mkdir()
    rows = (json.dumps({"target": document}) + "\n" for document in documents)
    (folder / "documents.jsonl").write_text("".join(rows), encoding="utf-8")
    tokenizer = work_dir / "tokenizer"
    tokenizer.mkdir()
    lines = (line for document in documents for line in document.splitlines() if line.strip())
    write_tokenizer(train_vocabulary(lines, TOKENIZER_PIECES), tokenizer)
    return tokenizer


def fitting(shape: Shape, work_dir: Path, *, tokens: int) -> Shape:
    """The shape with as many layers as can be trained in the device's free memory, and saved on the disk.

    An estimate of its own: the run measures what the dry run's forecast is worth. Raises SystemExit if not even one
    layer fits.
    """
    import torch

    memory = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    disk = shutil.disk_usage(work_dir).free
    for layers in range(shape.layers, 0, -1):
        cut = Shape(**{**vars(shape), "layers": layers})
        needed = TRAINED_BYTES * cut.parameters + ACTIVATION_BYTES * tokens * cut.hidden * layers
        if needed <= MEMORY_SHARE * memory and SAVED_BYTES * cut.parameters <= DISK_SHARE * disk:
            return cut
    raise SystemExit(f"not one layer fits: {memory:,} bytes of memory and {disk:,} bytes of disk are free")


def write_model(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """Write a LLaMA with random bfloat16 weights, one shard at a time, and the tokenizer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        torch_dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards(config)):
        file_name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)


def shards(config) -> Iterator[dict]:
    """The weights of a LLaMA by name, in pieces of at most SHARD_BYTES and one tensor."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).named_parameters()}
    # A CPU takes minutes for what a GPU draws in a second.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shard: dict = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
        shard[name] = (torch.ones_like(drawn) if len(shape) == 1 else drawn).cpu()
        if sum(2 * tensor.numel() for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


if __name__ == "__main__":
    main()
