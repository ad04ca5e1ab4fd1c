"""How fast inference_example.py generates on this machine's CPUs, relative to `generate` of transformers.

    python benchmarks/bench_inference.py --work_dir /tmp/bench_inference

The model has the shape of SmolLM2-135M, a vocabulary of 32,000, and random weights, stored as bfloat16. Each row
generates as many tokens after a short prompt, with their text, and has the median time of a token. Its speed is divided
by that of transformers in float32 with PyTorch's number of threads, one prompt at a time, greedy or drawn as the row
is. "as chosen" is what --dtype auto and its trial choose. All rows are measured by turns, five times, and medians are
printed. Needs 4 GB.
"""

import itertools
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench_vocabulary import write_base, write_small_base  # noqa: E402
from inputs import add_smallest, benchmark_parser, make_folder, print_note  # noqa: E402

from colossal_llama2 import errors  # noqa: E402

PROMPT = "The import statement combines two operations; it searches for the named module"
GREEDY = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "seed": None}
DRAWN = {"do_sample": True, "temperature": 0.3, "top_k": 50, "top_p": 0.95, "seed": 1}
BASELINES = {"greedy": "transformers, greedy", "drawn": "transformers, drawn"}


@dataclass(frozen=True)
class Size:
    """The model, the tokens of an answer, the prompts that are answered together, and how often all is measured."""

    hidden: int = 576
    inner: int = 1536
    layers: int = 30
    heads: int = 9
    key_value_heads: int = 3
    tokens: int = 32
    together: int = 16
    rounds: int = 5
    write_tokenizer: Callable[[Path], None] = write_base


SMALLEST = Size(64, 128, 2, 4, 2, tokens=4, together=4, rounds=1, write_tokenizer=write_small_base)


def main() -> None:
    """Measure all rows and print their ratios."""
    parser = benchmark_parser(__doc__)
    add_smallest(parser)
    parser.add_argument("--work_dir", type=Path, required=True, help="new folder, removed at the end")
    args = parser.parse_args()
    folder = make_folder(parser, args.work_dir)
    size = SMALLEST if args.smallest else Size()
    try:
        print_note(args)
        with errors.one_line_errors("bench_inference.py"):
            make_model(folder / "model", size)
            speeds = measured(folder / "model", size)
    finally:
        shutil.rmtree(folder)
    print(f"{'tokens per second, relative to transformers':<60}{'(least-most)':>15}")
    for name, ratios in speeds.items():
        print(f"{name:<54}{statistics.median(ratios):>6.2f}{f'({min(ratios):.2f}-{max(ratios):.2f})':>15}")


def make_model(folder: Path, size: Size) -> None:
    """Write the model. Its end of text has a logit of 0, so that no answer ends early."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from colossal_llama2.encoding.registry import load_encoder

    logging.set_verbosity_error()
    size.write_tokenizer(folder)
    encoder = load_encoder(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=encoder.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[encoder.eos_id] = 0
    model.save_pretrained(folder)


def measured(folder: Path, size: Size) -> dict[str, list[float]]:
    """The ratio of each row in each round."""
    import torch

    from colossal_llama2.inference.cpu_speed import choose_on_cpu
    from colossal_llama2.inference.loading import load_model

    threads = torch.get_num_threads()
    chosen = {}
    for rows in (1, size.together):
        chosen[rows] = choose_on_cpu(folder, rows=rows), torch.get_num_threads()
        torch.set_num_threads(threads)
    precisions = {"fp32", *(precision for precision, _ in chosen.values())}
    models = {precision: load_model(str(folder), "cpu", dtype=precision) for precision in sorted(precisions)}
    plain = ("fp32", threads)
    rows_of = {
        **{
            name: (plain, transformers_answer, flags, 1)
            for name, flags in zip(BASELINES.values(), (GREEDY, DRAWN), strict=True)
        },
        "greedy, float32": (plain, our_answer, GREEDY, 1),
        "drawn, float32": (plain, our_answer, DRAWN, 1),
        f"greedy, as chosen ({described(chosen[1])})": (chosen[1], our_answer, GREEDY, 1),
        f"greedy, {size.together} prompts together, float32": (plain, our_answers, GREEDY, size.together),
        f"greedy, {size.together} together, as chosen ({described(chosen[size.together])})": (
            chosen[size.together],
            our_answers,
            GREEDY,
            size.together,
        ),
    }
    found: dict[str, list[float]] = {}
    for turn in range(size.rounds + 1):
        speeds = {}
        for name, ((precision, count), answer, flags, prompts) in rows_of.items():
            torch.set_num_threads(count)
            times = answer(*models[precision], flags, size.tokens if turn else 3, prompts)
            # Not the total: another process may interrupt a step.
            seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
            speeds[name] = prompts / seconds
        torch.set_num_threads(threads)
        for name, speed in speeds.items():
            # The first round chooses and prepares kernels.
            if turn and name not in BASELINES.values():
                found.setdefault(name, []).append(speed / speeds[BASELINES[name.split(",")[0]]])
    return found


def described(choice: tuple[str, int]) -> str:
    """A precision and a number of threads."""
    return f"{choice[0]}, {choice[1]} thread{'' if choice[1] == 1 else 's'}"


def transformers_answer(model: Any, tokenizer: Any, flags: dict, tokens: int, prompts: int) -> list[float]:
    """Answer by `generate`. Returns when each token was there, in seconds."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    times: list[float] = []

    class Clock(BaseStreamer):
        """Notes the time of the prompt and of each token; nothing is decoded."""

        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    sampling = {name: flags[name] for name in ("temperature", "top_k", "top_p")} if flags["do_sample"] else {}
    torch.manual_seed(1)
    model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=flags["do_sample"],
        pad_token_id=0,
        streamer=Clock(),
        **sampling,
    )
    return times[1:]


def our_answer(model: Any, tokenizer: Any, flags: dict, tokens: int, prompts: int) -> list[float]:
    """Answer as inference_example.py does. Returns when each token was there, in seconds."""
    from colossal_llama2.inference.answer import Answer
    from colossal_llama2.inference.prompts import text_ids
    from colossal_llama2.inference.settings import GenerationSettings

    answer = Answer(model, tokenizer, text_ids(tokenizer, PROMPT), GenerationSettings(tokens, **flags))
    return [time.perf_counter() for _ in answer][:-1]


def our_answers(model: Any, tokenizer: Any, flags: dict, tokens: int, prompts: int) -> list[float]:
    """Answer prompts of different lengths together. Returns when each token of all of them was there."""
    from colossal_llama2.inference.generation import generate_tokens
    from colossal_llama2.inference.prompts import text_ids
    from colossal_llama2.inference.settings import GenerationSettings
    from colossal_llama2.inference.streaming import TextStream

    rows = [text_ids(tokenizer, text) for text in short_prompts(prompts)]
    streams = [TextStream(tokenizer) for _ in rows]
    times = []
    for step in generate_tokens(model, tokenizer, rows, GenerationSettings(tokens, **flags)):
        for row, token in step.items():
            streams[row].push(token)
        times.append(time.perf_counter())
    return times


def short_prompts(count: int) -> Iterator[str]:
    """Beginnings of PROMPT, the whole last."""
    words = PROMPT.split()
    return (" ".join(words[: max(1, len(words) * number // count)]) for number in range(1, count + 1))


if __name__ == "__main__":
    main()
