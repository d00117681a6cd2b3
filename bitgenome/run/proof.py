"""Measures a file on held-out text, by simulation and by llama.cpp."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitgenome.common.devices import best_device, worker_memory
from evaluators.data.windows import TokenWindows
from evaluators.engine.activations import EightBitInputs
from evaluators.engine.divergence import Reference
from evaluators.engine.memory import windows_at_once
from evaluators.engine.streamed import streamed
from evaluators.engine.sweep import Sweep
from evaluators.model.folder import ModelFolder
from evaluators.model.head import Head
from evaluators.model.sizes import ModelShape
from exporters.files.file_layout import FileLayout
from exporters.files.gguf_reader import read_gguf
from exporters.files.packed_file import PackedFile
from exporters.runtime.comparison import LogProbs, compare, log_probs, rounded
from exporters.runtime.figures import Figures
from exporters.runtime.llamacpp import LlamaCppError, LlamaCppRuntime
from exporters.runtime.outputs import head_input_type
from exporters.runtime.text import TextServer
from exporters.runtime.tokens import check_tokens
from quantizers.formats.activations import input_type
from quantizers.formats.table import QuantFormat

log = logging.getLogger(__name__)

CONTEXT = 512  # tokens, for the measurement of speed and the sample
SAMPLE_TOKENS = 40
SAMPLE_CHARACTERS = 160  # of the test text, that a file without a chat template goes on from
QUESTION = "What can you help me with? Answer in one sentence."


@dataclass(frozen=True)
class MixProof:
    """Holds what llama.cpp's own file of a mix, beside which ours is proved, is worth by the same proof."""

    mix: str  # of llama.cpp, e.g. "Q3_K_M"
    file_bytes: int
    figures: Figures  # as those of the proof


@dataclass(frozen=True)
class Sample:
    """Holds what a file answers to a prompt, or how it goes on from it, by llama.cpp."""

    prompt: str
    answer: str
    chat: bool  # whether it is an answer, by the file's chat template


@dataclass(frozen=True)
class Proof:
    """Holds the quality of a file on held-out text, as simulated from its own bytes and as llama.cpp runs it.

    What llama.cpp makes of the file is in ``figures``, of its own logits: inputs of a quantized head are rounded to 8
    bits there as all others are. KL from a simulation to llama.cpp is of the hidden states of both through the same
    head in floats.
    """

    file: str
    file_bytes: int
    tokens: int
    simulated_kl: float  # nats per token, full precision to simulated
    simulated_perplexity: float
    simulated_to_runtime_kl: float
    prompt_tokens_per_second: float
    generated_tokens_per_second: float
    figures: Figures  # of llama.cpp beside the full-precision model
    eight_bit_kl: float | None = None  # simulated with llama.cpp's 8-bit inputs, the head's too, where configured so
    eight_bit_to_runtime_kl: float | None = None
    eight_bit_alone_kl: float | None = None  # of 8-bit inputs with full-precision weights
    mix: MixProof | None = None  # of llama.cpp's own files the nearest in size, where it was made
    sample: Sample | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name."""
        return asdict(self)


class ShippedModel(ModelFolder):
    """Reads a model folder with the norms and biases of a file, and the file's packed bytes as a bank."""

    def __init__(self, folder: ModelFolder, file: PackedFile):
        super().__init__(folder.path)
        self._file = file

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU: the file's own where it keeps it in float32, else in full precision."""
        return self._file.floats(name) if name in self._file.float_names else super().read(name)

    def packed(self, tensor: str, fmt: QuantFormat) -> Tensor:
        """Return a tensor's bytes uint8 (rows, row_bytes), which are of the format ``fmt``."""
        return torch.from_numpy(self._file.packed(tensor))


@torch.inference_mode()
def prove(
    path: Path,
    folder: ModelFolder,
    text: TokenWindows,
    activations: str = "float",
    memory: int | None = None,
    layout: FileLayout | None = None,
    loaded: Path | None = None,
    beside: tuple[str, Path] | None = None,
) -> Proof:
    """Measure a GGUF file of ``folder``'s model on the test windows (n, T) of ``text``, by simulation and by llama.cpp.

    With ``activations`` q8 the simulation is repeated with 8-bit inputs. A warning says where llama.cpp makes other
    tokens of the text than the model. Weights are in memory one block at a time, and at the end the two heads;
    ``memory`` bounds the windows that go through a block at once, by default by what is free; ``layout``
    is what the file holds, by default as built. ``loaded`` is what llama.cpp is given instead of the file, the first of
    its shards. ``beside`` is a mix of llama.cpp and its file of the model, which is
    measured by the same text. Raises ValueError for a damaged file, and LlamaCppError if llama.cpp cannot run it.
    """
    file, windows = PackedFile(path, folder, layout), text.windows["test"]
    with LlamaCppRuntime(loaded or path, windows.shape[1]) as runtime:
        from_runtime = runtime.hidden_states(windows)
        check_tokens(runtime, folder.path, text.sample)
    # before heads and hidden states, so that llama.cpp's memory is not beside theirs
    with TextServer(loaded or path, CONTEXT) as server:
        speed, sample = server.speed(), sample_of(server, text.sample)
    from_mix = None
    if beside is not None:
        with LlamaCppRuntime(beside[1], windows.shape[1]) as runtime:
            from_mix = runtime.hidden_states(windows)
    ids, device = torch.from_numpy(windows), best_device()
    at_once = windows_at_once(ModelShape.of(folder), windows.shape[1], windows.size, memory or worker_memory(device))
    shipped, formats = ShippedModel(folder, file), file.formats

    def pass_over(sweep: Sweep, candidate: Mapping[str, QuantFormat]) -> Tensor:
        return sweep.final_states(ids, "test", [candidate])[0]

    eight_bit_kl, eight_bit_states, eight_bit_input, alone = None, None, None, None
    if activations == "q8":
        with streamed(folder, shipped, device, at_once) as sweep:
            inputs = EightBitInputs(sweep.model, formats)
            alone = inputs.head_input(pass_over(sweep, {}))
        with streamed(shipped, shipped, device, at_once, "q8") as sweep:
            eight_bit_states = pass_over(sweep, formats)
            eight_bit_input = sweep.head_input(eight_bit_states, formats.get(folder.head_tensor))
    with streamed(folder, shipped, device, at_once) as full, streamed(shipped, shipped, device, at_once) as simulated:
        full_states, states = pass_over(full, {}), pass_over(simulated, formats)
        full_head, head = full.head(None), simulated.head(formats.get(folder.head_tensor))
    reference = Reference(full_states, full_head, ids, text.unscored)
    measured = reference.compare(states, head)
    eight_bit = None
    alone_kl = None if alone is None else reference.compare(alone, full_head).kl
    if eight_bit_states is not None and eight_bit_input is not None:
        eight_bit_kl = reference.compare(eight_bit_input, head).kl
        eight_bit = log_probs(eight_bit_states, head)
    full_precision = log_probs(full_states, full_head)
    mix = None
    if beside is not None and from_mix is not None:
        mix = mix_proof(*beside, torch.from_numpy(from_mix).to(device), full_head, full_precision, text)
    ours, head_format = torch.from_numpy(from_runtime).to(device), formats.get(folder.head_tensor)
    found = compare(
        log_probs(ours, rounded(head, input_type(head_format)) if head_format else head),
        windows,
        len(head.weight),
        full_precision,
        log_probs(states, head),
        eight_bit,
        text.unscored,
        before_rounding=log_probs(ours, head),
    )
    assert found.reference is not None and found.reference.figures is not None and found.simulated is not None
    return Proof(
        file=path.name,
        file_bytes=path.stat().st_size,
        tokens=windows.size,
        simulated_kl=measured.kl,
        simulated_perplexity=measured.perplexity,
        simulated_to_runtime_kl=found.simulated.kl,
        prompt_tokens_per_second=speed.prompt,
        generated_tokens_per_second=speed.generation,
        figures=found.reference.figures,
        eight_bit_kl=eight_bit_kl,
        eight_bit_to_runtime_kl=found.eight_bit.kl if found.eight_bit else None,
        eight_bit_alone_kl=alone_kl,
        mix=mix,
        sample=sample,
    )


def mix_proof(mix: str, path: Path, states: Tensor, full_head: Head, full: LogProbs, text: TokenWindows) -> MixProof:
    """Return what llama.cpp's file of a ``mix`` is worth, given its final hidden ``states`` (n, T, D).

    ``full_head`` and ``full`` are head and log probabilities of the full-precision model on the test windows.
    """
    contents, windows = read_gguf(path), text.windows["test"]
    head = replace(full_head, weight=torch.from_numpy(contents.head()).to(states.device))
    theirs = log_probs(states, rounded(head, head_input_type(contents.tensors)))
    found = compare(theirs, windows, len(head.weight), full, unscored=text.unscored)
    assert found.reference is not None and found.reference.figures is not None
    return MixProof(mix, path.stat().st_size, found.reference.figures)


def sample_of(server: TextServer, text: str) -> Sample | None:
    """Return what a file answers or, without a chat template, how it goes on from the beginning of ``text``.

    Nothing, with a warning, where llama.cpp refuses to let it write: a chat template may be one that it cannot read.
    """
    prompt = QUESTION if server.chats else text[:SAMPLE_CHARACTERS].rpartition(" ")[0].strip()
    try:
        return Sample(prompt, server.answer(prompt, SAMPLE_TOKENS), server.chats) if prompt else None
    except LlamaCppError as error:
        log.warning("no sample of what the file writes: %s", error)
        return None
