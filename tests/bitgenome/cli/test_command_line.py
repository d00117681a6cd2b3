"""The command line starts at once for commands that need no model and no cluster."""

import subprocess
import sys

from tests.conftest import REPOSITORY

SLOW = {"torch", "ray", "transformers", "pandas", "scipy", "pydantic"}


def test_importing_the_command_line_imports_no_library_that_takes_seconds() -> None:
    code = f"import sys, bitgenome.cli; print(*sorted({SLOW} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.strip() == "", f"bitgenome/cli imports {done.stdout}: import it in the command that needs it"
