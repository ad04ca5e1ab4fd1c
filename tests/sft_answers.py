"""Fine-tune a tiny model under each plugin until it answers questions word for word, and ask it as a user does.

    python -m tests.sft_answers                                     every case
    python -m tests.sft_answers --cases zero2 "gemini"              some of them
    python -m tests.sft_answers --questions 4 --template chatml     fewer questions, another template

The questions and answers are from chatterbot-corpus, half of them Chinese, half English. Each case runs
prepare_sft_dataset.py, train_sft.py on two CPU ranks and inference_example.py, which gets no flag about the form of
prompts: it must find that in the model's folder. "resumed" has NEFTune, accumulates 8 micro batches, and is resumed in
the middle. "lora" trains an adapter on a model that has learned other questions, and asks the merged model.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from colossal_llama2.dataset.write.prepare import prepare_sft
from colossal_llama2.model.merge_lora import MergeSettings, merge_lora
from tests import fork_server, layouts, tiny
from tests.byte_level import make_byte_level
from tests.preparing import settings, write_lines

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 30
BATCH = 8
EPOCHS = 90
RATE = 4e-3


class Case(NamedTuple):
    """A training run: a layout of tests/layouts.py, and how it differs from one run without interruption.

    Attributes:
        batch: conversations of an optimizer step.
        has_adapter: trains an adapter on a model that has learned other questions.
    """

    layout: str
    flags: tuple[str, ...] = ()
    accumulation_steps: int = 1
    is_resumed: bool = False
    batch: int = BATCH
    rate: float = RATE
    has_adapter: bool = False


CASES = {
    "zero2": Case("fp32 zero2"),
    "zero2_cpu": Case("fp32 zero2_cpu"),
    "ddp": Case("fp32 ddp"),
    "gemini": Case("bf16 gemini"),
    "gemini_auto": Case("bf16 gemini_auto"),
    "3d": Case("fp32 3d"),
    "3d tp2": Case("fp32 3d tp2"),
    "3d pp2": Case("fp32 3d pp2"),
    # One micro batch has one conversation, on two ranks.
    "resumed": Case("fp32 zero2", ("--use_neft", "--neft_alpha", "1"), accumulation_steps=8, is_resumed=True, batch=16),
    "lora": Case("fp32 zero2", ("--lora_rank", "32"), rate=1e-2, has_adapter=True),
}


def questions(count: int, *, are_others: bool = False) -> list[tuple[str, str]]:
    """Short questions with their answers, by turns Chinese and English; no question is asked twice.

    With `are_others`, they are as many other questions.
    """
    import yaml

    found: dict[str, dict[str, str]] = {"chinese": {}, "english": {}}
    for language, pairs in found.items():
        files = [file.locate() for file in metadata.files("chatterbot-corpus") if file.match(f"data/{language}/*.yml")]
        for file in sorted(files):
            for turns in yaml.safe_load(Path(file).read_bytes())["conversations"]:
                question, answer = (str(turn).strip() for turn in turns[:2])
                if len(question) <= LONGEST and 0 < len(answer) <= LONGEST and question not in pairs:
                    pairs[question] = answer
    chosen = []
    for pairs in found.values():
        step = len(pairs) // (count // 2)
        chosen.append(list(pairs.items())[step // 2 if are_others else 0 :: step][: count // 2])
    return [pair for both in zip(*chosen, strict=True) for pair in both]


def prepare(folder: Path, tokenizer: Path, pairs: Sequence[tuple[str, str]], template: str) -> str:
    """Write the questions as conversations, and prepare them as one bin."""
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    write_lines(folder / "in" / "rows.jsonl", rows)
    prepare_sft(**settings([folder / "in"], tokenizer, folder, max_length=256, chat_template=template))
    return str(folder / "arrow" / "part-00000")


def train(folder: Path, model: Path, part: str, case: Case, *, epochs: int) -> Path:
    """Run train_sft.py, and return the folder of the model that it wrote."""
    words = ["--pretrained", model, "--dataset", part, "--max_length", 256, "--lr", case.rate]
    words += ["--num_epochs", epochs]
    words += ["--save_dir", folder / "run", "--tensorboard_dir", folder / "tb", "--config_file", folder / "config.json"]
    batch = layouts.flags(case.layout, batch=case.batch, accumulation_steps=case.accumulation_steps)
    words += [*batch, *case.flags, "--save_interval", 20, "--skip_save_each_epoch", "--weight_decay", 0]
    _, _, name = case.layout.partition(" ")
    ranks = layouts.LAYOUTS[case.layout.partition(" ")[0]][name].ranks
    if case.is_resumed:
        # Saved at step 40, and killed some steps later, as far as the resumed run can tell.
        _run("train_sft.py", *words, "--max_steps", 40, ranks=ranks)
        words += ["--resume", "auto"]
    _run("train_sft.py", *words, ranks=ranks)
    return folder / "run" / "modeling"


def ask(model: Path, rows: Path) -> list[tuple[str, str, str]]:
    """Each question, its answer in the file, and that of inference_example.py without a flag for the prompt."""
    output = rows.with_name("answers.jsonl")
    words = ["--model_path", model, "--do_sample", "False", "--input_file", rows, "--output_file", output]
    _run("inference_example.py", *words)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return [(record["messages"][-1]["content"], record["reference"], record["answer"]) for record in records]


def _run(script: str, *words: object, ranks: int = 0) -> str:
    """What a script prints. Raises SystemExit with its errors if it fails."""
    process = fork_server.run([ROOT / script, *words], ranks=ranks, timeout=900)
    if process.returncode:
        raise SystemExit(f"{script} ended with exit code {process.returncode}: {process.stderr[-3000:]}")
    return process.stdout


def trained_model(
    folder: Path,
    case: Case,
    model: Path,
    tokenizer: Path,
    pairs: Sequence[tuple[str, str]],
    *,
    template: str,
    epochs: int = EPOCHS,
) -> Path:
    """The folder of what a model with this tokenizer becomes by training on the questions."""
    if case.has_adapter:
        other = prepare(folder / "others", tokenizer, questions(len(pairs), are_others=True), template)
        model = train(folder / "others", model, other, CASES["zero2"], epochs=epochs)
    trained = train(folder, model, prepare(folder / "data", tokenizer, pairs, template), case, epochs=epochs)
    if not case.has_adapter:
        return trained
    merge_lora(MergeSettings(str(model), str(trained), str(folder / "merged")))
    return folder / "merged"


def wrong_answers(folder: Path, case: Case, *, count: int, template: str, epochs: int = EPOCHS) -> list[str]:
    """The questions that a case answers otherwise than it was trained to, with the answers."""
    if template == "colossal" or template == "llama2":
        tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    else:
        tokenizer = make_byte_level(folder / "tokenizer")
    pairs = questions(count)
    model = tiny.make_model(folder / "model", tokenizer, heads=8)
    trained = trained_model(folder, case, model, tokenizer, pairs, template=template, epochs=epochs)
    asked = ask(trained, folder / "data" / "in" / "rows.jsonl")
    assert [(question, answer) for question, answer, _ in asked] == pairs
    # llama2 writes a space on both sides of an answer.
    return [
        f"{question!r}: {found!r}, not {answer!r}" for question, answer, found in asked if found.strip(" ") != answer
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each case; exit with 1 if one of them answers a question wrongly."""
    parser = argparse.ArgumentParser(prog="python -m tests.sft_answers", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=f"{list(CASES)}")
    parser.add_argument("--questions", type=int, default=20, help="number of questions")
    parser.add_argument("--template", default="colossal", help="colossal, llama2, or a *.jinja for a byte-level BPE")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the questions")
    args = parser.parse_args(argv)
    is_right = True
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            wrong = wrong_answers(
                Path(folder), CASES[name], count=args.questions, template=args.template, epochs=args.epochs
            )
        print(f"{name:<12} {args.questions - len(wrong)} of {args.questions} right", *wrong, sep="\n    ", flush=True)
        is_right = is_right and not wrong
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
