"""The folders of a prepare command: which may exist, which run may write, and when the output gets its final name.

Samples are written to hidden folders beside the final ones, .arrow_output.partial and .jsonl_output.partial. They are
renamed when everything is complete: jsonl first, then arrow, which holds manifest.json. Until then the cache records
what is done, so that the same command can continue.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from colossal_llama2.dataset.layout.locks import RefusedError, hold
from colossal_llama2.dataset.layout.store import TEMPORARY, remove_leftovers
from colossal_llama2.errors import UserError
from colossal_llama2.storage.files import check_can_create, check_is_utf8, is_stray, sync_entries

# In the cache: the input of the unfinished run. A training run writes another plan.json, to its --save_dir.
WORK_PLAN_FILE = "plan.json"
# Beside the bins: their input and counts. Each checkpoint has another manifest.json.
DATA_MANIFEST_FILE = "manifest.json"
CACHE_FLAG = "--data_cache_dir"


class OutputDirs:
    """The folders of one command. `jsonl` is None with --no_jsonl."""

    def __init__(self, *, cache: str, jsonl: str | None, arrow: str):
        given = {CACHE_FLAG: cache, "--data_jsonl_output_dir": jsonl, "--data_arrow_output_dir": arrow}
        self._given = {flag: folder for flag, folder in given.items() if folder is not None}
        for flag, folder in self._given.items():
            if not Path(folder).resolve().name:
                raise UserError(f"{flag}: {folder} cannot be an output folder; give a folder below it")
            check_is_utf8(str(Path(folder).resolve()), flag)
        self.cache = Path(cache).resolve()
        # Arrow last: training reads it, so when it exists everything exists.
        self._finals = [Path(folder).resolve() for folder in (jsonl, arrow) if folder is not None]
        self._partials = [final.with_name(f".{final.name}.partial") for final in self._finals]
        self.final_arrow = self._finals[-1]
        self.arrow = self._partials[-1]
        self.jsonl = self._partials[0] if jsonl is not None else None
        self._made: list[Path] = []

    @property
    def outputs(self) -> dict[str, str]:
        """The output folders by their flags."""
        return {flag: str(Path(folder).resolve()) for flag, folder in self._given.items() if flag != CACHE_FLAG}

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run has written everything."""
        return (self.final_arrow / DATA_MANIFEST_FILE).is_file()

    def check(self) -> None:
        """Raise UserError unless all folders are separate, and can be created or continued."""
        resolved = {flag: Path(folder).resolve() for flag, folder in self._given.items()}
        taken = [*resolved.items(), *zip(self.outputs, self._partials, strict=True)]
        for flag, given in self._given.items():
            folder = resolved[flag]
            for other_flag, other in taken:
                if flag != other_flag and folder.is_relative_to(other):
                    raise UserError(
                        f"{flag}: {given} is the folder of {other_flag} or inside it; give a separate folder"
                    )
            if folder == self.cache:
                self._check_cache(given)
            elif folder.exists() and not self.is_being_published:
                raise UserError(f"{flag}: {given} already exists; remove it or give another folder")
            if folder == self.cache or not folder.exists():
                check_can_create(folder, flag)

    def _check_cache(self, given: str) -> None:
        if os.path.lexists(self.cache) and not self.cache.is_dir():
            raise UserError(f"{CACHE_FLAG}: {given} is not a folder; give another one")
        foreign = (
            self.cache.is_dir()
            and not (self.cache / WORK_PLAN_FILE).exists()
            and [
                path for path in self.cache.iterdir() if not path.name.startswith(TEMPORARY) and not is_stray(path.name)
            ]
        )
        if foreign:
            raise UserError(f"{CACHE_FLAG}: {given} holds other files, such as {foreign[0].name}; give another folder")

    @property
    def is_being_published(self) -> bool:
        """Whether an earlier run wrote everything, but died while it renamed the folders."""
        return (self.arrow / DATA_MANIFEST_FILE).is_file() and (self.cache / WORK_PLAN_FILE).is_file()

    @contextmanager
    def locked(self, shard: tuple[int, int] | None) -> Iterator[None]:
        """Create the folders and lock other runs out of them, except runs of other shares.

        After a UserError, everything that was created is removed, unless other shares may be active.
        """
        try:
            with ExitStack() as stack:
                for folder in (self.cache, *self._partials):
                    self._make(folder)
                    hold(stack, self._lock_path(folder), shared=shard is not None)
                if shard:
                    self._lock_share(stack, *shard)
                if self.is_finished:
                    raise RefusedError(f"another run has just finished {self.final_arrow}; run the command again")
                with self._removed_after_errors(shard):
                    yield
        except UserError:
            self._unmake()
            raise

    def _lock_path(self, folder: Path) -> Path:
        """The lock file of a folder: inside the cache, but beside an output folder, which is renamed."""
        return folder / f"{TEMPORARY}run.lock" if folder == self.cache else folder.with_name(f"{folder.name}.lock")

    @contextmanager
    def _removed_after_errors(self, shard: tuple[int, int] | None) -> Iterator[None]:
        """Remove everything after a UserError, unless other shares may be active."""
        try:
            yield
        except RefusedError:
            raise
        except UserError as error:
            if shard:
                raise UserError(f"{error}; other shares may be running, delete {self.cache} when none of them is")
            self.empty_cache()
            for folder in self._partials:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _make(self, folder: Path) -> None:
        if folder.is_symlink():
            raise RefusedError(f"{folder} is a link; output is not written through links, so remove it")
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def _lock_share(self, stack: ExitStack, number: int, shares: int) -> None:
        """Lock out a second run of the same share, and shares of another total, which would do the same units."""
        hold(stack, self.cache / f"{TEMPORARY}share-{number}-of-{shares}.lock")
        all_shares = f"{TEMPORARY}shares-of-{shares}.lock"
        hold(stack, self.cache / all_shares, shared=True)
        for other in self.cache.glob(f"{TEMPORARY}shares-of-*.lock"):
            if other.name != all_shares:
                with ExitStack() as tried:
                    hold(tried, other)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Let only one run at a time read or write the work plan."""
        with ExitStack() as stack:
            hold(stack, self.cache / f"{TEMPORARY}plan.lock", wait=True)
            yield

    def tidy_up(self, is_ours: Callable[[], bool]) -> None:
        """Clean up after a run that died at its very end: its locks, and its cache if `is_ours` returns True.

        Folders of an active run are not touched; `is_ours` is called under the lock.
        """
        with ExitStack() as stack, suppress(UserError):
            for path in filter(Path.exists, map(self._lock_path, self._partials)):
                hold(stack, path)
            if self.cache.is_dir():
                hold(stack, self._lock_path(self.cache))
                if is_ours():
                    self.empty_cache()

    def _unmake(self) -> None:
        """Remove the folders that this run created, if they are empty."""
        for folder in sorted(self._made, key=lambda folder: -len(folder.parts)):
            try:
                folder.rmdir()
            except OSError:  # it holds other files, or it is gone
                pass

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Yield whether this run, of several shares, is the one that writes the bins."""
        with ExitStack() as stack:
            try:
                hold(stack, self.cache / f"{TEMPORARY}finish.lock")
            except RefusedError:
                yield False
                return
            yield not self.is_finished

    def remove_leftovers(self) -> int:
        """Remove what dead runs were writing. Returns the number of files and folders removed."""
        return sum(map(remove_leftovers, (self.cache, *self._partials)))

    def publish(self) -> None:
        """Rename the folders to their final names."""
        for partial, final in zip(self._partials, self._finals, strict=True):
            # `locked` creates a new partial folder if an earlier run died after this rename.
            if final.exists():
                partial.rmdir()
            else:
                os.rename(partial, final)
                sync_entries(final.parent)

    def empty_cache(self) -> None:
        """Remove everything in the cache, the plan last: it shows that the rest is ours."""
        for path in sorted(self.cache.iterdir(), key=lambda path: path.name == WORK_PLAN_FILE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def paths(self) -> dict[str, str]:
        """The folders that workers write to, by the names of the fields of a BinTask."""
        return {"cache_dir": str(self.cache), "jsonl_dir": str(self.jsonl), "arrow_dir": str(self.arrow)}
