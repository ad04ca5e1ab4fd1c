"""A fault of one rank of two while it saves, as with a local disk of its host.

index     rank 1 cannot write its part of a pipeline's index
folder    rank 1 cannot create the folder of these parts
rename    no folder can be renamed, as if the parent folder belonged to another user
slow      rank 0 needs a second to remove half-written files, and rank 1 cannot write its part of the index
"""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from colossal_llama2.engine.ranks import collectives

PARTS = "tmp_index_files"
SLOW_SECONDS = 1.0


@contextlib.contextmanager
def befalling(kind: str) -> Iterator[None]:
    """Within it, the fault of that name happens."""
    from colossalai.checkpoint_io import CheckpointIndexFile

    rank, _ = collectives.place()
    write_index, make_folder, remove = CheckpointIndexFile.write_index_file, Path.mkdir, shutil.rmtree

    def write_no_part(index, name):
        if PARTS in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        write_index(index, name)

    def make_no_folder(path, *args, **kwargs):
        if path.name == PARTS:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make_folder(path, *args, **kwargs)

    def remove_slowly(path, *args, **kwargs):
        time.sleep(SLOW_SECONDS if Path(path).is_dir() else 0.0)
        remove(path, *args, **kwargs)

    def rename_no_folder(path, *args):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    with contextlib.ExitStack() as faults:
        if kind == "rename":
            faults.enter_context(mock.patch("colossal_llama2.storage.publishing.os.rename", rename_no_folder))
        elif rank == 1 and kind == "folder":
            faults.enter_context(mock.patch.object(Path, "mkdir", make_no_folder))
        elif rank == 1:
            faults.enter_context(mock.patch.object(CheckpointIndexFile, "write_index_file", write_no_part))
        elif kind == "slow":
            faults.enter_context(mock.patch.object(shutil, "rmtree", remove_slowly))
        yield
