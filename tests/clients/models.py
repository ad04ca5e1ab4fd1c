"""The two models that clients are asked: each has learned 20 answers word for word, with its own kind of tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from colossal_llama2.chat.folder_chat import chat_of_folder
from colossal_llama2.encoding.registry import load_encoder
from tests import sft_answers, tiny
from tests.byte_level import make_byte_level
from tests.clients.exchange import Job

QUESTIONS = 20
SENTENCEPIECE, BYTE_LEVEL = KINDS = ("sentencepiece", "byte-level")
# LLaMA-3's: the end of a turn is not the tokenizer's eos_token.
OWN_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
      {{- message['content'] + '<|eot_id|>' -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- message['content'] + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Model:
    """A trained model, and what our own code computes with it.

    Attributes:
        text_ids: of each text of the job, as in training.
        logits: for each question, of the tokens of its answer and of the end of its turn: (tokens, vocabulary).
        own_answers: those of inference_example.py.
    """

    job: Job
    text_ids: list[list[int]]
    logits: list[np.ndarray]
    own_answers: list[str]


def train_model(folder: Path, kind: str) -> Path:
    """Train a model, and return its modeling/ folder; one that is already there is used."""
    done = folder / "run" / "modeling"
    if not done.exists():
        pairs = sft_answers.questions(QUESTIONS)
        if kind == SENTENCEPIECE:
            tokenizer, template = tiny.make_tokenizer(folder / "tokenizer"), "colossal"
        else:
            tokenizer, template = make_byte_level(folder / "tokenizer"), "model"
            (tokenizer / "chat_template.jinja").write_text(OWN_TEMPLATE)
        # vLLM has no attention on CPUs for smaller heads.
        model = tiny.make_model(folder / "model", tokenizer, heads=4, head_size=32)
        sft_answers.trained_model(folder, sft_answers.CASES["zero2"], model, tokenizer, pairs, template=template)
    return done


def read_model(folder: Path) -> Model:
    """What our own code finds with the model in the modeling/ folder of a run."""
    pairs = sft_answers.questions(QUESTIONS)
    chat = chat_of_folder(folder)
    assert chat is not None
    conversations, lengths = [], []
    for question, answer in pairs:
        asked = [{"role": "user", "content": question}]
        prompt = chat.prompt(asked)
        parts = chat.tokens([*asked, {"role": "assistant", "content": answer}]).parts
        ids = [token for part in parts if part.answer in (None, 0) for token in part.ids]
        end = next(n for n in range(len(parts)) if parts[n].answer == 0)
        length = sum(len(part.ids) for part in parts[:end])
        assert ids[:length] == prompt
        conversations.append(ids[: length + len(parts[end].ids)])
        lengths.append(length)
    chat.close()
    texts = texts_to_compare(pairs)
    questions, answers = ([pair[side] for pair in pairs] for side in (0, 1))
    job = Job(str(folder), questions, answers, conversations, lengths, texts)
    encoder = load_encoder(folder)
    text_ids = [[encoder.bos_id, *ids] for ids in encoder.encode(texts)]
    own = [answer for _, _, answer in sft_answers.ask(folder, folder.parents[1] / "data" / "in" / "rows.jsonl")]
    return Model(job, text_ids, _logits(job), own)


def texts_to_compare(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Chinese and English: the dialogues, sentences, and white space in unusual places."""
    lines = [tiny.CHINESE, *"\n".join(tiny.english_documents()[:5]).splitlines()]
    spaces = ["  two spaces", "a\n\nb\tc ", "中文 and English，混在一起。", "naïve 🤖 é", "3.14 + 1e-5"]
    return [*(text for pair in pairs for text in pair), *filter(str.strip, lines), *spaces]


def _logits(job: Job) -> list[np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return [
            np.asarray(model(torch.tensor([ids])).logits[0, begin - 1 : -1])
            for ids, begin in zip(job.conversations, job.prompt_lengths, strict=True)
        ]
