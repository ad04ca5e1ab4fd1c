"""The flags of init_tokenizer.py, init_model.py, merge_lora.py, mine_tokens.py, compare.py and convert_tiktoken.py."""

from colossal_llama2.cli.data_flags import add_data_input_dirs
from colossal_llama2.cli.flag_definitions import FlagGroup
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.cli.value_types import (
    path_list,
    positive_int,
    row_multiple,
    seed_number,
    share,
)

MODEL_DTYPES = ("float16", "bfloat16", "float32")
MINED_SCRIPTS = ("han", "any")
LLAMA_3_VERSIONS = ("3.0", "3.1")


def init_tokenizer_parser() -> CommandParser:
    """Flags of init_tokenizer.py."""
    parser = CommandParser(
        "init_tokenizer.py",
        "Append new pieces to a LLaMA tokenizer, so that a new language needs fewer tokens.",
        "  python init_tokenizer.py --source_tokenizer_dir llama-2-7b \\\n"
        "      --target_tokenizer_dir tokenizer-zh --expand_tokens_file new_tokens.jsonl",
    )
    group = parser.flag_group("tokenizer")
    group.add(
        "--source_tokenizer_dir",
        metavar="DIR",
        required=True,
        help="folder with tokenizer.model (SentencePiece, as LLaMA-2) or tokenizer.json (byte-level BPE, as LLaMA-3), "
        "tokenizer_config.json and special_tokens_map.json",
    )
    group.add(
        "--target_tokenizer_dir",
        metavar="DIR",
        required=True,
        help="folder to write; must not exist yet unless --overwrite is given",
    )
    group.add(
        "--expand_tokens_file", metavar="FILE", required=True, help='new pieces, one {"piece": "..."} per line (jsonl)'
    )
    group.add("--overwrite", action="store_true", help="replace the target once the new tokenizer is complete")
    _add_marks(group)
    _add_extension_of_pieces(parser.flag_group("pieces"))
    return parser


def _add_marks(group: FlagGroup) -> None:
    for mark, place in (("bos", "begins"), ("eos", "ends")):
        group.add(
            f"--{mark}_token",
            metavar="TOKEN",
            default=None,
            help=f"added token that {place} documents from now on, for a chat model whose {mark}_token belongs to its "
            "chats (byte-level BPE only; default: the source's)",
        )


def _add_extension_of_pieces(pieces: FlagGroup) -> None:
    pieces.add(
        "--piece_scores",
        choices=("below", "zero"),
        default="below",
        help="below: decreasing in the order of the file, below every existing merge; zero: all 0, sorted by length, "
        "as in the original (SentencePiece only)",
    )
    pieces.add(
        "--closure",
        choices=("complete", "drop", "off"),
        default="complete",
        help="complete: also add the characters and intermediate pieces that the new ones need; drop: leave out the "
        "pieces that would need them; off: add the given pieces alone, as in the original, even if a check fails",
    )
    pieces.add(
        "--max_added_pieces",
        metavar="N",
        type=positive_int,
        default=None,
        help="maximum number of pieces to add, including those of the closure; the last of the file are left out first "
        "(default: no limit)",
    )
    pieces.add(
        "--parity_text",
        metavar="PATH",
        nargs="+",
        default=None,
        help="jsonl or text files, or folders of them, on which the new tokenizer is checked too; much text is sampled "
        "(default: the new pieces only)",
    )


def init_model_parser() -> CommandParser:
    """Flags of init_model.py."""
    parser = CommandParser(
        "init_model.py",
        "Give each new token the mean of the embeddings of the source tokens it replaces.",
        "  python init_model.py --source_model_and_tokenizer_path llama-2-7b \\\n"
        "      --target_tokenizer_path tokenizer-zh --target_model_path llama-2-7b-zh",
    )
    group = parser.flag_group("model")
    group.add(
        "--source_model_and_tokenizer_path",
        metavar="DIR",
        required=True,
        help="folder with a Hugging Face LLaMA (safetensors) and its tokenizer",
    )
    group.add("--target_tokenizer_path", metavar="DIR", required=True, help="the folder that init_tokenizer.py wrote")
    group.add(
        "--target_model_path",
        metavar="DIR",
        required=True,
        help="folder to write the model and its tokenizer to; new, or the same as --target_tokenizer_path",
    )
    group.add(
        "--dtype",
        choices=("source", *MODEL_DTYPES),
        default="source",
        help="dtype of the written weights; source: that of the source model; a value too large for the dtype is an "
        "error",
    )
    group.add(
        "--pad_vocab_to_multiple_of",
        metavar="N",
        type=row_multiple,
        default=1,
        help="pad the embeddings to a multiple of N with rows that no token uses, for faster kernels and for --tp",
    )
    group.add(
        "--overwrite",
        action="store_true",
        help="replace the target once the new model is complete; refused if the target contains other files",
    )
    return parser


def merge_lora_parser() -> CommandParser:
    """Flags of colossal_llama2.model.merge_lora."""
    parser = CommandParser(
        "merge_lora.py",
        "Merge a LoRA adapter of train.py or train_sft.py into the model that it was trained on.",
        "  python -m colossal_llama2.model.merge_lora --base_model_path llama-2-7b-zh \\\n"
        "      --adapter_path checkpoint_dir/modeling --target_model_path llama-2-7b-zh-chat",
    )
    group = parser.flag_group("model")
    group.add(
        "--base_model_path",
        metavar="DIR",
        required=True,
        help="the model that the adapter was trained on, with the same files of weights",
    )
    group.add(
        "--adapter_path",
        metavar="DIR",
        required=True,
        help="the modeling/ folder of a run or checkpoint with --lora_rank",
    )
    group.add(
        "--target_model_path",
        metavar="DIR",
        required=True,
        help="folder to write the merged model to; must not exist yet",
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
    files = parser.flag_group("files")
    add_data_input_dirs(files)
    files.add("--source_tokenizer_dir", metavar="DIR", required=True, help="folder of the tokenizer to extend")
    files.add(
        "--output_file",
        metavar="FILE",
        required=True,
        help='file for the pieces, one {"piece": "..."} per line (jsonl); must not exist yet',
    )
    files.add(
        "--plot", metavar="FILE.png", default=None, help="file for a curve of tokens per character by number of pieces"
    )
    pieces = parser.flag_group("pieces")
    pieces.add(
        "--num_new_tokens",
        metavar="N",
        type=positive_int,
        default=37104,
        help="maximum number of new pieces; 37,104 give LLaMA-2 the vocabulary size of Colossal-LLaMA-2",
    )
    pieces.add("--script", choices=MINED_SCRIPTS, default="han", help="characters to mine: han (Chinese) or any")
    pieces.add(
        "--max_piece_length", metavar="CHARACTERS", type=positive_int, default=8, help="maximum length of a piece"
    )
    pieces.add(
        "--min_count",
        metavar="N",
        type=positive_int,
        default=5,
        help="minimum number of occurrences of a character, or of a merge, in the sample",
    )
    sample = parser.flag_group("sample")
    sample.add(
        "--sample_bytes",
        metavar="BYTES",
        type=positive_int,
        default=100_000_000,
        help="maximum amount of text of the script to train on, sampled from the input; training needs about 25 times "
        "as much memory",
    )
    sample.add(
        "--held_out",
        metavar="SHARE",
        type=share,
        default=0.125,
        help="fraction of the documents to measure on, which are never trained on",
    )
    sample.add(
        "--seed",
        metavar="N",
        type=seed_number,
        default=1024,
        help="seed of the sample and of the choice of held-out documents",
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
    group = parser.flag_group()
    group.add(
        "--tokenizer_dirs",
        metavar="PATH,PATH",
        type=path_list,
        required=True,
        help="comma-separated Hugging Face tokenizer folders, tokenizer.model or tokenizer.json files",
    )
    add_data_input_dirs(group)
    group.add("--output_file", metavar="FILE.json", default=None, help="file for the table as JSON; must not exist yet")
    group.add(
        "--sample_documents",
        metavar="N",
        type=positive_int,
        default=10_000,
        help="maximum number of documents to compare on; a larger input is sampled",
    )
    return parser


def convert_tiktoken_parser() -> CommandParser:
    """Flags of colossal_llama2.tokenizer.convert_tiktoken."""
    parser = CommandParser(
        "convert_tiktoken.py",
        "Convert LLaMA-3's original tokenizer.model, which is in tiktoken's format, to a Hugging Face folder.",
        "  python -m colossal_llama2.tokenizer.convert_tiktoken \\\n"
        "      --source_file Meta-Llama-3-8B/original/tokenizer.model --target_dir llama-3-tokenizer",
    )
    group = parser.flag_group()
    group.add("--source_file", metavar="FILE", required=True, help="tokenizer.model of LLaMA-3's original download")
    group.add("--target_dir", metavar="DIR", required=True, help="folder to write; must not exist yet")
    group.add(
        "--special_tokens",
        choices=LLAMA_3_VERSIONS,
        default="3.1",
        help="the version whose 256 special tokens are used: 3.0, or 3.1 for that and later ones",
    )
    return parser
