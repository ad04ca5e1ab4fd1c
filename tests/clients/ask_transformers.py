"""Ask transformers: its pipeline with messages."""

from pathlib import Path

import numpy as np

from tests.clients.exchange import LOGITS, Found, Job


def ask(job: Job, folder: Path) -> Found:
    """Load the folder as the pipeline does without any setting."""
    import torch
    import transformers

    pipeline = transformers.pipeline("text-generation", model=job.model)
    answers, prompts, scores = [], [], []
    for messages, ids, begin in zip(job.messages(), job.conversations, job.prompt_lengths, strict=True):
        (output,) = pipeline(messages, max_new_tokens=job.longest)
        answers.append(output["generated_text"][-1]["content"])
        rendered = pipeline.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        prompts.append([int(token) for token in rendered])
        with torch.no_grad():
            logits = pipeline.model(torch.tensor([ids])).logits[0, begin - 1 : -1]
        scores.append(np.asarray(logits.float()))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    texts = [list(pipeline.tokenizer(text)["input_ids"]) for text in job.texts]
    return Found(versions, answers, prompts, texts, scores, LOGITS)
