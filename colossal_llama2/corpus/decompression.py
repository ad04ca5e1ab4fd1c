"""Decompress a file as a stream, including every byte before a place where it is damaged.

The compression is detected from the first bytes, not from the name. Concatenated streams, as `cat` and parallel
compressors write them, are read as one.

pyarrow decodes zstd with windows of up to 128 MiB, the default limit of `zstd` itself. Longer windows (`zstd --long=28`
and above) are decoded by backports.zstd; they need as much memory as the window, at most 2 GiB.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, BinaryIO, Protocol

from colossal_llama2.storage.lines import READ_BYTES

LONG_WINDOWS_PACKAGE = "backports.zstd==1.8.0"
MAX_WINDOW_LOG = 31
# Bytes 2 to 4 of zstd's skippable frames, with which parallel compressors begin.
_SKIPPABLE = b"\x2a\x4d\x18"
_WINDOW_TOO_LONG = "requires too much memory"
PADDING = b"\0"


class DamagedError(Exception):
    """Compressed data cannot be decompressed any further. The message is the reason."""


class MissingPackageError(DamagedError):
    """The data is valid, but a package is missing, which the message names."""


DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError, DamagedError)


def compression_of(head: bytes) -> str | None:
    """The compression of a file, from its first 8 bytes: "gzip", "zstd", "bzip2", "xz", or None for anything else."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or head[1:4] == _SKIPPABLE and 0x50 <= head[0] <= 0x5F:
        return "zstd"
    if head.startswith(b"BZh") and head[4:6] in (b"1A", b"\x17r"):
        return "bzip2"
    return "xz" if head.startswith(b"\xfd7zXZ\0") else None


class ByteStream(Protocol):
    """A binary stream that is read from its beginning to its end."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""
        ...


class Decompressing(io.RawIOBase):
    """The decompressed bytes of a file that is read from `stream`. Every valid byte is returned before an error.

    A decompressor that fails discards what it has decoded of the requested block. So the data up to that block is
    decompressed again from `path`, and then the block one byte at a time.
    """

    def __init__(self, path: str, compression: str, stream: BinaryIO, stack: ExitStack):
        """`compression` is what `compression_of` returns; files that are opened are closed with `stack`."""
        self._path, self._compression, self._stack = path, compression, stack
        self._has_long_window = False
        self._stream = self._decompressor(stream)
        self._given, self._step = 0, READ_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            block = self._stream.read(min(len(buffer), self._step))
        except DAMAGE as error:
            if _WINDOW_TOO_LONG in str(error) and not self._has_long_window:
                self._has_long_window = True
            elif self._step > 1:
                self._step = 1
            else:
                raise
            self._begin_anew()
            return self.readinto(buffer)
        buffer[: len(block)] = block
        self._given += len(block)
        return len(block)

    def _begin_anew(self) -> None:
        """Return to the current position from the start of the file."""
        self._stream = self._decompressor(self._stack.enter_context(open(self._path, "rb")))
        left = self._given
        while left:
            left -= len(self._stream.read(min(left, READ_BYTES)))

    def _decompressor(self, stream: BinaryIO) -> ByteStream:
        """An object whose `read` returns decompressed bytes, or raises one of `DAMAGE`."""
        if self._compression == "gzip":
            return self._stack.enter_context(gzip.GzipFile(fileobj=stream))
        if self._compression == "bzip2":
            return _Streams(stream, bz2.BZ2Decompressor)
        if self._compression == "xz":
            return _Streams(stream, lzma.LZMADecompressor)
        if self._has_long_window:
            return _Streams(stream, _long_window_decompressor)
        import pyarrow

        source = pyarrow.PythonFile(stream, mode="r")
        return self._stack.enter_context(pyarrow.CompressedInputStream(source, "zstd"))


def _long_window_decompressor() -> Any:
    """A decompressor of one zstd frame with a window of any length."""
    try:
        from backports import zstd
    except ImportError:
        raise MissingPackageError(f"its zstd window is over 128 MiB; run: pip install {LONG_WINDOWS_PACKAGE}")
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG})


class _Streams:
    """Reads concatenated streams with decompressors that have the interface of `bz2.BZ2Decompressor`.

    The readers in Python's bz2 and lzma modules silently ignore a damaged stream that follows the first one.
    """

    def __init__(self, stream: BinaryIO, make: Callable[[], Any]):
        self._stream, self._make = stream, make
        self._decompressor: Any = None
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Up to `size` decompressed bytes, b"" at the end. Raises one of `DAMAGE`."""
        while True:
            if self._decompressor is None:
                self._rest = self._rest.lstrip(PADDING) or self._next_data()
                if not self._rest:
                    return b""
                self._decompressor = self._make()
            elif self._decompressor.needs_input and not self._rest:
                self._rest = self._stream.read(READ_BYTES)
                if not self._rest:
                    raise EOFError("it ends too early")
            given, self._rest = self._rest, b""
            try:
                block = self._decompressor.decompress(given, size)
            except Exception as error:
                # The error class of backports.zstd is not among DAMAGE.
                raise error if isinstance(error, DAMAGE) else DamagedError(str(error))
            if self._decompressor.eof:
                self._rest, self._decompressor = self._decompressor.unused_data, None
            if block:
                return block

    def _next_data(self) -> bytes:
        """The bytes after the padding of a stream; b"" at the end of the file."""
        while data := self._stream.read(READ_BYTES):
            if data := data.lstrip(PADDING):
                return data
        return b""
