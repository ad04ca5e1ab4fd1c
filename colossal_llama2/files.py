"""Small files and folders: JSON that is an object, and folders that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

from colossal_llama2.errors import UserError


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError if the file is missing or holds anything else."""
    if not path.is_file():
        raise UserError(f"{path.parent} holds no {path.name}; copy it there from where the model comes from")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy the file again from where the model comes from")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; copy the file again from where the model comes from")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a value as transformers writes its own: indented, UTF-8, one newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Copy those of the named files and folders that exist, following links."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, folder / name)


@contextmanager
def temporary_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new hidden folder in `parent`, to be renamed when it is complete; what is left of it at the end is removed."""
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=parent))
    try:
        # mkdtemp's folders are for their owner alone; this one becomes the target, which is as open as any other.
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
