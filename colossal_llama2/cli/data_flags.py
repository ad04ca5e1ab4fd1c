"""The flags of prepare_pretrain_dataset.py, prepare_sft_dataset.py and inspect_data.py."""

from colossal_llama2.cli.flag_definitions import FlagGroup
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.cli.value_types import (
    bin_count,
    fraction,
    non_negative_int,
    path_list,
    positive_int,
    ray_address,
    role_list,
    seed_number,
    sequence_length,
    shard,
)

SPLICINGS = ("best_fit", "sequential", "none")


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
    roles = parser.flag_group("conversations")
    roles.add(
        "--chat_template",
        metavar="NAME|FILE.jinja",
        default="colossal",
        help="how conversations are written: colossal (Human: ...Assistant: ...), model (the chat template in "
        "--tokenizer_dir), llama2, chatml, or a Jinja file; train_sft.py saves it with the model",
    )
    roles.add(
        "--assistant_roles",
        metavar="NAME,NAME",
        type=role_list,
        default=None,
        help="other names of the assistant, such as chatgpt,bing,bard; a row with any other unknown role is a bad row",
    )
    roles.add(
        "--assistant_first",
        choices=("mask", "train"),
        default="mask",
        help="what to do with answers before the first human message, as in conversations that were cut: mask them, or "
        "train on them",
    )
    return parser


def _add_prepare_arguments(parser: CommandParser, samples: str, *, splicing: str, overlong: tuple[str, ...]) -> None:
    data = parser.flag_group("input")
    add_data_input_dirs(data)
    data.add(
        "--tokenizer_dir",
        metavar="DIR",
        required=True,
        help="folder with tokenizer.model, or with tokenizer.json of a byte-level BPE",
    )
    data.add(
        "--on_bad_row",
        choices=("fail", "skip"),
        default="fail",
        help="fail: stop at the first row that cannot be used; skip: leave such rows out and list them in "
        "bad_rows.jsonl",
    )
    data.add(
        "--on_bad_file",
        choices=("fail", "skip"),
        default="fail",
        help="what to do with a file that cannot be read to its end; fail: stop, or with --on_bad_row skip continue "
        "and exit with code 1; skip: leave out the rest of the file and list it",
    )
    output = parser.flag_group("output (the jsonl and the arrow folder may not exist yet)")
    output.add(
        "--data_cache_dir",
        metavar="DIR",
        default="cache",
        help="folder for finished units of work, from which an interrupted run continues; emptied at the end",
    )
    output.add(
        "--data_jsonl_output_dir",
        metavar="DIR",
        default="jsonl_output",
        help=f"folder for the {samples} as part-00000.jsonl, ...",
    )
    output.add(
        "--data_arrow_output_dir",
        metavar="DIR",
        default="arrow_output",
        help=f"folder for the {samples} as part-00000/, ..., which train.py reads, and for manifest.json",
    )
    output.add("--no_jsonl", action="store_true", help="do not write the jsonl copy of the samples")
    shape = parser.flag_group("shape")
    shape.add("--max_length", metavar="TOKENS", type=sequence_length, default=4096, help="maximum length of a sample")
    shape.add(
        "--num_spliced_dataset_bins",
        metavar="N",
        type=bin_count,
        default=10,
        help="number of bins (part-* folders) to spread the data over",
    )
    shape.add(
        "--splicing",
        choices=SPLICINGS,
        default=splicing,
        help="how documents share a sample: best_fit fills samples best; sequential keeps the input order; none: one "
        "per sample",
    )
    shape.add(
        "--overlong",
        choices=overlong,
        default=overlong[0],
        help="what to do with a document over --max_length: split it into several pieces, or truncate it"
        if "split" in overlong
        else "a conversation over --max_length keeps the leading turns that fit completely",
    )
    shape.add(
        "--eval_fraction",
        metavar="F",
        type=fraction,
        default=0.0,
        help="fraction of the documents of each category to hold out, chosen by a hash of the text and written as "
        "eval/ beside the bins",
    )
    shape.add(
        "--eval_dedup",
        action="store_true",
        help="report how many held-out documents share 13 consecutive words with training text",
    )
    shape.add(
        "--seed",
        metavar="N",
        type=seed_number,
        default=1024,
        help="seed of the order and of the choice of held-out documents",
    )
    _add_work_arguments(parser)


def _add_work_arguments(parser: CommandParser) -> None:
    """Flags that the output does not depend on."""
    work = parser.flag_group("work")
    work.add(
        "--num_workers",
        metavar="N",
        type=positive_int,
        default=None,
        help="number of processes that tokenize and write; the output does not depend on it (default: the number of "
        "CPU cores)",
    )
    work.add(
        "--shard",
        metavar="i/n",
        type=shard,
        default=None,
        help="do the i-th of n shards of the work, in folders that all n runs share; the last to finish writes the "
        "bins",
    )
    work.add(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="where to run: on the cores of this machine, or on a Ray cluster whose nodes share the folders",
    )
    work.add(
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
        "Show prepared data: decoded samples with what is trained and what is masked, the manifest, two charts.",
        "  python -m colossal_llama2.dataset.inspect_data arrow_output/part-00000 \\\n"
        "      --tokenizer_dir tokenizer-zh --sample 3 --plots charts",
    )
    group = parser.flag_group("input")
    group.add("part", metavar="PART", help="a prepared bin, such as arrow_output/part-00000")
    group.add("--tokenizer_dir", metavar="DIR", required=True, help="the tokenizer that the bin was prepared with")
    group = parser.flag_group("output")
    group.add("--sample", metavar="N", type=non_negative_int, default=5, help="number of samples to show")
    group.add("--seed", metavar="N", type=seed_number, default=1024, help="seed of the choice of samples")
    group.add(
        "--plots",
        metavar="DIR",
        default=None,
        help="folder for lengths.png and categories.png",
    )
    return parser


def add_data_input_dirs(group: FlagGroup) -> None:
    """Add --data_input_dirs to a group."""
    group.add(
        "--data_input_dirs",
        metavar="DIR,DIR",
        type=path_list,
        required=True,
        help="comma-separated folders; reads every *.jsonl, *.json, *.ndjson and *.jl directly inside, also compressed "
        "(.gz, .zst, .zstd, .bz2, .xz), and every *.parquet",
    )
