"""Append new pieces to a LLaMA tokenizer, prove that they work, and write it as a folder that every loader reads.

    python init_tokenizer.py --source_tokenizer_dir llama-2-7b \\
        --target_tokenizer_dir tokenizer-zh --expand_tokens_file new_tokens.jsonl

New pieces are given one per line, as {"piece": "你好"}; a space inside one is written "▁". They are appended after the
source's pieces, so every old id keeps its meaning. Their scores are below every old merge, so old merges win, and text
without new pieces is tokenized as before. Pieces that are needed to reach them are added (closure.py), and nothing is
written unless SentencePiece and both tokenizers of transformers agree on them (parity.py).
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    # Run by its path, this file's own folder is on sys.path instead of the repository's.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import tokenizer_flags
from colossal_llama2.encoding.added_tokens import read_added_tokens
from colossal_llama2.encoding.bpe_model import BpeModel, merges, unreachable, with_pieces
from colossal_llama2.encoding.file_names import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    COPIED_FILES,
    FAST_FILE,
    MODEL_FILE,
    REPORT_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_FILES,
)
from colossal_llama2.encoding.folder_files import check_tokenizer_files
from colossal_llama2.encoding.parity import (
    Measurement,
    PieceFinder,
    Tokenizers,
    load_with_transformers,
    measure,
    texts_alone,
    texts_in_context,
    texts_of_old_pieces,
)
from colossal_llama2.encoding.sentencepiece_file import sentencepiece_file
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.storage.files import (
    check_can_create,
    contents_of,
    is_stray,
    read_json,
    temporary_folder,
    write_contents,
    write_json,
)
from colossal_llama2.storage.given_paths import check_is_folder
from colossal_llama2.storage.publishing import claimed, publish, remove_leftovers
from colossal_llama2.terminal_text import show_line
from colossal_llama2.tokenizer.closure import ExtensionPlan, plan_extension
from colossal_llama2.tokenizer.extension_report import failures, make_report, print_report
from colossal_llama2.tokenizer.new_pieces import read_new_pieces
from colossal_llama2.tokenizer.parity_text import read_parity_text

# What LLaMA-2 ships beside its weights, and what transformers needs to load a tokenizer with its settings.
REQUIRED_FILES = (MODEL_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE)
SHOWN_PIECES = 5


@dataclass(frozen=True)
class ExtensionSettings:
    """The flags of init_tokenizer.py."""

    source_tokenizer_dir: str | Path
    target_tokenizer_dir: str | Path
    expand_tokens_file: str | Path
    piece_scores: str = "below"
    closure: str = "complete"
    max_added_pieces: int | None = None
    parity_text: Sequence[str] | None = None
    overwrite: bool = False


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
    given, closure = settings.source_tokenizer_dir, settings.closure
    check_is_folder(given, "--source_tokenizer_dir", "give the folder of a tokenizer, with its files")
    source = Path(os.path.abspath(given))
    # Replacing a link to a folder replaces the folder, not the link.
    target = Path(os.path.realpath(settings.target_tokenizer_dir))
    _check_source(source)
    remove_leftovers(target)
    _check_target(source, target, overwrite=settings.overwrite)
    model = BpeModel.read(source)
    added_tokens = read_added_tokens(source, len(model.pieces))
    special_tokens = _special_tokens(source, model, added_tokens)
    asked = read_new_pieces(Path(settings.expand_tokens_file), known=model.scores, special_tokens=special_tokens)
    documents = read_parity_text(settings.parity_text) if settings.parity_text else []
    piece_scores, most = settings.piece_scores, settings.max_added_pieces
    plan = plan_extension(model, asked.wanted, closure=closure, piece_scores=piece_scores, max_added=most)
    _warn_of_altered(source, plan.altered)

    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as folder, claimed(folder):
        _write_tokenizer(source, folder, model, plan)
        tokenizers = Tokenizers(folder)
        _check_ids(tokenizers, model, plan, added_tokens)
        report = make_report(
            asked,
            plan,
            unreachable=unreachable((folder / MODEL_FILE).read_bytes(), plan.pieces),
            vocabulary_before=len(model.pieces),
            measurements=_measure(Tokenizers(source), tokenizers, model, plan, documents),
            settings={"piece_scores": piece_scores, "closure": closure, "max_added_pieces": most},
        )
        print_report(report)
        _judge(report, may_fail=closure == "off")
        write_json(folder / REPORT_FILE, report)
        publish(folder, target, replace=settings.overwrite)
    show_line(f"written to {target}")
    show_line(f"requested {asked.asked}, added {len(plan.pieces)}")


# Reading the source.


def _check_source(source: Path) -> None:
    sentencepiece_file(source)
    # Templates are copied, and through a link that could copy a whole disk, or read a device forever.
    check_tokenizer_files(source)
    missing = [name for name in REQUIRED_FILES if not (source / name).is_file()]
    if missing:
        raise UserError(
            f"--source_tokenizer_dir {source} holds no {' and no '.join(missing)}; "
            "LLaMA-2 ships these files beside its weights, copy them there"
        )


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


def _special_tokens(source: Path, model: BpeModel, added_tokens: dict[str, int]) -> set[str]:
    """Every token that is not ordinary text: <s>, <0x0A> and the like, and the special tokens of transformers."""
    special = set(model.pieces).difference(model.scores).union(model.user_defined)
    for value in read_json(source / SPECIAL_TOKENS_FILE).values():
        for token in value if isinstance(value, list) else [value]:
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str):
                raise UserError(f"{source / SPECIAL_TOKENS_FILE}: {token!r} is not a token; copy the file again")
            special.add(content)
    return special.union(added_tokens)


def _warn_of_altered(source: Path, altered: Sequence[str]) -> None:
    """Warn about pieces that the source's normalizer never produces."""
    if not altered:
        return
    shown = ", ".join(map(repr, altered[:SHOWN_PIECES])) + (", ..." if len(altered) > SHOWN_PIECES else "")
    logs.get_logger().warning(
        f"the normalizer of {source} never produces {len(altered):,} of the pieces, so no text is encoded to them: "
        f"{shown}; remove them from the file, or extend a tokenizer without a normalizer, such as LLaMA-2's"
    )


# Writing the target.


def _write_tokenizer(source: Path, folder: Path, model: BpeModel, plan: ExtensionPlan) -> None:
    num_source, num_added = len(model.pieces), len(plan.pieces)
    (folder / MODEL_FILE).write_bytes(with_pieces(model.content, plan.pieces, plan.scores))
    _write_settings(source, folder, num_source, num_added)
    _write_fast_tokenizer(source, folder, model, plan)


def _write_settings(source: Path, folder: Path, num_source_pieces: int, num_added: int) -> None:
    """Write everything except the two vocabularies, with the ids of added tokens moved after the new pieces."""
    config = read_json(source / CONFIG_FILE)
    if config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] = {
            str(_moved(int(index), num_source_pieces, num_added)): token
            for index, token in config["added_tokens_decoder"].items()
        }
    # Without a class, AutoTokenizer would need the model's config.json in the folder.
    config["tokenizer_class"] = config.get("tokenizer_class") or "LlamaTokenizer"
    write_json(folder / CONFIG_FILE, config)
    if (source / ADDED_TOKENS_FILE).is_file():
        added = read_json(source / ADDED_TOKENS_FILE)
        moved = {token: _moved(index, num_source_pieces, num_added) for token, index in added.items()}
        write_json(folder / ADDED_TOKENS_FILE, moved)
    write_contents(folder, contents_of(source, COPIED_FILES))


def _moved(index: int, num_source_pieces: int, num_added: int) -> int:
    return index if index < num_source_pieces else index + num_added


def _write_fast_tokenizer(source: Path, folder: Path, model: BpeModel, plan: ExtensionPlan) -> None:
    """Write tokenizer.json, with vocabulary and merges of the new tokenizer.model and the rest from the source."""
    import orjson

    if (source / FAST_FILE).is_file():
        fast = read_json(source / FAST_FILE)
    else:
        fast = orjson.loads(load_with_transformers(source).backend_tokenizer.to_str())
    if fast.get("model", {}).get("type") != "BPE":
        raise UserError(f"{source / FAST_FILE} is not a BPE tokenizer, as {MODEL_FILE} is; remove it")
    num_source, num_added = len(model.pieces), len(plan.pieces)
    pieces = model.pieces + plan.pieces
    scores = [model.scores.get(piece, 0.0) for piece in model.pieces] + plan.scores
    pairs = merges(pieces, scores, [*model.scores, *plan.pieces])
    old_merges = fast["model"]["merges"]
    _warn_if_merges_differ(old_merges, pairs, set(model.pieces))
    # Files from before tokenizers 0.20, such as LLaMA-2's, write a merge as "a b"; older versions read only that.
    spells_as_text = bool(old_merges) and isinstance(old_merges[0], str)
    fast["model"]["merges"] = list(map(" ".join, pairs)) if spells_as_text else pairs
    fast["model"]["vocab"] = {piece: index for index, piece in enumerate(pieces)}
    for token in fast.get("added_tokens", []):
        token["id"] = _moved(token["id"], num_source, num_added)
    _move_post_processor_ids(fast.get("post_processor"), num_source, num_added)
    # orjson: the standard library takes a minute to indent a million pieces.
    (folder / FAST_FILE).write_bytes(orjson.dumps(fast, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _warn_if_merges_differ(source_merges: list, pairs: list, source_pieces: set[str]) -> None:
    """Warn if the old merges change or lose their order: then old text may be tokenized differently."""
    old = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in source_merges]
    kept = [
        (left, right)
        for left, right in pairs
        if left in source_pieces and right in source_pieces and left + right in source_pieces
    ]
    if old != kept:
        logs.get_logger().warning(
            "the source's %s and %s have different merges (%d and %d); the target follows %s",
            FAST_FILE,
            MODEL_FILE,
            len(old),
            len(kept),
            MODEL_FILE,
        )


def _move_post_processor_ids(processor: dict | None, num_source_pieces: int, num_added: int) -> None:
    """Move the ids of special tokens in a template or a sequence of post-processors."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        _move_post_processor_ids(part, num_source_pieces, num_added)
    if processor.get("type") == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [_moved(index, num_source_pieces, num_added) for index in token["ids"]]


# Checking what was written, before it gets its final name.


def _check_ids(tokenizers: Tokenizers, model: BpeModel, plan: ExtensionPlan, added_tokens: dict[str, int]) -> None:
    """Raise RunError unless the fast tokenizer has exactly the old, new and added tokens with their ids."""
    expected = {piece: index for index, piece in enumerate(plan.pieces, start=len(model.pieces))}
    expected.update({token: index + len(plan.pieces) for token, index in added_tokens.items()})
    vocabulary = tokenizers.fast.get_vocab()
    wrong = [token for token, index in expected.items() if vocabulary.get(token) != index]
    if wrong or len(vocabulary) != len(model.pieces) + len(expected):
        raise RunError(
            f"transformers does not read back the ids of {wrong[:3] or 'the vocabulary'}; nothing was kept. "
            f"Check {FAST_FILE} and the added tokens of the source"
        )


def _measure(
    source: Tokenizers, target: Tokenizers, model: BpeModel, plan: ExtensionPlan, documents: list[str]
) -> list[Measurement]:
    finder = PieceFinder(plan.pieces)
    groups = {
        "new pieces alone": texts_alone(plan.pieces),
        "new pieces in context": texts_in_context(plan.pieces),
        "old pieces": texts_of_old_pieces(model),
        "parity text": documents,
    }
    measured = []
    compared = "SentencePiece, slow and fast tokenizer"
    if not (source.slow and target.slow):
        logs.get_logger().info("transformers has no slow tokenizer for these folders, so only its fast one is compared")
        compared = "SentencePiece and fast tokenizer"
    for group, texts in groups.items():
        if texts:
            logs.get_logger().info("comparing %s: %s", compared, group)
            measured.append(measure(source, target, group, texts, finder))
    return measured


def _judge(report: dict, *, may_fail: bool) -> None:
    found = failures(report)
    if found and may_fail:
        logs.get_logger().warning("not proven: %s", "; ".join(found))
    elif found:
        raise RunError(
            f"{'; '.join(found)}; nothing was written. Use --piece_scores below and --closure complete, "
            "or --closure off to write it anyway"
        )


if __name__ == "__main__":
    main()
