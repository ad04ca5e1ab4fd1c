"""Messages about a path that is not the expected folder: missing, a file, a name on the hub, another kind of folder."""

import re
from pathlib import Path

from colossal_llama2.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_hub_name(path: str) -> bool:
    """Whether a path can only be OWNER/NAME on the Hugging Face hub: there is no local folder OWNER."""
    return HUB_NAME.fullmatch(path) is not None and not Path(path).exists() and not Path(path).parent.exists()


def hub_cure(path: str) -> str:
    """For a path that may be a name on the hub, how to download it, as "; if it is ..."; else ""."""
    if not is_hub_name(path):
        return ""
    return (
        f"; if it is a name on the Hugging Face hub, download it first (hf download {path} "
        f"--local-dir {Path(path).name}) and give that folder"
    )


def no_folder(path: str, *, may_be_on_hub: bool = True) -> str:
    """Why a path is not a folder, and for a name on the hub the fix, if such a file can be on the hub."""
    reason = "is a file, not a folder" if Path(path).exists() else "no such folder"
    return reason + (hub_cure(path) if may_be_on_hub else "")


def check_is_folder(path: str | Path, flag: str, cure: str) -> None:
    """Raise a UserError unless the folder exists; `path` as given, since an absolute path would hide a hub name."""
    if not Path(path).is_dir():
        kind = "a file, not a folder" if Path(path).exists() else "not a folder"
        raise UserError(f"{flag} {path} is {kind}{hub_cure(str(path))}; {cure}")


def what_it_holds(path: str) -> str:
    """What a folder without the expected files contains, as "; it holds ...", or "" if that is unknown."""
    folder = Path(path)
    if (folder / "modeling" / "config.json").is_file():
        return f"; its model is in {folder / 'modeling'}"
    if (folder / "dataset_info.json").is_file() or any(folder.glob("part-*/dataset_info.json")):
        return "; it holds prepared data, which is for --dataset"
    if (folder / "config.json").is_file():
        return "; it holds a model"
    if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return "; it holds a tokenizer without a model; init_model.py makes a model for it"
    if any(folder.glob("*.jsonl*")):
        return "; it holds jsonl files, which are input of a prepare command"
    return ""
