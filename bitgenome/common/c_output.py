"""Keeps what C libraries print out of this process's output, where Python's own goes on as it is."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

STREAMS = ("stdout", "__stdoutp")  # the variable's name in glibc, in macOS


@contextmanager
def silent_c_stdout() -> Iterator[None]:
    """Discard what C code prints on standard output while the context lasts, in all threads.

    The C library's variable ``stdout`` is set to another stream, as its manual allows; file descriptor 1 stays as it
    is, so that nothing is lost that Python writes meanwhile. Does nothing where there is no such variable.
    """
    found = _stdout()
    if found is None:
        yield
        return
    variable, stream = found
    variable.value = _nowhere() or stream
    try:
        yield
    finally:
        variable.value = stream


@cache
def _stdout() -> tuple[ctypes.c_void_p, int | None] | None:
    """Return the C library's variable, and the stream in it when it was first asked for."""
    library = ctypes.CDLL(None)
    for name in STREAMS:
        with suppress(ValueError):
            variable = ctypes.c_void_p.in_dll(library, name)
            return variable, variable.value
    return None


@cache
def _nowhere() -> int | None:
    """Return a stream whose output is discarded, which stays open: code may still hold it."""
    fopen = ctypes.CDLL(None).fopen
    fopen.restype, fopen.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_char_p)
    found: int | None = fopen(b"/dev/null", b"w")
    return found
