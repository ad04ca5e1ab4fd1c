"""Ask CTranslate2: convert the folder, and generate from the tokens of its template."""

import json
from pathlib import Path

import numpy as np

from tests.clients.exchange import LOGITS, Found, Job


def ask(job: Job, folder: Path) -> Found:
    """The tokenizer is that of transformers, as CTranslate2 has none."""
    import ctranslate2
    import transformers
    from ctranslate2.converters import TransformersConverter

    converted = TransformersConverter(job.model).convert(str(folder / "ctranslate2"))
    generator = ctranslate2.Generator(converted, device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    ends = json.loads(Path(job.model, "generation_config.json").read_text())["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    answers, prompts, scores = [], [], []
    for messages, ids in zip(job.messages(), job.conversations, strict=True):
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        (result,) = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt)],
            max_length=job.longest,
            include_prompt_in_result=False,
            end_token=ends,
        )
        answers.append(tokenizer.decode(result.sequences_ids[0]))
        prompts.append(list(prompt))
        logits = np.asarray(generator.forward_batch([tokenizer.convert_ids_to_tokens(ids)]))
        scores.append(logits[0, len(prompt) - 1 : -1].astype(np.float32))
    versions = {"ctranslate2": ctranslate2.__version__, "transformers": transformers.__version__}
    return Found(versions, answers, prompts, None, scores, LOGITS)
