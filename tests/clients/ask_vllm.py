"""Ask vLLM: its chat, in float32 on a CPU."""

import os
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tests.clients.exchange import LOG_PROBABILITIES, Found, Job


def ask(job: Job, folder: Path) -> Found:
    """The template, and the tokens that end an answer, are what vLLM finds in the folder."""
    # In this process, with a small cache.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
    from vllm import LLM, SamplingParams

    model = LLM(job.model, dtype="float32", max_model_len=512, max_logprobs=-1, enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=job.longest, logprobs=-1)
    outputs = model.chat(job.messages(), settings, use_tqdm=False)
    scores: list[np.ndarray | None] = []
    for output, answer in zip(outputs, job.answers, strict=True):
        (generated,) = output.outputs
        rows = [[row[token].logprob for token in range(len(row))] for row in generated.logprobs]
        # Of another answer, the tokens are others.
        scores.append(np.asarray(rows, np.float32) if generated.text == answer else None)
    tokenizer = model.get_tokenizer()
    return Found(
        {"vllm": version("vllm-cpu"), "transformers": version("transformers"), "torch": version("torch")},
        [output.outputs[0].text for output in outputs],
        [list(output.prompt_token_ids) for output in outputs],
        [list(tokenizer(text)["input_ids"]) for text in job.texts],
        scores,
        LOG_PROBABILITIES,
    )
