"""Every flag of every command, defined once, in plain argparse.

A flag that the original's README and code spell differently has both spellings on one line. What argparse can judge
by itself (type, range, choice) is judged here; what needs two flags or the file system is judged by the command, which
asks `unused_flags` for those that would change nothing, and takes their defaults from `with_defaults`.
This module imports little but the standard library, so `--help` is instant.
"""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from colossal_llama2.cli import settings_file
from colossal_llama2.cli.word_mistakes import check_words, repeated_lists
from colossal_llama2.launcher import place, report_to_torchrun, wait_for_first_of_host
from colossal_llama2.terminal_text import one_line, show_line

PLUGINS = ("gemini", "gemini_auto", "zero2", "zero2_cpu", "3d")
PRECISIONS = ("fp16", "bf16", "fp32")
SP_MODES = ("split_gather", "ring", "all_to_all")
MODEL_DTYPES = ("float16", "bfloat16", "float32")
MAX_BINS = 100_000
SPLICINGS = ("best_fit", "sequential", "none")
MINED_SCRIPTS = ("han", "any")
MAX_LENGTH = 2**20
# More would make a model of rows that no token has.
MAX_ROW_MULTIPLE = 2**16
SWITCH = ("auto", "on", "off")
MIXTURE_ENDS = ("repeat", "stop")


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations, shows defaults, and answers a mistake with one line."""

    def __init__(self, prog: str, description: str, example: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n{example}",
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print one line that names the mistake and where help is, once a host, and exit with code 2."""
        line = f"{self.prog}: error: {one_line(message).strip()} (see {self.prog} --help)"
        report_to_torchrun(line)
        wait_for_first_of_host()
        self.exit(2, f"{line}\n" if place().local_rank == 0 else None)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        # Prompts, pieces and paths may hold what the terminal's encoding lacks; that must not end a command.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        words = list(sys.argv[1:] if args is None else args)
        # Before all else: a misspelt required flag should be called misspelt, not missing.
        try:
            check_words(words, self)
        except ValueError as error:
            self.error(str(error))
        loaded = self._loaded_words(words)
        parsed, unknown = self.parse_known_args([*loaded, *words], namespace)
        if unknown:
            self.error(f"unexpected {' '.join(unknown)}; quote a value that has spaces, and check its flag")
        if place().rank == 0:
            for sentence in repeated_lists(words, self):
                show_line(f"{self.prog}: warning: {sentence}", file=sys.stderr)
        return parsed

    def _loaded_words(self, words: Sequence[str]) -> list[str]:
        path = settings_file.named_file(words) if settings_file.FLAG in self._option_string_actions else None
        if path is None:
            return []
        try:
            return settings_file.words_of(path, self)
        except ValueError as error:
            self.error(str(error))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the example's line breaks and appends defaults, except where the help says what an unset flag means."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required or action.default is None or isinstance(action.default, bool) and action.nargs == 0:
            return action.help or ""
        return super()._get_help_string(action)


# Types. Each raises ArgumentTypeError, which argparse turns into "argument --flag: <message>".


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, "a whole number of at least 1", lambda value: value >= 1)


def row_multiple(text: str) -> int:
    """A whole number from 1 to `MAX_ROW_MULTIPLE`."""
    allowed = f"a whole number from 1 to {MAX_ROW_MULTIPLE}"
    return _number(text, int, allowed, lambda value: 1 <= value <= MAX_ROW_MULTIPLE)


def at_least_two(text: str) -> int:
    """A whole number of at least 2."""
    return _number(text, int, "a whole number of at least 2", lambda value: value >= 2)


def non_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, "a whole number of at least 0", lambda value: value >= 0)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, "a number above 0", lambda value: value > 0)


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, float, "a number of at least 0", lambda value: value >= 0)


def probability(text: str) -> float:
    """A number above 0 and at most 1."""
    return _number(text, float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


def share(text: str) -> float:
    """A part of a whole that is neither all nor nothing."""
    return _number(text, float, "a number above 0 and below 1", lambda value: 0 < value < 1)


def seed_number(text: str) -> int:
    """A seed, as NumPy and PyTorch both take it."""
    return _number(text, int, "a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32)


def bin_count(text: str) -> int:
    """A number of bins; folders are named part-00000 to part-99999."""
    return _number(text, int, f"a whole number from 1 to {MAX_BINS}", lambda value: 1 <= value <= MAX_BINS)


def sequence_length(text: str) -> int:
    """A length in tokens that leaves room for text between <s> and </s>."""
    return _number(text, int, f"a whole number from 8 to {MAX_LENGTH}", lambda value: 8 <= value <= MAX_LENGTH)


def fraction(text: str) -> float:
    """A number of at least 0 and below 1."""
    return _number(text, float, "a number of at least 0 and below 1", lambda value: 0 <= value < 1)


def shard(text: str) -> tuple[int, int]:
    """A share i/n, counted from 1: "2/8" becomes (2, 8)."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' given, i/n with i from 1 to n allowed, such as 1/8")
    return int(match[1]), int(match[2])


def ray_address(text: str) -> str:
    """Where a Ray cluster is: HOST:PORT of its head node, or "auto"."""
    if text != "auto" and not re.fullmatch(r"[^\s/]+:\d{1,5}", text):
        raise argparse.ArgumentTypeError(f"'{text}' given, HOST:PORT such as 10.0.0.1:6379, or auto allowed")
    return text


def true_or_false(text: str) -> bool:
    """The words True and False, in any case."""
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"'{text}' given, True or False allowed")
    return values[text.lower()]


def source_weight(text: str) -> str:
    """SOURCE=WEIGHT, as it was given: a name and a number above 0."""
    name, _, weight = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"'{text}' given, SOURCE=WEIGHT such as zh=0.8 allowed")
    positive_float(weight)
    return text


def named_path(text: str) -> str:
    """NAME=PATH, as it is."""
    name, sign, path = text.partition("=")
    if not sign or not name or not path or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} given, NAME=PATH allowed, such as en=arrow_en/eval")
    return text


def named_share(text: str) -> str:
    """NAME=SHARE, a share over 0, as it is."""
    name, sign, value = text.rpartition("=")
    if not sign or not name:
        raise argparse.ArgumentTypeError(f"{text!r} given, NAME=SHARE allowed, such as en=0.05")
    positive_float(value)
    return text


def path_list(text: str) -> list[str]:
    """A comma-separated list of folders, in the given order."""
    return _comma_list(text, "give folders as DIR_1,DIR_2,DIR_3")


def role_list(text: str) -> list[str]:
    """A comma-separated list of names of roles."""
    return _comma_list(text, "give names as chatgpt,bing,bard")


def _comma_list(text: str, cure: str) -> list[str]:
    """The entries of a list with commas; `cure` is for one in which nothing else is left."""
    entries = [part.strip() for part in text.split(",")]
    if not all(entries):
        kept = ",".join(filter(None, entries))
        cure = f"type {shlex.quote(kept)}" if kept else cure
        raise argparse.ArgumentTypeError(f"'{text}' has an empty entry; {cure}")
    return entries


def _number(text: str, kind: type, allowed: str, accepts):
    try:
        value = kind(text)
        is_allowed = math.isfinite(value) and accepts(value)
    except (ValueError, OverflowError):
        is_allowed = False
    if not is_allowed:
        hint = _number_hint(text, kind, accepts)
        raise argparse.ArgumentTypeError(f"'{text}' given, {allowed} allowed" + (f"; {hint}" if hint else ""))
    return value


def _number_hint(text: str, kind: type, accepts) -> str:
    """What a number in another notation should be typed as, if that is certain; else ""."""
    plain = text.strip().lstrip("+").replace("_", "")
    if re.fullmatch(r"[\d.]+ ?%", plain, re.ASCII):
        plain, divisor = plain.rstrip("% "), 100
    elif re.fullmatch(r"[1-9]\d{0,2}(,\d{3})+", plain, re.ASCII):
        if kind is float:
            # In some countries a thousand, in others one.
            return ""
        plain, divisor = plain.replace(",", ""), 1
    elif re.fullmatch(r"\d+,\d+([eE][-+]?\d+)?", plain, re.ASCII):
        plain, divisor = plain.replace(",", "."), 1
    else:
        divisor = 1
    try:
        value = float(plain) / divisor
    except ValueError:
        return ""
    if not math.isfinite(value) or (kind is int and value != int(value)) or not accepts(kind(value)):
        return ""
    return f"type {value!r}" if kind is float else f"type {int(value)}"


def sampling_temperature(text: str) -> float:
    """A finite number above 0; 0 is what other tools call greedy decoding."""
    try:
        return positive_float(text)
    except argparse.ArgumentTypeError as error:
        is_zero = re.fullmatch(r"\+?0*\.?0*", text) is not None
        greedy = "; for the likeliest token at each place give --do_sample False" if is_zero else ""
        raise argparse.ArgumentTypeError(f"{error}{greedy}")


def candidate_count(text: str) -> int:
    """A whole number of at least 1; what other tools write for "no limit" is explained."""
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as error:
        cure = "; to sample among all tokens give a number as large as the vocabulary" if text in ("0", "-1") else ""
        raise argparse.ArgumentTypeError(f"{error}{cure}")


# Flags that mean something only beside others. Argparse's default is None, which tells whether one was given.


class DependentFlag(NamedTuple):
    """A flag's default, what it needs, in words, and whether the other flags have that."""

    default: Any
    needs: str
    is_used: Callable[[argparse.Namespace], bool]


DEPENDENT_FLAGS: dict[str, DependentFlag] = {
    "zero": DependentFlag(1, "needs --plugin 3d", lambda args: args.plugin == "3d"),
    "microbatch_size": DependentFlag(1, "needs --pp of at least 2", lambda args: args.pp > 1),
    "sp_mode": DependentFlag(
        "split_gather", "needs --enable_sequence_parallelism", lambda args: args.enable_sequence_parallelism
    ),
    "mixture_end": DependentFlag("repeat", "needs --mixture", lambda args: args.mixture is not None),
    "on_forgetting": DependentFlag("warn", "needs --forgetting_alarm", lambda args: bool(args.forgetting_alarm)),
    "neft_alpha": DependentFlag(5.0, "needs --use_neft", lambda args: args.use_neft),
    "keep_every": DependentFlag(None, "needs --keep_last", lambda args: args.keep_last is not None),
    "num_samples": DependentFlag(500, "needs --benchmark", lambda args: args.benchmark),
    "load_checkpoint": DependentFlag(None, "is not for --benchmark, which loads none", lambda args: not args.benchmark),
    "resume": DependentFlag(None, "is not for --benchmark, which saves nothing", lambda args: not args.benchmark),
}


def unused_flags(args: argparse.Namespace) -> list[str]:
    """One sentence for each flag that was given and would change nothing."""
    given = {name: getattr(args, name, None) for name in DEPENDENT_FLAGS}
    return [
        f"--{name} {value} {DEPENDENT_FLAGS[name].needs}; leave it out"
        for name, value in given.items()
        if value is not None and not DEPENDENT_FLAGS[name].is_used(args)
    ]


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """The same flags, with the defaults of those that were not given."""
    unset = [name for name in DEPENDENT_FLAGS if getattr(args, name, "not a flag of this command") is None]
    return argparse.Namespace(**{**vars(args), **{name: DEPENDENT_FLAGS[name].default for name in unset}})


def used_flags(args: argparse.Namespace) -> dict[str, Any]:
    """All flags by name but those that change nothing beside the others: what the same parser takes again."""
    is_used = {name: flag.is_used for name, flag in DEPENDENT_FLAGS.items() if hasattr(args, name)}
    return {name: value for name, value in vars(args).items() if name not in is_used or is_used[name](args)}


def _default(name: str) -> str:
    return f"(default: {DEPENDENT_FLAGS[name].default})"


# One parser per command.


def init_tokenizer_parser() -> CommandParser:
    """Flags of init_tokenizer.py."""
    parser = CommandParser(
        "init_tokenizer.py",
        "Append new pieces to a LLaMA tokenizer, so that a new language needs fewer tokens.",
        "  python init_tokenizer.py --source_tokenizer_dir llama-2-7b \\\n"
        "      --target_tokenizer_dir tokenizer-zh --expand_tokens_file new_tokens.jsonl",
    )
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--source_tokenizer_dir",
        metavar="DIR",
        required=True,
        help="folder with tokenizer.model, tokenizer_config.json and special_tokens_map.json",
    )
    group.add_argument(
        "--target_tokenizer_dir",
        metavar="DIR",
        required=True,
        help="folder to write; must not exist yet unless --overwrite is given",
    )
    group.add_argument(
        "--expand_tokens_file", metavar="FILE", required=True, help='new pieces, one {"piece": "..."} a line (jsonl)'
    )
    group.add_argument("--overwrite", action="store_true", help="replace the target once the new tokenizer is complete")
    pieces = parser.add_argument_group("pieces")
    pieces.add_argument(
        "--piece_scores",
        choices=("below", "zero"),
        default="below",
        help="below: falling in file order, below every existing merge; zero: all 0 and sorted by length, as in the "
        "original",
    )
    pieces.add_argument(
        "--closure",
        choices=("complete", "drop", "off"),
        default="complete",
        help="complete: also add the characters and intermediate pieces that the new ones need; drop: leave out pieces "
        "that no merge reaches; off: check nothing, as in the original",
    )
    pieces.add_argument(
        "--max_added_pieces",
        metavar="N",
        type=positive_int,
        default=None,
        help="most pieces to add, including those added by the closure; the last in the file are dropped first "
        "(default: no limit)",
    )
    pieces.add_argument(
        "--parity_text",
        metavar="PATH",
        nargs="+",
        default=None,
        help="jsonl or text files, or folders of them, to check the new tokenizer on as well; large text is sampled "
        "(default: the new pieces only)",
    )
    return parser


def init_model_parser() -> CommandParser:
    """Flags of init_model.py."""
    parser = CommandParser(
        "init_model.py",
        "Give each new token the mean of the embeddings of the source tokens it replaces.",
        "  python init_model.py --source_model_and_tokenizer_path llama-2-7b \\\n"
        "      --target_tokenizer_path tokenizer-zh --target_model_path llama-2-7b-zh",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--source_model_and_tokenizer_path",
        metavar="DIR",
        required=True,
        help="folder with a Hugging Face LLaMA (safetensors) and its tokenizer",
    )
    group.add_argument(
        "--target_tokenizer_path", metavar="DIR", required=True, help="the folder that init_tokenizer.py wrote"
    )
    group.add_argument(
        "--target_model_path",
        metavar="DIR",
        required=True,
        help="folder to write the model and its tokenizer to; new, or the same as --target_tokenizer_path",
    )
    group.add_argument(
        "--dtype",
        choices=("source", *MODEL_DTYPES),
        default="source",
        help="number format of the written weights; source: as the source model's; values too large for it are an "
        "error",
    )
    group.add_argument(
        "--pad_vocab_to_multiple_of",
        metavar="N",
        type=row_multiple,
        default=1,
        help="pad the embeddings to a multiple of N with rows that no token uses, for faster kernels and for --tp",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the target once the new model is complete; refused if it contains anything else",
    )
    return parser


def mine_tokens_parser() -> CommandParser:
    """Flags of colossal_llama2.tokenizer.mine_tokens."""
    parser = CommandParser(
        "mine_tokens.py",
        "Mine new pieces for a tokenizer from text, for init_tokenizer.py to add.",
        "  python -m colossal_llama2.tokenizer.mine_tokens --data_input_dirs data/zh \\\n"
        "      --source_tokenizer_dir llama-2-7b --output_file new_tokens.jsonl",
    )
    files = parser.add_argument_group("files")
    _add_data_input_dirs(files)
    files.add_argument(
        "--source_tokenizer_dir", metavar="DIR", required=True, help="folder with the tokenizer.model to extend"
    )
    files.add_argument(
        "--output_file",
        metavar="FILE",
        required=True,
        help='file for the pieces, one {"piece": "..."} a line (jsonl); must not exist yet',
    )
    files.add_argument(
        "--plot", metavar="FILE.png", default=None, help="file for a curve of tokens per character by number of pieces"
    )
    pieces = parser.add_argument_group("pieces")
    pieces.add_argument(
        "--num_new_tokens",
        metavar="N",
        type=positive_int,
        default=37104,
        help="most new pieces; 37,104 make LLaMA-2's vocabulary that of Colossal-LLaMA-2",
    )
    pieces.add_argument(
        "--script", choices=MINED_SCRIPTS, default="han", help="characters to mine: han (Chinese) or any"
    )
    pieces.add_argument(
        "--max_piece_length", metavar="CHARACTERS", type=positive_int, default=8, help="longest piece, in characters"
    )
    pieces.add_argument(
        "--min_count",
        metavar="N",
        type=positive_int,
        default=5,
        help="fewest occurrences in the sample of a character, or of a merge",
    )
    sample = parser.add_argument_group("sample")
    sample.add_argument(
        "--sample_bytes",
        metavar="BYTES",
        type=positive_int,
        default=100_000_000,
        help="most text of the script to train on, sampled from the input; needs about 25 times as much memory",
    )
    sample.add_argument(
        "--held_out",
        metavar="SHARE",
        type=share,
        default=0.125,
        help="share of the documents to measure on and never train on",
    )
    sample.add_argument(
        "--seed", metavar="N", type=seed_number, default=1024, help="seed of the sample and of what is held out"
    )
    return parser


def compare_parser() -> CommandParser:
    """Flags of colossal_llama2.tokenizer.compare."""
    parser = CommandParser(
        "compare.py",
        "Compare tokenizers on text: compression, unreachable pieces, speed.",
        "  python -m colossal_llama2.tokenizer.compare --tokenizer_dirs llama-2-7b,tokenizer-zh \\\n"
        "      --data_input_dirs data/zh,data/en --output_file comparison.json",
    )
    parser.add_argument(
        "--tokenizer_dirs",
        metavar="PATH,PATH",
        type=path_list,
        required=True,
        help="comma-separated Hugging Face tokenizer folders, tokenizer.model or tokenizer.json files",
    )
    _add_data_input_dirs(parser)
    parser.add_argument(
        "--output_file", metavar="FILE.json", default=None, help="file for the table as JSON; must not exist yet"
    )
    parser.add_argument(
        "--sample_documents",
        metavar="N",
        type=positive_int,
        default=10_000,
        help="most documents to compare on; a larger input is sampled",
    )
    return parser


def prepare_pretrain_parser() -> CommandParser:
    """Flags of prepare_pretrain_dataset.py."""
    parser = CommandParser(
        "prepare_pretrain_dataset.py",
        'Tokenize {"source", "target", "category"} jsonl and splice documents into samples, in bins.',
        "  python prepare_pretrain_dataset.py --data_input_dirs data/zh,data/en --tokenizer_dir tokenizer-zh \\\n"
        "      --data_cache_dir cache --data_jsonl_output_dir jsonl_output \\\n"
        "      --data_arrow_output_dir arrow_output --max_length 4096 --num_spliced_dataset_bins 10",
    )
    _add_prepare_arguments(parser, "spliced samples", splicing="best_fit", overlong=("split", "truncate"))
    return parser


def prepare_sft_parser() -> CommandParser:
    """Flags of prepare_sft_dataset.py."""
    parser = CommandParser(
        "prepare_sft_dataset.py",
        'Tokenize {"messages": [{"from", "content"}, ...]} jsonl, one conversation a sample, in bins.',
        "  python prepare_sft_dataset.py --data_input_dirs data/chat --tokenizer_dir tokenizer-zh \\\n"
        "      --data_cache_dir sft_cache --data_jsonl_output_dir sft_jsonl_output \\\n"
        "      --data_arrow_output_dir sft_arrow_output --max_length 4096 --num_spliced_dataset_bins 10",
    )
    # A conversation is never split: one that is too long keeps its whole leading turns.
    _add_prepare_arguments(parser, "samples", splicing="none", overlong=("truncate",))
    roles = parser.add_argument_group("roles")
    roles.add_argument(
        "--assistant_roles",
        metavar="NAME,NAME",
        type=role_list,
        default=None,
        help="other names of the assistant, such as chatgpt,bing,bard; a row with any other unknown role is a bad row",
    )
    roles.add_argument(
        "--assistant_first",
        choices=("mask", "train"),
        default="mask",
        help="answers before the first human message, as in conversations that were cut: mask them, or train on them",
    )
    return parser


def _add_prepare_arguments(parser: CommandParser, samples: str, *, splicing: str, overlong: tuple[str, ...]) -> None:
    data = parser.add_argument_group("input")
    _add_data_input_dirs(data)
    data.add_argument("--tokenizer_dir", metavar="DIR", required=True, help="folder with tokenizer.model")
    data.add_argument(
        "--on_bad_row",
        choices=("fail", "skip"),
        default="fail",
        help="fail: stop at the first row that cannot be used; skip: leave such rows out and list them in "
        "bad_rows.jsonl",
    )
    data.add_argument(
        "--on_bad_file",
        choices=("fail", "skip"),
        default="fail",
        help="a file that cannot be read to its end: fail (with --on_bad_row skip: at the end, exit code 1), or skip "
        "the rest of it and list it",
    )
    output = parser.add_argument_group("output (the jsonl and the arrow folder may not exist yet)")
    output.add_argument(
        "--data_cache_dir",
        metavar="DIR",
        default="cache",
        help="folder for finished units of work, from which an interrupted run continues; emptied at the end",
    )
    output.add_argument(
        "--data_jsonl_output_dir",
        metavar="DIR",
        default="jsonl_output",
        help=f"folder for the {samples} as part-00000.jsonl, ...",
    )
    output.add_argument(
        "--data_arrow_output_dir",
        metavar="DIR",
        default="arrow_output",
        help=f"folder for the {samples} as part-00000/, ..., which train.py reads, and for manifest.json",
    )
    output.add_argument("--no_jsonl", action="store_true", help="do not write the jsonl copy of the samples")
    shape = parser.add_argument_group("shape")
    shape.add_argument(
        "--max_length", metavar="TOKENS", type=sequence_length, default=4096, help="longest sample, in tokens"
    )
    shape.add_argument(
        "--num_spliced_dataset_bins",
        metavar="N",
        type=bin_count,
        default=10,
        help="number of bins (part-* folders) to spread the data over",
    )
    shape.add_argument(
        "--splicing",
        choices=SPLICINGS,
        default=splicing,
        help="how documents share a sample: best_fit fills samples best; sequential keeps the input order; none: one "
        "per sample",
    )
    shape.add_argument(
        "--overlong",
        choices=overlong,
        default=overlong[0],
        help="a document over --max_length is split into several pieces or truncated"
        if "split" in overlong
        else "a conversation over --max_length keeps the leading turns that fit whole",
    )
    shape.add_argument(
        "--eval_fraction",
        metavar="F",
        type=fraction,
        default=0.0,
        help="share of the documents of each category to hold out, chosen by a hash of the text and written as eval/ "
        "beside the bins",
    )
    shape.add_argument(
        "--eval_dedup",
        action="store_true",
        help="report how many held-out documents share 13 consecutive words with training text",
    )
    shape.add_argument(
        "--seed", metavar="N", type=seed_number, default=1024, help="seed of the order and of the held-out part"
    )
    _add_work_arguments(parser)


def _add_work_arguments(parser: CommandParser) -> None:
    """Flags that the output does not depend on."""
    work = parser.add_argument_group("work")
    work.add_argument(
        "--num_workers",
        metavar="N",
        type=positive_int,
        default=None,
        help="processes that tokenize and write; the output does not depend on it (default: the number of CPU cores)",
    )
    work.add_argument(
        "--shard",
        metavar="i/n",
        type=shard,
        default=None,
        help="do the i-th of n shares of the work, in folders that all n runs share; the last to finish writes the "
        "bins",
    )
    work.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="run on the cores of this machine, or on a Ray cluster whose nodes share the folders",
    )
    work.add_argument(
        "--ray_address",
        metavar="HOST:PORT",
        type=ray_address,
        default=None,
        help="head node of the Ray cluster, or auto for the cluster that this machine is in (default: start Ray here "
        "with --num_workers cores)",
    )


def inspect_data_parser() -> CommandParser:
    """Flags of colossal_llama2/dataset/inspect_data.py."""
    parser = CommandParser(
        "python -m colossal_llama2.dataset.inspect_data",
        "Show prepared data: decoded samples with what is trained and what is masked, the account, two charts.",
        "  python -m colossal_llama2.dataset.inspect_data arrow_output/part-00000 \\\n"
        "      --tokenizer_dir tokenizer-zh --sample 3 --plots charts",
    )
    group = parser.add_argument_group("input")
    group.add_argument("part", metavar="PART", help="a prepared bin, such as arrow_output/part-00000")
    group.add_argument(
        "--tokenizer_dir", metavar="DIR", required=True, help="the tokenizer that the bin was prepared with"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--sample", metavar="N", type=non_negative_int, default=5, help="number of samples to show")
    group.add_argument("--seed", metavar="N", type=seed_number, default=1024, help="seed of which samples are shown")
    group.add_argument(
        "--plots",
        metavar="DIR",
        default=None,
        help="folder for lengths.png and categories.png",
    )
    return parser


def _add_data_input_dirs(group) -> None:
    group.add_argument(
        "--data_input_dirs",
        metavar="DIR,DIR",
        type=path_list,
        required=True,
        help="comma-separated folders; reads every *.jsonl, *.json, *.ndjson and *.jl directly inside, also compressed "
        "(.gz, .zst, .zstd, .bz2, .xz), and every *.parquet",
    )


def train_parser() -> CommandParser:
    """Flags of train.py."""
    parser = CommandParser(
        "train.py",
        "Continue the pre-training of a LLaMA model on prepared data, with ColossalAI.",
        "  colossalai run --nproc_per_node 8 --hostfile hostfile train.py \\\n"
        "      --pretrained llama-2-7b-zh --dataset arrow_output/part-00000 arrow_output/part-00001 \\\n"
        "      --plugin zero2 --mixed_precision bf16 --lr 1e-4 --use_grad_checkpoint --use_flash_attn",
    )
    _add_training_arguments(parser, accumulation_steps=1)
    parser.set_defaults(stage="pretrain", pad_token="unk")
    return parser


def train_sft_parser() -> CommandParser:
    """Flags of train_sft.py: those of train.py and NEFTune."""
    parser = CommandParser(
        "train_sft.py",
        "Fine-tune a LLaMA model on prepared conversations, with ColossalAI.",
        "  colossalai run --nproc_per_node 8 --hostfile hostfile train_sft.py \\\n"
        "      --pretrained llama-2-7b-zh --dataset sft_arrow_output/part-00000 sft_arrow_output/part-00001 \\\n"
        "      --plugin zero2 --mixed_precision bf16 --lr 5e-5 --accumulation_steps 8 --use_neft",
    )
    _add_training_arguments(parser, accumulation_steps=8)
    parser.set_defaults(stage="sft", pad_token="eos")
    sft = parser.add_argument_group("fine-tuning")
    sft.add_argument("--use_neft", action="store_true", help="add NEFTune noise to the embeddings while training")
    sft.add_argument(
        "--neft_alpha",
        metavar="ALPHA",
        type=positive_float,
        default=None,
        help=f"scale of NEFTune's noise; the paper tries 5, 10 and 15 {_default('neft_alpha')}",
    )
    return parser


def selftest_parser() -> CommandParser:
    """Flags of colossal_llama2.train.selftest: those of train.py that decide how a step is computed, and its own."""
    parser = CommandParser(
        "selftest",
        "Prove that training on this machine is the mathematics of a plain loop, and that a resumed run repeats it.",
        "  colossalai run --nproc_per_node 8 --hostfile hostfile -m colossal_llama2.train.selftest \\\n"
        "      --plugin zero2 --mixed_precision bf16 --work_dir /shared/selftest",
    )
    own = parser.add_argument_group("test")
    own.add_argument(
        "--work_dir",
        metavar="DIR",
        default="selftest",
        help="new folder that all hosts share; removed if everything is equal",
    )
    own.add_argument("--steps", metavar="N", type=at_least_two, default=10, help="optimizer steps")
    _add_compute_arguments(parser.add_argument_group("model"))
    _add_recipe_arguments(parser, accumulation_steps=1, has_epochs=False)
    _add_parallel_arguments(parser)
    parser.set_defaults(micro_batch_size=2, mixed_precision="bf16")
    return parser


def _add_training_arguments(parser: CommandParser, *, accumulation_steps: int) -> None:
    _add_model_arguments(parser)
    _add_recipe_arguments(parser, accumulation_steps=accumulation_steps)
    _add_parallel_arguments(parser)
    _add_evaluation_arguments(parser)
    _add_output_arguments(parser)
    _add_dry_run_arguments(parser)
    _add_settings_arguments(parser)
    _add_benchmark_arguments(parser)


def _add_model_arguments(parser: CommandParser) -> None:
    data = parser.add_argument_group("data and model")
    data.add_argument(
        "--pretrained",
        metavar="DIR",
        required=True,
        help="Hugging Face LLaMA model (safetensors) and tokenizer to start from",
    )
    data.add_argument(
        "--dataset",
        metavar="DIR",
        nargs="+",
        required=True,
        help="prepared part-* folders in reading order, or folders that contain them; NAME=DIR names the source",
    )
    _add_order_arguments(data)
    data.add_argument(
        "--max_length",
        metavar="TOKENS",
        type=sequence_length,
        default=4096,
        help="pad samples to at most this length; a longer sample is an error; at most the number of positions of the "
        "model",
    )
    data.add_argument(
        "--train_new_rows_only",
        action="store_true",
        help="train only the embedding rows that init_model.py added; everything else stays the same bit for bit",
    )
    _add_compute_arguments(data)


def _add_order_arguments(data) -> None:
    data.add_argument(
        "--bucketed",
        action="store_true",
        help="read bucket after bucket: bucket k is part k of every source, shuffled on its own; without it all "
        "samples are shuffled together",
    )
    data.add_argument(
        "--mixture",
        metavar="SOURCE=WEIGHT",
        nargs="+",
        type=source_weight,
        default=None,
        help="share of each source in the tokens of a bucket; the source named first is read once (default: the sizes "
        "of the sources)",
    )
    data.add_argument(
        "--mixture_end",
        choices=MIXTURE_ENDS,
        default=None,
        help=f"when a source of --mixture runs out: repeat it, or stop the bucket {_default('mixture_end')}",
    )


def _add_compute_arguments(data) -> None:
    data.add_argument(
        "--document_mask",
        choices=SWITCH,
        default="auto",
        help="keep the documents of a sample apart in attention, positions and loss; auto: if the data has document "
        "lengths; off: as in the original",
    )
    data.add_argument(
        "--freeze_non_embeds_params", action="store_true", help="train only the input and output embeddings"
    )
    data.add_argument(
        "--use_flash_attn",
        action="store_true",
        help="use flash-attn on GPUs that support it; everywhere else PyTorch's scaled_dot_product_attention is used",
    )
    data.add_argument(
        "--use_grad_checkpoint", action="store_true", help="recompute activations: less memory, slower steps"
    )
    data.add_argument(
        "--chunked_loss",
        choices=SWITCH,
        default="auto",
        help="compute the loss without ever holding the logits of the whole vocabulary; auto: wherever that works",
    )


def _add_recipe_arguments(parser: CommandParser, *, accumulation_steps: int, has_epochs: bool = True) -> None:
    recipe = parser.add_argument_group("optimization")
    if has_epochs:
        recipe.add_argument("--num_epochs", metavar="N", type=positive_int, default=1, help="passes over the data")
        recipe.add_argument(
            "--max_steps",
            metavar="STEPS",
            type=positive_int,
            default=None,
            help="stop after this many optimizer steps, even in the middle of an epoch (default: at the end of the "
            "last epoch)",
        )
    recipe.add_argument(
        "--micro_batch_size",
        "--batch_size",
        metavar="N",
        type=positive_int,
        default=1,
        help="samples per forward pass and data-parallel rank",
    )
    recipe.add_argument(
        "--accumulation_steps",
        metavar="N",
        type=positive_int,
        default=accumulation_steps,
        help="micro batches per optimizer step",
    )
    recipe.add_argument(
        "--lr",
        metavar="LR",
        type=positive_float,
        default=3e-4,
        help="peak learning rate; a cosine schedule lowers it to a tenth",
    )
    recipe.add_argument(
        "-s",
        "--warmup_steps",
        metavar="STEPS",
        type=non_negative_int,
        default=None,
        help="optimizer steps of linear warm-up (default: 2.5 %% of all steps)",
    )
    recipe.add_argument(
        "-w",
        "--weight_decay",
        metavar="W",
        type=non_negative_float,
        default=0.1,
        help="AdamW's weight decay; norms do not decay",
    )
    recipe.add_argument(
        "--gradient_clipping",
        "--grad_clip",
        metavar="NORM",
        type=non_negative_float,
        default=1.0,
        help="largest gradient norm; 0 turns clipping off",
    )
    recipe.add_argument(
        "--mixed_precision",
        choices=PRECISIONS,
        default="fp16",
        help="number format of the forward and backward passes; fp32 is for tests and rehearsals and does not work "
        "with gemini",
    )
    recipe.add_argument(
        "--seed", metavar="N", type=seed_number, default=1024, help="seed of the data order and of NEFTune noise"
    )


def _add_parallel_arguments(parser: CommandParser) -> None:
    parallel = parser.add_argument_group("parallelism")
    parallel.add_argument("--plugin", choices=PLUGINS, default="gemini", help="ColossalAI plugin")
    parallel.add_argument(
        "--tp", metavar="N", type=positive_int, default=1, help="tensor-parallel size, for --plugin 3d"
    )
    parallel.add_argument(
        "--zero",
        "--zero_stage",
        type=int,
        choices=(0, 1, 2),
        default=None,
        help=f"ZeRO stage, for --plugin 3d {_default('zero')}",
    )
    parallel.add_argument(
        "--pp", metavar="N", type=positive_int, default=1, help="pipeline stages, for --plugin 3d with --zero 0 or 1"
    )
    parallel.add_argument(
        "--microbatch_size",
        metavar="N",
        type=positive_int,
        default=None,
        help="samples that a pipeline stage passes on at a time; divides --micro_batch_size into at least --pp parts "
        f"{_default('microbatch_size')}",
    )
    parallel.add_argument(
        "--enable_sequence_parallelism",
        action="store_true",
        help="split samples along their length as well, for --plugin 3d",
    )
    parallel.add_argument(
        "--sp_mode",
        choices=SP_MODES,
        default=None,
        help="split_gather and ring: over the tensor-parallel ranks; all_to_all: over separate ranks, see --sp "
        f"{_default('sp_mode')}",
    )
    parallel.add_argument(
        "--sp", metavar="N", type=positive_int, default=1, help="sequence-parallel size, for --sp_mode all_to_all"
    )


class _BenchmarkSwitch(argparse.Action):
    """A switch after which --dataset need not be given."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            if action.dest == "dataset":
                action.required = False


def _add_benchmark_arguments(parser: CommandParser) -> None:
    benchmark = parser.add_argument_group("benchmark")
    benchmark.add_argument(
        "--benchmark",
        action=_BenchmarkSwitch,
        nargs=0,
        default=False,
        help="measure steps on random tokens, in place of --dataset, and write nothing",
    )
    benchmark.add_argument(
        "--num_samples",
        metavar="N",
        type=positive_int,
        default=None,
        help=f"random samples, of --max_length tokens {_default('num_samples')}",
    )
    benchmark.add_argument(
        "--profile", metavar="DIR", default=None, help="with --benchmark: folder for PyTorch's trace of two steps"
    )
    benchmark.add_argument(
        "--peak_tflops",
        metavar="TFLOPS",
        type=positive_float,
        default=None,
        help="peak of one device, for MFU, while training too (default: known for A100, A800, H100, H800 and some "
        "others)",
    )


def _add_evaluation_arguments(parser: CommandParser) -> None:
    evaluation = parser.add_argument_group("evaluation while training")
    evaluation.add_argument(
        "--eval_dataset",
        metavar="NAME=DIR",
        nargs="+",
        type=named_path,
        default=None,
        help="held-out data for loss and bits per byte, as NAME=DIR: folders that a prepare command wrote with "
        "--eval_fraction",
    )
    evaluation.add_argument(
        "--eval_interval",
        metavar="STEPS",
        type=positive_int,
        default=None,
        help="optimizer steps between evaluations; one also runs before the first step and at the end of each epoch "
        "and of the run",
    )
    evaluation.add_argument(
        "--forgetting_alarm",
        metavar="NAME=SHARE",
        nargs="+",
        type=named_share,
        default=None,
        help="warn when the bits per byte of that --eval_dataset exceed their first value by more than this share",
    )
    evaluation.add_argument(
        "--on_forgetting",
        choices=("warn", "stop"),
        default=None,
        help=f"what --forgetting_alarm does: warn, or stop: save and exit with code 1 {_default('on_forgetting')}",
    )


def _add_dry_run_arguments(parser: CommandParser) -> None:
    dry_run = parser.add_argument_group("dry run")
    dry_run.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, print the plan, memory and disk space, and exit before the first step; nothing is "
        "written; with --benchmark neither data nor weights are needed",
    )
    dry_run.add_argument(
        "--num_ranks",
        metavar="N",
        type=positive_int,
        default=None,
        help="with --dry_run: plan for this many GPUs, which need not exist here (default: the launcher's processes)",
    )


def _add_output_arguments(parser: CommandParser) -> None:
    output = parser.add_argument_group("checkpoints and logs")
    output.add_argument(
        "--save_dir", metavar="DIR", default="checkpoint_dir", help="folder for checkpoints and the final modeling/"
    )
    output.add_argument(
        "--save_interval", metavar="STEPS", type=positive_int, default=1000, help="optimizer steps between checkpoints"
    )
    output.add_argument(
        "--skip_save_each_epoch",
        action="store_true",
        help="do not save at the end of each epoch; the end of the run is always saved",
    )
    output.add_argument(
        "--load_checkpoint",
        metavar="DIR",
        default=None,
        help="checkpoint folder to resume from, or its modeling/ folder to load the weights only",
    )
    output.add_argument(
        "--continue_data",
        action="store_true",
        help="with --load_checkpoint CHECKPOINT/modeling: continue from that checkpoint's position in the data",
    )
    output.add_argument(
        "--resume",
        choices=("auto",),
        default=None,
        help="auto: continue from the newest complete checkpoint in --save_dir; start from the beginning if there is "
        "none",
    )
    output.add_argument(
        "--keep_last",
        metavar="K",
        type=positive_int,
        default=None,
        help="keep the K newest checkpoints and remove older ones (default: keep all)",
    )
    output.add_argument(
        "--keep_every",
        metavar="STEPS",
        type=positive_int,
        default=None,
        help="with --keep_last: also keep checkpoints whose step is a multiple of this",
    )
    output.add_argument(
        "--max_bad_steps",
        metavar="N",
        type=non_negative_int,
        default=0,
        help="number of steps with a NaN/Inf loss or gradient norm to skip before the run ends",
    )
    output.add_argument(
        "--dist_timeout",
        metavar="SECONDS",
        type=positive_float,
        default=600.0,
        help="how long ranks wait for each other; must be longer than a save takes",
    )
    output.add_argument(
        "--tensorboard_dir",
        metavar="DIR",
        default="logs_dir",
        help="folder for TensorBoard; if it has events of another run, a folder inside it is used",
    )
    output.add_argument(
        "--config_file",
        metavar="FILE",
        default="config_file",
        help="file to write the resolved settings to (JSON); if it belongs to another run, the name of --save_dir is "
        "added to it",
    )


def _add_settings_arguments(parser: CommandParser) -> None:
    settings = parser.add_argument_group("settings of another run")
    settings.add_argument(
        settings_file.FLAG,
        metavar="FILE",
        default=None,
        help="read settings from a file that --config_file wrote, such as SAVE_DIR/settings.json; flags on the command "
        "line win, but a switch that the file turns on stays on",
    )


def verify_parser() -> CommandParser:
    """Flags of colossal_llama2/train/verify.py."""
    parser = CommandParser(
        "python -m colossal_llama2.train.verify",
        "Check one checkpoint: files, hashes, shapes, numbers, tokenizer. Exit code 0 if it is whole, 2 if it is not.",
        "  python -m colossal_llama2.train.verify checkpoint_dir/epoch-0_step-400",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="such as checkpoint_dir/epoch-0_step-400; of a run's folder, the newest in it",
    )
    return parser


def inference_parser() -> CommandParser:
    """Flags of inference_example.py."""
    parser = CommandParser(
        "inference_example.py",
        "Continue a prompt with a trained model.",
        "  python inference_example.py --model_path checkpoint_dir/modeling --input_txt 明月松间照，",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model_path",
        metavar="PATH",
        default="hpcai-tech/Colossal-LLaMA-2-7b-base",
        help="local folder or Hugging Face name of a LLaMA model with its tokenizer; other models are refused",
    )
    model.add_argument("--device", default=None, help="cpu, cuda:0, ... (default: cuda:0 if there is a GPU, else cpu)")
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--input_txt",
        metavar="TEXT",
        default="明月松间照，",
        help="prompt or question; the mark \\n\\n->\\n\\n of the published models is appended",
    )
    generation.add_argument(
        "--max_new_tokens",
        metavar="N",
        type=positive_int,
        default=512,
        help="most tokens to generate, prompt not counted",
    )
    generation.add_argument(
        "--do_sample",
        metavar="True|False",
        type=true_or_false,
        default=True,
        help="sample; False always takes the likeliest token",
    )
    generation.add_argument(
        "--temperature", metavar="T", type=sampling_temperature, default=0.3, help="sampling temperature"
    )
    generation.add_argument(
        "--top_k", metavar="K", type=candidate_count, default=50, help="sample among the K likeliest tokens"
    )
    generation.add_argument(
        "--top_p", metavar="P", type=probability, default=0.95, help="sample among tokens of this total probability"
    )
    generation.add_argument("--seed", metavar="N", type=seed_number, default=None, help="seed (default: not set)")
    return parser
