"""Ask the models that training writes in other programs: transformers, lm-eval, CTranslate2, llama.cpp and vLLM.

    python -m tests.clients                                    every client, with both kinds of tokenizer
    python -m tests.clients --clients ctranslate2 llama_cpp    some of them
    python -m tests.clients --work_dir ../clients              keeps the two models and what clients write

Two tiny models learn 20 questions with train_sft.py (tests/sft_answers.py): one with a SentencePiece tokenizer and the
chat template colossal, one with a byte-level BPE and a template of its own. Each client gets the modeling/ folder as it
is, and is compared with training: answers word for word, ids of prompts and of Chinese and English texts, and logits in
float32. The command ends with 1 if one of them differs where docs/inference.md does not state it.

A client runs in an environment of its own, which is made in --environments from requirements/clients/ and kept. "own"
and "transformers" of the suite's version run in this one.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from colossal_llama2 import errors
from colossal_llama2.errors import RunError
from colossal_llama2.tables import print_table
from tests.clients import environments, models
from tests.clients.comparing import Comparison, compare
from tests.clients.exchange import Found

ROOT = environments.ROOT
# Nothing is looked up or reported elsewhere.
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class Client(NamedTuple):
    """A program that reads a model's folder.

    Attributes:
        environment: its name in requirements/clients/; None for this one.
        module, function: in this package, what asks it.
        kinds: the models that it is asked with.
        known: the models with which it is known to differ, as docs/inference.md states.
    """

    environment: str | None
    module: str
    function: str = "ask"
    kinds: tuple[str, ...] = models.KINDS
    known: tuple[str, ...] = ()


CLIENTS = {
    "suite": Client(None, "ask_transformers"),
    "transformers": Client("transformers", "ask_transformers"),
    "lm_eval": Client("lm_eval", "ask_lm_eval"),
    "ctranslate2": Client("ctranslate2", "ask_ctranslate2"),
    "llama_cpp": Client("llama_cpp", "ask_llama_cpp", known=(models.SENTENCEPIECE,)),
    "llama_cpp_without_prefix": Client(
        "llama_cpp", "ask_llama_cpp", "ask_without_prefix", kinds=(models.SENTENCEPIECE,)
    ),
    "vllm": Client("vllm", "ask_vllm"),
}
HEAD = ("client", "tokenizer", "answers right", "prompts with other ids", "texts with other ids", "logits differ by")


def ask(client: str, job: Path, folder: Path, home: Path) -> Found:
    """What a client finds, asked in its environment.

    Raises:
        RunError: it fails.
    """
    chosen = CLIENTS[client]
    python = environments.python_of(chosen.environment, home) if chosen.environment else Path(sys.executable)
    # What an earlier run converted.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    asked = ["-m", "tests.clients.worker", chosen.module, chosen.function]
    words = [str(python), *asked, str(job.resolve()), str(folder.resolve())]
    log = folder / "log"
    with log.open("w") as file:
        code = subprocess.run(words, cwd=ROOT, env=OFFLINE, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise RunError(f"{client} ended with exit code {code}: {log.read_text(errors='replace')[-3000:]}")
    return Found.read(folder)


def row(client: str, kind: str, count: int, found: Comparison, texts: int) -> list[str]:
    """A line of the table."""
    others = "-" if found.other_texts is None else f"{found.other_texts} of {texts}"
    right = f"{count - len(found.wrong)} of {count}"
    difference = f"{found.difference:.1e}" + (f" ({found.compared} of {count})" if found.compared < count else "")
    return [client, kind, right, f"{found.other_prompts} of {count}", others, difference]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__.splitlines()[0])
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS), metavar="CLIENT")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-clients", metavar="DIR")
    parser.add_argument(
        "--work_dir", type=Path, metavar="DIR", help="keep the models here, and use those that are there"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; exit with 1 if a client differs."""
    args = parse(argv)
    rows: list[list[str]] = [list(HEAD)]
    lines: list[str] = []
    is_equal = True
    with ExitStack() as stack:
        work = args.work_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind in models.KINDS:
            model = models.read_model(models.train_model(work / kind, kind))
            own = sum(one == other for one, other in zip(model.own_answers, model.job.answers, strict=True))
            rows.append(["inference_example.py", kind, f"{own} of {models.QUESTIONS}"])
            job = work / kind / "job.json"
            model.job.write(job)
            for client in [name for name in args.clients if kind in CLIENTS[name].kinds]:
                found = ask(client, job, work / kind / client, args.environments)
                result = compare(model, found)
                versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
                rows.append(row(versions, kind, models.QUESTIONS, result, len(model.job.texts)))
                lines += [f"{client}, {kind}: {line}" for line in [*found.notes, *result.wrong]]
                is_equal = is_equal and (result.is_equal or kind in CLIENTS[client].known)
                print(f"{client}, {kind}: {rows[-1][2]} answers right", file=sys.stderr)
    print_table(rows)
    print(*lines, sep="\n")
    sys.exit(0 if is_equal else 1)


if __name__ == "__main__":
    with errors.one_line_errors("tests.clients"):
        main()
