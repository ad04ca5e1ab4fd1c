"""init_model.py compared with a file copy, in time and memory, on a checkpoint of LLaMA-2-7B's shapes.

    python benchmarks/bench_init_model.py --work_dir /tmp/bench_init_model

The checkpoint has 4 of the 32 layers: hidden size 4096, fp16, sharded, with a real tokenizer of 32,000 pieces that is
extended to 69,104. All times are medians of 3, measured in turns, and all of them end when the bytes are on the disk.
The input is in the page cache. Needs 11 GB in --work_dir, which are removed at the end, and requirements-dev.txt.

- The copy is shutil.copyfile of each file, which copies inside the kernel, then fsync of each.
- Time is that of init_model(), called in a separate process after its imports; the complete command, including
  interpreter and imports, has its own line.
- Memory is the anonymous memory of that process (RssAnon, read 500 times a second from outside), less what it has
  after its imports: what was allocated, without the pages of mapped files, which the system can drop at any time.
- The original grows a matrix by one numpy.concatenate for each new row. At full size that copies 61 TB, so it is
  compared on an eighth of the rows and of the columns: there it only works in memory, ours writes and syncs a file.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inputs import add_smallest, benchmark_parser, make_folder, package_folder, print_note  # noqa: E402

from colossal_llama2 import errors  # noqa: E402

OLD_ROWS, SHARDS = 32_000, 3
SMALL = 8
CHILD = """
import sys, time
import google.protobuf, numpy, safetensors, sentencepiece, torch
from colossal_llama2.model.init_model import InitModelSettings, init_model
print("imported", flush=True)
sys.stdin.readline()
start = time.perf_counter()
init_model(InitModelSettings(*sys.argv[1:]))
print("seconds", time.perf_counter() - start, flush=True)
"""


@dataclass(frozen=True)
class Size:
    """The shapes of the checkpoint, the rows of its embeddings when it is extended, and how often all is run."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 4
    heads: int = 32
    new_rows: int = 69_104
    rounds: int = 3


SMALLEST = Size(hidden=64, intermediate=128, layers=1, heads=4, new_rows=32_064, rounds=1)


def main() -> None:
    """Make the inputs, measure, print the ratios, remove everything."""
    parser = benchmark_parser(__doc__)
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="new folder for 11 GB of files, removed at the end"
    )
    add_smallest(parser)
    args = parser.parse_args()
    size = SMALLEST if args.smallest else Size()
    with errors.one_line_errors(parser.prog):
        tokenizer, words = (package_folder(name) for name in ("mistral_common", "jieba"))
        work = make_folder(parser, args.work_dir)
        try:
            print_note(args)
            make_source(work / "source", tokenizer / "data" / "tokenizer.model.v1", size)
            make_target_tokenizer(work / "source", work / "tokenizer", words / "dict.txt", size.new_rows)
            print_table(measure(work, size))
        finally:
            shutil.rmtree(work)


def make_source(folder: Path, tokenizer: Path, size: Size) -> None:
    """A sharded checkpoint of random numbers with a real tokenizer."""
    import numpy
    from safetensors.numpy import save_file

    from colossal_llama2.encoding.from_text import write_tokenizer

    folder.mkdir()
    write_tokenizer(tokenizer.read_bytes(), folder)
    block = numpy.random.default_rng(0).standard_normal(2**22, dtype=numpy.float32).astype(numpy.float16)
    shapes = list(tensor_shapes(size).items())
    per_shard = -(-len(shapes) // SHARDS)
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = dict(shapes[shard * per_shard : (shard + 1) * per_shard])
        save_file({key: numpy.resize(block, shape) for key, shape in part.items()}, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": OLD_ROWS,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


def tensor_shapes(size: Size) -> dict:
    """Name to shape of every tensor, in the order of the model."""
    hidden, inner = size.hidden, size.intermediate
    shapes = {"model.embed_tokens.weight": (OLD_ROWS, hidden)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        shapes.update({f"{prefix}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"})
        shapes.update({f"{prefix}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")})
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, inner)
        shapes.update({f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")})
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (OLD_ROWS, hidden)}


def make_target_tokenizer(source: Path, target: Path, word_list: Path, rows: int) -> None:
    """Extend the tokenizer by the most frequent words of jieba and their characters, to exactly `rows` pieces."""
    from colossal_llama2.encoding.bpe_model import read_model
    from colossal_llama2.encoding.registry import load_encoder
    from colossal_llama2.tokenizer.init_tokenizer import ExtensionSettings, expand_tokenizer

    known = {piece.piece for piece in read_model(source).pieces}
    words = [line.split() for line in word_list.read_text(encoding="utf-8").splitlines()]
    pieces: dict = {}
    for word, *_ in sorted(words, key=lambda word: -int(word[1])):
        closed = dict.fromkeys(piece for piece in (*word, word) if piece not in known and piece not in pieces)
        if len(word) > 1 and len(pieces) + len(closed) <= rows - OLD_ROWS:
            pieces.update(closed)
    file = target.with_suffix(".jsonl")
    file.write_text("".join(json.dumps({"piece": piece}) + "\n" for piece in pieces), encoding="utf-8")
    # What closure adds beyond these would only change the number of rows.
    with contextlib.redirect_stdout(sys.stderr):
        expand_tokenizer(ExtensionSettings(source, target, file, closure="off"))
    assert load_encoder(target).vocab_size == rows, load_encoder(target).vocab_size


def measure(work: Path, size: Size) -> list:
    """Rows of the table: name, value, target."""
    arguments = [work / "source", work / "tokenizer", work / "target"]
    run_init(arguments)
    os.rename(work / "target", work / "pattern")
    times: dict = {"copy": [], "init": [], "command": []}
    peaks = []
    for _ in range(size.rounds):
        times["copy"].append(copy_folder(work / "pattern", work / "copy"))
        shutil.rmtree(work / "copy")
        seconds, peak = run_init(arguments)
        shutil.rmtree(work / "target")
        start = time.perf_counter()
        run_command(arguments)
        times["command"].append(time.perf_counter() - start)
        shutil.rmtree(work / "target")
        times["init"].append(seconds)
        peaks.append(peak)
    copy, init, command = (statistics.median(times[name]) for name in ("copy", "init", "command"))
    spread = max(times["copy"]) / min(times["copy"])
    matrices = 2 * size.new_rows * size.hidden * 2
    small = f"{OLD_ROWS // SMALL:,} -> {size.new_rows // SMALL:,} x {size.hidden // SMALL}"
    return [
        ("time / time to copy the same bytes", init / copy, "<= 1.5"),
        ("time of the whole command / the same", command / copy, ""),
        ("slowest copy / fastest copy (noise)", spread, ""),
        ("peak anonymous memory / the two new matrices", max(peaks) / matrices, "<= 2"),
        (f"one concatenate per row / ours, {small}", concatenate_ratio(work, size), ""),
    ]


def run_init(arguments: list) -> tuple:
    """Seconds of init_model() in a separate process, and its peak of anonymous bytes beyond those after imports."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "imported\n"
    base = peak = anonymous_bytes(child.pid)
    child.stdin.write("go\n")
    child.stdin.flush()
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.002)
    assert child.returncode == 0
    last = child.stdout.read().splitlines()[-1]
    return float(last.split()[1]), peak - base


def anonymous_bytes(process: int) -> int:
    """RssAnon of a process; 0 if it has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def run_command(arguments: list) -> None:
    """init_model.py as a user runs it."""
    flags = ("--source_model_and_tokenizer_path", "--target_tokenizer_path", "--target_model_path")
    words = [str(word) for pair in zip(flags, arguments, strict=True) for word in pair]
    subprocess.run([sys.executable, str(ROOT / "init_model.py"), *words], check=True, stdout=subprocess.DEVNULL)


def copy_folder(source: Path, target: Path) -> float:
    """Seconds to copy every file of a folder with shutil, and then to sync them."""
    start = time.perf_counter()
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
    for path in sorted(source.iterdir()):
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def concatenate_ratio(work: Path, size: Size) -> float:
    """Time of the original's loop over one float32 matrix in memory, over ours from file to synced file."""
    import numpy
    from safetensors.numpy import load_file, save_file

    from colossal_llama2.model.safetensors_stream import Change, read_shard, write_shard
    from colossal_llama2.storage.files import sync

    old, new, hidden = OLD_ROWS // SMALL, size.new_rows // SMALL, size.hidden // SMALL
    generator = numpy.random.default_rng(0)
    matrix = generator.standard_normal((old, hidden), dtype=numpy.float32)
    bags = [generator.integers(old, size=count).tolist() for count in generator.integers(2, 7, size=new - old)]
    save_file({"matrix": matrix}, work / "small.safetensors")

    ours, original = [], []
    for _ in range(size.rounds):
        # write_shard never writes over a file.
        (work / "grown.safetensors").unlink(missing_ok=True)
        start = time.perf_counter()
        write_shard(
            read_shard(work / "small.safetensors"),
            work / "grown.safetensors",
            Change(("matrix",), kept=old, bags=bags),
            lambda count: None,
        )
        sync(work / "grown.safetensors")
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        grown = matrix
        for bag in bags:
            grown = numpy.concatenate((grown, matrix[bag].mean(0, keepdims=True)), axis=0)
        original.append(time.perf_counter() - start)
    numpy.testing.assert_allclose(load_file(work / "grown.safetensors")["matrix"], grown, rtol=1e-5, atol=1e-6)
    return statistics.median(original) / statistics.median(ours)


def print_table(rows: list) -> None:
    """Aligned, ratios only."""
    for name, value, target in rows:
        print(f"{name:<64}{value:>8.2f}  {target}")


if __name__ == "__main__":
    main()
