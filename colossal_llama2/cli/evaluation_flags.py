"""The flags of python -m colossal_llama2.evaluation."""

from colossal_llama2.cli.inference_flags import DTYPES
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.cli.value_types import auto_or_count, non_negative_int, positive_int, seed_number, task_list
from colossal_llama2.task_names import TASK_NAMES

COMMAND = "python -m colossal_llama2.evaluation"


def evaluation_parser() -> CommandParser:
    """Flags of python -m colossal_llama2.evaluation."""
    parser = CommandParser(
        COMMAND,
        "Evaluate models on MMLU, CMMLU, C-Eval, AGIEval, GAOKAO-Bench, GSM8K, in-context learning and bits per byte.",
        f"  {COMMAND} --model_path llama-2-7b checkpoint_dir/modeling \\\n"
        "      --tasks cmmlu,mmlu,icl --data_dir evaluation_sets --output_file results.jsonl",
    )
    _add_measured(parser)
    _add_how(parser)
    return parser


def _add_measured(parser: CommandParser) -> None:
    group = parser.flag_group("what is measured")
    group.add(
        "--model_path",
        metavar="PATH",
        nargs="+",
        required=True,
        help="local folders or Hugging Face names of LLaMA models with their tokenizers, one row of the table each",
    )
    group.add(
        "--tasks",
        metavar="NAME[=PATH],...",
        type=task_list,
        required=True,
        help=f"comma-separated list of {', '.join(TASK_NAMES)}; a set's files are in PATH, or in a folder of its name "
        "in --data_dir. bits_per_byte needs =FILE, a jsonl file of texts, and may be given several times; icl is an "
        "in-context-learning probe, which needs no files",
    )
    group.add("--data_dir", metavar="DIR", default=None, help="folder with a folder for each set, such as mmlu/")
    group.add(
        "--num_fewshot",
        metavar="N",
        type=non_negative_int,
        default=None,
        help="examples before each question, of the sets that have some (default: 8 for gsm8k, 0 for gaokao, 5 for "
        "the others)",
    )
    group.add(
        "--limit",
        metavar="N",
        type=positive_int,
        default=None,
        help="at most N items of each task, taken from its subjects by turns; of icl, exactly N (default: all; 300 of "
        "icl)",
    )
    # None, so that one that was given without icl can be refused.
    group.add("--seed", metavar="N", type=seed_number, default=None, help="seed of the items of icl (default: 0)")


def _add_how(parser: CommandParser) -> None:
    group = parser.flag_group("how")
    group.add("--device", default=None, help="cpu, cuda:0, ... (default: cuda:0 if there is a GPU, else cpu)")
    group.add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision to compute in. auto: on a GPU that of the weights, on CPUs fp32",
    )
    group.add(
        "--batch_size",
        metavar="N|auto",
        type=auto_or_count,
        default=None,
        help="items that are computed together; auto: as many as their lengths and the memory allow (default: auto)",
    )
    group.add(
        "--output_file",
        metavar="FILE.jsonl",
        default=None,
        help="jsonl to which every item is appended with its logits or its answer; the same command continues it. "
        "FILE.json beside it gets the table's figures, and FILE.png a chart",
    )
    group.add(
        "--write_card",
        action="store_true",
        help="put the results into the model card, README.md in each model's folder: a table, and the model-index that "
        "hubs read. What an earlier evaluation put there is replaced",
    )
    group.add("--by_subject", action="store_true", help="print a line for each subject too")
