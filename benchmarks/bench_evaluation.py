"""How fast questions are evaluated on this machine's CPUs, relative to one prompt at a time and to lm-eval.

    python benchmarks/bench_evaluation.py --work_dir /tmp/bench_evaluation --lm_eval_python ../lm-eval/bin/python

The model has the shape of SmolLM2-135M, a vocabulary of 32,000, and random weights. The questions are made up, in the
format of CMMLU with 5 examples, and in that of GSM8K with 8. An answer to the latter has 64 tokens: random weights
do not end one. "one at a time" is transformers alone: a forward pass for each question, `generate` for each answer.
lm-eval runs in the environment of --lm_eval_python, with the same prompts, threads and batches of 8. Everything is in
float32 and measured by turns, three times; medians are printed. Needs 4 GB.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import bench_inference  # noqa: E402
from inputs import add_smallest, benchmark_parser, make_folder, print_note  # noqa: E402

from colossal_llama2 import errors  # noqa: E402

NAMES = {"cmmlu": "questions after 5 examples", "gsm8k": "answers after 8 examples"}
BATCH_SIZE = 8
NOT_MEASURED = "-"


@dataclass(frozen=True)
class Size:
    """The model, the questions of a subject, the problems, the tokens of an answer, and how often all is measured."""

    model: bench_inference.Size = field(default_factory=bench_inference.Size)
    questions: int = 40
    problems: int = 16
    tokens: int = 64
    rounds: int = 3


SMALLEST = Size(bench_inference.SMALLEST, questions=4, problems=2, tokens=4, rounds=1)


def main() -> None:
    """Measure both tasks and print the ratios."""
    parser = benchmark_parser(__doc__)
    add_smallest(parser)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    parser.add_argument("--lm_eval_python", default=None, help="python of an environment with lm-eval (default: none)")
    args = parser.parse_args()
    folder = make_folder(parser, args.work_dir)
    size = SMALLEST if args.smallest else Size()
    try:
        print_note(args)
        with errors.one_line_errors("bench_evaluation.py"):
            ratios = measured(folder, size, args.lm_eval_python)
    finally:
        shutil.rmtree(folder)
    print(f"{'items per second, relative to':<40}{'one at a time':>15}{'lm-eval':>10}")
    for name, (alone, peer) in ratios.items():
        shown = [f"{statistics.median(values):.2f}" if values else NOT_MEASURED for values in (alone, peer)]
        print(f"{NAMES[name]:<40}{shown[0]:>15}{shown[1]:>10}")


def measured(folder: Path, size: Size, lm_eval_python: str | None) -> dict[str, tuple[list[float], list[float]]]:
    """For each task, the ratios of every round to one prompt at a time, and to lm-eval."""
    from colossal_llama2.evaluation import question_task
    from colossal_llama2.evaluation.sets.registry import FINAL_NUMBER, SETS
    from colossal_llama2.inference.loading import load_model
    from tests import evaluation_files, evaluation_peer

    bench_inference.make_model(folder / "model", size.model)
    evaluation_files.write_cmmlu(folder / "sets" / "cmmlu", size.questions)
    evaluation_files.write_gsm8k(folder / "sets" / "gsm8k", size.problems)
    question_task.NEW_TOKENS[FINAL_NUMBER] = size.tokens
    model, tokenizer = load_model(str(folder / "model"), "cpu", dtype="fp32")
    found: dict[str, tuple[list[float], list[float]]] = {}
    for name in NAMES:
        kind = SETS[name]
        questions = kind.read(folder / "sets" / name, kind.num_fewshot)
        task = question_task.QuestionTask(name, kind, questions, kind.num_fewshot)
        rows = task.prepare(model, tokenizer, str(folder / "model")).rows
        alone = one_at_a_time(model, [list(row.ids) for row in rows], size.tokens if name == "gsm8k" else 0)
        texts = evaluation_peer.texts_of(task, model, tokenizer, str(folder / "model"))
        ratios: tuple[list[float], list[float]] = ([], [])
        for _ in range(size.rounds):
            ours = timed(
                lambda task=task: evaluation_peer.our_records(task, model, tokenizer, str(folder / "model"), BATCH_SIZE)
            )
            ratios[0].append(timed(alone) / ours)
            if lm_eval_python:
                peer = peer_seconds(lm_eval_python, folder / "model", tokenizer, name, texts)
                ratios[1].append(peer / ours)
        found[name] = ratios
    return found


def timed(do: Callable[[], Any]) -> float:
    """The seconds that a call takes."""
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def one_at_a_time(model: Any, rows: list[list[int]], new_tokens: int) -> Callable[[], None]:
    """A function that computes every row by itself with transformers."""
    import torch

    def compute() -> None:
        with torch.no_grad():
            for row in rows:
                ids = torch.tensor([row])
                if new_tokens:
                    model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
                else:
                    model(ids, logits_to_keep=1)

    return compute


def peer_seconds(python: str, model: Path, tokenizer: Any, name: str, texts: list[tuple[str, str]]) -> float:
    """The seconds of lm-eval's model for the prompts of a task, without its start."""
    import torch

    from tests import evaluation_peer

    args = argparse.Namespace(
        model_path=model, threads=torch.get_num_threads(), batch_size=BATCH_SIZE, lm_eval_python=python
    )
    return float(evaluation_peer.ask_peer(args, tokenizer, {name: texts})[name]["seconds"])


if __name__ == "__main__":
    main()
