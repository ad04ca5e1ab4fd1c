"""Check one checkpoint: files, hashes, shapes, numbers, tokenizer.

    python -m colossal_llama2.train.verify checkpoint_dir/epoch-0_step-400

Given a run's folder, such as checkpoint_dir, it checks the newest checkpoint.

Prints a line per check, and exits with code 0, or with 2 and the first problem. Every tensor is read, one at a time, so
a model of any size needs the memory of its largest matrix. Nothing is trained, nothing is written.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from colossal_llama2 import errors, logs
from colossal_llama2.cli import train_flags
from colossal_llama2.encoding.registry import fingerprint, kind_of, load_encoder
from colossal_llama2.encoding.sentencepiece_encoder import SentencePieceEncoder
from colossal_llama2.engine.patches.checkpoint_io import OPTIMIZER_INDEX, read_object, read_optimizer_index
from colossal_llama2.engine.resume_state import MASTERS_NAME, masters_ranks
from colossal_llama2.errors import UserError
from colossal_llama2.model.adapter_files import check_adapter_weights, is_adapter, read_adapter
from colossal_llama2.model.config_fields import read_fields
from colossal_llama2.model.loading import check_model, facts_of_config, inspect_weights, model_without_weights
from colossal_llama2.model.lora import PEFT_PREFIX
from colossal_llama2.model.model_folder import shard_names
from colossal_llama2.model.tied_weights import INPUT_EMBEDDING
from colossal_llama2.plurals import counted
from colossal_llama2.terminal_text import show_line
from colossal_llama2.train.checkpointing.saved_run import SavedRun
from colossal_llama2.train.run_folder import checkpoint_files
from colossal_llama2.train.run_folder.file_names import MANIFEST_NAME, MODEL_NAME, OPTIMIZER_NAME, STATES_NAME
from colossal_llama2.train.settings.model_source import find_source

COMMAND = "python -m colossal_llama2.train.verify"
# Entries of running_states.json besides the position in the data, and their types.
STATE_TYPES = {"layout": dict, "tokenizer": str, "ranks": list, "world_size": int, "freeze_non_embeds_params": bool}
# Kinds of text on which our encoder and transformers differ if the files are those of two tokenizers.
PARITY_TEXTS = ("Hello, world! 1234.5", "明月松间照，清泉石上流。", "two  spaces\n\tand a tab", "naïve café 😀")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and check the checkpoint."""
    args = train_flags.verify_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors(COMMAND):
        for line in verify(args.checkpoint):
            show_line(line)


def verify(checkpoint: str) -> Iterator[str]:
    """Yield a line per check. Raises UserError at the first problem."""
    folder = Path(checkpoint)
    if not (folder / STATES_NAME).is_file() and not (folder / MANIFEST_NAME).is_file():
        complete = checkpoint_files.complete_checkpoints(folder)
        if not complete:
            raise UserError(f"{checkpoint}: holds no checkpoint; give a folder such as checkpoint_dir/epoch-0_step-400")
        folder = complete[-1]
    problem = checkpoint_files.sizes_problem(folder) or next(checkpoint_files.content_problems(folder), None)
    if problem:
        raise UserError(f"{problem}; use another checkpoint")
    sizes = checkpoint_files.list_files(folder)
    yield f"checkpoint {folder}"
    yield f"files      {len(sizes)} of {sum(sizes.values()):,} bytes, all as they were written"
    try:
        find_source("", str(folder))
    except UserError as error:
        raise UserError(str(error).removeprefix("--load_checkpoint "))
    saved = SavedRun.read(folder)
    state = saved.state
    _check_entries(folder / STATES_NAME, saved.entries)
    read = f"{counted(state.samples_seen, 'sample')}, {counted(state.tokens_seen, 'token')}"
    yield f"place      epoch {state.epoch}, step {state.step}, {read}"
    for name, check in CHECKS.items():
        yield f"{name:<10} {check(saved)}"


def _check_entries(path: Path, entries: dict[str, Any]) -> None:
    for name, kind in STATE_TYPES.items():
        if not isinstance(entries.get(name), kind):
            raise UserError(f"{path}: {name} is {entries.get(name)!r}, not {kind.__name__}; use another checkpoint")
    if len(entries["ranks"]) != entries["world_size"]:
        raise UserError(
            f"{path}: has states of {counted(len(entries['ranks']), 'rank')}, the run had {entries['world_size']}"
        )


def _model(saved: SavedRun) -> Path:
    return saved.folder / MODEL_NAME


def _check_model(saved: SavedRun) -> str:
    folder = str(_model(saved))
    if is_adapter(folder):
        return _check_adapter(folder)
    check_model(folder, MODEL_NAME)
    facts = inspect_weights(folder)
    for name in shard_names(folder):
        _read_all(Path(folder, name))
    return f"{facts.parameters / 1e6:.1f} M parameters, shapes as in its config.json, all numbers finite"


def _check_adapter(folder: str) -> str:
    adapter = read_adapter(folder)
    check_adapter_weights(adapter, read_fields(folder))
    numbers = sum(math.prod(shape) for shape in _read_all(adapter.weights_file).values())
    return f"an adapter of {numbers / 1e6:.1f} M parameters, shapes as in its configuration, all numbers finite"


def _check_optimizer(saved: SavedRun) -> str:
    """Adam's two moments of each trained parameter, in the parameter's shape, and the groups that name them."""
    folder = saved.folder / OPTIMIZER_NAME
    weight_map, groups_name = read_optimizer_index(folder)
    expected = _trained_shapes(saved)
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(weight_map.values())):
        read_object(str(folder / name))
        found |= _read_all(folder / name)
    numbers = [number for group in read_object(str(folder / groups_name)) for number in group["params"]]
    if sorted(numbers) != list(range(len(expected))):
        raise UserError(f"{folder / groups_name}: is of {len(numbers)} parameters, {len(expected)} are trained")
    if not found:
        return "no moments: no update was made yet"
    for number, (parameter, shape) in enumerate(expected):
        for moment in ("exp_avg", "exp_avg_sq"):
            if found.get(f"{number}.{moment}") != shape:
                raise UserError(
                    f"{folder / weight_map.get(str(number), OPTIMIZER_INDEX)}: {moment} of {parameter} has shape "
                    f"{found.get(f'{number}.{moment}')}, its weight {shape}; use another checkpoint"
                )
    return f"both moments of {len(expected)} parameters, shapes as the model's, all numbers finite"


def _trained_shapes(saved: SavedRun) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the trained parameters in the optimizer's order: matrices, then norms."""
    from colossal_llama2.model.trainable import Lora, Trainable

    folder = _model(saved)
    model = model_without_weights(str(folder))
    trainable = Trainable.from_flags(embeddings=saved.entries["freeze_non_embeds_params"], new_rows=False)
    if is_adapter(folder):
        adapter = read_adapter(folder)
        names = check_adapter_weights(adapter, read_fields(folder))
        trainable = Lora(shape=adapter.shape, with_embeddings=PEFT_PREFIX + INPUT_EMBEDDING in names)
    trainable.prepare(model)
    trained = [(name, tuple(param.shape)) for name, param in model.named_parameters() if param.requires_grad]
    return [item for item in trained if len(item[1]) > 1] + [item for item in trained if len(item[1]) <= 1]


def _check_masters(saved: SavedRun) -> str:
    entries = saved.entries
    if entries["layout"].get("precision") == "fp32":
        return "none needed, the run is in float32"
    total = 0
    ranks = masters_ranks(entries["layout"].get("plugin"), entries["world_size"])
    for rank in ranks:
        path = Path(saved.folder, MASTERS_NAME, f"rank-{rank:05d}.safetensors")
        if not path.is_file():
            raise UserError(
                f"{path}: is missing, the run had {counted(entries['world_size'], 'rank')}; use another checkpoint"
            )
        total += sum(math.prod(shape) for shape in _read_all(path).values())
    # Padding, and what several ranks hold, are additional.
    needed = sum(math.prod(shape) for _, shape in _trained_shapes(saved))
    if total < needed:
        raise UserError(f"{path.parent}: holds {total:,} numbers, the model has {needed:,}; use another checkpoint")
    of_ranks = counted(len(ranks), "rank") if len(ranks) > 1 else "rank 0"
    return f"of {of_ranks}, all numbers finite"


def _check_tokenizer(saved: SavedRun) -> str:
    folder = _model(saved)
    kind = kind_of(folder).encoder
    # The file that decides the ids.
    name = kind.files[0]
    if fingerprint(folder) != saved.entries["tokenizer"]:
        raise UserError(f"{folder / name}: differs from the tokenizer of the run; use another checkpoint")
    encoder = load_encoder(folder)
    others = _transformers_tokenizers(folder)
    fast = others["fast"]
    rows = facts_of_config(str(folder)).vocab_size
    if len(fast) > rows:
        raise UserError(f"{folder}: its tokenizer has {counted(len(fast), 'token')}, the model {counted(rows, 'row')}")
    texts = [text for text in PARITY_TEXTS if not encoder.problem_of(text)]
    # Whether transformers puts "▁" before a text is a setting of the tokenizer, not an error.
    allowed = [encoder.encode(texts, dummy_prefix=prefix) for prefix in (True, False)]
    for speed, tokenizer in others.items():
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for text, ids, *right in zip(texts, encoded, *allowed, strict=True):
            if ids not in right:
                raise UserError(
                    f"{folder}: transformers' {speed} tokenizer gives {ids} for {text!r}, {name} {right[0]}; "
                    f"its tokenizer files belong to different tokenizers"
                )
    return f"{counted(len(fast), 'token')} for {counted(rows, 'row')}; transformers encodes as {encoder.name} does"


def _transformers_tokenizers(folder: Path) -> dict[str, Any]:
    """The tokenizers of a folder in transformers: "fast", and for SentencePiece "slow", if the library has it."""
    from colossal_llama2.encoding.parity import load_with_transformers
    from colossal_llama2.encoding.transformers_tokenizer import load_tokenizer

    if kind_of(folder).encoder is not SentencePieceEncoder:
        return {"fast": load_tokenizer(folder)}
    fast, slow = load_with_transformers(folder), load_with_transformers(folder, use_fast=False)
    return {"fast": fast} if slow.is_fast else {"fast": fast, "slow": slow}


CHECKS: dict[str, Callable[[SavedRun], str]] = {
    "model": _check_model,
    "optimizer": _check_optimizer,
    "masters": _check_masters,
    "tokenizer": _check_tokenizer,
}


def _read_all(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file, all of whose numbers are read. Raises UserError for NaN and infinity."""
    import torch
    from safetensors import SafetensorError, safe_open

    shapes = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{path}: {key} has numbers that are NaN or infinite; use an earlier checkpoint")
                shapes[key] = tuple(tensor.shape)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); use another checkpoint")
    return shapes


if __name__ == "__main__":
    main()
