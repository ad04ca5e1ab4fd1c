"""The flags of inference_example.py."""

import argparse

from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.cli.value_types import (
    candidate_count,
    positive_float,
    positive_int,
    probability,
    sampling_temperature,
    seed_number,
    true_or_false,
)

PROMPT_STYLES = ("auto", "sft", "pretrained", "plain")
BATCH_SIZE = 8
GENERATION = "generation"
DTYPES = ("auto", "fp32", "bf16", "fp16")


def inference_parser() -> CommandParser:
    """Flags of inference_example.py."""
    parser = CommandParser(
        "inference_example.py",
        "Continue a prompt with a trained model.",
        "  python inference_example.py --model_path checkpoint_dir/modeling --input_txt 明月松间照，",
    )
    model = parser.flag_group("model")
    model.add(
        "--model_path",
        metavar="PATH",
        default="hpcai-tech/Colossal-LLaMA-2-7b-base",
        help="local folder or Hugging Face name of a LLaMA model with its tokenizer; other models are refused",
    )
    model.add("--device", default=None, help="cpu, cuda:0, ... (default: cuda:0 if there is a GPU, else cpu)")
    model.add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision to compute in. auto: on a GPU that of the weights; on CPUs fp32, or bf16 if the weights are "
        "stored in it and it is faster in a short trial",
    )
    prompt = parser.flag_group("prompt")
    prompt.add("--input_txt", metavar="TEXT", default="明月松间照，", help="prompt or question")
    prompt.add(
        "--prompt_style",
        choices=PROMPT_STYLES,
        default="auto",
        help="sft: as a message of the model's chat template; pretrained: followed by \\n\\n->\\n\\n, as the published "
        "models were trained; plain: as it is. auto: as the model's folder records",
    )
    prompt.add(
        "--interactive",
        action="store_true",
        help="chat in the terminal: messages from stdin, with history if the model has a chat template; /help lists "
        "the commands",
    )
    prompt.add(
        "--input_file",
        metavar="FILE",
        default=None,
        help="answer every prompt of a file: *.txt with a prompt per line, or *.jsonl with records of prompt or "
        "input_txt, or conversations",
    )
    prompt.add(
        "--output_file",
        metavar="FILE",
        default=None,
        help="jsonl to which the answers to --input_file are appended; the same command continues it. Without it, they "
        "are printed",
    )
    prompt.add(
        "--batch_size",
        metavar="N",
        type=positive_int,
        default=None,
        help=f"answers that are generated together (default: {BATCH_SIZE})",
    )
    prompt.add(
        "--num_return_sequences",
        metavar="N",
        type=positive_int,
        default=1,
        help="answers to each prompt; more than one needs sampling",
    )
    prompt.add("--no_stream", action="store_true", help="print the answer when it is complete, not while it grows")
    generation = parser.flag_group(GENERATION)
    generation.add(
        "--max_new_tokens",
        metavar="N",
        type=positive_int,
        default=512,
        help="maximum number of tokens to generate, not counting the prompt",
    )
    generation.add(
        "--do_sample",
        metavar="True|False",
        type=true_or_false,
        default=True,
        help="sample; with False, the most likely token is always chosen",
    )
    generation.add("--temperature", metavar="T", type=sampling_temperature, default=0.3, help="sampling temperature")
    generation.add(
        "--top_k", metavar="K", type=candidate_count, default=50, help="sample among the K most likely tokens"
    )
    generation.add(
        "--top_p",
        metavar="P",
        type=probability,
        default=0.95,
        help="sample among the most likely tokens of this total probability",
    )
    generation.add(
        "--repetition_penalty",
        metavar="P",
        type=positive_float,
        default=1.0,
        help="divides the positive logits of tokens that the text already has, and multiplies the negative ones",
    )
    generation.add(
        "--seed", metavar="N", type=seed_number, default=None, help="seed of the sampling (default: not set)"
    )
    return parser


def generation_flags() -> dict[str, argparse.Action]:
    """The flags that decide how text is generated, by name. A chat can change them."""
    (group,) = (group for group in inference_parser().groups if group.title == GENERATION)
    return {action.dest: action for action in group.actions}
