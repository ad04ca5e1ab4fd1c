"""Where a prepare command writes: three folders that appear together, and each bin as jsonl and as arrow."""

import hashlib
import secrets
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Sequence

import numpy as np
import orjson

from colossal_llama2.dataset.splicing import TokenSequence
from colossal_llama2.errors import UserError
from colossal_llama2.files import check_can_create

ARROW_BATCH_SAMPLES = 1000


@dataclass(frozen=True)
class OutputDirs:
    """The three folders to write. Cache comes into being empty: no step of this one-pass design needs it yet."""

    cache: str
    jsonl: str
    arrow: str

    def check(self) -> None:
        """Raise UserError unless all three can be made: new, apart from each other, in folders that can be written."""
        resolved = {flag: Path(folder).resolve() for flag, folder in self._by_flag().items()}
        for flag, given in self._by_flag().items():
            folder = resolved[flag]
            if folder.exists():
                raise UserError(f"{flag}: {given} exists already; remove it or name another folder")
            for other_flag, other in resolved.items():
                if flag != other_flag and folder.is_relative_to(other):
                    raise UserError(f"{flag}: {given} is the folder of {other_flag} or inside it; name one beside it")
            check_can_create(folder, flag)

    @contextmanager
    def published_together(self) -> Iterator["OutputDirs"]:
        """Yield folders beside the final ones, which get the final names at the end; on an error all of them go."""
        mark = f".partial-{secrets.token_hex(4)}"
        finals = [Path(folder).resolve() for folder in self._by_flag().values()]
        partials = [final.with_name(final.name + mark) for final in finals]
        published: List[Path] = []
        try:
            for folder in partials:
                folder.mkdir(parents=True)
            yield OutputDirs(*map(str, partials))
            for folder, final in zip(partials, finals, strict=True):
                folder.rename(final)
                published.append(final)
        except BaseException:
            for folder in [*partials, *published]:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _by_flag(self) -> Dict[str, str]:
        # Arrow last: it is what training reads, so when it is there all is there.
        return {
            "--data_cache_dir": self.cache,
            "--data_jsonl_output_dir": self.jsonl,
            "--data_arrow_output_dir": self.arrow,
        }


def write_bin(
    name: str, *, samples: Sequence[TokenSequence], columns: Dict[str, List[Any]], folders: OutputDirs
) -> None:
    """Write one bin as `name`.jsonl and as the arrow folder `name`, which datasets.load_from_disk reads."""
    import datasets
    import pyarrow

    digest = hashlib.sha256()
    with open(Path(folders.jsonl, f"{name}.jsonl"), "wb") as file:
        for index, sample in enumerate(samples):
            row = {**sample._asdict(), **{column: values[index] for column, values in columns.items()}}
            line = orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
            digest.update(line)
            file.write(line)
    batches = []
    for start in range(0, len(samples), ARROW_BATCH_SAMPLES):
        part = slice(start, start + ARROW_BATCH_SAMPLES)
        arrays = {
            "input_ids": _list_column(sample.input_ids for sample in samples[part]),
            "labels": _list_column(sample.labels for sample in samples[part]),
            **{column: pyarrow.array(values[part]) for column, values in columns.items()},
        }
        batches.append(pyarrow.RecordBatch.from_pydict(arrays))
    # Left to itself, datasets makes a fingerprint of the clock; this one is of the content.
    table = datasets.Dataset(pyarrow.Table.from_batches(batches), fingerprint=digest.hexdigest()[:16])
    datasets.disable_progress_bars()
    table.save_to_disk(str(Path(folders.arrow, name)))


def _list_column(sequences: Iterable[np.ndarray]):
    import pyarrow

    values = list(sequences)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(values)))
