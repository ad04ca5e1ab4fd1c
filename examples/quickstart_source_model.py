"""Write the quick start's source model: a tokenizer trained on English, and a small LLaMA with random weights.

    python examples/quickstart_source_model.py --english_dir quickstart/data/en --output_dir quickstart/source

The folder has what LLaMA-2's has: config, safetensors, tokenizer.model and the other tokenizer files. train.py then
teaches it English. It stands in for LLaMA-2, which no one can train on two cores.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import value_types
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.storage.files import jsonl_files, read_jsonl

SEED = 42
MAX_LENGTH = 512


def build_parser() -> CommandParser:
    """Flags of this script."""
    parser = CommandParser(
        "quickstart_source_model.py",
        "Train an English tokenizer and write a small LLaMA with random weights beside it.",
        "  python examples/quickstart_source_model.py --english_dir quickstart/data/en --output_dir quickstart/source",
    )
    parser.add_argument("--english_dir", metavar="DIR", required=True, help="folder with English *.jsonl")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="folder to write; must not exist yet")
    parser.add_argument(
        "--vocab_size", metavar="N", type=value_types.positive_int, default=4000, help="pieces of the tokenizer"
    )
    return parser


def write_model(vocab_size: int, output_dir: Path) -> int:
    """Write a LLaMA with random float32 weights to `output_dir`; returns its parameter count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=MAX_LENGTH,
            torch_dtype="float32",
        )
    )
    model.save_pretrained(output_dir)
    return model.num_parameters()


def read_targets(folder: Path) -> list[str]:
    """The `target` texts of every *.jsonl in `folder`."""
    files = jsonl_files(folder)
    if not files:
        raise errors.UserError(f"no *.jsonl in {folder}; write them with examples/quickstart_corpus.py")
    return [line.record["target"] for file in files for line in read_jsonl(file) if line.record]


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("quickstart_source_model.py"):
        output_dir = Path(args.output_dir)
        if output_dir.exists():
            raise errors.UserError(f"--output_dir {output_dir} exists; delete it or name another folder")
        from colossal_llama2.encoding.from_text import train_vocabulary, write_tokenizer

        texts = read_targets(Path(args.english_dir))
        logs.get_logger().info("Training a tokenizer of %d pieces on %d documents", args.vocab_size, len(texts))
        lines = (line for text in texts for line in text.splitlines() if line.strip())
        vocabulary = train_vocabulary(lines, args.vocab_size)
        output_dir.mkdir(parents=True)
        write_tokenizer(vocabulary, output_dir, model_max_length=MAX_LENGTH)
        parameters = write_model(args.vocab_size, output_dir)
        logs.get_logger().info("Wrote a LLaMA of %.2f M parameters to %s", parameters / 1e6, output_dir)


if __name__ == "__main__":
    main()
