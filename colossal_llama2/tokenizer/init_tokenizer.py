"""Append new pieces to a LLaMA tokenizer, prove that they work, and write it as a folder that every loader reads.

    python init_tokenizer.py --source_tokenizer_dir llama-2-7b \\
        --target_tokenizer_dir tokenizer-zh --expand_tokens_file new_tokens.jsonl

New pieces are given one per line, as {"piece": "你好"}; a space inside one is written "▁". They are appended after the
source's pieces, so every old id keeps its meaning. Their scores are below every old merge, so old merges win, and text
without new pieces is tokenized as before. Pieces that are needed to reach them are added (closure.py), and nothing is
written unless SentencePiece and both tokenizers of transformers agree on them (parity.py).

A folder with LLaMA-2's tokenizer.model is extended as a SentencePiece tokenizer (extend_sentencepiece.py), one with
only tokenizer.json as a byte-level BPE, such as LLaMA-3's (extend_byte_level.py).
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Run by its path, this file's own folder is on sys.path instead of the repository's.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import tokenizer_flags
from colossal_llama2.encoding.byte_level_encoder import ByteLevelEncoder
from colossal_llama2.encoding.file_names import REPORT_FILE, TOKENIZER_FILES
from colossal_llama2.encoding.registry import kind_of
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.storage.files import check_can_create, is_stray, temporary_folder, write_json
from colossal_llama2.storage.given_paths import check_is_folder
from colossal_llama2.storage.publishing import claimed, publish, remove_leftovers
from colossal_llama2.terminal_text import show_line
from colossal_llama2.tokenizer.extend_byte_level import ByteLevelExtension
from colossal_llama2.tokenizer.extend_sentencepiece import SentencePieceExtension
from colossal_llama2.tokenizer.extension import Extension, ExtensionSettings
from colossal_llama2.tokenizer.extension_report import failures, make_report, print_report
from colossal_llama2.tokenizer.parity_text import read_parity_text

EXTENSIONS: dict[type, type[Extension]] = {
    SentencePieceEncoder: SentencePieceExtension,
    ByteLevelEncoder: ByteLevelExtension,
}

# What vocabulary_report.json records of the flags.
REPORTED_SETTINGS = ("piece_scores", "closure", "max_added_pieces")
REPORTED_IF_GIVEN = ("bos_token", "eos_token")


def main(argv: Sequence[str] | None = None) -> None:
    """The command: parse `argv` (default: the process's) and expand the tokenizer."""
    args = tokenizer_flags.init_tokenizer_parser().parse_args(argv)
    logs.configure_logging()
    # The original's README exports "python" for an old protobuf; it makes large models slow to read.
    os.environ.pop("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", None)
    with errors.one_line_errors("init_tokenizer.py"):
        expand_tokenizer(ExtensionSettings(**vars(args)))


def expand_tokenizer(settings: ExtensionSettings) -> None:
    """Write the source's tokenizer, with the pieces of the file appended, to the target, completely or not at all.

    Prints the report, then "requested N, added M": the file has N pieces, M were added.

    Raises:
        UserError: a mistake in the folders or files.
        RunError: new pieces are not reached, tokenizers have new differences, or the ids of old text change; nothing is
            written. With closure "off", which proves nothing, this is only a warning.
    """
    given = settings.source_tokenizer_dir
    check_is_folder(given, "--source_tokenizer_dir", "give the folder of a tokenizer, with its files")
    source = Path(os.path.abspath(given))
    # Replacing a link to a folder replaces the folder, not the link.
    target = Path(os.path.realpath(settings.target_tokenizer_dir))
    extension: Extension = EXTENSIONS[kind_of(source).encoder](source)
    remove_leftovers(target)
    _check_target(source, target, overwrite=settings.overwrite)
    asked = extension.read_pieces(Path(settings.expand_tokens_file))
    documents = read_parity_text(settings.parity_text) if settings.parity_text else []
    plan = extension.plan(asked.wanted, settings)

    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as folder, claimed(folder):
        extension.write(folder, plan)
        proof = extension.prove(folder, plan, documents)
        report = make_report(
            asked,
            plan,
            proof,
            vocabulary_before=extension.vocabulary_size,
            settings=_reported(settings),
            shown=extension.shown,
            is_byte_level=isinstance(extension, ByteLevelExtension),
        )
        print_report(report)
        _judge(report, cure=extension.cure, may_fail=settings.closure == "off")
        write_json(folder / REPORT_FILE, report)
        publish(folder, target, replace=settings.overwrite)
    show_line(f"written to {target}")
    show_line(f"requested {asked.asked}, added {len(plan.pieces)}")


def _reported(settings: ExtensionSettings) -> dict[str, Any]:
    given = [name for name in REPORTED_IF_GIVEN if getattr(settings, name) is not None]
    return {name: getattr(settings, name) for name in (*REPORTED_SETTINGS, *given)}


def _check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    real_source = Path(os.path.realpath(source))
    if real_source in target.parents:
        raise UserError(f"--target_tokenizer_dir {target} is inside the source {source}; give a folder outside of it")
    if not os.path.lexists(target):
        check_can_create(target, "--target_tokenizer_dir")
        return
    if not overwrite:
        raise UserError(
            f"--target_tokenizer_dir {target} already exists; give a new folder, or --overwrite to replace a tokenizer"
        )
    real_files = [Path(os.path.realpath(path)) for path in source.iterdir()]
    if target == real_source or any(target in path.parents for path in (real_source, *real_files)):
        raise UserError(f"--target_tokenizer_dir {target} is or holds the source; give another folder")
    if not target.is_dir():
        raise UserError(f"--target_tokenizer_dir {target} is not a folder; give another name")
    found = {path.name for path in target.iterdir() if not is_stray(path.name)}
    others = sorted(found - {*TOKENIZER_FILES, REPORT_FILE})
    if others:
        raise UserError(
            f"--target_tokenizer_dir {target} holds {others[0]}, which is not a file of a tokenizer; "
            "--overwrite only replaces a folder that holds nothing else"
        )
    # The new folder is written beside it first.
    check_can_create(target.parent, "--target_tokenizer_dir")


def _judge(report: dict, *, cure: str, may_fail: bool) -> None:
    found = failures(report)
    if found and may_fail:
        logs.get_logger().warning("not proven: %s", "; ".join(found))
    elif found:
        raise RunError(f"{'; '.join(found)}; nothing was written. {cure}, or --closure off to write it anyway")


if __name__ == "__main__":
    main()
