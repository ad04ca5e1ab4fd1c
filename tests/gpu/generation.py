"""How fast does a model load, and how many tokens does it generate in a second?"""

import argparse
import time
from pathlib import Path

from tests.gpu.adam import synchronize
from tests.gpu.parts import print_figures

PROMPT = "The import statement combines two operations;"


def main() -> None:
    """Load as inference_example.py does, generate some tokens to warm up, then time."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.generation", description=__doc__)
    parser.add_argument("--model_dir", type=Path, required=True, help="model")
    parser.add_argument("--tokens", type=int, required=True, help="tokens to generate")
    args = parser.parse_args()

    import torch

    from colossal_llama2.inference.answer import Answer
    from colossal_llama2.inference.loading import load_model
    from colossal_llama2.inference.prompts import text_ids
    from colossal_llama2.inference.settings import GenerationSettings

    if torch.cuda.is_available():
        torch.cuda.init()
    start = time.monotonic()
    model, tokenizer = load_model(str(args.model_dir), None)
    synchronize()
    load_seconds = time.monotonic() - start
    row = text_ids(tokenizer, PROMPT)

    def answer(tokens: int) -> tuple[int, float]:
        settings = GenerationSettings(tokens, do_sample=False, temperature=1.0, top_k=50, top_p=1.0, seed=None)
        begin = time.perf_counter()
        generated = Answer(model, tokenizer, row, settings)
        for _ in generated:
            pass
        synchronize()
        return generated.tokens, time.perf_counter() - begin

    answer(4)
    tokens, seconds = answer(args.tokens)
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    print_figures(
        load_seconds=load_seconds,
        weight_bytes=weights,
        tokens=tokens,
        tokens_per_second=tokens / seconds,
    )


if __name__ == "__main__":
    main()
