"""Record the input and output of a run: plan.json in the cache, manifest.json beside the bins.

plan.json is written first, so that a restart only continues the same work. manifest.json is written last; it depends
only on the input, the settings and the tokenizer:

    {"version": 3, "settings": {"stage": "pretrain", "max_length": 4096, ...},
     "tokenizer": {"sha256": "5f3a...", "sample_texts": 200, "sample_differing": 0},
     "inputs": [{"path": "data/zh/news.jsonl", "source": "zh", "size": 5101, "sha256": "0c9e...", "documents": 3, ...}],
     "categories": {"news": {"documents": 3, "tokens_in": 620, "trained": 600, ...}}, "total": {...}, "lines": 3,
     "empty_lines": 0, "bad_rows": 0, "bad_reasons": {}, "lost_files": [], "left_out": [], "formats": {}, "notes": {},
     "unknown_roles": {}, "samples": 1, "fill": 0.97,
     "bins": [{"name": "part-00000", "samples": 1, "tokens": 620, "trained": 600, "predicted": 598, "pieces": 3,
               "longest": 620, "fingerprint": "9b12...", "bytes": 5904}], "eval": null, "turn_end": [2]}

The counts are those of `token_ledger`. `lost_files` could not be read to their end (`data_files.LostFile`); `left_out`
are entries of the input folders that are not read (`file_kinds.LeftOut`). `turn_end`, for conversations, are the ids of
the tokens that end an answer.
"""

import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any

from colossal_llama2 import logs
from colossal_llama2.corpus.data_files import InputFile, LostFile
from colossal_llama2.corpus.file_kinds import LeftOut
from colossal_llama2.corpus.row_reader import sha256_of
from colossal_llama2.dataset.layout.arrow_folder import DATA_FILE
from colossal_llama2.dataset.layout.locks import RefusedError
from colossal_llama2.dataset.layout.output_folder import CACHE_FLAG, DATA_MANIFEST_FILE, WORK_PLAN_FILE, OutputDirs
from colossal_llama2.dataset.layout.prepare_settings import Settings
from colossal_llama2.dataset.layout.store import read_json_or_none, write_json_whole
from colossal_llama2.dataset.layout.token_ledger import TokenLedger
from colossal_llama2.encoding.registry import fingerprint
from colossal_llama2.errors import RunError, UserError
from colossal_llama2.plurals import counted
from colossal_llama2.storage import json_input

# 2: the normalized text decides what is held out (`held_out`); document_target_bytes counts predicted tokens only.
# 3: loss marks are read, and more forms of rows.
VERSION = 3
MANIFEST_KEYS = {"settings", "tokenizer", "bins"}
NOT_OURS = "not ours"
# The command that prepares the data of a stage, and the command that trains on it.
COMMANDS = {
    "pretrain": ("prepare_pretrain_dataset.py", "train.py"),
    "sft": ("prepare_sft_dataset.py", "train_sft.py"),
}


def plan_content(
    settings: Settings, files: Sequence[InputFile], *, tokenizer_sha256: str, folders: OutputDirs, unit_bytes: int
) -> dict[str, Any]:
    """The content of plan.json, which must be equal for a restart to continue."""
    return {
        "version": VERSION,
        "unit_bytes": unit_bytes,
        "settings": settings.as_dict(),
        "tokenizer": tokenizer_sha256,
        "inputs": [file._asdict() for file in files],
        "outputs": folders.outputs,
    }


def begin_or_continue(folders: OutputDirs, content: dict[str, Any]) -> bool:
    """Write plan.json, or check that the one in the cache is the same. Returns whether there was one.

    Raises:
        RefusedError: it differs; the message lists what has changed.
    """
    path = folders.cache / WORK_PLAN_FILE
    with folders.deciding():
        earlier = _read_ours(path, content.keys())
        if earlier is None:
            write_json_whole(path, content)
            return False
    if earlier == NOT_OURS:
        raise RefusedError(
            f"{CACHE_FLAG}: {path} is damaged, or from another program or version; delete that folder or give another"
        )
    changes = _changed_settings(earlier["settings"], content["settings"])
    changes += [
        f"{flag} was {earlier['outputs'][flag]}, now {folder}"
        for flag, folder in content["outputs"].items()
        if earlier["outputs"].get(flag, folder) != folder
    ]
    if earlier["tokenizer"] != content["tokenizer"]:
        changes.append("the tokenizer is a different one")
    changes += _changed_inputs(earlier["inputs"], content["inputs"], ("size", "mtime_ns"))
    if not changes and earlier != content:
        changes.append("it was made by another version")
    if changes:
        raise RefusedError(
            f"{CACHE_FLAG}: {folders.cache} holds an unfinished run, but since then: {'; '.join(changes)}; run "
            "the earlier command to continue, or delete that folder to start over"
        )
    return True


def check_finished(folders: OutputDirs, content: dict[str, Any]) -> dict[str, Any]:
    """Check that finished output is what this command would write, and return its manifest.

    Inputs are compared by size, and by hash if they are newer than the output.

    Raises:
        UserError: something differs or is missing.
    """
    path = folders.final_arrow / DATA_MANIFEST_FILE
    manifest = _read_ours(path, {*MANIFEST_KEYS, "inputs", "total", "eval"})
    if manifest in (None, NOT_OURS):
        raise UserError(
            f"--data_arrow_output_dir: {path} is damaged or from another program; remove its folder or give another one"
        )
    changes = _changed_settings(manifest["settings"], content["settings"])
    if manifest["tokenizer"]["sha256"] != content["tokenizer"]:
        changes.append("the tokenizer is a different one")
    changes += _changed_inputs(manifest["inputs"], content["inputs"], ("size",))
    if _is_outdated(manifest):
        changes.append("it was made by another version")
    if not changes:
        # A copy may keep the modification time of its source, so the time of the last status change counts too.
        since = path.stat().st_mtime_ns
        newer = [file["path"] for file in content["inputs"] if _came_after(file, since)]
        known = {file["path"]: file["sha256"] for file in manifest["inputs"]}
        changes = [f"{file} has different content" for file in newer if sha256_of(file) != known[file]]
    if changes:
        raise UserError(
            f"--data_arrow_output_dir: {folders.final_arrow} already exists and differs from this command: "
            f"{'; '.join(changes)}; remove it or give another folder"
        )
    _check_complete(folders.outputs, manifest)
    return manifest


def _is_outdated(manifest: dict[str, Any]) -> bool:
    """Whether this version may write something different for the same input and settings."""
    version = manifest.get("version")
    version = version if isinstance(version, int) else 1
    has_cuts = manifest["eval"] or manifest["total"].get("cut_documents")
    # A row that was bad in that version may be valid in this one.
    reads_differently = manifest["settings"]["stage"] == "sft" or manifest.get("bad_rows")
    return version < 2 and bool(has_cuts) or version < 3 and bool(reads_differently)


def _check_complete(outputs: dict[str, str], manifest: dict[str, Any]) -> None:
    """Raise UserError if a bin of finished output is missing or cut."""
    entries = [*manifest["bins"], *([manifest["eval"]] if manifest["eval"] else [])]
    names = {"--data_arrow_output_dir": "{}/state.json", "--data_jsonl_output_dir": "{}.jsonl"}
    files = [(flag, Path(folder, names[flag].format(e["name"]))) for flag, folder in outputs.items() for e in entries]
    wrong = [(flag, path, "is missing") for flag, path in files if not path.is_file()]
    for entry in entries:
        data = Path(outputs["--data_arrow_output_dir"], entry["name"], DATA_FILE)
        size = data.stat().st_size if data.is_file() else 0
        if size != entry.get("bytes", size):
            wrong.append(("--data_arrow_output_dir", data, f"has {size:,} bytes, not {entry['bytes']:,}"))
    if wrong:
        flag, path, problem = wrong[0]
        raise UserError(
            f"{flag}: {path} {problem} ({counted(len(wrong), 'such file')}), although the output was finished; put it "
            "back, or remove the output folders and run the command again"
        )


def _came_after(file: dict[str, Any], since: int) -> bool:
    return max(file["mtime_ns"], os.stat(file["path"]).st_ctime_ns) > since


def check_unchanged(files: Sequence[InputFile]) -> None:
    """Raise UserError if an input has changed since the run began."""
    for file in files:
        try:
            status = os.stat(file.path)
        except OSError as error:
            raise UserError(f"{file.path} disappeared while it was read ({error.strerror}); put it back and start over")
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise UserError(
                f"{file.path} changed while it was read ({file.size:,} bytes, now {status.st_size:,}); run the "
                "command again when nothing writes to it"
            )


def _read_ours(path: Path, keys: Set[str]) -> Any:
    """The object in a JSON file; None if the file is missing, `NOT_OURS` if it is damaged or lacks these keys."""
    try:
        content = read_json_or_none(path)
    except RunError:
        return NOT_OURS
    if content is None:
        return None
    is_ours = isinstance(content, dict) and keys <= content.keys() and _is_as_written(content)
    return content if is_ours and isinstance(content["inputs"], list) else NOT_OURS


def _is_as_written(content: dict[str, Any]) -> bool:
    """Whether the entries of a plan or a manifest that are used have the expected types."""
    try:
        for file in json_input.typed(content, "inputs", list):
            json_input.typed(file, "path", str)
            json_input.whole_number(file, "size")
        json_input.typed(content, "settings", dict)
        if "bins" not in content:
            json_input.typed(content, "tokenizer", str)
            return all(isinstance(folder, str) for folder in json_input.typed(content, "outputs", dict).values())
        json_input.typed(json_input.typed(content, "tokenizer", dict), "sha256", str)
        for file in content["inputs"]:
            json_input.typed(file, "sha256", str)
        for entry in [*json_input.typed(content, "bins", list), *([content["eval"]] if content.get("eval") else [])]:
            json_input.typed(entry, "name", str)
            json_input.whole_number({"bytes": 0, **entry}, "bytes")
    except (KeyError, ValueError, TypeError, AttributeError):
        return False
    return True


def read_manifest_of(part: str) -> dict[str, Any]:
    """The manifest of the prepared data that a part-* or eval folder belongs to; empty if there is none beside it.

    Raises UserError for a manifest that is damaged.
    """
    path = Path(part).resolve().parent / DATA_MANIFEST_FILE
    try:
        content = read_json_or_none(path)
    except RunError as error:
        raise UserError(str(error))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fix that, or copy it again")
    # The name is common: the file may be from another program.
    if not isinstance(content, dict) or not MANIFEST_KEYS <= content.keys():
        return {}
    for name, kind in {"settings": dict, "tokenizer": dict, "bins": list}.items():
        try:
            json_input.typed(content, name, kind)
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); copy it again, or prepare the data again")
    return content


def check_parts_fit(parts: Sequence[str], *, stage: str, tokenizer_dir: str | None, flag: str = "--dataset") -> None:
    """Compare prepared folders with the model's tokenizer and with the command, as far as manifests record them.

    Warns about a folder of another stage, "pretrain" or "sft", which may be intended.

    Args:
        tokenizer_dir: None does not compare the tokenizer.

    Raises:
        UserError: a folder was prepared with another tokenizer.
    """
    expected = None if tokenizer_dir is None else fingerprint(tokenizer_dir)
    others, unknown = [], []
    for part in parts:
        manifest = read_manifest_of(part)
        if not manifest:
            unknown.append(part)
        elif expected is not None and (found := manifest["tokenizer"].get("sha256")) != expected:
            raise UserError(
                f"{flag} {part}: prepared with another tokenizer (SHA-256 {str(found)[:12]}) "
                f"than that of {tokenizer_dir} ({expected[:12]}); prepare the data with --tokenizer_dir {tokenizer_dir}"
                f", or give --pretrained the model that init_model.py made for the other tokenizer"
            )
        elif manifest["settings"].get("stage") != stage:
            others.append(part)
    if others:
        (other,) = COMMANDS.keys() - {stage}
        logs.get_logger().warning(
            f"{flag} {others[0]}: prepared by {COMMANDS[other][0]} for {COMMANDS[other][1]}, but this is "
            f"{COMMANDS[stage][1]} ({len(others)} of {counted(len(parts), 'folder')}); unless this mix is intended, "
            f"stop and run {COMMANDS[other][1]}"
        )
    if unknown:
        logs.get_logger().warning(
            f"{flag} {unknown[0]}: no {DATA_MANIFEST_FILE} beside it, so its tokenizer cannot be compared"
            f"{', nor its chat template' if stage == 'sft' else ''} ({len(unknown)} of "
            f"{counted(len(parts), 'folder')})"
        )


def _changed_settings(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = {name: Settings.FLAGS.get(name, f"--{name}") for name in now}
    # An earlier version without such a flag behaved as if it was off.
    before = {name: earlier.get(name, Settings.LATER_DEFAULTS.get(name)) for name in now}
    differing = [name for name in now if before[name] != now[name]]
    return [
        f"{names[name]} is another one"
        if name == "template_text"
        else f"{names[name]} was {before[name]}, now {now[name]}"
        for name in differing
    ]


def _changed_inputs(earlier: list[dict], now: list[dict], compared: Sequence[str]) -> list[str]:
    before, after = ({file["path"]: file for file in files} for files in (earlier, now))
    changes = [f"{path} is new" for path in after if path not in before]
    changes += [f"{path} is missing" for path in before if path not in after]
    for path in before.keys() & after.keys():
        if any(before[path].get(name) != after[path][name] for name in compared):
            size, now_size = before[path].get("size"), after[path]["size"]
            how = "the same size, another time" if size == now_size else f"{size:,} bytes, now {now_size:,}"
            changes.append(f"{path} has changed ({how})")
    if not changes and list(before) != list(after):
        changes.append("--data_input_dirs has another order")
    return sorted(changes)


def manifest_content(
    settings: Settings,
    files: Sequence[InputFile],
    *,
    tokenizer: dict[str, Any],
    hashes: dict[int, str],
    ledger: TokenLedger,
    bins: list[dict[str, Any]],
    lost: Sequence[LostFile] = (),
    left_out: Sequence[LeftOut] = (),
) -> dict[str, Any]:
    """The manifest, as in this module's docstring; `bins` are the counts that `bins.write_bin` returns."""
    by_file = ledger.by_file()
    inputs = []
    for number, file in enumerate(files):
        counts = by_file[number].as_json() if number in by_file else {}
        inputs.append({"path": file.path, "source": file.source, "size": file.size, "sha256": hashes[number], **counts})
    samples = sum(entry["samples"] for entry in bins)
    return {
        "version": VERSION,
        "settings": settings.as_dict(),
        "tokenizer": tokenizer,
        "inputs": inputs,
        "categories": {name: tally.as_json() for name, tally in ledger.by_category().items()},
        "total": ledger.total().as_json(),
        "lines": ledger.lines,
        "empty_lines": ledger.empty_lines,
        "bad_rows": ledger.bad_rows,
        "bad_reasons": ledger.bad_reasons(),
        "lost_files": [entry._asdict() for entry in lost],
        "left_out": [entry._asdict() for entry in left_out],
        "formats": dict(sorted(ledger.formats.items())),
        "notes": dict(sorted(ledger.notes.items())),
        "unknown_roles": dict(sorted(ledger.unknown_roles.items())),
        "samples": samples,
        "fill": round(ledger.total().kept / (samples * settings.max_length), 6),
        "bins": bins[: settings.num_bins],
        "eval": bins[settings.num_bins] if settings.has_eval else None,
    }
