"""Panics of the tokenizers library, which is written in Rust, as ordinary errors."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise ValueError for a panic, as a damaged tokenizer.json causes.

    The class of a panic is not a subclass of Exception, and has no public name.
    Rust has already printed lines of its own to stderr.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tokenizers ended with {error}") from error
