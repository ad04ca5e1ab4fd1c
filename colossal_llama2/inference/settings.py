"""The settings of inference_example.py: its flags as typed values."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from colossal_llama2.cli.inference_flags import BATCH_SIZE, inference_parser
from colossal_llama2.errors import UserError


@dataclass(frozen=True)
class GenerationSettings:
    """How text is generated.

    Attributes:
        max_new_tokens: most tokens to generate, the prompt not counted.
        do_sample: draw each token; if false, the most likely one is chosen, and temperature, top_k, top_p and seed
            have no effect.
        temperature: divides the logits.
        top_k: number of most likely tokens to draw from.
        top_p: total probability of the most likely tokens to draw from.
        seed: of the random numbers of each answer; None draws from PyTorch's global generator.
        repetition_penalty: above 1, tokens of the prompt and of the answer so far become less likely; 1 changes
            nothing (Keskar et al. 2019, https://arxiv.org/abs/1909.05858).
    """

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int | None
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class InferenceSettings:
    """The flags of inference_example.py.

    Attributes:
        model_path: a folder, or the name of a model on Hugging Face.
        device: "cpu", "cuda", "cuda:N", or None for cuda:0 where there is a GPU and cpu elsewhere.
        dtype: one of `inference_flags.DTYPES`.
        prompt_style: one of `inference_flags.PROMPT_STYLES`.
        input_txt: the prompt.
        input_file, output_file: where prompts come from instead, and where the answers go; None for stdout.
        batch_size: answers that are generated together.
        num_return_sequences: answers to each prompt.
        interactive: read prompts from stdin instead, as a chat.
        streams: whether an answer is printed while it is generated.
    """

    model_path: str
    device: str | None
    dtype: str
    prompt_style: str
    input_txt: str
    input_file: Path | None
    output_file: Path | None
    batch_size: int
    num_return_sequences: int
    interactive: bool
    streams: bool
    generation: GenerationSettings

    @classmethod
    def from_flags(cls, flags: Mapping[str, Any]) -> "InferenceSettings":
        """The settings from the values of all flags, by name. Raises UserError for flags that contradict each other."""
        _check(flags)
        names = {field.name for field in fields(GenerationSettings)}
        generation = {name: value for name, value in flags.items() if name in names}
        others = {name: value for name, value in flags.items() if name not in names}
        for name in ("input_file", "output_file"):
            others[name] = None if others[name] is None else Path(others[name])
        others["batch_size"] = others["batch_size"] or BATCH_SIZE
        return cls(streams=not others.pop("no_stream"), generation=GenerationSettings(**generation), **others)


def _check(flags: Mapping[str, Any]) -> None:
    """Raise UserError for flags that contradict each other or have no effect."""
    has_text = flags["input_txt"] != inference_parser().defaults["input_txt"]
    has_file, is_chat, sequences = flags["input_file"] is not None, flags["interactive"], flags["num_return_sequences"]
    is_one = not has_file and sequences == 1
    problems = [
        (is_chat and has_text, "--interactive reads prompts from stdin; leave out --input_txt"),
        (is_chat and has_file, "--interactive reads prompts from stdin; leave out --input_file"),
        (is_chat and sequences > 1, "--interactive gives one answer; leave out --num_return_sequences"),
        (has_file and has_text, "--input_file and --input_txt both given; leave out one"),
        (not has_file and flags["output_file"] is not None, "--output_file needs --input_file; leave it out"),
        (
            flags["batch_size"] is not None and is_one,
            "--batch_size has no effect on one answer; leave it out",
        ),
        (has_file and flags["no_stream"], "--no_stream has no effect on --input_file; leave it out"),
        (
            sequences > 1 and not has_file and flags["no_stream"],
            "--no_stream has no effect with --num_return_sequences, whose answers are printed whole; leave it out",
        ),
        (
            sequences > 1 and not flags["do_sample"],
            f"--num_return_sequences {sequences} needs --do_sample True: without sampling, all answers are the same",
        ),
    ]
    found = [sentence for is_wrong, sentence in problems if is_wrong]
    if found:
        raise UserError("; ".join(found))
