"""Ask llama.cpp: convert the folder with its converter, and chat with the server of xllamacpp.

The converter recognizes a byte-level tokenizer by the ids that it gives to one text, so it refuses each vocabulary that
its authors have not seen, such as an extended one. It then gets the name of the rule that divides texts.

With a SentencePiece tokenizer llama.cpp puts a "▁" before the text after each special token. transformers does not if
tokenizer_config.json has "legacy": false, and then neither does training. `ask_without_prefix` converts the folder with
"add_prefix_space": false, which the flag --override-kv of llama.cpp's own commands does to a converted file.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tests.clients.exchange import LOG_PROBABILITIES, Found, Job

# llama.cpp's name for the rule of LLaMA-3.
RULE = "llama-bpe"
UNKNOWN_RULE = "pre-tokenizer was not recognized"
# The converter's command, with one answer of it given.
WITH_RULE = f"""
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "{RULE}"
convert_hf_to_gguf.main()
"""


class Server:
    """llama.cpp's HTTP server with one model, in this process."""

    def __init__(self, path: Path):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = 512
        settings.n_parallel = 1
        settings.warmup = False
        # For log-probabilities in float32. By default the cache has fp16, which changes them by a hundredth.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Its threads wait for each other in a loop, and the model is tiny.
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(settings)

    def post(self, name: str, **body: Any) -> Any:
        """The answer to a request."""
        address = f"{self._server.listening_address}/{name}"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str, *, is_prompt: bool) -> list[int]:
        """The ids of a rendered prompt, in which special tokens are found, or of a text."""
        return self.post("tokenize", content=text, add_special=True, parse_special=is_prompt)["tokens"]


def ask_without_prefix(job: Job, folder: Path) -> Found:
    """Ask it without the "▁" after special tokens."""
    changed = shutil.copytree(job.model, folder / "changed")
    config = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": False}))
    return ask(dataclasses.replace(job, model=str(changed)), folder)


def ask(job: Job, folder: Path) -> Found:
    """Ask it once by its chat, and once from the prompt's ids for all log-probabilities."""
    path, notes = convert(job.model, folder)
    server = Server(path)
    answers, prompts, scores = [], [], []
    for messages, ids, begin in zip(job.messages(), job.conversations, job.prompt_lengths, strict=True):
        chosen = {"temperature": 0, "max_tokens": job.longest}
        reply = server.post("v1/chat/completions", messages=messages, **chosen)
        answers.append(reply["choices"][0]["message"]["content"])
        rendered = server.post("apply-template", messages=messages)["prompt"]
        prompts.append(server.ids(rendered, is_prompt=True))
        scores.append(_scores(server, ids, begin))
    names = ("convert-hf-to-gguf", "xllamacpp", "transformers")
    texts = [server.ids(text, is_prompt=False) for text in job.texts]
    versions = {name: version(name) for name in names}
    return Found(versions, answers, prompts, texts, scores, LOG_PROBABILITIES, notes)


def convert(model: str, folder: Path) -> tuple[Path, list[str]]:
    """The GGUF file of a model, and what the converter needed besides its folder."""
    path = folder / "model.gguf"
    arguments = [model, "--outfile", str(path), "--outtype", "f32"]
    process = subprocess.run([sys.executable, "-m", "convert_hf_to_gguf", *arguments], capture_output=True, text=True)
    notes = []
    if process.returncode and UNKNOWN_RULE in process.stderr:
        process = subprocess.run([sys.executable, "-c", WITH_RULE, *arguments], capture_output=True, text=True)
        notes.append(f"the converter does not recognize this vocabulary, and was given the pre-tokenizer {RULE}")
    if process.returncode:
        raise SystemExit(process.stderr[-3000:])
    return path, notes


def _scores(server: Server, ids: list[int], begin: int) -> np.ndarray | None:
    """The log-probabilities of the vocabulary at each token of an answer and at its end.

    None for another answer, and for one with characters of several tokens: the server leaves out all but their last.
    """
    chosen = {"temperature": 0, "n_predict": len(ids) - begin, "cache_prompt": False}
    reply = server.post("completion", prompt=ids[:begin], n_probs=10**6, return_tokens=True, **chosen)
    rows = []
    for step in reply["completion_probabilities"]:
        row = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
        rows.append([row[token] for token in range(len(row))])
    scores = np.asarray(rows, np.float32)
    generated = [step["id"] for step in reply["completion_probabilities"]]
    return scores if generated == ids[begin : begin + len(generated)] else None
