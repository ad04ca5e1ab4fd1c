"""Questions of a set, scored by the logits of the first predicted token, by a greedy answer, or by both."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama2.errors import UserError
from colossal_llama2.evaluation.by_logits import records_by_logits, records_of_logits
from colossal_llama2.evaluation.choice_tokens import ChoiceTokens, find_choice_tokens
from colossal_llama2.evaluation.sets.gsm8k import NEXT_QUESTION, final_number
from colossal_llama2.evaluation.sets.questions import LETTERS, Question, QuestionSet, doubtful_choices
from colossal_llama2.evaluation.sets.registry import CHOICE, COMBINED, FINAL_NUMBER, EvaluationSet
from colossal_llama2.evaluation.task import ACCURACY, Row, checked_finite
from colossal_llama2.inference.generation import generate_tokens
from colossal_llama2.inference.prompts import text_ids
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.inference.streaming import TextStream
from colossal_llama2.logs import get_logger
from colossal_llama2.model.positions import positions_of
from colossal_llama2.plurals import counted, some

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    from colossal_llama2.inference.prompt_batch import SharedStates

# Most tokens of an answer.
NEW_TOKENS = {CHOICE: 1, COMBINED: 32, FINAL_NUMBER: 256}
# The letter of an answer: the first that is no part of a word, as in "(B)" and "答案是B", not in "Because" or "CO2".
LETTER = re.compile(r"(?<![A-Za-z])[A-D](?![A-Za-z0-9])")


class QuestionTask:
    """The questions of a set; see `Task`."""

    metric = ACCURACY

    def __init__(self, name: str, kind: EvaluationSet, found: QuestionSet, num_fewshot: int):
        self.name, self.num_fewshot, self.left_out = name, num_fewshot, found.left_out
        self.subjects = [question.subject for question in found.questions]
        self._kind, self._questions = kind, found.questions
        self._examples = {
            subject: list(found.examples.get(subject, ()))[:num_fewshot] for subject in dict.fromkeys(self.subjects)
        }
        for reason, count in found.examples_left_out.items():
            get_logger().info(f"{name}: {counted(count, 'example')} {reason} left out")
        for what, places in doubtful_choices(found.questions).items():
            get_logger().info(
                f"{name}: {counted(len(places), 'question')} with {what}, scored unchanged: {some(places)}"
            )
        fewer = [subject for subject, examples in self._examples.items() if len(examples) < num_fewshot]
        if fewer:
            most = max(len(self._examples[subject]) for subject in fewer)
            get_logger().info(
                f"{name}: {counted(len(fewer), 'subject')} with fewer than {num_fewshot} examples in the set's files, "
                f"at most {most}: {', '.join(fewer)}"
            )

    @property
    def definition(self) -> Any:
        """Questions and examples, without where they are."""
        examples = {subject: [item[1:] for item in items] for subject, items in self._examples.items()}
        return [self.name, self.num_fewshot, [question[1:] for question in self._questions], examples]

    def prepare(self, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", folder: str) -> "_Prepared":
        """The prompts as ids. Raises UserError if the tokenizer cannot encode one, or has no token for a letter."""
        rows = model.get_input_embeddings().num_embeddings
        items = self.items(tokenizer, context=positions_of(model.config), vocab_size=rows)
        return _Prepared(model, tokenizer, self._kind, self._questions, items)

    def items(self, tokenizer: "PreTrainedTokenizerBase", *, context: int, vocab_size: int) -> "QuestionItems":
        """See `LogitTask`. The prompts leave room for a whole answer; without choices they have no candidates."""
        return QuestionItems(tokenizer, self.name, self._kind, self._questions, self._examples, context=context)


class QuestionItems:
    """The questions as ids; see `LogitItems`.

    Attributes:
        new_tokens: the room behind each question for an answer.
        choices: the letters as tokens; None for questions without choices.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        name: str,
        kind: EvaluationSet,
        questions: Sequence[Question],
        examples: dict[str, list[Question]],
        *,
        context: int,
    ):
        self._tokenizer, self._kind, self._questions = tokenizer, kind, questions
        self.new_tokens = NEW_TOKENS[kind.metric]
        if context <= self.new_tokens:
            raise UserError(
                f"{name}: an answer has up to {counted(self.new_tokens, 'token')}, and the model's context {context}, "
                "so no question fits; leave it out"
            )
        self._room = context - self.new_tokens
        self.choices: ChoiceTokens | None = None
        if kind.metric != FINAL_NUMBER:
            first = questions[0]
            prompt = kind.form.prompt(first, examples[first.subject])
            self.choices = find_choice_tokens(tokenizer, prompt, kind.form.lead)
            get_logger().info(f"{name}: {self.choices.described()}")
        self.rows = [
            self._row(number, question, examples[question.subject]) for number, question in enumerate(questions)
        ]

    def _row(self, number: int, question: Question, examples: list[Question]) -> Row:
        """A prompt that fits the model's context: without as many of the first examples as needed, or cut in front."""
        room = self._room
        suffix, candidates = (self.choices.suffix, self.choices.ids) if self.choices else ("", ())
        for dropped in range(len(examples) + 1):
            kept = examples[dropped:]
            try:
                ids = text_ids(self._tokenizer, self._kind.form.prompt(question, kept) + suffix)
            except UserError as error:
                raise UserError(f"{question.where}: {error}")
            if len(ids) <= room:
                break
        notes = {"examples": len(kept), "dropped_examples": dropped, "cut_tokens": max(0, len(ids) - room)}
        return Row(number, ids[-room:], (question.subject, len(kept)), notes, candidates)

    def record(self, row: Row, logits: list[float]) -> dict[str, Any]:
        """See `LogitItems`. The candidates are the letters."""
        checked_finite(logits)
        choice, answer = LETTERS[logits.index(max(logits))], self._questions[row.item].answer
        return {"logits": logits, "choice": choice, "answer": answer, "is_correct": choice == answer}


class _Prepared:
    def __init__(
        self,
        model: "LlamaForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        kind: EvaluationSet,
        questions: Sequence[Question],
        items: QuestionItems,
    ):
        self._model, self._tokenizer, self._kind, self._questions = model, tokenizer, kind, questions
        self._items, self.rows, self.new_tokens = items, items.rows, items.new_tokens

    def compute(self, rows: Sequence[Row], shared: "SharedStates | None") -> list[dict[str, Any]]:
        if self._kind.metric == CHOICE:
            return records_by_logits(self._model, self._items, rows, shared)
        if self._kind.metric == COMBINED:
            return self._combined(rows, shared)
        return self._final_numbers(rows, shared)

    def _combined(self, rows: Sequence[Row], shared: "SharedStates | None") -> list[dict[str, Any]]:
        texts, first, _ = self._generated(rows, shared, lambda text: letter_of(text, is_whole=False) is not None)
        found = []
        for record, text in zip(records_of_logits(self._items, rows, first), texts, strict=True):
            by_logits, by_text = record.pop("is_correct"), letter_of(text) == record["answer"]
            found.append(
                {
                    **record,
                    "text": text,
                    "is_correct_by_logits": by_logits,
                    "is_correct_by_text": by_text,
                    "is_correct": by_logits or by_text,
                }
            )
        return found

    def _final_numbers(self, rows: Sequence[Row], shared: "SharedStates | None") -> list[dict[str, Any]]:
        texts, _, tokens = self._generated(rows, shared, lambda text: NEXT_QUESTION in text)
        found = []
        for row, text, count in zip(rows, texts, tokens, strict=True):
            text = text.partition(NEXT_QUESTION)[0]
            number, answer = final_number(text), final_number(self._questions[row.item].answer)
            found.append(
                {
                    "text": text,
                    "choice": None if number is None else str(number),
                    "answer": str(answer),
                    "is_correct": number == answer,
                    "is_cut": count == self.new_tokens,
                    "new_tokens": count,
                }
            )
        return found

    def _generated(
        self, rows: Sequence[Row], shared: "SharedStates | None", is_over: Callable[[str], bool]
    ) -> tuple[list[str], "torch.Tensor", list[int]]:
        """Greedy answers, which end when `is_over`; the logits of their first tokens; and their numbers of tokens."""
        settings = GenerationSettings(self.new_tokens, do_sample=False, temperature=1.0, top_k=1, top_p=1.0, seed=None)
        streams, texts = [TextStream(self._tokenizer) for _ in rows], [""] * len(rows)
        first: list[torch.Tensor] = []
        counts = [0] * len(rows)
        for step in generate_tokens(
            self._model,
            self._tokenizer,
            [row.ids for row in rows],
            settings,
            shared=shared,
            ends=lambda row, token: is_over(texts[row]),
            # A copy, since the sampler may change them.
            on_first=lambda logits: first.append(logits.clone()),
        ):
            for row, token in step.items():
                texts[row] += streams[row].push(token)
                counts[row] += 1
        return [text + stream.end() for text, stream in zip(texts, streams, strict=True)], first[0], counts


def letter_of(text: str, *, is_whole: bool = True) -> str | None:
    """The letter of an answer; of one that is not whole, only if what follows cannot change it."""
    found = LETTER.search(text)
    return found[0] if found and (is_whole or found.end() < len(text)) else None
