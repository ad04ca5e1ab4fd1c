"""Small evaluation sets in the formats in which their authors publish them. All content is made up here."""

import csv
import json
from pathlib import Path

LETTERS = "ABCD"
SUBJECTS = ("agronomy", "logical")


def question(number: int, subject: str) -> list[str]:
    """A question, its four choices, and its answer."""
    text = f"Which of these numbers follows {number} in {subject}" + " when one counts on" * (number % 4) + "?"
    return [text, *(str(number + step) for step in (1, 2, 3, 4)), LETTERS[number % 4]]


def write_rows(path: Path, rows: list[list]) -> None:
    """A CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_lines(path: Path, records: list[dict]) -> None:
    """A jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_mmlu(folder: Path, questions: int = 6) -> Path:
    """Two subjects without a header."""
    for subject in SUBJECTS:
        write_rows(folder / "test" / f"{subject}_test.csv", [question(n, subject) for n in range(questions)])
        write_rows(folder / "dev" / f"{subject}_dev.csv", [question(n, subject) for n in range(50, 55)])
    return folder


def write_cmmlu(folder: Path, questions: int = 6) -> Path:
    """Two subjects, whose files have a header and numbered rows."""
    head = ["", "Question", "A", "B", "C", "D", "Answer"]
    for subject in SUBJECTS:
        for split, numbers in (("test", range(questions)), ("dev", range(50, 55))):
            rows = [[place, *question(number, subject)] for place, number in enumerate(numbers)]
            write_rows(folder / split / f"{subject}.csv", [head, *rows])
    return folder


def write_ceval(folder: Path, questions: int = 3) -> Path:
    """One subject; the examples have explanations."""
    head = ["id", "question", "A", "B", "C", "D", "answer"]
    rows = [[n, *question(n, "logic")] for n in range(questions)]
    write_rows(folder / "val" / "logic_val.csv", [head, *rows])
    examples = [[n, *question(n + 50, "logic"), "because"] for n in range(5)]
    write_rows(folder / "dev" / "logic_dev.csv", [[*head, "explanation"], *examples])
    return folder


def agieval_record(number: int, *, choices: int = 4, passage: str | None = None) -> dict:
    """A record of AGIEval."""
    options = [f"({letter}){number + step}" for step, letter in enumerate("ABCDE"[:choices])]
    label = "ABCDE"[number % choices]
    return {"passage": passage, "question": f"What is {number}?", "options": options, "label": label, "other": None}


def write_agieval(folder: Path) -> Path:
    """A task of each language, one with five choices, and a question without choices and one with two answers."""
    records = [agieval_record(number, passage="A story.") for number in range(3)]
    write_lines(folder / "v1" / "logiqa-en.jsonl", records)
    cloze = {**agieval_record(0), "options": None, "label": None, "answer": "2"}
    write_lines(
        folder / "v1" / "jec-qa-kd.jsonl", [{**agieval_record(1), "label": ["B"]}, {**cloze}, agieval_record(2)]
    )
    write_lines(folder / "v1" / "aqua-rat.jsonl", [agieval_record(4, choices=5)])
    write_lines(folder / "v1" / "gaokao-physics.jsonl", [{**agieval_record(1), "label": ["A", "B"]}])
    names = ["logiqa-en", "jec-qa-kd", "aqua-rat", "gaokao-physics"]
    rows: list[list] = [["", *names]]
    for number in range(1, 4):
        rows.append([f"sample {number}", *(repr(agieval_record(number + 20)) for _ in names)])
        rows.append([f"explanation {number}", *("so it is" for _ in names)])
    write_rows(folder / "few_shot_prompts.csv", rows)
    return folder


def write_gaokao(folder: Path) -> Path:
    """A file of single questions, one of them with two answers, and a file whose items ask several questions."""
    items = [
        {"question": f"{n}．下列各数中最大的是\nA．1  B．2  C．3  D．4\n", "answer": [answer], "index": n}
        for n, answer in enumerate(["D", "A", "BD"])
    ]
    reading = [{"question": "Read. 1. A. a B. b C. c D. d 2. ...", "answer": ["A", "C"], "index": 0}]
    place = folder / "Data" / "Objective_Questions"
    place.mkdir(parents=True, exist_ok=True)
    for name, example in (("2010-2022_Math_I_MCQs", items), ("2010-2022_English_Reading_Comp", reading)):
        content = {"keywords": name, "example": example}
        (place / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


def write_gsm8k(folder: Path, problems: int = 4) -> Path:
    """Problems of addition."""
    for name, numbers in (("test", range(problems)), ("train", range(50, 60))):
        records = [
            {"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}
            for n in numbers
        ]
        write_lines(folder / f"{name}.jsonl", records)
    return folder


WRITERS = {
    "mmlu": write_mmlu,
    "cmmlu": write_cmmlu,
    "ceval": write_ceval,
    "agieval": write_agieval,
    "gaokao": write_gaokao,
    "gsm8k": write_gsm8k,
}


def write_all(folder: Path) -> Path:
    """A --data_dir with every set."""
    for name, write in WRITERS.items():
        write(folder / name)
    return folder
