"""Ask lm-evaluation-harness: its model hf, with apply_chat_template, generate_until and loglikelihood."""

from importlib.metadata import version
from pathlib import Path

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
    pairs = zip(prompts, job.answers, strict=True)
    scored = model.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)])
    ids = [list(model.tok_encode(prompt)) for prompt in prompts]
    texts = [list(model.tok_encode(text)) for text in job.texts]
    versions = {name: version(name) for name in ("lm_eval", "transformers", "torch")}
    return Found(versions, answers, ids, texts, [np.asarray(one) for one, _ in scored], LOG_LIKELIHOOD)
