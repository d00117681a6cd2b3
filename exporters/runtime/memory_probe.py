"""Has llama.cpp say what a GGUF file would take at a context, as a process of its own, which allocates none of it.

``exporters.runtime.memory`` starts it by its path, with the settings as a JSON object in a line of standard input, and
reads llama.cpp's table of memory from its standard error. It imports nothing of the project. Only the file's header is
read. Once the table is there llama.cpp aborts the process, as no tensors are to be loaded.
"""

import json
import sys

import xllamacpp

SHOWN = 4  # llama.cpp's log level from which it shows its table


def main() -> None:
    """Let llama.cpp fit the file into this machine's memory, without loading it."""
    wanted = json.loads(sys.stdin.readline())
    params = xllamacpp.CommonParams()
    params.model.path = wanted["path"]
    if wanted["mmproj"]:
        params.mmproj.path = wanted["mmproj"]
    params.n_ctx = wanted["context"]
    params.n_parallel = 1
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{wanted['kv']}")
    params.fit_params = params.no_alloc = True
    params.warmup = False
    params.cache_ram_mib = 0
    params.verbosity = SHOWN
    xllamacpp.Server(params)


if __name__ == "__main__":
    main()
