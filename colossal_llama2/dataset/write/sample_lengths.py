"""Compare the length of samples with the positions of the model, without torch, as far as files record both."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from colossal_llama2 import logs
from colossal_llama2.dataset.layout.manifest import read_manifest_of
from colossal_llama2.errors import UserError
from colossal_llama2.model.config_fields import CONFIG_FILE, read_fields
from colossal_llama2.model.model_folder import StrPath
from colossal_llama2.model.positions import cure_of_long_samples, described, positions_of, scaling_type
from colossal_llama2.storage.json_input import is_whole


def warn_if_too_long(max_length: int, tokenizer_dir: str) -> None:
    """Warn if samples of `max_length` tokens are too long for the model in the tokenizer's folder, if there is one."""
    if not Path(tokenizer_dir, CONFIG_FILE).is_file():
        return
    try:
        config = SimpleNamespace(**read_fields(tokenizer_dir))
    except UserError as error:
        logs.get_logger().warning(f"--max_length is not compared with the positions of the model: {error}")
        return
    positions = positions_of(config)
    if max_length > positions:
        logs.get_logger().warning(
            f"--max_length {max_length} given, {described(positions, scaling_type(config))}, and training "
            f"refuses longer samples; {cure_of_long_samples(positions)}"
        )


def check_max_length(max_length: int, model_path: StrPath) -> None:
    """Raise UserError for a training --max_length over the model's positions."""
    config = SimpleNamespace(**read_fields(model_path))
    positions = positions_of(config)
    if max_length > positions:
        has = described(positions, scaling_type(config))
        raise UserError(f"--max_length {max_length} given, {has}; give at most that many")


def check_samples_fit(parts: Sequence[str], model_path: StrPath, *, flag: str = "--dataset") -> None:
    """Raise UserError for a prepared folder with a sample that is longer than the model's positions.

    Folders that do not record the length of their samples, from earlier versions, are not checked.
    """
    config = SimpleNamespace(**read_fields(model_path))
    positions = positions_of(config)
    for part in parts:
        longest = longest_sample(part)
        if longest is not None and longest > positions:
            has = described(positions, scaling_type(config))
            raise UserError(
                f"{flag} {part}: its longest sample has {longest} tokens, {has}; {cure_of_long_samples(positions)}"
            )


def longest_sample(part: str) -> int | None:
    """Tokens of the longest sample of a part-* or eval folder, from its manifest; None if that does not record it."""
    manifest = read_manifest_of(part)
    name = Path(part).resolve().name
    for entry in [*manifest.get("bins", ()), manifest.get("eval")]:
        if isinstance(entry, dict) and entry.get("name") == name and is_whole(entry.get("longest")):
            return entry["longest"]
    return None
