"""Measure a model on held-out text: loss per byte and tokens per character, by plain transformers.

    python examples/quickstart_evaluate.py --model_path quickstart/stage-1/modeling \\
        --held_out_dir quickstart/data/held_out --output_file quickstart/results.json --stage "1 English"

Loss per UTF-8 byte, unlike loss per token, can be compared between vocabularies. The figures of one stage are one entry
of the results file; the entry of an earlier run of the same stage is replaced:

    {"stage": "1 English", "model_path": ..., "tensorboard_dir": null, "config_file": null, "languages": {"zh":
     {"documents": 270, "characters": 23000, "bytes": 64945, "tokens": 66000, "nats_per_byte": 2.1, ...}, "en": ...}}
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import value_types
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.storage.files import jsonl_files, read_jsonl

WINDOW_TOKENS = 256


def build_parser() -> CommandParser:
    """Flags of this script."""
    parser = CommandParser(
        "quickstart_evaluate.py",
        "Measure a model's loss per byte and its tokens per character on held-out text.",
        "  python examples/quickstart_evaluate.py --model_path quickstart/stage-1/modeling \\\n"
        "      --held_out_dir quickstart/data/held_out --output_file quickstart/results.json --stage '1 English'",
    )
    parser.add_argument("--model_path", metavar="DIR", required=True, help="Hugging Face model and tokenizer")
    parser.add_argument("--held_out_dir", metavar="DIR", required=True, help="folder with en.jsonl, zh.jsonl")
    parser.add_argument("--output_file", metavar="FILE", required=True, help="results of all stages (JSON), added to")
    parser.add_argument("--stage", metavar="NAME", required=True, help="name of the stage that made the model")
    parser.add_argument("--tensorboard_dir", metavar="DIR", help="the stage's TensorBoard logs, recorded for the table")
    parser.add_argument("--config_file", metavar="FILE", help="the stage's resolved settings, recorded for the table")
    parser.add_argument(
        "--max_length",
        metavar="TOKENS",
        type=value_types.sequence_length,
        help=f"most tokens of a window; default: {WINDOW_TOKENS}",
    )
    parser.add_argument(
        "--window_bytes",
        metavar="BYTES",
        type=value_types.sequence_length,
        help="instead of --max_length: most bytes of text in a window, so that models of different vocabularies see as"
        " much context before each character",
    )
    parser.add_argument(
        "--first_token",
        metavar="TOKEN",
        help="token that opens every window; default: the tokenizer's bos_token. Models are comparable only with the "
        "same one",
    )
    parser.add_argument(
        "--batch_size", metavar="N", type=value_types.positive_int, default=8, help="windows per forward pass"
    )
    parser.add_argument(
        "--max_bytes",
        metavar="BYTES",
        type=value_types.positive_int,
        help="about as much text of each language, evenly chosen from its documents; default: all",
    )
    return parser


def read_held_out(folder: Path, max_bytes: int | None = None) -> dict[str, list[str]]:
    """The held-out texts by language: the `target` of every record of every *.jsonl of the folder, or a part of them.

    With `max_bytes`, every n-th document of a language is taken, for the smallest n that suffices.
    """
    files = jsonl_files(folder)
    if not files:
        raise errors.UserError(f"no *.jsonl in --held_out_dir {folder}; examples/quickstart_corpus.py writes them")
    texts = {file.stem: [line.record["target"] for line in read_jsonl(file) if line.record] for file in files}
    if max_bytes is None:
        return texts
    sizes = {language: sum(len(text.encode()) for text in part) for language, part in texts.items()}
    return {language: part[:: math.ceil(sizes[language] / max_bytes) or 1] for language, part in texts.items()}


def windows(token_ids: list[int], max_length: int, first_id: int) -> Iterator[list[int]]:
    """Cut a document into windows of at most `max_length` tokens, `first_id` included; every token is in one window."""
    for start in range(0, len(token_ids), max_length - 1):
        yield [first_id, *token_ids[start : start + max_length - 1]]


def first_id_of(tokenizer, first_token: str | None) -> int:
    """The id of the token that opens windows. Raises UserError if the tokenizer has no such token."""
    token = tokenizer.bos_token if first_token is None else first_token
    if token in tokenizer.get_vocab():
        return tokenizer.get_vocab()[token]
    given = f"--first_token {first_token!r} is not a token of" if first_token else "there is no bos_token in"
    raise errors.UserError(
        f"{given} {tokenizer.name_or_path}; give --first_token one of its tokens, such as {tokenizer.eos_token!r}"
    )


def text_parts(text: str, most_bytes: int) -> Iterator[str]:
    """Cut a text into parts of at most `most_bytes` UTF-8 bytes, which are at least four, between characters."""
    start = size = 0
    for position, character in enumerate(text):
        width = len(character.encode())
        if size + width > most_bytes:
            yield text[start:position]
            start, size = position, 0
        size += width
    if text[start:]:
        yield text[start:]


def total_nats(model, batch: list[list[int]]) -> float:
    """The summed negative log-likelihood, in nats, of every token of the windows but their first."""
    import torch
    from torch.nn.functional import cross_entropy

    longest = max(map(len, batch))
    input_ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    labels = input_ids.masked_fill(mask == 0, -100)
    with torch.inference_mode():
        logits = model(input_ids=input_ids, attention_mask=mask).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum").item()


def measure(
    model,
    tokenizer,
    texts: list[str],
    *,
    language: str,
    first_id: int,
    max_length: int,
    window_bytes: int | None,
    batch_size: int,
) -> dict:
    """Figures of one language's texts. Totals are divided once, at the end, so a long document weighs by its length."""
    parts = texts
    if window_bytes is not None:
        parts = [part for text in texts for part in text_parts(text, window_bytes)]
        # Not cut again: a byte is one token at most, besides the space that SentencePiece adds.
        max_length = window_bytes + 2
    # verbose=False: a document longer than the model's window is no mistake here, since it is cut below.
    encoded = [tokenizer.encode(part, add_special_tokens=False, verbose=False) for part in parts]
    rows = [row for ids in encoded for row in windows(ids, max_length, first_id)]
    rows.sort(key=len)  # like lengths share a batch, so little padding is computed
    nats = 0.0
    with logs.progress(total=len(rows), description=f"Evaluating {language}", unit="windows") as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            nats += total_nats(model, batch)
            bar.update(len(batch))
    tokens, characters = sum(map(len, encoded)), sum(map(len, texts))
    size = sum(len(text.encode()) for text in texts)
    return {
        "documents": len(texts),
        "characters": characters,
        "bytes": size,
        "tokens": tokens,
        "nats_per_byte": nats / size,
        "bits_per_byte": nats / size / math.log(2),
        "tokens_per_character": tokens / characters,
    }


def evaluate(
    model_path: str,
    texts: dict[str, list[str]],
    *,
    max_length: int = WINDOW_TOKENS,
    window_bytes: int | None = None,
    first_token: str | None = None,
    batch_size: int = 8,
) -> dict[str, dict]:
    """Load a model in float32 and measure it on every language."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    settings = {"max_length": max_length, "window_bytes": window_bytes, "batch_size": batch_size}
    settings["first_id"] = first_id_of(tokenizer, first_token)
    model = AutoModelForCausalLM.from_pretrained(model_path, torch_dtype=torch.float32).eval()
    return {name: measure(model, tokenizer, part, language=name, **settings) for name, part in texts.items()}


def add_entry(output_file: Path, entry: dict) -> None:
    """Add one stage's entry to the results file, in place of an older one of the same name."""
    entries = json.loads(output_file.read_text(encoding="utf-8")) if output_file.exists() else []
    entries = [old for old in entries if old["stage"] != entry["stage"]] + [entry]
    unfinished = output_file.with_name(output_file.name + ".unfinished")
    unfinished.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, output_file)


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("quickstart_evaluate.py"):
        if not (Path(args.model_path) / "config.json").is_file():
            raise errors.UserError(f"--model_path {args.model_path} holds no config.json; name a Hugging Face folder")
        texts = read_held_out(Path(args.held_out_dir), args.max_bytes)
        if args.max_length and args.window_bytes:
            raise errors.UserError(
                f"--max_length {args.max_length} and --window_bytes {args.window_bytes} given; one of them is allowed"
            )
        window = {"max_length": args.max_length or WINDOW_TOKENS, "window_bytes": args.window_bytes}
        shared = {"first_token": args.first_token, "batch_size": args.batch_size}
        languages = evaluate(args.model_path, texts, **window, **shared)
        settings = {name: getattr(args, name) for name in ("stage", "model_path", "tensorboard_dir", "config_file")}
        settings["first_token"] = args.first_token
        settings["window"] = f"{args.window_bytes} bytes" if args.window_bytes else f"{window['max_length']} tokens"
        add_entry(Path(args.output_file), {**settings, "languages": languages})
        for language, figures in languages.items():
            print(
                f"{args.stage} | {language}: {figures['bits_per_byte']:.3f} bits per byte"
                f" | {figures['tokens_per_character']:.3f} tokens per character"
            )


if __name__ == "__main__":
    main()
