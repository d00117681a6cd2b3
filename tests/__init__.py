"""Tests of all packages."""

import os

from bitgenome.common.devices import best_device

if best_device().type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, which Ray's libraries may do
