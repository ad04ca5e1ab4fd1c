"""The folders of a prepare command: which may exist, who may write, and when the result gets its name.

Samples are written to hidden folders beside the final ones, .arrow_output.partial and .jsonl_output.partial, which get
the final names when all is complete: jsonl first, then arrow, which holds manifest.json. Until then the cache says what
is done, so that the same command goes on after any end.
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

PLAN_FILE = "plan.json"
MANIFEST_FILE = "manifest.json"
CACHE_FLAG = "--data_cache_dir"


class OutputDirs:
    """The folders of one command. `jsonl` is None if no jsonl is to be written."""

    def __init__(self, *, cache: str, jsonl: str | None, arrow: str):
        given = {CACHE_FLAG: cache, "--data_jsonl_output_dir": jsonl, "--data_arrow_output_dir": arrow}
        self._given = {flag: folder for flag, folder in given.items() if folder is not None}
        for flag, folder in self._given.items():
            if not Path(folder).resolve().name:
                raise UserError(f"{flag}: {folder} is no folder to write to; name one below it")
            check_is_utf8(str(Path(folder).resolve()), flag)
        self.cache = Path(cache).resolve()
        # Arrow last: it is what training reads, so when it is there all is there.
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
        return (self.final_arrow / MANIFEST_FILE).is_file()

    def check(self) -> None:
        """Raise UserError unless all folders can be made, apart from each other, or be gone on with."""
        resolved = {flag: Path(folder).resolve() for flag, folder in self._given.items()}
        taken = [*resolved.items(), *zip(self.outputs, self._partials, strict=True)]
        for flag, given in self._given.items():
            folder = resolved[flag]
            for other_flag, other in taken:
                if flag != other_flag and folder.is_relative_to(other):
                    raise UserError(f"{flag}: {given} is the folder of {other_flag} or inside it; name one beside it")
            if folder == self.cache:
                self._check_cache(given)
            elif folder.exists() and not self.is_being_published:
                raise UserError(f"{flag}: {given} exists already; remove it or name another folder")
            if folder == self.cache or not folder.exists():
                check_can_create(folder, flag)

    def _check_cache(self, given: str) -> None:
        if os.path.lexists(self.cache) and not self.cache.is_dir():
            raise UserError(f"{CACHE_FLAG}: {given} is not a folder; name another")
        foreign = (
            self.cache.is_dir()
            and not (self.cache / PLAN_FILE).exists()
            and [
                path for path in self.cache.iterdir() if not path.name.startswith(TEMPORARY) and not is_stray(path.name)
            ]
        )
        if foreign:
            raise UserError(f"{CACHE_FLAG}: {given} holds other files, such as {foreign[0].name}; name another")

    @property
    def is_being_published(self) -> bool:
        """Whether an earlier run has everything written and died while it gave the folders their names."""
        return (self.arrow / MANIFEST_FILE).is_file() and (self.cache / PLAN_FILE).is_file()

    @contextmanager
    def locked(self, shard: tuple[int, int] | None) -> Iterator[None]:
        """Make the folders and keep other runs out of them; runs of other shares may enter.

        A mistake in the user's data takes away all that was made, unless other shares may be at work.
        """
        try:
            with ExitStack() as stack:
                for folder in (self.cache, *self._partials):
                    self._make(folder)
                    hold(stack, self._lock_path(folder), shared=shard is not None)
                if shard:
                    self._lock_share(stack, *shard)
                if self.is_finished:
                    raise RefusedError(f"another run has just finished {self.final_arrow}; give the command again")
                with self._taken_back(shard):
                    yield
        except UserError:
            self._unmake()
            raise

    def _lock_path(self, folder: Path) -> Path:
        """The file that a run holds: in the cache, and beside an output folder, which is renamed with all in it."""
        return folder / f"{TEMPORARY}run.lock" if folder == self.cache else folder.with_name(f"{folder.name}.lock")

    @contextmanager
    def _taken_back(self, shard: tuple[int, int] | None) -> Iterator[None]:
        """Remove what was made if the user's data has a mistake, unless other shares may be at work."""
        try:
            yield
        except RefusedError:
            raise
        except UserError as error:
            if shard:
                raise UserError(f"{error}; other shares may be at work, delete {self.cache} when none is any more")
            self.empty_cache()
            for folder in self._partials:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _make(self, folder: Path) -> None:
        if folder.is_symlink():
            raise RefusedError(f"{folder} is a link, which this command does not write through; remove it")
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made += missing

    def _lock_share(self, stack: ExitStack, number: int, shares: int) -> None:
        """Keep out the same share again, and shares of another number, which would do the same units."""
        hold(stack, self.cache / f"{TEMPORARY}share-{number}-of-{shares}.lock")
        all_shares = f"{TEMPORARY}shares-of-{shares}.lock"
        hold(stack, self.cache / all_shares, shared=True)
        for other in self.cache.glob(f"{TEMPORARY}shares-of-*.lock"):
            if other.name != all_shares:
                with ExitStack() as tried:
                    hold(tried, other)

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Let one run after the other read the plan, or write it."""
        with ExitStack() as stack:
            hold(stack, self.cache / f"{TEMPORARY}plan.lock", wait=True)
            yield

    def tidy_up(self, is_ours: Callable[[], bool]) -> None:
        """Finish what a run that died at its very end left: its locks, and its cache if `is_ours` says so.

        Nothing is touched in which a run is at work; `is_ours` is asked when none can be.
        """
        with ExitStack() as stack, suppress(UserError):
            for path in filter(Path.exists, map(self._lock_path, self._partials)):
                hold(stack, path)
            if self.cache.is_dir():
                hold(stack, self._lock_path(self.cache))
                if is_ours():
                    self.empty_cache()

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
        with ExitStack() as stack:
            try:
                hold(stack, self.cache / f"{TEMPORARY}finish.lock")
            except RefusedError:
                yield False
                return
            yield not self.is_finished

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

    def paths(self) -> dict[str, str]:
        """The folders that workers write to, by the names that a BinTask has for them."""
        return {"cache_dir": str(self.cache), "jsonl_dir": str(self.jsonl), "arrow_dir": str(self.arrow)}
