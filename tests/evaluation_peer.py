"""Compares python -m colossal_llama2.evaluation with lm-eval on the same prompts, item by item.

    python -m tests.evaluation_peer --model_path MODEL --data_dir SETS --limit 40
    python -m tests.evaluation_peer ... --lm_eval_python ../lm-eval/bin/python

lm-eval's `hf` model gets the texts of our prompts: for a multiple-choice task the log-likelihoods of the four letters
(`loglikelihood`), for GSM8K the greedy answer (`generate_until`). Both compute in float32 on one CPU. Choices must be
equal for every question, differences of logits equal to 1e-4, and answers equal to the character.

lm-eval needs another PyTorch than ColossalAI, so it runs in an environment of its own:
pip install lm-eval torch transformers. Without one, the command prints so and ends with code 0.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CHOICE_TASK, ANSWER_TASK = "cmmlu", "gsm8k"
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
def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=tuple(pair), idx=place, metadata=("peer", place, 1))
        for place, pair in enumerate(arguments)
    ]
found = {}
start = time.monotonic()
if job["choices"]:
    results = model.loglikelihood(requests("loglikelihood", job["choices"]), disable_tqdm=True)
    found["choices"] = [value for value, _ in results]
found["choice_seconds"] = time.monotonic() - start
start = time.monotonic()
if job["answers"]:
    found["answers"] = model.generate_until(requests("generate_until", job["answers"]), disable_tqdm=True)
found["answer_seconds"] = time.monotonic() - start
json.dump(found, open(sys.argv[2], "w"))
"""


def main(argv: list[str] | None = None) -> int:
    """Print the comparison. Returns the exit code: 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation_peer", description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", type=Path, required=True, help="folder of a LLaMA model with its tokenizer")
    parser.add_argument("--data_dir", type=Path, required=True, help=f"folder with {CHOICE_TASK}/ and {ANSWER_TASK}/")
    parser.add_argument("--limit", type=int, default=None, help="most items of each task (default: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="of both (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    parser.add_argument("--tasks", default=f"{CHOICE_TASK},{ANSWER_TASK}", help="one or both")
    parser.add_argument("--lm_eval_python", default=sys.executable, help="python of the environment with lm-eval")
    args = parser.parse_args(argv)
    if not has_lm_eval(args.lm_eval_python):
        print(SKIPPED)
        return 0
    report = compare(args)
    for line in report["lines"]:
        print(line)
    return int(report["differs"])


def has_lm_eval(python: str) -> bool:
    """Whether an environment has lm-eval."""
    script = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lm_eval') is None)"
    return subprocess.run([python, "-c", script], capture_output=True).returncode == 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """What both find, and the lines of the report."""
    import torch

    from colossal_llama2.evaluation.settings import EvaluationSettings
    from colossal_llama2.evaluation.tasks import read_tasks
    from colossal_llama2.inference.loading import load_model

    torch.set_num_threads(args.threads)
    names = args.tasks.split(",")
    flags = {
        "model_path": [str(args.model_path)],
        "tasks": [(name, None) for name in names],
        "data_dir": str(args.data_dir),
        "num_fewshot": None,
        "limit": args.limit,
        "seed": 0,
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
    return judged(ours, theirs, seconds)


def our_records(task: Any, model: Any, tokenizer: Any, folder: str, batch_size: int) -> list[dict]:
    """Our records, by item."""
    from colossal_llama2.evaluation.compute import records_of

    found = [record for some in records_of(model, tokenizer, folder, task, batch_size=batch_size) for record in some]
    return sorted(found, key=lambda record: record["item"])


def texts_of(task: Any, model: Any, tokenizer: Any, folder: str) -> list[tuple[str, str]]:
    """For each item, its prompt and how a letter follows it: the texts whose ids our rows are."""
    prepared = task.prepare(model, tokenizer, folder)
    found = []
    for row, question in zip(prepared.rows, task._questions, strict=True):
        assert not row.notes["cut_tokens"], "a prompt is longer than the context; give a model with a longer one"
        examples = task._examples[question.subject][row.notes["dropped_examples"] :]
        choices = prepared._choices
        found.append(
            (task._kind.form.prompt(question, examples) + (choices.suffix if choices else ""), choices and choices.lead)
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
    choices = [(begin + text, lead + letter) for text, lead in prompts.get(CHOICE_TASK, ()) for letter in "ABCD"]
    limits = {"until": [NEXT_QUESTION], "max_gen_toks": NEW_TOKENS[FINAL_NUMBER], "do_sample": False}
    answers = [(begin + text, limits) for text, _ in prompts.get(ANSWER_TASK, ())]
    job = {
        "model": str(args.model_path.absolute()),
        "threads": args.threads,
        "batch_size": args.batch_size,
        "max_length": None,
        "add_bos": adds_mark,
        "choices": choices,
        "answers": answers,
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


def judged(ours: dict, theirs: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The lines of the report, and whether anything differs."""
    lines, differs = [], False
    if CHOICE_TASK in ours:
        records, values = ours[CHOICE_TASK], theirs["choices"]
        rows = [values[start : start + 4] for start in range(0, len(values), 4)]
        same = sum(record["choice"] == "ABCD"[row.index(max(row))] for record, row in zip(records, rows, strict=True))
        # Log-likelihoods are logits minus a constant of the row.
        worst = max(
            abs((one - record["logits"][0]) - (other - row[0]))
            for record, row in zip(records, rows, strict=True)
            for one, other in zip(record["logits"], row, strict=True)
        )
        speed = theirs["choice_seconds"] / seconds[CHOICE_TASK]
        lines.append(f"{CHOICE_TASK}: same choice for {same} of {len(records)}, logits differ by at most {worst:.1e}")
        lines.append(
            f"{CHOICE_TASK}: {seconds[CHOICE_TASK]:.1f} s, lm-eval {theirs['choice_seconds']:.1f} s: {speed:.2f}"
        )
        differs |= same < len(records) or worst > TOLERANCE
    if ANSWER_TASK in ours:
        records, texts = ours[ANSWER_TASK], theirs["answers"]
        same = sum(record["text"].strip() == text.strip() for record, text in zip(records, texts, strict=True))
        speed = theirs["answer_seconds"] / seconds[ANSWER_TASK]
        lines.append(f"{ANSWER_TASK}: same answer to {same} of {len(records)}")
        pairs = [(record["text"].strip(), text.strip()) for record, text in zip(records, texts, strict=True)]
        for number, (our_text, their_text) in enumerate(pairs):
            if our_text != their_text:
                place = next(
                    (n for n, pair in enumerate(zip(our_text, their_text, strict=False)) if pair[0] != pair[1]),
                    min(len(our_text), len(their_text)),
                )
                lines.append(f"  {number}: at {place}: {our_text[place:][:40]!r}, lm-eval {their_text[place:][:40]!r}")
        lines.append(
            f"{ANSWER_TASK}: {seconds[ANSWER_TASK]:.1f} s, lm-eval {theirs['answer_seconds']:.1f} s: {speed:.2f}"
        )
        differs |= same < len(records)
    return {"lines": lines, "differs": differs, "ours": ours, "theirs": theirs, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
