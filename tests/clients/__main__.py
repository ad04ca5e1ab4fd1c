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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from colossal_llama2 import errors
from colossal_llama2.errors import RunError
from colossal_llama2.tables import print_table
from tests.clients import environments, models
from tests.clients.comparing import Comparison, compare
from tests.clients.exchange import Found

ROOT = environments.ROOT
# The module that asks each, and whether it has an environment of its own.
CLIENTS = {
    "suite": ("transformers", False),
    "transformers": ("transformers", True),
    "lm_eval": ("lm_eval", True),
    "ctranslate2": ("ctranslate2", True),
    "llama_cpp": ("llama_cpp", True),
    "vllm": ("vllm", True),
}
HEAD = ("client", "tokenizer", "answers right", "prompts with other ids", "texts with other ids", "logits differ by")


def ask(client: str, job: Path, folder: Path, home: Path) -> Found:
    """What a client finds, asked in its environment.

    Raises:
        RunError: it fails.
    """
    module, has_environment = CLIENTS[client]
    python = environments.python_of(client, home) if has_environment else Path(sys.executable)
    folder.mkdir(parents=True, exist_ok=True)
    words = [str(python), "-m", "tests.clients.worker", module, str(job.resolve()), str(folder.resolve())]
    log = folder / "log"
    with log.open("w") as file:
        code = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise RunError(f"{client} ended with exit code {code}: {log.read_text(errors='replace')[-3000:]}")
    return Found.read(folder)


def row(client: str, kind: str, count: int, found: Comparison, texts: int) -> list[str]:
    """A line of the table."""
    others = "-" if found.other_texts is None else f"{found.other_texts} of {texts}"
    right = f"{count - len(found.wrong)} of {count}"
    return [client, kind, right, f"{found.other_prompts} of {count}", others, f"{found.difference:.1e}"]


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
        for kind in (models.SENTENCEPIECE, models.BYTE_LEVEL):
            model = models.read_model(models.train_model(work / kind, kind))
            own = sum(one == other for one, other in zip(model.own_answers, model.job.answers, strict=True))
            rows.append(["inference_example.py", kind, f"{own} of {models.QUESTIONS}"])
            job = work / kind / "job.json"
            model.job.write(job)
            for client in args.clients:
                found = ask(client, job, work / kind / client, args.environments)
                result = compare(model, found)
                versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
                rows.append(row(versions, kind, models.QUESTIONS, result, len(model.job.texts)))
                lines += [f"{client}, {kind}: {line}" for line in [*found.notes, *result.wrong]]
                is_equal = is_equal and result.is_equal
                print_table([rows[0], rows[-1]])
    print_table(rows)
    print(*lines, sep="\n")
    sys.exit(0 if is_equal else 1)


if __name__ == "__main__":
    with errors.one_line_errors("tests.clients"):
        main()
