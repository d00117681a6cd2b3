"""What C code prints is kept out of the output of a command, and what Python prints is not."""

import ctypes
import os

import pytest

from bitgenome.common.c_output import silent_c_stdout


def test_c_code_prints_nothing_meanwhile_and_python_does(capfd: pytest.CaptureFixture[str]) -> None:
    library = ctypes.CDLL(None)
    with silent_c_stdout(), silent_c_stdout():
        library.puts(b"of C")
        library.fflush(None)
        os.write(1, b"of Python\n")
    library.puts(b"of C, afterwards")
    library.fflush(None)
    assert capfd.readouterr().out == "of Python\nof C, afterwards\n"
