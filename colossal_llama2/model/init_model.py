"""Give each new token of an extended tokenizer the mean of the embeddings of the source tokens it replaces.

    python init_model.py --source_model_and_tokenizer_path llama-2-7b \\
        --target_tokenizer_path tokenizer-zh --target_model_path llama-2-7b-zh

Only the input embedding and lm_head change. Every other tensor is copied as bytes, and of the two the old rows too, so
this runs on a CPU at the speed of a file copy, in memory for a matrix or two. A source matrix may have more rows than
its tokenizer has tokens (padding to a round number): no token ever used these rows, so they are left out.
"""

import json
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Dict, List, Optional, Sequence, Union

if not __package__:
    # Run by its path, this file's own folder is on sys.path instead of the repository's.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama2 import arguments, errors, logs
from colossal_llama2.errors import UserError
from colossal_llama2.files import check_can_create, copy_files, read_json, temporary_folder, write_json
from colossal_llama2.model.loading import CONFIG_FILE, GENERATION_CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, shard_names
from colossal_llama2.tokenizer import TOKENIZER_FILES, Encoder
from colossal_llama2.tokenizer.init_tokenizer import SPACE, read_added_tokens, read_model

MODEL_PATTERNS = ("*.safetensors", "*.bin", "*.index.json", CONFIG_FILE, GENERATION_CONFIG_FILE)
INPUT_EMBEDDING = "model.embed_tokens.weight"
OUTPUT_EMBEDDING = "lm_head.weight"
TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
COPY_BYTES = 16 * 2**20
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True)
class Rows:
    """How the target's rows come from the source's: the first `kept` as they are, each later one the mean of a bag.

    `bags[i]` lists the source rows whose mean is target row `kept + i`. A token that transformers added beyond the
    pieces has moved behind the new pieces: its bag is its old row, and `moved_ids` says where old ids went.
    """

    kept: int
    bags: List[List[int]]
    new: int
    moved_ids: Dict[int, int]

    @property
    def vocab_size(self) -> int:
        """Rows of the target's matrices."""
        return self.kept + len(self.bags)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its header (tensor name to dtype, shape, data_offsets) and where the data begins."""

    path: Path
    header: dict
    data_start: int

    @property
    def tensors(self) -> dict:
        """The header without its free-text metadata, in the order of the data."""
        names = (name for name in self.header if name != "__metadata__")
        return {name: self.header[name] for name in sorted(names, key=lambda name: self.header[name]["data_offsets"])}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command: parse `argv` (default: the process's) and initialize the model."""
    args = arguments.init_model_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("init_model.py"):
        init_model(args.source_model_and_tokenizer_path, args.target_tokenizer_path, args.target_model_path)


def init_model(
    source_model_and_tokenizer_path: Union[str, Path],
    target_tokenizer_path: Union[str, Path],
    target_model_path: Union[str, Path],
) -> None:
    """Write the source model with rows for the target tokenizer's new tokens, and that tokenizer, to the target.

    The target is a new folder or the tokenizer's own. Files get their final names when all of them are complete.
    Raises UserError for what is wrong with the folders, before anything is written.
    """
    source = Path(os.path.abspath(source_model_and_tokenizer_path))
    tokenizer = Path(os.path.abspath(target_tokenizer_path))
    target = Path(os.path.abspath(target_model_path))
    into_tokenizer = _check_folders(source, tokenizer, target)
    config = _read_config(source)
    shards = _read_shards(source)
    rows = _plan_rows(source, tokenizer, source_rows=_check_matrices(shards, config))

    parent = target if into_tokenizer else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(parent, target.name) as folder:
        written = _write_shards(shards, folder, rows)
        _write_index(source, folder, shards)
        _write_configs(source, folder, config, rows)
        if into_tokenizer:
            _move_into(folder, target)
        else:
            copy_files(tokenizer, folder, TOKENIZER_FILES)
            os.rename(folder, target)
    matrices = sum(name in (INPUT_EMBEDDING, OUTPUT_EMBEDDING) for shard in shards for name in shard.tensors)
    print(f"written to {target}")
    print(
        f"vocabulary {config['vocab_size']:,} -> {rows.vocab_size:,}, "
        f"{rows.new:,} rows initialized in each of {matrices} matrices, {written:,} bytes written"
    )


# Checks, before anything is written.


def _check_folders(source: Path, tokenizer: Path, target: Path) -> bool:
    """Refuse a target that exists or lies inside the source; True if it is the tokenizer's own folder."""
    for flag, folder in (("--source_model_and_tokenizer_path", source), ("--target_tokenizer_path", tokenizer)):
        if not folder.is_dir():
            raise UserError(f"{flag} {folder} is not a folder; give a folder in Hugging Face format")
    if Path(os.path.realpath(source)) in Path(os.path.realpath(target)).parents:
        raise UserError(f"--target_model_path {target} is inside the source {source}; give a folder outside of it")
    if not os.path.lexists(target):
        check_can_create(target, "--target_model_path")
        return False
    if not target.is_dir():
        raise UserError(f"--target_model_path {target} is not a folder; give a new folder")
    held = sorted(path.name for pattern in MODEL_PATTERNS for path in target.glob(pattern))
    if held:
        raise UserError(f"--target_model_path {target} holds a model already ({held[0]}); give a new folder")
    if not os.path.samefile(target, tokenizer):
        raise UserError(
            f"--target_model_path {target} exists already; give a new folder, or --target_tokenizer_path's own"
        )
    return True


def _read_config(source: Path) -> dict:
    if not (source / CONFIG_FILE).is_file():
        raise UserError(f"{source} holds no {CONFIG_FILE}; give the folder of a LLaMA model in Hugging Face format")
    config = read_json(source / CONFIG_FILE)
    if "vocab_size" not in config:
        raise UserError(f"{source / CONFIG_FILE} has no vocab_size; give a LLaMA model in Hugging Face format")
    return config


def _read_shards(source: Path) -> List[Shard]:
    """The headers of all weight files of the source. Raises UserError if any is missing, foreign or damaged."""
    if (source / WEIGHTS_FILE).is_file():
        return [_read_shard(source / WEIGHTS_FILE)]
    if not (source / INDEX_FILE).is_file():
        raise UserError(_no_weights(source))
    shards = [_read_shard(source / name) for name in shard_names(str(source))]
    weight_map = read_json(source / INDEX_FILE)["weight_map"]
    held = {(shard.path.name, name) for shard in shards for name in shard.tensors}
    if held != {(file, name) for name, file in weight_map.items()}:
        file, name = sorted(held ^ {(file, name) for name, file in weight_map.items()})[0]
        raise UserError(
            f"{source / INDEX_FILE} and its files disagree about {name} in {file}; download the model again"
        )
    return shards


def _no_weights(source: Path) -> str:
    if not any(source.glob("pytorch_model*.bin")):
        return f"{source} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; give a LLaMA model in Hugging Face format"
    convert = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained('{source}', torch_dtype='auto').save_pretrained('{source}')"
    )
    return f'{source} holds pytorch_model.bin weights, which are never unpickled here; convert: python -c "{convert}"'


def _read_shard(path: Path) -> Shard:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path} is missing, though {INDEX_FILE} names it; download it again")
    try:
        with safe_open(path, framework="pt"):
            pass  # it checks the whole header: that it parses, and that the tensors fill the file
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download it again")
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return Shard(path=path, header=json.loads(file.read(length)), data_start=8 + length)


def _check_matrices(shards: List[Shard], config: dict) -> int:
    """The number of rows of both matrices. Raises UserError if one is missing or they differ."""
    shapes = {
        name: shard.tensors[name]["shape"]
        for shard in shards
        for name in (INPUT_EMBEDDING, OUTPUT_EMBEDDING)
        if name in shard.tensors
    }
    folder = shards[0].path.parent
    required = [INPUT_EMBEDDING] if config.get("tie_word_embeddings") else [INPUT_EMBEDDING, OUTPUT_EMBEDDING]
    for name in required:
        if name not in shapes:
            raise UserError(f"the weights of {folder} have no {name}; give a LLaMA model in Hugging Face format")
    if len(set(map(tuple, shapes.values()))) > 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise UserError(f"the embeddings of {folder} have the shapes {shapes}; two equal matrices are needed")
    return shapes[INPUT_EMBEDDING][0]


def _plan_rows(source: Path, tokenizer: Path, *, source_rows: int) -> Rows:
    """Which source rows make up each target row. Raises UserError if tokenizers or matrix do not fit together."""
    old = [piece.piece for piece in read_model(source).pieces]
    new = [piece.piece for piece in read_model(tokenizer).pieces]
    _check_extends(source, tokenizer, old=old, new=new)
    if source_rows < len(old):
        raise UserError(
            f"the embedding of {source} has {source_rows} rows, fewer than the {len(old)} pieces of its tokenizer; "
            "give the tokenizer that belongs to the model"
        )
    old_added = {token: index for token, index in read_added_tokens(source, len(old)).items() if index < source_rows}
    new_added = read_added_tokens(tokenizer, len(new))
    moved_ids = {old_added[token]: index for token, index in new_added.items() if token in old_added}
    # Pieces write a space as "▁", and their first one is no dummy prefix: it is there only if the piece has it.
    texts = [piece.replace(SPACE, " ") for piece in new[len(old) :]] + list(new_added)
    bags = Encoder(source).encode(texts, dummy_prefix=False)
    for old_id, new_id in moved_ids.items():
        bags[new_id - len(old)] = [old_id]
    for text, bag in zip(texts, bags, strict=True):
        if not bag:
            raise UserError(f"{source} encodes {text!r} as nothing, so no row can be made; remove the piece")
    return Rows(kept=len(old), bags=bags, new=len(bags) - len(moved_ids), moved_ids=moved_ids)


def _check_extends(source: Path, tokenizer: Path, *, old: List[str], new: List[str]) -> None:
    for index, piece in enumerate(old):
        if index >= len(new) or new[index] != piece:
            found = repr(new[index]) if index < len(new) else "missing"
            raise UserError(
                f"{tokenizer} does not extend the tokenizer of {source}: piece {index} is {found}, not {piece!r}; "
                "give the folder that init_tokenizer.py wrote from this source"
            )


# Writing.


def _write_shards(shards: List[Shard], folder: Path, rows: Rows) -> int:
    """Write every shard under its own name; returns the bytes written."""
    headers = [_target_header(shard, rows) for shard in shards]
    total = sum(len(header) + _data_bytes(header) for header in headers)
    with logs.progress(total=total, description="weights", unit="B", unit_scale=True) as bar:
        for shard, header in zip(shards, headers, strict=True):
            with open(shard.path, "rb") as source, open(folder / shard.path.name, "wb") as target:
                bar.update(target.write(header))
                for name, entry in shard.tensors.items():
                    begin, end = entry["data_offsets"]
                    source.seek(shard.data_start + begin)
                    if name in (INPUT_EMBEDDING, OUTPUT_EMBEDDING):
                        row_bytes = (end - begin) // entry["shape"][0]
                        _copy(source, target, rows.kept * row_bytes, bar)
                        _write_new_rows(shard.path, name, target, rows.bags, bar)
                    else:
                        _copy(source, target, end - begin, bar)
    return total


def _target_header(shard: Shard, rows: Rows) -> bytes:
    """The shard's header with the two matrices' new shapes and all offsets moved, as it stands in the file."""
    header = {key: value for key, value in shard.header.items() if key == "__metadata__"}
    offset = 0
    for name, entry in shard.tensors.items():
        begin, end = entry["data_offsets"]
        shape, length = entry["shape"], end - begin
        if name in (INPUT_EMBEDDING, OUTPUT_EMBEDDING):
            length = length // shape[0] * rows.vocab_size
            shape = [rows.vocab_size, shape[1]]
        header[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Spaces at the end align the data to 8 bytes, as the format's own writer does.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _data_bytes(header: bytes) -> int:
    entries = json.loads(header[8:])
    return max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)


def _copy(source: BinaryIO, target: BinaryIO, length: int, bar: logs.SilentProgress) -> None:
    while length > 0:
        chunk = source.read(min(length, COPY_BYTES))
        if not chunk:
            raise OSError(f"{source.name} became shorter while it was read")
        bar.update(target.write(chunk))
        length -= len(chunk)


def _write_new_rows(
    path: Path, name: str, target: BinaryIO, bags: List[List[int]], bar: logs.SilentProgress
) -> None:
    """Append the mean of each bag's rows: summed in float32, cast to the matrix's dtype once."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as weights:
        matrix = weights.get_tensor(name)
    for start in range(0, len(bags), ROWS_AT_A_TIME):
        block = bags[start : start + ROWS_AT_A_TIME]
        ids = torch.tensor([index for bag in block for index in bag])
        # Only the rows in use become float32: a copy of the whole matrix would take twice a half-precision one.
        used, ids = torch.unique(ids, return_inverse=True)
        offsets = torch.tensor([0, *(len(bag) for bag in block[:-1])]).cumsum(0)
        means = torch.nn.functional.embedding_bag(ids, matrix[used].float(), offsets, mode="mean")
        rows = means.to(matrix.dtype).contiguous().view(torch.uint8)
        bar.update(target.write(rows.numpy().data))


def _write_index(source: Path, folder: Path, shards: List[Shard]) -> None:
    """The source's index with the new sizes; nothing if the source is a single file."""
    if shards[0].path.name == WEIGHTS_FILE:
        return
    index = read_json(source / INDEX_FILE)
    written = [entry for shard in shards for entry in _read_shard(folder / shard.path.name).tensors.values()]
    metadata = index.setdefault("metadata", {})
    metadata["total_size"] = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in written)
    if "total_parameters" in metadata:
        old = [entry for shard in shards for entry in shard.tensors.values()]
        metadata["total_parameters"] += _elements(written) - _elements(old)
    write_json(folder / INDEX_FILE, index)


def _elements(entries: List[dict]) -> int:
    total = 0
    for entry in entries:
        count = 1
        for length in entry["shape"]:
            count *= length
        total += count
    return total


def _write_configs(source: Path, folder: Path, config: dict, rows: Rows) -> None:
    write_json(folder / CONFIG_FILE, {**_with_moved_ids(config, CONFIG_FILE, rows), "vocab_size": rows.vocab_size})
    if (source / GENERATION_CONFIG_FILE).is_file():
        generation = read_json(source / GENERATION_CONFIG_FILE)
        write_json(folder / GENERATION_CONFIG_FILE, _with_moved_ids(generation, GENERATION_CONFIG_FILE, rows))


def _with_moved_ids(config: dict, name: str, rows: Rows) -> dict:
    """The config with the ids of tokens that moved. An id that no token has would now be a new piece: it is unset."""
    changed = dict(config)
    for key in TOKEN_ID_KEYS:
        ids = config.get(key)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        moved = [index if index < rows.kept else rows.moved_ids.get(index) for index in listed]
        if moved == listed:
            continue
        kept = [index for index in moved if index is not None]
        changed[key] = kept if isinstance(ids, list) and kept else kept[0] if kept else None
        logs.get_logger().info("%s: %s %s is now %s, as its token moved or had none", name, key, ids, changed[key])
    return changed


def _move_into(folder: Path, target: Path) -> None:
    """Give the files their final names in the tokenizer's folder; config.json last, without which nothing loads."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
        os.rename(path, target / path.name)


if __name__ == "__main__":
    main()
