"""Draws docs/run.svg, what ``make run`` shows at its end; a run that is finished is proved again, not searched.

python -m benchmarks.run_picture [CONFIG]
"""

import sys
from pathlib import Path

from bitgenome.cli.main import execute
from bitgenome.cli.terminal import console
from bitgenome.config.run import load_config

PICTURE = Path("docs") / "run.svg"
COLUMNS = 100


def main() -> None:
    """Run the configuration, and write what it showed as a picture."""
    console.record, console.width = True, COLUMNS
    execute(load_config(Path(sys.argv[1] if len(sys.argv) > 1 else "configs/stdlib-6m.yaml")))
    console.save_svg(str(PICTURE), title="make run")


if __name__ == "__main__":
    main()
