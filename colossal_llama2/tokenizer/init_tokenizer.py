"""Append new pieces to a LLaMA tokenizer, and write it as a folder that SentencePiece and transformers both load.

    python init_tokenizer.py --source_tokenizer_dir llama-2-7b \\
        --target_tokenizer_dir tokenizer-zh --expand_tokens_file new_tokens.jsonl

New pieces come one a line, as {"piece": "你好"}; a space inside one is written "▁". They are appended behind the
source's pieces, so every old id keeps its meaning, with scores below every old merge, so old merges win and text that
holds no new piece is tokenized as before.
"""

import json
import math
import os
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Union

if not __package__:
    # Run by its path, this file's own folder is on sys.path instead of the repository's.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama2 import arguments, errors, logs
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.files import (
    check_can_create,
    copy_files,
    read_json,
    read_jsonl,
    temporary_folder,
    write_json,
)
from colossal_llama2.tokenizer import (
    ADDED_TOKENS_FILE,
    CONFIG_FILE,
    COPIED_FILES,
    FAST_FILE,
    MODEL_FILE,
    SPECIAL_TOKENS_FILE,
    Encoder,
    sentencepiece_file,
)

# What LLaMA-2 ships beside its weights, and what transformers needs to load a tokenizer with its settings.
REQUIRED_FILES = (MODEL_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE)
MAX_PIECE_CHARACTERS = 64
SPACE = "▁"


@dataclass(frozen=True)
class NewPieces:
    """What the file of new pieces asks for: `pieces` in the order they are appended, and how they came about."""

    pieces: List[str]
    asked: int
    duplicates: int
    already_pieces: int
    characters: int


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command: parse `argv` (default: the process's) and expand the tokenizer."""
    args = arguments.init_tokenizer_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("init_tokenizer.py"):
        expand_tokenizer(args.source_tokenizer_dir, args.target_tokenizer_dir, args.expand_tokens_file)


def expand_tokenizer(
    source_tokenizer_dir: Union[str, Path], target_tokenizer_dir: Union[str, Path], expand_tokens_file: Union[str, Path]
) -> None:
    """Write the source's tokenizer with the pieces of the file appended to the target, whole or not at all.

    Prints a summary that ends with "asked N, added M": N lines were asked for, M pieces were added. Raises UserError
    for a mistake in the folders or the file, RunError if the written tokenizer does not load as it must.
    """
    source = Path(os.path.abspath(source_tokenizer_dir))
    target = Path(os.path.abspath(target_tokenizer_dir))
    _check_folders(source, target)
    model = read_model(source)
    source_pieces = [piece.piece for piece in model.pieces]
    added_tokens = read_added_tokens(source, len(source_pieces))
    new = _read_new_pieces(Path(expand_tokens_file), model, special_tokens=_special_tokens(source, model, added_tokens))

    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, target.name) as folder:
        append_pieces(model, new.pieces)
        (folder / MODEL_FILE).write_bytes(model.SerializeToString())
        _write_settings(source, folder, len(source_pieces), len(new.pieces))
        _write_fast_tokenizer(source, folder, len(source_pieces), len(new.pieces))
        expected_ids = {piece: len(source_pieces) + index for index, piece in enumerate(new.pieces)}
        expected_ids.update({token: index + len(new.pieces) for token, index in added_tokens.items()})
        unreached, differing = _check_written(folder, new.pieces, expected_ids)
        os.rename(folder, target)
    _print_summary(target, len(source_pieces), new, unreached=unreached, differing=differing)


# Reading the source.


def _check_folders(source: Path, target: Path) -> None:
    sentencepiece_file(source)
    missing = [name for name in REQUIRED_FILES if not (source / name).is_file()]
    if missing:
        raise UserError(
            f"--source_tokenizer_dir {source} holds no {' and no '.join(missing)}; "
            "LLaMA-2 ships these files beside its weights, copy them there"
        )
    if os.path.lexists(target):
        raise UserError(f"--target_tokenizer_dir {target} exists already; give a new folder, nothing is overwritten")
    if Path(os.path.realpath(source)) in Path(os.path.realpath(target)).parents:
        raise UserError(f"--target_tokenizer_dir {target} is inside the source {source}; give a folder outside of it")
    check_can_create(target, "--target_tokenizer_dir")


def read_model(folder: Path):
    """The SentencePiece ModelProto of a tokenizer folder. Raises UserError if it is missing or not a BPE model."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    # SentencePiece tells better than protobuf whether a file is one of its models.
    Encoder(folder)
    path = sentencepiece_file(folder)
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise UserError(f"{path} is not a SentencePiece model; copy LLaMA-2's {MODEL_FILE} again")
    kind = model.trainer_spec.model_type
    if kind != TrainerSpec.BPE:
        name = TrainerSpec.ModelType.Name(kind).capitalize()
        raise UserError(f"{path} is a {name} model; only BPE models, such as LLaMA-2's, can be expanded by appending")
    return model


def read_added_tokens(folder: Path, num_pieces: int) -> Dict[str, int]:
    """The tokens that transformers adds beyond the `num_pieces` of SentencePiece, with their ids, in order of id.

    Raises UserError if two files disagree about an id, or if the ids do not follow the pieces without a gap.
    """
    found: Dict[str, int] = {}
    for token, index in _listed_added_tokens(folder):
        if index >= num_pieces and found.setdefault(token, index) != index:
            raise UserError(f"{folder} gives the added token {token!r} the ids {found[token]} and {index}; keep one")
    found = dict(sorted(found.items(), key=lambda item: item[1]))
    if list(found.values()) != list(range(num_pieces, num_pieces + len(found))):
        raise UserError(
            f"the added tokens of {folder} have the ids {sorted(found.values())}, which do not follow its "
            f"{num_pieces} pieces without a gap; add the tokens again with transformers' add_tokens"
        )
    return found


def _listed_added_tokens(folder: Path) -> Iterator[tuple]:
    config = read_json(folder / CONFIG_FILE)
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        yield token["content"], int(index)
    if (folder / ADDED_TOKENS_FILE).is_file():
        yield from read_json(folder / ADDED_TOKENS_FILE).items()
    if (folder / FAST_FILE).is_file():
        for token in read_json(folder / FAST_FILE).get("added_tokens", []):
            yield token["content"], token["id"]


def _special_tokens(source: Path, model, added_tokens: Dict[str, int]) -> set:
    """Every token that is not ordinary text: <s>, <0x0A> and the like, and what transformers knows as special."""
    kind = model.SentencePiece
    special = {piece.piece for piece in model.pieces if piece.type in (kind.UNKNOWN, kind.CONTROL, kind.BYTE)}
    for value in read_json(source / SPECIAL_TOKENS_FILE).values():
        for token in value if isinstance(value, list) else [value]:
            special.add(token["content"] if isinstance(token, dict) else token)
    return special.union(added_tokens)


# Reading the new pieces.


def _read_new_pieces(path: Path, model, *, special_tokens: set) -> NewPieces:
    """Read and check the jsonl file; plan the missing single characters first, then the pieces, shortest first."""
    if not path.is_file():
        raise UserError(f'--expand_tokens_file {path} is not a file; give a jsonl file of {{"piece": "..."}} lines')
    asked = list(_pieces_of(path, special_tokens))
    if not asked:
        raise UserError(f'--expand_tokens_file {path} holds no pieces; give a jsonl file of {{"piece": "..."}} lines')
    known = {piece.piece for piece in model.pieces}
    unique = dict.fromkeys(asked)
    wanted = sorted((piece for piece in unique if piece not in known), key=len)
    # BPE builds a piece from its characters: one that is not a piece would come as bytes, which never merge.
    characters = dict.fromkeys(character for piece in wanted for character in piece if character not in known)
    pieces = list(dict.fromkeys([*characters, *wanted]))
    return NewPieces(
        pieces=pieces,
        asked=len(asked),
        duplicates=len(asked) - len(unique),
        already_pieces=len(unique) - len(wanted),
        characters=len(pieces) - len(wanted),
    )


def _pieces_of(path: Path, special_tokens: set) -> Iterator[str]:
    for line in read_jsonl(path):
        if line.record is not None:
            try:
                yield _piece_of(line.record, special_tokens)
            except ValueError as error:
                raise UserError(f"{line.where}: {error}")


def _piece_of(record: dict, special_tokens: set) -> str:
    """The piece of one record. Raises ValueError with what is wrong and what is allowed."""
    if "piece" not in record:
        raise ValueError('no "piece" in this line; write {"piece": "..."}')
    piece = record["piece"]
    if not isinstance(piece, str):
        raise ValueError(f'"piece" is {piece!r:.80}, which is not a string; write {{"piece": "..."}}')
    if not piece:
        raise ValueError('"piece" is empty; remove the line')
    if len(piece) > MAX_PIECE_CHARACTERS:
        raise ValueError(f'"piece" has {len(piece)} characters, at most {MAX_PIECE_CHARACTERS} are allowed')
    if piece in special_tokens:
        raise ValueError(f'"piece" is {piece!r}, a special token of the source tokenizer; remove the line')
    if any(character.isspace() or unicodedata.category(character) == "Cc" for character in piece):
        raise ValueError(
            f'"piece" is {piece!r}, which holds whitespace or a control character; write a space as {SPACE} (U+2581)'
        )
    return piece


# Writing the target.


def append_pieces(model, pieces: Sequence[str]) -> None:
    """Append `pieces` to a ModelProto with falling scores, each a different float32, below every merge it has.

    A merge is a piece of two or more characters. The score of a single character decides nothing, and some models
    give all of theirs a sentinel (-1e9), near which float32 could not tell the new scores apart.
    """
    mergeable = (model.SentencePiece.NORMAL, model.SentencePiece.UNUSED)
    merges = [piece.score for piece in model.pieces if piece.type in mergeable and len(piece.piece) > 1]
    lowest = math.floor(min(merges, default=0.0))
    # 1 where float32 holds every whole number, as far as the scores reach; else twice the distance of its neighbours.
    step = max(1.0, 2.0 ** (math.frexp(abs(lowest) + len(pieces))[1] - 23))
    for index, piece in enumerate(pieces, start=1):
        model.pieces.add(piece=piece, score=lowest - step * index, type=model.SentencePiece.NORMAL)


def _write_settings(source: Path, folder: Path, num_source_pieces: int, num_added: int) -> None:
    """Everything but the two vocabularies, with the ids of added tokens moved behind the new pieces."""
    config = read_json(source / CONFIG_FILE)
    if config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] = {
            str(_moved(int(index), num_source_pieces, num_added)): token
            for index, token in config["added_tokens_decoder"].items()
        }
    # Without it, AutoTokenizer would need a config.json in the folder, which is the model's.
    config["tokenizer_class"] = config.get("tokenizer_class") or "LlamaTokenizer"
    write_json(folder / CONFIG_FILE, config)
    if (source / ADDED_TOKENS_FILE).is_file():
        added = read_json(source / ADDED_TOKENS_FILE)
        moved = {token: _moved(index, num_source_pieces, num_added) for token, index in added.items()}
        write_json(folder / ADDED_TOKENS_FILE, moved)
    copy_files(source, folder, COPIED_FILES)


def _moved(index: int, num_source_pieces: int, num_added: int) -> int:
    return index if index < num_source_pieces else index + num_added


def _write_fast_tokenizer(source: Path, folder: Path, num_source_pieces: int, num_added: int) -> None:
    """Write tokenizer.json: vocabulary and merges from the new tokenizer.model, everything else as in the source's."""
    converted = json.loads(_load_fast(folder).backend_tokenizer.to_str())
    if (source / FAST_FILE).is_file():
        fast = read_json(source / FAST_FILE)
        if fast.get("model", {}).get("type") != "BPE":
            raise UserError(f"{source / FAST_FILE} is not a BPE tokenizer, as {MODEL_FILE} is; remove it")
        _warn_if_merges_differ(fast, converted, num_source_pieces)
        for key in ("vocab", "merges"):
            fast["model"][key] = converted["model"][key]
        for token in fast.get("added_tokens", []):
            token["id"] = _moved(token["id"], num_source_pieces, num_added)
        _move_post_processor_ids(fast.get("post_processor"), num_source_pieces, num_added)
    else:
        fast = converted
    write_json(folder / FAST_FILE, fast)


def _warn_if_merges_differ(source_fast: dict, converted: dict, num_source_pieces: int) -> None:
    """Old text can only be tokenized as before if the old merges are still there in the old order."""
    old = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in source_fast["model"]["merges"]]
    vocabulary = converted["model"]["vocab"]
    kept = [
        (left, right)
        for left, right in converted["model"]["merges"]
        if max(vocabulary[left], vocabulary[right], vocabulary[left + right]) < num_source_pieces
    ]
    if old != kept:
        logs.get_logger().warning(
            "the source's %s has other merges than its %s (%d against %d); the target's follow %s",
            FAST_FILE, MODEL_FILE, len(old), len(kept), MODEL_FILE,
        )  # fmt: skip


def _move_post_processor_ids(processor: Optional[dict], num_source_pieces: int, num_added: int) -> None:
    """A template or a sequence of post-processors names special tokens together with their ids."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        _move_post_processor_ids(part, num_source_pieces, num_added)
    if processor.get("type") == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [_moved(index, num_source_pieces, num_added) for index in token["ids"]]


# Checking what was written, before it gets its final name.


def _load_fast(folder: Path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception for a file that it cannot parse
        raise UserError(
            f"transformers cannot load the source's {CONFIG_FILE} with the new {MODEL_FILE} "
            f"({type(error).__name__}: {str(error)[:200]}); give a tokenizer whose tokenizer_class is LlamaTokenizer"
        )


def _check_written(folder: Path, pieces: List[str], expected_ids: Dict[str, int]) -> tuple:
    """Check all ids of the fast tokenizer, then encode each new piece.

    Returns how many new pieces SentencePiece does not produce from their own text, and on how many of these texts
    the fast tokenizer gives other ids than SentencePiece. Whether a text is given a leading "▁" is the source's own
    setting in each of the two, so that difference does not count.
    """
    fast, encoder = _load_fast(folder), Encoder(folder)
    wrong = [token for token, index in expected_ids.items() if fast.convert_tokens_to_ids(token) != index]
    if wrong or len(fast) != encoder.vocab_size + len(expected_ids) - len(pieces):
        raise RunError(
            f"transformers gives {wrong[:3] or 'the vocabulary'} other ids than were written; nothing was kept. "
            f"Check {FAST_FILE} and the added tokens of the source"
        )
    if not pieces:
        return 0, 0
    texts = [piece.lstrip(SPACE).replace(SPACE, " ") for piece in pieces]
    fast_ids = fast(texts, add_special_tokens=False)["input_ids"]
    either = zip(encoder.encode(texts), encoder.encode(texts, dummy_prefix=False), strict=True)
    differing = sum(ids not in pair for ids, pair in zip(fast_ids, either, strict=True))
    alone = encoder.encode([piece.replace(SPACE, " ") for piece in pieces], dummy_prefix=False)
    unreached = sum(ids != [expected_ids[piece]] for piece, ids in zip(pieces, alone, strict=True))
    return unreached, differing


def _print_summary(target: Path, num_source_pieces: int, new: NewPieces, *, unreached: int, differing: int) -> None:
    rows = (
        ("pieces in the file", new.asked),
        ("repeated in the file", new.duplicates),
        ("pieces of the source already", new.already_pieces),
        ("characters added for them", new.characters),
        ("pieces added", len(new.pieces)),
        ("never reached from their own text", unreached),
        ("encoded differently by transformers", differing),
        ("vocabulary before", num_source_pieces),
        ("vocabulary after", num_source_pieces + len(new.pieces)),
    )
    for name, count in rows:
        print(f"{name:<36}{count:>10,}")
    print(f"written to {target}")
    print(f"asked {new.asked}, added {len(new.pieces)}")


if __name__ == "__main__":
    main()
