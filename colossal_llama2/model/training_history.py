"""training_history.json in a model's folder: every stage that made its weights, the earliest first.

    {"version": 1, "base_model": "meta-llama/Llama-2-7b-hf", "stages": [
        {"stage": "vocabulary", "parent": {"name": "llama-2-7b", "config_sha256": "...", "weights": {...}},
         "vocabulary_before": 32000, "vocabulary": 55296, "tokenizer_sha256": "..."},
        {"stage": "pretrain", "parent": {"name": "llama-2-7b-zh", ...},
         "data": [{"source": "zh", "parts": 10, "fingerprints": ["9b12...", ...], "samples_there": 1920,
                   "samples": 1920, "tokens": 240000}],
         "begins": {"epoch": 0, "sample": 0}, "ends": {"epoch": 1, "sample": 0}, "steps": 480, "updates": 480,
         "samples": 1920, "tokens": 240000, "first_loss": 8.91, "final_loss": 3.2, "final_loss_steps": 48,
         "settings": {"lr": 3e-05, ...}, "world_size": 8, "versions": {"torch": "2.5.1", ...},
         "tokenizer_sha256": "...", "weights": {"model.safetensors": {"bytes": 13476835328, "sha256": "..."}}}]}

`base_model` is the name, for a model card, of the model that the first stage started from. A parent is named by the end
of its path. In a parent's weights, null stands for a hash that would take long to compute. A stage has weights once its
model is exported. `resumed` lists the steps at which a stage was resumed with changed settings, and what changed.

The folder may come from anyone, so every entry is checked, and a file with a wrong entry is ignored.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from colossal_llama2 import logs
from colossal_llama2.errors import UserError
from colossal_llama2.model.front_matter import read_front_matter
from colossal_llama2.model.loading import CONFIG_FILE
from colossal_llama2.model.model_folder import shard_names
from colossal_llama2.storage import json_input
from colossal_llama2.storage.json_input import is_finite, is_whole

HISTORY_FILE = "training_history.json"
VERSION = 1
KINDS = ("vocabulary", "pretrain", "sft")
MAX_BYTES = 8 * 2**20
MAX_TEXT = 4096
# For a source with more parts, only this many fingerprints are listed; `parts` counts all of them.
MAX_FINGERPRINTS = 1000
# A parent whose weights are larger is not hashed: that would delay the first step by more than a second or two.
HASHED_BYTES = 2**30
CARD_FILE = "README.md"

Weights = dict[str, dict[str, Any]]


class History(NamedTuple):
    """The history of a model; `problem` is the reason why an existing file was ignored."""

    base_model: str | None = None
    stages: list[dict[str, Any]] = []
    problem: str | None = None

    def followed_by(self, stage: dict[str, Any], *, base_model: str) -> dict[str, Any]:
        """The content of the file after one more stage; `base_model` is its parent if it is the first stage."""
        return {"version": VERSION, "base_model": self.base_model or base_model, "stages": [*self.stages, stage]}


def read_history(folder: Path) -> History:
    """The history in a model's folder, empty if there is none or it cannot be used; never raises."""
    path = Path(folder, HISTORY_FILE)
    try:
        if not os.path.lexists(path):
            return History()
        content = json_input.parse(json_input.read_regular(path, most_bytes=MAX_BYTES))
        return _checked(content)
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:
        problem = str(error)
    return History(problem=f"{path} is ignored, so earlier stages are unknown: {problem}")


def log_problem(history: History) -> None:
    """Log a warning about a file that was ignored."""
    if history.problem:
        logs.get_logger().warning("%s", history.problem)


def name_of(path: str) -> str:
    """A name for a folder by the end of its path; for a run's model that of the run: "runs/epoch-0_step-2"."""
    folder = Path(path).absolute()
    if folder.name == "modeling" and folder.parent.name:
        run = folder.parent
        is_checkpoint = run.name.startswith("epoch-") and run.parent.name
        name = f"{run.parent.name}/{run.name}" if is_checkpoint else run.name
    else:
        name = _hub_name(folder) or folder.name
    return encodable(name)


def encodable(text: str) -> str:
    """`text` with characters escaped that UTF-8 cannot encode, which a folder's name may have."""
    return text.encode("utf-8", "backslashreplace").decode()


def _hub_name(folder: Path) -> str | None:
    """ "meta-llama/Llama-2-7b-hf" for a folder of that model in the cache of huggingface_hub."""
    kind, *name = folder.parent.parent.name.split("--")
    return "/".join(name) if folder.parent.name == "snapshots" and kind == "models" and name else None


def base_model_of(path: str, history: History) -> str:
    """What a card should name as the base of a model trained from this folder: history, own card, or path."""
    return history.base_model or named_by_card(Path(path, CARD_FILE)) or name_of(path)


def named_by_card(card: Path) -> str | None:
    """The `base_model` in a card's front matter; None if there is none that can be read. Never raises."""
    named: Any = read_front_matter(card).get("base_model")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    return named.strip() if is_name(named) else None


def is_name(value: Any) -> bool:
    """Whether a value read from a file can be the name of a model: text of bounded length that UTF-8 can hold."""
    return _is_text(value) and bool(value.strip())


def describe_parent(path: str, history: History, known: Weights | None = None) -> dict[str, Any]:
    """A stage's "parent": the folder that its weights come from.

    Args:
        known: hashes of its weights that are already known, such as those in a checkpoint's manifest.
    """
    weights = weights_of(path, known or {})
    parent: dict[str, Any] = {"name": name_of(path), "weights": weights}
    config = Path(path, CONFIG_FILE)
    if config.is_file():
        parent["config_sha256"] = hashlib.sha256(config.read_bytes()).hexdigest()
    left = history.stages[-1].get("weights") if history.stages else None
    if left and weights and _are_same(left, weights):
        # Too large to be hashed: the sizes agree, so the recorded hashes are used.
        weights.update({name: left[name] for name, entry in weights.items() if entry["sha256"] is None})
    elif left and weights:
        parent["as_recorded"] = False
        logs.get_logger().warning(
            "%s: its weights are not those of the last stage in its %s; they are recorded as another model's",
            path,
            HISTORY_FILE,
        )
    return parent


def weights_of(path: str, known: Weights) -> Weights:
    """Bytes and SHA-256 of a model's safetensors; null for hashes that are unknown and would take long."""
    try:
        sizes = {name: Path(path, name).stat().st_size for name in shard_names(path)}
    except (OSError, UserError):
        return {}
    found: Weights = {}
    affordable = sum(sizes.values()) <= HASHED_BYTES
    for name, size in sizes.items():
        entry = known.get(name, {})
        sha256 = entry.get("sha256") if entry.get("bytes") == size else None
        if sha256 is None and affordable:
            with Path(path, name).open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        found[name] = {"bytes": size, "sha256": sha256}
    return found


def _are_same(recorded: Weights, found: Weights) -> bool:
    if recorded.keys() != found.keys():
        return False
    pairs = [(recorded[name], found[name]) for name in found]
    same_bytes = all(one["bytes"] == other["bytes"] for one, other in pairs)
    return same_bytes and all(None in (a["sha256"], b["sha256"]) or a["sha256"] == b["sha256"] for a, b in pairs)


# Checks. Each returns whether a value read from JSON is valid.

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value == encodable(value)


def _is_count(value: Any) -> bool:
    return is_whole(value) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return is_finite(value) and abs(value) < 2**63


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool) or _is_number(value) or _is_text(value)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _mapping_to(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(check, value.values()))


def _record(fields: Mapping[str, Check], *required: str) -> Check:
    def check(value: Any) -> bool:
        if not isinstance(value, dict) or not set(required) <= value.keys() <= fields.keys():
            return False
        return all(fields[name](entry) for name, entry in value.items())

    return check


_is_weights = _mapping_to(_record({"bytes": _is_count, "sha256": _or_null(_is_text)}, "bytes", "sha256"))
_is_place = _record({"epoch": _is_count, "sample": _is_count}, "epoch", "sample")
_is_source = _record(
    {
        "source": _is_text,
        "parts": _is_count,
        "fingerprints": _list_of(_is_text),
        "samples_there": _is_count,
        "samples": _is_count,
        "tokens": _is_count,
    },
    "source",
)
STAGE_FIELDS: dict[str, Check] = {
    "stage": lambda value: value in KINDS if isinstance(value, str) else False,
    "parent": _record(
        {
            "name": _is_text,
            "weights": _is_weights,
            "config_sha256": _is_text,
            "as_recorded": lambda value: isinstance(value, bool),
        },
        "name",
    ),
    "data": _list_of(_is_source),
    "begins": _is_place,
    "ends": _is_place,
    **dict.fromkeys(("steps", "updates", "samples", "tokens", "world_size", "final_loss_steps"), _is_count),
    **dict.fromkeys(("vocabulary_before", "vocabulary", "padding_rows"), _is_count),
    **dict.fromkeys(("first_loss", "final_loss"), _or_null(_is_number)),
    "settings": _mapping_to(lambda value: _is_plain(value) or _list_of(_is_plain)(value)),
    "versions": _mapping_to(_or_null(_is_text)),
    "tokenizer_sha256": _is_text,
    "weights": _is_weights,
    "resumed": _list_of(_record({"step": _is_count, "changed": _list_of(_is_text)}, "step", "changed")),
}
REQUIRED = ("stage", "parent")


def _checked(content: Any) -> History:
    """The history in a file's content. Raises ValueError for any other content."""
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise ValueError("it is not a training history")
    if content.get("version") != VERSION:
        raise ValueError(f"it is of version {content.get('version')!r:.40}, this program reads version {VERSION}")
    if not _is_text(content.get("base_model")) or not content["base_model"].strip():
        raise ValueError("its base_model is not a name")
    stages = []
    for number, entry in enumerate(content["stages"], start=1):
        wrong = _first_wrong(entry)
        if wrong is not None:
            raise ValueError(f"{wrong} of its stage {number} is not valid")
        stages.append(entry)
    return History(content["base_model"], stages)


def _first_wrong(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return "the type"
    wrong = [name for name in REQUIRED if name not in entry]
    wrong += [name for name, value in entry.items() if name not in STAGE_FIELDS or not STAGE_FIELDS[name](value)]
    return f"{wrong[0]!r:.60}" if wrong else None


def as_written(content: dict[str, Any]) -> dict[str, Any]:
    """What `read_history` will return for this content. Raises ValueError if it would ignore the file."""
    text = json.dumps(content)
    if len(text) > MAX_BYTES // 2:
        raise ValueError(f"it would have {len(text):,} characters")
    plain = json.loads(text)
    _checked(plain)
    return plain


def vocabulary_stage(
    source: str, sizes: tuple[int, int], tokenizer_sha256: str, *, new_rows: int = 0, padding_rows: int = 0
) -> dict[str, Any]:
    """The content of the file for a model whose vocabulary was extended from `sizes[0]` to `sizes[1]` rows.

    `padding_rows` of them have no token. A model with as many rows as before, none of them new, has no new stage.
    """
    history = read_history(Path(source))
    log_problem(history)
    base_model = base_model_of(source, history)
    if sizes[0] == sizes[1] and not new_rows:
        return {"version": VERSION, "base_model": base_model, "stages": history.stages}
    stage = {
        "stage": "vocabulary",
        "parent": describe_parent(source, history),
        "vocabulary_before": sizes[0],
        "vocabulary": sizes[1],
        **({"padding_rows": padding_rows} if padding_rows else {}),
        "tokenizer_sha256": tokenizer_sha256,
    }
    return history.followed_by(stage, base_model=base_model)
