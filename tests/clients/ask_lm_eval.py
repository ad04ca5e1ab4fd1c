"""Ask lm-evaluation-harness: its model hf, with apply_chat_template, generate_until and loglikelihood."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tests.clients.exchange import LOG_LIKELIHOOD, Found, Job


def ask(job: Job, folder: Path) -> Found:
    """What `lm_eval --model hf --model_args pretrained=FOLDER --apply_chat_template` calls for each request."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=job.model, device="cpu")
    prompts = [model.apply_chat_template(messages) for messages in job.messages()]
    settings = {"until": [], "max_gen_toks": job.longest, "do_sample": False}
    answers = model.generate_until(
        [Instance("generate_until", {}, (prompt, settings), n) for n, prompt in enumerate(prompts)]
    )
    scores = [np.asarray(one) for one in _log_likelihoods(model, prompts, job.answers)]
    ids = [list(model.tok_encode(prompt)) for prompt in prompts]
    texts = [list(model.tok_encode(text)) for text in job.texts]
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    return Found(versions, answers, ids, texts, scores, LOG_LIKELIHOOD)


def _log_likelihoods(model: Any, prompts: list[str], answers: list[str]) -> list[float]:
    """Of answers. lm-eval counts white space at the end of a prompt to the answer; what that adds is subtracted."""
    from lm_eval.api.instance import Instance

    spaced = [prompt for prompt in prompts if prompt != prompt.rstrip()]
    pairs = [*zip(prompts, answers, strict=True), *((prompt, "") for prompt in spaced)]
    found = [one for one, _ in model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])]
    of_spaces = dict(zip(spaced, found[len(prompts) :], strict=True))
    return [one - of_spaces.get(prompt, 0.0) for one, prompt in zip(found, prompts, strict=False)]
