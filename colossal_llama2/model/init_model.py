"""Give each new token of an extended tokenizer the mean of the embeddings of the source tokens it replaces.

    python init_model.py --source_model_and_tokenizer_path llama-2-7b \\
        --target_tokenizer_path tokenizer-zh --target_model_path llama-2-7b-zh

Only the input embedding and lm_head change. All other tensors, and the old rows of these two, are copied as bytes, so
this runs on a CPU at the speed of a file copy, with memory for one or two matrices. A source matrix may have more rows
than its tokenizer has tokens (padding to a round number): no token uses these rows, so they are left out.

With --pad_vocab_to_multiple_of, the target has such rows too, after all tokens. Each is the mean of the rows of all of
the source's pieces: it is never used as input, and as output its logit is the mean of theirs, so that all such rows
together get hardly any probability. transformers' resize_token_embeddings(pad_to_multiple_of=N) draws them from a
narrow distribution around the mean of all rows.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:
    # Run by its path, this file's own folder is on sys.path instead of the repository's.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama2 import errors, logs
from colossal_llama2.cli import tokenizer_flags
from colossal_llama2.encoding.byte_level_encoder import ByteLevelEncoder, changed_marks
from colossal_llama2.encoding.file_names import REPORT_FILE, TOKENIZER_FILES
from colossal_llama2.encoding.folder_files import check_tokenizer_files
from colossal_llama2.encoding.registry import fingerprint, kind_of
from colossal_llama2.errors import UserError
from colossal_llama2.model.config_fields import TOKEN_ID_FIELDS, check_not_quantized, fields_of
from colossal_llama2.model.exported_configs import portable_config, portable_generation, with_moved_settings
from colossal_llama2.model.loading import CONFIG_FILE, NEW_ROWS_KEY, PADDING_ROWS_KEY, check_weights
from colossal_llama2.model.model_folder import (
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    check_model_files,
    shard_names,
)
from colossal_llama2.model.row_plan import Rows, plan_rows
from colossal_llama2.model.safetensors_stream import (
    FLOATS,
    Change,
    Shard,
    read_shards,
    target_index,
    target_size,
    write_shard,
)
from colossal_llama2.model.tied_weights import INPUT_EMBEDDING, OUTPUT_EMBEDDING, check_is_one_matrix
from colossal_llama2.model.training_history import HISTORY_FILE, vocabulary_stage
from colossal_llama2.model.weight_numbers import check_numbers
from colossal_llama2.plurals import counted
from colossal_llama2.storage.files import (
    check_can_create,
    contents_of,
    is_stray,
    sync,
    temporary_folder,
    write_contents,
    write_json,
)
from colossal_llama2.storage.given_paths import check_is_folder
from colossal_llama2.storage.input_files import read_settings
from colossal_llama2.storage.publishing import check_space, claimed, publish, publish_into, remove_leftovers
from colossal_llama2.terminal_text import show_line

MODEL_PATTERNS = ("*.safetensors", "*.bin", "*.index.json", CONFIG_FILE, GENERATION_CONFIG_FILE)
# Weights keep the source's file names, listed in an index; a killed run may leave some without an index.
WEIGHTS_NAME = re.compile(r"model(-\d+(-of-\d+)?)?\.safetensors")
MATRICES = (INPUT_EMBEDDING, OUTPUT_EMBEDDING)
# What is copied with a tokenizer of any kind: its files, and the report of init_tokenizer.py.
COPIED_FILES = (*TOKENIZER_FILES, REPORT_FILE)


@dataclass(frozen=True)
class InitModelSettings:
    """The flags of init_model.py.

    Attributes:
        dtype: the type to convert floating-point weights to: float16, bfloat16, float32, or "source" for no change.
        pad_vocab_to_multiple_of: rows without a token fill both matrices up to a multiple of this.
        overwrite: replace an earlier target, which is kept until the new one is complete and on the disk.
    """

    source_model_and_tokenizer_path: str | Path
    target_tokenizer_path: str | Path
    target_model_path: str | Path
    dtype: str = "source"
    pad_vocab_to_multiple_of: int = 1
    overwrite: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """The command: parse `argv` (default: the process's) and initialize the model."""
    args = tokenizer_flags.init_model_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("init_model.py"):
        init_model(InitModelSettings(**vars(args)))


def init_model(settings: InitModelSettings) -> None:
    """Write the source model with rows for the target tokenizer's new tokens, and that tokenizer, to the target.

    The target is a new folder, the tokenizer's folder, or with `overwrite` an earlier target.

    Raises:
        UserError: something is wrong with the folders. Nothing was written.
        RunError: there is too little space on the disk. Nothing was written.
    """
    overwrite = settings.overwrite
    source = Path(os.path.abspath(settings.source_model_and_tokenizer_path))
    tokenizer = Path(os.path.abspath(settings.target_tokenizer_path))
    # Replacing a link to a folder replaces the folder, not the link.
    target = Path(os.path.realpath(settings.target_model_path))
    _check_folders(settings.source_model_and_tokenizer_path, settings.target_tokenizer_path)
    remove_leftovers(target)
    _check_target(source, tokenizer, target, overwrite=overwrite)
    config = _read_config(source)
    shards = read_shards(source)
    source_rows = _check_matrices(shards, config)
    _warn_of_unusable_weights(source)
    rows = plan_rows(source, tokenizer, source_rows=source_rows)
    is_byte_level = kind_of(tokenizer).encoder is ByteLevelEncoder
    new_marks = changed_marks(source, tokenizer) if is_byte_level else {}
    rows = replace(rows, padding=-rows.tokens % settings.pad_vocab_to_multiple_of)
    dtype = _format_name(settings.dtype)
    change = Change(MATRICES, kept=rows.kept, bags=rows.bags, dtype=dtype, padding=rows.padding)
    total = sum(target_size(shard, change) for shard in shards)
    # Whether the numbers fit into another format is checked when they are converted.
    check_numbers(str(source), None)

    inside = target.exists() and not overwrite
    parent = target if inside else target.parent
    check_space(parent, total + _tokenizer_bytes(tokenizer))
    parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(parent, target.name) as folder, claimed(folder):
        _write_weights(source, folder, shards, change, total=total)
        _write_configs(source, folder, config, rows, settings.dtype, new_marks)
        sizes = (source_rows, rows.vocab_size)
        history = vocabulary_stage(
            str(source), sizes, fingerprint(tokenizer), new_rows=rows.new, padding_rows=rows.padding
        )
        write_json(folder / HISTORY_FILE, history)
        if inside:
            publish_into(folder, target, last=CONFIG_FILE)
        else:
            write_contents(folder, contents_of(tokenizer, (*kind_of(tokenizer).encoder.files, REPORT_FILE)))
            publish(folder, target, replace=overwrite)
    matrices = sum(name in MATRICES for shard in shards for name in shard.tensors)
    show_line(f"written to {target}")
    padding = f" ({rows.padding:,} of them without a token)" if rows.padding else ""
    show_line(
        f"vocabulary {source_rows:,} -> {rows.vocab_size:,}{padding}, "
        f"{counted(rows.new, 'row')} initialized in each of {matrices} matrices, {total:,} bytes written"
    )


# Checks, before anything is written.


def _check_folders(source: str | Path, tokenizer: str | Path) -> None:
    for flag, folder in (("--source_model_and_tokenizer_path", source), ("--target_tokenizer_path", tokenizer)):
        check_is_folder(folder, flag, "give a folder in Hugging Face format")
        check_tokenizer_files(Path(os.path.abspath(folder)))
    check_model_files(Path(os.path.abspath(source)))


def _check_target(source: Path, tokenizer: Path, target: Path, *, overwrite: bool) -> None:
    """Raise UserError if the target holds a model (without `overwrite`), other files or the source, or is inside it."""
    real_source = Path(os.path.realpath(source))
    if real_source in target.parents:
        raise UserError(f"--target_model_path {target} is inside the source {source}; give a folder outside of it")
    if not os.path.lexists(target):
        check_can_create(target, "--target_model_path")
        return
    if not target.is_dir():
        raise UserError(f"--target_model_path {target} is not a folder; give a new folder")
    held = sorted(path.name for pattern in MODEL_PATTERNS for path in target.glob(pattern))
    if overwrite:
        _check_replaceable(target, source)
    elif held:
        raise UserError(
            f"--target_model_path {target} already holds a model ({held[0]}); give a new folder, or --overwrite"
        )
    elif not os.path.samefile(target, tokenizer):
        raise UserError(
            f"--target_model_path {target} already exists; give a new folder, or --target_tokenizer_path's own"
        )
    check_can_create(target, "--target_model_path")
    if overwrite:
        # The new folder is written beside it first.
        check_can_create(target.parent, "--target_model_path")


def _check_replaceable(target: Path, source: Path) -> None:
    """Raise UserError if a folder to replace holds anything that this command does not write, or the source needs."""
    found = {path.name for path in target.iterdir() if not is_stray(path.name)}
    ours = {INDEX_FILE, CONFIG_FILE, GENERATION_CONFIG_FILE, HISTORY_FILE, *COPIED_FILES}
    ours.update(name for name in found if WEIGHTS_NAME.fullmatch(name))
    if INDEX_FILE in found:
        ours.update(shard_names(str(target)))
    foreign = sorted(found - ours)
    if foreign:
        raise UserError(
            f"--overwrite would remove {foreign[0]} from --target_model_path {target}, which init_model.py does not "
            "write; move it away, or give a new folder"
        )
    for path in (source, *source.iterdir()):
        if target in (Path(os.path.realpath(path)), *Path(os.path.realpath(path)).parents):
            raise UserError(f"--overwrite would remove {path}, which is in the target {target}; give a new folder")


def _read_config(source: Path) -> dict:
    """The source's config. Raises UserError if it is not that of a LLaMA."""
    path = source / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{source} holds no {CONFIG_FILE}; give the folder of a LLaMA model in Hugging Face format")
    config = read_settings(path, allows_mark=True)
    if "vocab_size" not in config:
        raise UserError(f"{path} has no vocab_size; give a LLaMA model in Hugging Face format")
    if "auto_map" in config and config.get("model_type") != "llama":
        raise UserError(
            f"{path} names its own code (auto_map), which is never run here; give a model that transformers supports "
            "itself, such as LLaMA"
        )
    check_not_quantized(config, path)
    if config.get("model_type") == "llama":
        fields_of(config, path)
    return config


def _format_name(dtype: str) -> str | None:
    """The name of a dtype in safetensors; None for "source"."""
    if dtype not in ("source", *tokenizer_flags.MODEL_DTYPES):
        raise ValueError(f"dtype is {dtype!r}; allowed are source and {tokenizer_flags.MODEL_DTYPES}")
    return next((name for name, (torch_name, _) in FLOATS.items() if torch_name == dtype), None)


def _tokenizer_bytes(tokenizer: Path) -> int:
    return sum(path.stat().st_size for name in COPIED_FILES for path in tokenizer.glob(name))


def _check_matrices(shards: list[Shard], config: dict) -> int:
    """The number of rows of both matrices. Raises UserError if one is missing or they do not fit together."""
    found = {name: shard.tensors[name] for shard in shards for name in MATRICES if name in shard.tensors}
    folder = shards[0].path.parent
    required = [INPUT_EMBEDDING] if config.get("tie_word_embeddings") else MATRICES
    for name in required:
        if name not in found:
            raise UserError(f"the weights of {folder} have no {name}; give a LLaMA model in Hugging Face format")
    shapes = {name: entry["shape"] for name, entry in found.items()}
    if len(set(map(tuple, shapes.values()))) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise UserError(f"the embeddings of {folder} have the shapes {shapes}; two equal matrices are needed")
    for name, entry in found.items():
        if entry["dtype"] not in FLOATS:
            raise UserError(f"{name} of {folder} has the dtype {entry['dtype']}; one of {', '.join(FLOATS)} is needed")
    rows, columns = shapes[INPUT_EMBEDDING]
    if (rows, columns) != (config["vocab_size"], config.get("hidden_size", columns)):
        raise UserError(
            f"the embedding of {folder} is {rows} x {columns}, but its {CONFIG_FILE} has vocab_size "
            f"{config['vocab_size']} and hidden_size {config.get('hidden_size')}; give files that belong together"
        )
    if config.get("tie_word_embeddings"):
        problem = check_is_one_matrix(folder, [shard.path.name for shard in shards])
        if problem:
            raise UserError(problem)
    return rows


def _warn_of_unusable_weights(source: Path) -> None:
    """Warn about weights that train.py and inference would refuse; here they are only copied."""
    try:
        check_weights(str(source))
    except UserError as error:
        logs.get_logger().warning("train.py and inference_example.py will refuse this model: %s", error)


# Writing.


def _write_weights(source: Path, folder: Path, shards: list[Shard], change: Change, *, total: int) -> None:
    # One shard is synced to the disk while the next one is being read.
    with ThreadPoolExecutor(max_workers=1) as pool:
        with logs.progress(total=total, description="weights", unit="B", unit_scale=True) as bar:
            synced = []
            for shard in shards:
                write_shard(shard, folder / shard.path.name, change, bar.update)
                synced.append(pool.submit(sync, folder / shard.path.name))
        for future in synced:
            future.result()
    if shards[0].path.name != WEIGHTS_FILE:
        write_json(folder / INDEX_FILE, target_index(read_settings(source / INDEX_FILE), shards, change))


def _write_configs(
    source: Path, folder: Path, config: dict, rows: Rows, dtype: str, new_marks: Mapping[str, int | None]
) -> None:
    changed = {**_with_moved_ids(config, CONFIG_FILE, rows), "vocab_size": rows.vocab_size}
    changed = _with_new_marks(changed, CONFIG_FILE, new_marks)
    changed[NEW_ROWS_KEY] = rows.new_ranges or _recorded_ranges(config, rows)
    # The source's rows without a token are not in the target.
    changed.pop(PADDING_ROWS_KEY, None)
    if rows.padding:
        changed[PADDING_ROWS_KEY] = [[rows.tokens, rows.vocab_size]]
    if changed.pop("auto_map", None):
        logs.get_logger().info(
            "%s: auto_map is left out, because it names code, and transformers supports LLaMA itself", CONFIG_FILE
        )
    if dtype != "source":
        # transformers 5 writes "dtype", 4 writes "torch_dtype".
        changed["dtype" if "dtype" in changed and "torch_dtype" not in changed else "torch_dtype"] = dtype
    changed, settings, changes = portable_config(changed)
    own = {}
    if (source / GENERATION_CONFIG_FILE).is_file():
        settings_there = read_settings(source / GENERATION_CONFIG_FILE, allows_mark=True)
        own = _with_moved_ids(settings_there, GENERATION_CONFIG_FILE, rows)
        own = _with_new_marks(own, GENERATION_CONFIG_FILE, new_marks)
    generation, moves = with_moved_settings(own, settings)
    portable, others = portable_generation(generation, vocab_size=rows.vocab_size)
    for change in [*changes, *moves, *others]:
        logs.get_logger().info("%s", change)
    write_json(folder / CONFIG_FILE, changed)
    if generation:
        write_json(folder / GENERATION_CONFIG_FILE, portable)


def _recorded_ranges(config: dict, rows: Rows) -> list[list[int]]:
    """The new rows that the source's config records, as target rows. Used if this run adds no new rows."""
    recorded = config.get(NEW_ROWS_KEY)
    if not isinstance(recorded, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in recorded):
        return []
    if not all(type(border) is int for pair in recorded for border in pair):
        return []
    found: list[list[int]] = []
    # Rows without a token are not in the target.
    sources = [*((row, row) for row in range(rows.kept)), *sorted(rows.moved_ids.items(), key=lambda ids: ids[1])]
    for old, new in sources:
        if not any(begin <= old < end for begin, end in recorded):
            continue
        if found and found[-1][1] == new:
            found[-1][1] += 1
        else:
            found.append([new, new + 1])
    return found


def _with_moved_ids(config: dict, name: str, rows: Rows) -> dict:
    """The config with new ids for tokens that moved. An id without a token is removed: it would be a new piece now."""
    changed = dict(config)
    for key in TOKEN_ID_FIELDS:
        ids = config.get(key)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        moved = [index if index < rows.kept else rows.moved_ids.get(index) for index in listed]
        if moved == listed:
            continue
        kept = [index for index in moved if index is not None]
        changed[key] = kept if isinstance(ids, list) and kept else kept[0] if kept else None
        logs.get_logger().info(
            "%s: %s %s is now %s, because its token moved or did not exist", name, key, ids, changed[key]
        )
    return changed


def _with_new_marks(config: dict, name: str, marks: Mapping[str, int | None]) -> dict:
    """The config with the new marks of the tokenizer. generate() still stops at the old eos_token, a turn's end."""
    changed = dict(config)
    for key, index in marks.items():
        ids = config.get(key)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if key == "eos_token_id":
            changed[key] = [*listed, *([] if index in listed else [index])]
        else:
            changed[key] = index
        if changed[key] != ids:
            logs.get_logger().info("%s: %s %s is now %s, as in the tokenizer", name, key, ids, changed[key])
    return changed


if __name__ == "__main__":
    main()
