"""Write samples, a batch at a time, to a folder that datasets.load_from_disk reads. The bytes are reproducible.

The `datasets` package needs a second to import in each worker, puts the time into its fingerprint, and needs all
samples at once. The folder holds data-00000-of-00001.arrow (a stream of record batches), dataset_info.json and
state.json.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow

DATA_FILE = "data-00000-of-00001.arrow"


class ArrowFolder:
    """A folder being written. `columns` maps names to types: "int32", "int64", "string" or a list of one, ["int32"].

    `description` is what `datasets` reports as `info.description`.
    """

    def __init__(self, folder: Path, columns: dict[str, Any], *, description: str = ""):
        import pyarrow

        self._folder, self._columns, self._description = folder, columns, description
        self._digest = hashlib.sha256()
        features = {name: _feature(kind) for name, kind in columns.items()}
        self._features = features
        fields = [pyarrow.field(name, _arrow_type(kind)) for name, kind in columns.items()]
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        self._schema = pyarrow.schema(fields, metadata=metadata)
        self._sink = open(folder / DATA_FILE, "wb")
        self._writer = pyarrow.ipc.new_stream(self._sink, self._schema)

    def write(self, columns: dict[str, Any]) -> None:
        """Append a batch of arrow arrays, one for each column."""
        import pyarrow

        batch = pyarrow.RecordBatch.from_arrays([columns[name] for name in self._columns], schema=self._schema)
        for array in batch.columns:
            for buffer in array.buffers():
                if buffer is not None:
                    self._digest.update(buffer)
        self._writer.write_batch(batch)

    def finish(self) -> str:
        """Write the rest of the folder; returns its fingerprint, a hash of the samples."""
        self._writer.close()
        self._sink.close()
        fingerprint = self._digest.hexdigest()[:16]
        state: dict[str, Any] = {
            "_data_files": [{"filename": DATA_FILE}],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info = {
            "citation": "",
            "description": self._description,
            "features": self._features,
            "homepage": "",
            "license": "",
        }
        (self._folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
        (self._folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
        return fingerprint

    def close(self) -> None:
        """Close the file, also after an error."""
        self._sink.close()


def _feature(kind: Any) -> dict[str, Any]:
    if isinstance(kind, list):
        return {"feature": _feature(kind[0]), "_type": "List"}
    return {"dtype": kind, "_type": "Value"}


def _arrow_type(kind: Any) -> "pyarrow.DataType":
    import pyarrow

    return pyarrow.list_(_arrow_type(kind[0])) if isinstance(kind, list) else pyarrow.type_for_alias(kind)


def number_column(values: np.ndarray) -> "pyarrow.Array":
    """A column of numbers. `pyarrow.array` gives the same, but imports pandas in each worker."""
    import pyarrow

    kind = pyarrow.type_for_alias(str(values.dtype))
    return pyarrow.Array.from_buffers(kind, len(values), [None, pyarrow.py_buffer(values)])


def list_column(values: "np.ndarray | pyarrow.Array", counts: Sequence[int] | np.ndarray) -> "pyarrow.ListArray":
    """A column of lists: row i holds the next `counts[i]` of `values`, a numpy or arrow array."""
    import pyarrow

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    items = number_column(values) if isinstance(values, np.ndarray) else values
    return pyarrow.ListArray.from_arrays(number_column(offsets), items)


def named_list_column(
    names: Sequence[str], numbers: np.ndarray, counts: Sequence[int] | np.ndarray
) -> "pyarrow.ListArray":
    """Like `list_column`, for the strings in `names` that `numbers` refer to."""
    import pyarrow

    texts = [name.encode() for name in names]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(texts))]
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(names), buffers)
    return list_column(column.take(number_column(numbers)), counts)


def rows_of(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The batch as one dictionary per sample, with lists of numbers as numpy arrays."""
    listed = {}
    for name, column in columns.items():
        values = column.type.value_type if hasattr(column.type, "value_type") else None
        if values is not None and str(values) in ("int32", "int64"):
            flat, offsets = (_numbers(array) for array in (column.values, column.offsets))
            listed[name] = [flat[start:stop] for start, stop in zip(offsets, offsets[1:], strict=False)]
        else:
            listed[name] = column.to_pylist()
    return [dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True)]


def _numbers(column: "pyarrow.Array") -> np.ndarray:
    """The inverse of `number_column`."""
    return np.frombuffer(column.buffers()[1], str(column.type), count=len(column))
