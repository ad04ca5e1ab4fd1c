"""Compares python -m colossal_llama2.evaluation with lm-eval on the same prompts, item by item.

    python -m tests.evaluation_peer --model_path MODEL --data_dir SETS --tasks cmmlu,gaokao,gsm8k --limit 40
    python -m tests.evaluation_peer ... --lm_eval_python ../lm-eval/bin/python

lm-eval's `hf` model gets the texts of our prompts: for a multiple-choice task the log-likelihoods of the four letters
(`loglikelihood`), for GSM8K the greedy answer (`generate_until`). Both compute in float32 on one CPU. Choices must be
equal for every question, differences of logits equal to 1e-4, and answers equal to the character but for white space
at their ends. Of AGIEval, the logits are compared, which are one part of its combined metric.

lm-eval needs another PyTorch than ColossalAI, so it runs in an environment of its own:
pip install -r requirements/clients/lm_eval.txt. Without one, the command prints so and ends with code 0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from colossal_llama2.task_names import SET_NAMES  # noqa: E402

ANSWER_TASK = "gsm8k"
TOLERANCE = 1e-4
SKIPPED = "skipped: lm-eval is not installed"
# Runs in lm-eval's environment: reads requests, and writes what lm-eval's model returns for them.
PEER = """
import json, sys, time
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

job = json.load(open(sys.argv[1]))
torch.set_num_threads(job["threads"])
model = HFLM(
    pretrained=job["model"], device="cpu", dtype="float32", batch_size=job["batch_size"],
    max_length=job["max_length"], add_bos_token=job["add_bos"],
)
found = {}
for name, (kind, arguments) in job["requests"].items():
    requests = [
        Instance(request_type=kind, doc={}, arguments=tuple(pair), idx=place, metadata=(name, place, 1))
        for place, pair in enumerate(arguments)
    ]
    start = time.monotonic()
    results = getattr(model, kind)(requests, disable_tqdm=True)
    seconds = time.monotonic() - start
    found[name] = {"results": [value[0] if kind == "loglikelihood" else value for value in results], "seconds": seconds}
json.dump(found, open(sys.argv[2], "w"))
"""


@dataclass(frozen=True)
class Asked:
    """A task, its prompts and what both found.

    Attributes:
        texts: for each item, the prompt and what stands before a letter; None for one that needs an answer.
        records: ours, by item.
        results: lm-eval's: the log-likelihoods of A to D of each item, or its answer.
        seconds: ours, and lm-eval's.
    """

    name: str
    texts: list[tuple[str, str | None]]
    records: list[dict]
    results: list[Any]
    seconds: tuple[float, float]


def main(argv: list[str] | None = None) -> int:
    """Print the comparison. Returns the exit code: 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation_peer", description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", type=Path, required=True, help="folder of a LLaMA model with its tokenizer")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--limit", type=int, default=None, help="most items of each task (default: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="of both (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--tasks", type=set_names, default="cmmlu,gsm8k", help="names of sets (default: %(default)s)")
    parser.add_argument("--lm_eval_python", default=sys.executable, help="python of the environment with lm-eval")
    args = parser.parse_args(argv)
    if not has_lm_eval(args.lm_eval_python):
        print(SKIPPED)
        return 0
    differs = False
    rows = [["task", "items", "ours", "error", "lm-eval", "error", "equal", "logits", "speed"]]
    for asked in compare(args):
        row, is_equal = compared(asked)
        rows.append(row)
        differs |= not is_equal
    from colossal_llama2.tables import print_table

    print_table(rows)
    print("speed: items per second relative to lm-eval; logits: the largest difference")
    return int(differs)


def has_lm_eval(python: str) -> bool:
    """Whether an environment has lm-eval."""
    script = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    return subprocess.run([python, "-c", script], capture_output=True).returncode == 0


def compare(args: argparse.Namespace) -> list[Asked]:
    """What both find for each task."""
    import torch

    from colossal_llama2.evaluation.settings import EvaluationSettings
    from colossal_llama2.evaluation.tasks import read_tasks
    from colossal_llama2.inference.loading import load_model

    torch.set_num_threads(args.threads)
    flags = {
        "model_path": [str(args.model_path)],
        "tasks": [(name, None) for name in args.tasks],
        "data_dir": str(args.data_dir),
        "num_fewshot": None,
        "limit": args.limit,
        "seed": None,
        "device": "cpu",
        "dtype": "fp32",
        "batch_size": 0,
        "output_file": None,
        "write_card": False,
        "by_subject": False,
    }
    model, tokenizer = load_model(str(args.model_path), "cpu", dtype="fp32")
    ours, prompts, seconds = {}, {}, {}
    settings = EvaluationSettings.from_flags(flags)
    for task in read_tasks(settings.tasks, num_fewshot=settings.num_fewshot, limit=settings.limit, seed=settings.seed):
        prompts[task.name] = texts_of(task, model, tokenizer, str(args.model_path))
        start = time.monotonic()
        ours[task.name] = our_records(task, model, tokenizer, str(args.model_path), args.batch_size)
        seconds[task.name] = time.monotonic() - start
    theirs = ask_peer(args, tokenizer, prompts)
    return [
        Asked(name, texts, ours[name], theirs[name]["results"], (seconds[name], theirs[name]["seconds"]))
        for name, texts in prompts.items()
    ]


def our_records(task: Any, model: Any, tokenizer: Any, folder: str, batch_size: int) -> list[dict]:
    """Our records, by item."""
    from colossal_llama2.evaluation.compute import records_of

    found = [record for some in records_of(model, tokenizer, folder, task, batch_size=batch_size) for record in some]
    return sorted(found, key=lambda record: record["item"])


def texts_of(task: Any, model: Any, tokenizer: Any, folder: str) -> list[tuple[str, str | None]]:
    """For each item, its prompt and how a letter follows it: the texts whose ids our rows are."""
    items = task.prepare(model, tokenizer, folder)._items
    found = []
    for row, question in zip(items.rows, task._questions, strict=True):
        assert not row.notes["cut_tokens"], "a prompt is longer than the context; give a model with a longer one"
        examples = task._examples[question.subject][row.notes["dropped_examples"] :]
        choices = items.choices
        found.append(
            (
                task._kind.form.prompt(question, examples) + (choices.suffix if choices else ""),
                choices.lead if choices else None,
            )
        )
    return found


def ask_peer(args: argparse.Namespace, tokenizer: Any, prompts: dict) -> dict[str, Any]:
    """What lm-eval's model returns."""
    from colossal_llama2.evaluation.question_task import NEW_TOKENS
    from colossal_llama2.evaluation.sets.gsm8k import NEXT_QUESTION
    from colossal_llama2.evaluation.sets.registry import FINAL_NUMBER
    from colossal_llama2.inference.prompts import first_mark

    # Where the tokenizer does not put the mark in front itself, the text does.
    mark = first_mark(tokenizer)
    adds_mark = mark is not None and tokenizer("a")["input_ids"][:1] == [mark]
    begin = "" if mark is None or adds_mark else tokenizer.convert_ids_to_tokens(mark)
    limits = {"until": [NEXT_QUESTION], "max_gen_toks": NEW_TOKENS[FINAL_NUMBER], "do_sample": False}
    requests: dict[str, tuple[str, list]] = {}
    for name, texts in prompts.items():
        if name == ANSWER_TASK:
            requests[name] = ("generate_until", [(begin + text, limits) for text, _ in texts])
        else:
            pairs = [(begin + text, lead + letter) for text, lead in texts for letter in "ABCD"]
            requests[name] = ("loglikelihood", pairs)
    job = {
        "model": str(args.model_path.absolute()),
        "threads": args.threads,
        "batch_size": args.batch_size,
        "max_length": None,
        "add_bos": adds_mark,
        "requests": requests,
    }
    with tempfile.TemporaryDirectory() as folder:
        script, request, result = (Path(folder) / name for name in ("peer.py", "request.json", "result.json"))
        script.write_text(PEER)
        request.write_text(json.dumps(job))
        environment = {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": folder}
        command = [args.lm_eval_python, script, request, result]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"lm-eval failed: {done.stderr[-3000:]}")
        return json.loads(result.read_text())


def compared(asked: Asked) -> tuple[list[str], bool]:
    """The row of a task, and whether both agree. Answers that differ are printed."""
    from colossal_llama2.evaluation.sets.gsm8k import final_number

    records, worst = asked.records, 0.0
    if asked.name == ANSWER_TASK:
        pairs = [(record["text"].strip(), text.strip()) for record, text in zip(records, asked.results, strict=True)]
        same = sum(ours == theirs for ours, theirs in pairs)
        for number, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                print(f"{asked.name} {number}: {ours!r}, lm-eval {theirs!r}")
        right = [record["is_correct"] for record in records]
        their_right = [
            str(final_number(text)) == record["answer"] for (_, text), record in zip(pairs, records, strict=True)
        ]
    else:
        rows = [asked.results[start : start + 4] for start in range(0, len(asked.results), 4)]
        choices = ["ABCD"[row.index(max(row))] for row in rows]
        same = sum(record["choice"] == choice for record, choice in zip(records, choices, strict=True))
        # Log-likelihoods are logits minus a constant of the row.
        worst = max(
            abs((one - record["logits"][0]) - (other - row[0]))
            for record, row in zip(records, rows, strict=True)
            for one, other in zip(record["logits"], row, strict=True)
        )
        right = [record["choice"] == record["answer"] for record in records]
        their_right = [choice == record["answer"] for record, choice in zip(records, choices, strict=True)]
    # lm-eval is not asked for AGIEval's answers.
    speed = "" if asked.name == "agieval" else f"{asked.seconds[1] / asked.seconds[0]:.2f}"
    logits = "" if asked.name == ANSWER_TASK else f"{worst:.1e}"
    cells = [asked.name, str(len(records)), *share(right), *share(their_right), f"{same} of {len(records)}", logits]
    return [*cells, speed], same == len(records) and worst <= TOLERANCE


def share(right: list[bool]) -> tuple[str, str]:
    """The share of right items and its standard error."""
    from colossal_llama2.evaluation.results import share_of

    score = share_of(sum(right), len(right))
    return f"{score.value:.1%}", "" if score.error is None else f"{score.error:.1%}"


def set_names(text: str) -> list[str]:
    """Names of sets of questions."""
    names = text.split(",")
    if unknown := set(names) - set(SET_NAMES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} given, {', '.join(SET_NAMES)} allowed")
    return names


if __name__ == "__main__":
    sys.exit(main())
