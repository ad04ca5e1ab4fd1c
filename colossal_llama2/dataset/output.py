"""The folders of a prepare command: which may exist, who may write, and when the result gets its name.

Samples are written to hidden folders beside the final ones, .arrow_output.partial and .jsonl_output.partial, which get
the final names when all is complete: jsonl first, then arrow, which holds manifest.json. Until then the cache says what
is done, so that the same command goes on after any end.
"""

import fcntl
import os
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from colossal_llama2.dataset.store import TEMPORARY, remove_leftovers
from colossal_llama2.errors import UserError
from colossal_llama2.files import check_can_create, sync_entries

PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"


class RefusedError(UserError):
    """A run that may not touch what is there: another one is at work, or what it left was made of something else."""


class OutputDirs:
    """The folders of one command. `jsonl` is None if no jsonl is to be written."""

    def __init__(self, *, cache: str, jsonl: Optional[str], arrow: str):
        self._given = {"--data_cache_dir": cache, "--data_jsonl_output_dir": jsonl, "--data_arrow_output_dir": arrow}
        self._given = {flag: folder for flag, folder in self._given.items() if folder is not None}
        self.cache = Path(cache).resolve()
        # Arrow last: it is what training reads, so when it is there all is there.
        self._finals = [Path(folder).resolve() for folder in (jsonl, arrow) if folder is not None]
        self._partials = [final.with_name(f".{final.name}.partial") for final in self._finals]
        self.final_arrow = self._finals[-1]
        self.arrow = self._partials[-1]
        self.jsonl = self._partials[0] if jsonl is not None else None
        self._made: List[Path] = []

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has written everything."""
        return (self.final_arrow / MANIFEST_FILE).is_file()

    def check(self) -> None:
        """Raise UserError unless all folders can be made, apart from each other, or be gone on with."""
        resolved = {flag: Path(folder).resolve() for flag, folder in self._given.items()}
        for flag, given in self._given.items():
            folder = resolved[flag]
            for other_flag, other in resolved.items():
                if flag != other_flag and folder.is_relative_to(other):
                    raise UserError(f"{flag}: {given} is the folder of {other_flag} or inside it; name one beside it")
            if folder == self.cache:
                self._check_cache(given)
            elif folder.exists() and not self.is_being_published:
                raise UserError(f"{flag}: {given} exists already; remove it or name another folder")
            if not folder.exists():
                check_can_create(folder, flag)

    def _check_cache(self, given: str) -> None:
        if os.path.lexists(self.cache) and not self.cache.is_dir():
            raise UserError(f"--data_cache_dir: {given} is not a folder; name another")
        foreign = self.cache.is_dir() and not (self.cache / PLAN_FILE).exists() and [
            path for path in self.cache.iterdir() if not path.name.startswith(TEMPORARY)
        ]  # fmt: skip
        if foreign:
            raise UserError(f"--data_cache_dir: {given} holds other files, such as {foreign[0].name}; name another")

    @property
    def is_being_published(self) -> bool:
        """Whether an earlier run has everything written and died while it gave the folders their names."""
        return (self.arrow / MANIFEST_FILE).is_file() and (self.cache / PLAN_FILE).is_file()

    @contextmanager
    def locked(self, shard: Optional[Tuple[int, int]]) -> Iterator[None]:
        """Make the folders and keep other runs out of them; runs of other shares may enter.

        A mistake in the user's data takes away all that was made, unless other shares may be at work.
        """
        with ExitStack() as stack:
            try:
                for folder in (self.cache, *self._partials):
                    self._make(folder)
                    self._lock(stack, folder, fcntl.LOCK_SH if shard else fcntl.LOCK_EX)
                if shard:
                    path = self.cache / f"{TEMPORARY}share-{shard[0]}-of-{shard[1]}.lock"
                    path.touch()
                    self._lock(stack, path, fcntl.LOCK_EX)
                yield
            except RefusedError:
                self._unmake()
                raise
            except UserError:
                if not shard:
                    self._take_back()
                raise

    def _make(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def _lock(self, stack: ExitStack, path: Path, kind: int) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(f"another run is at work in {path}; wait for it, or name other folders")
        if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
            raise RefusedError(f"another run has just finished with {path}; give the command again")

    def _take_back(self) -> None:
        self.empty_cache()
        for folder in self._partials:
            shutil.rmtree(folder, ignore_errors=True)
        self._unmake()

    def _unmake(self) -> None:
        """Remove the folders that this run has made, if nothing is in them."""
        for folder in sorted(self._made, key=lambda folder: -len(folder.parts)):
            try:
                folder.rmdir()
            except OSError:  # somebody else's files are in it, or it is gone
                pass

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Yield whether this run is the one, of several shares, that writes the bins."""
        path = self.cache / f"{TEMPORARY}finish.lock"
        path.touch()
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield path.exists() and not self.is_finished
        finally:
            os.close(descriptor)

    def remove_leftovers(self) -> int:
        """Remove what dead runs were in the middle of writing; returns how many files and folders that were."""
        return sum(map(remove_leftovers, (self.cache, *self._partials)))

    def publish(self) -> None:
        """Give the folders their final names."""
        for partial, final in zip(self._partials, self._finals, strict=True):
            # `locked` makes a new partial folder if an earlier run died after this rename.
            if final.exists():
                partial.rmdir()
            else:
                os.rename(partial, final)
                sync_entries(final.parent)

    def empty_cache(self) -> None:
        """Remove everything in the cache, the plan last: without it the rest would not be known as ours."""
        for path in sorted(self.cache.iterdir(), key=lambda path: path.name == PLAN_FILE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def paths(self) -> Dict[str, str]:
        """The folders that workers write to, by the names that a BinTask has for them."""
        return {"cache_dir": str(self.cache), "jsonl_dir": str(self.jsonl), "arrow_dir": str(self.arrow)}
