"""The bytes in a compressed file, as a stream: all that there are, also before a place where it is damaged.

What compresses a file is decided by its first bytes, not by its name. Several compressed streams one after the other,
as `cat` and parallel compressors make them, are read as one.

pyarrow decodes zstd with windows of up to 128 MiB, which is what `zstd` itself decodes unless asked. For longer ones
(`zstd --long=28` and more) backports.zstd is taken. They need as much memory as the window has, 2 GiB at most.
"""

import bz2
import gzip
import io
import lzma
import zlib
from contextlib import ExitStack

from colossal_llama2.storage.lines import READ_BYTES

LONG_WINDOWS_PACKAGE = "backports.zstd==1.8.0"
MAX_WINDOW_LOG = 31
# Any of zstd's skippable frames, with which parallel compressors begin, is this with another first byte.
_SKIPPABLE = b"\x2a\x4d\x18"
_WINDOW_TOO_LONG = "requires too much memory"
PADDING = b"\0"


class DamagedError(Exception):
    """Compressed data that cannot be decompressed any further, with the reason."""


class MissingPackageError(DamagedError):
    """Sound data for which a package is missing; the message says which."""


DAMAGE = (EOFError, zlib.error, lzma.LZMAError, OSError, DamagedError)


def compression_of(head: bytes) -> str | None:
    """What the file is compressed by, "gzip", "zstd", "bzip2" or "xz", by its first 8 bytes; None for anything else."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or head[1:4] == _SKIPPABLE and 0x50 <= head[0] <= 0x5F:
        return "zstd"
    if head.startswith(b"BZh") and head[4:6] in (b"1A", b"\x17r"):
        return "bzip2"
    return "xz" if head.startswith(b"\xfd7zXZ\0") else None


class Decompressing(io.RawIOBase):
    """The decompressed bytes of a file that is read from `stream`; all that there are before an error is raised.

    A decompressor that fails keeps to itself what it has of the block asked for. So the data up to that block is then
    read once more, from `path`, and the block by the byte.
    """

    def __init__(self, path: str, compression: str, stream, stack: ExitStack):
        """`compression` is what `compression_of` returns; `stack` closes what is opened."""
        self._path, self._compression, self._stack = path, compression, stack
        self._has_long_window = False
        self._stream = self._decompressor(stream)
        self._given, self._step = 0, READ_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
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
        """Come back to the place from the start of the file."""
        self._stream = self._decompressor(self._stack.enter_context(open(self._path, "rb")))
        left = self._given
        while left:
            left -= len(self._stream.read(min(left, READ_BYTES)))

    def _decompressor(self, stream):
        """An object whose `read` gives decompressed bytes, and raises one of `DAMAGE`."""
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


def _long_window_decompressor():
    """A decompressor of one zstd frame with a window of any length."""
    try:
        from backports import zstd
    except ImportError:
        raise MissingPackageError(f"its zstd window is over 128 MiB; run: pip install {LONG_WINDOWS_PACKAGE}")
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG})


class _Streams:
    """Reads compressed streams that follow each other, by decompressors with the interface of `bz2.BZ2Decompressor`.

    The readers of Python's own bz2 and lzma pass over what follows the first stream if it is damaged, without a word.
    """

    def __init__(self, stream, make):
        self._stream, self._make = stream, make
        self._decompressor = None
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
                # That of backports.zstd is none of the kinds that others raise.
                raise error if isinstance(error, DAMAGE) else DamagedError(str(error))
            if self._decompressor.eof:
                self._rest, self._decompressor = self._decompressor.unused_data, None
            if block:
                return block

    def _next_data(self) -> bytes:
        """What follows the padding behind a stream; b"" at the end of the file."""
        while data := self._stream.read(READ_BYTES):
            if data := data.lstrip(PADDING):
                return data
        return b""
