"""What a client is asked and what it answers, as files between two Python environments.

Imports nothing but numpy. A client's environment has neither the package nor what the tests need.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

# What `Found.scores` holds for each question: logits or log-probabilities of the whole vocabulary for each token of the
# answer and its end, an array of (tokens, vocabulary); or the log-likelihood of the answer's text, an array of ().
LOGITS, LOG_PROBABILITIES, LOG_LIKELIHOOD = "logits", "log-probabilities", "log-likelihood"


@dataclass(frozen=True)
class Job:
    """What a client is asked.

    Attributes:
        model: the folder that training wrote.
        questions, answers: what the model has learned, word for word.
        conversations: for each question, the ids of its prompt, of its answer, and of the end of its turn.
        prompt_lengths: how many of these ids belong to the prompt.
        texts: to be tokenized, without a template.
        longest: most tokens of an answer.
    """

    model: str
    questions: list[str]
    answers: list[str]
    conversations: list[list[int]]
    prompt_lengths: list[int]
    texts: list[str]
    longest: int = 128

    def messages(self) -> list[list[dict[str, str]]]:
        """Each question as a conversation."""
        return [[{"role": "user", "content": question}] for question in self.questions]

    def write(self, path: Path) -> None:
        """To a file."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Job":
        """From a file."""
        return cls(**json.loads(path.read_text()))


@dataclass
class Found:
    """What a client answers.

    Attributes:
        versions: of its packages, by name.
        answers: to the questions.
        prompts: the ids that it generated from, for each question.
        texts: the ids of each text; None for a client that has no tokenizer of its own.
        scores: for each question, see above; None where it cannot be compared.
        kind: of the scores.
        notes: what it needed besides the folder.
    """

    versions: dict[str, str]
    answers: list[str]
    prompts: list[list[int]]
    texts: list[list[int]] | None
    scores: list[np.ndarray | None]
    kind: str
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """To two files in a folder."""
        arrays = {str(number): one for number, one in enumerate(self.scores) if one is not None}
        np.savez(folder / "scores.npz", **arrays)
        content = {key: value for key, value in vars(self).items() if key != "scores"}
        (folder / "found.json").write_text(json.dumps({**content, "count": len(self.scores)}))

    @classmethod
    def read(cls, folder: Path) -> "Found":
        """From the files that `write` makes."""
        content = json.loads((folder / "found.json").read_text())
        with np.load(folder / "scores.npz", allow_pickle=False) as arrays:
            scores = [arrays[name] if (name := str(n)) in arrays else None for n in range(content.pop("count"))]
        return cls(**content, scores=scores)
