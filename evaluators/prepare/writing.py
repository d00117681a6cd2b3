"""This module lets a model write text for itself: windows of tokens drawn from its own distribution, at temperature 1.

The model is in memory as a whole, as transformers generates: with a cache of keys and values. Every window draws from a
random sequence of its own, and the first tokens of all windows are different ones. So the text depends on model, seed
and numbers of windows alone, not on who writes which part of it. Shapes: B windows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils.logging import disable_progress_bar

from bitgenome.common.devices import best_device, compute_type, release_memory
from bitgenome.common.files import atomic_write_bytes
from bitgenome.common.json_files import read_json_object
from bitgenome.common.steps import Step, tell
from evaluators.data.documents import TextError
from evaluators.data.stdlib import SPLITS
from evaluators.data.tokenizer import ModelTokenizer, load_tokenizer
from evaluators.data.turns import Pen, Script, script_of
from evaluators.model.folder import ModelFolder, ModelFolderError

SCHEMA = 1  # raise when the same model and seed give other text
BATCH = 32  # windows that are written together; not by the machine's memory, as sums then round otherwise
FIRST, DRAWS = 0, 1  # which random numbers a seed is for
ROWS = "rows"
CONFIGS = ("generation_config.json", "config.json")  # that name the ids which end an answer


@dataclass(frozen=True)
class Batch:
    """Names windows that are written together: ``count`` from ``start``, counted over all splits."""

    start: int
    count: int

    @property
    def file(self) -> str:
        """Name of the file of its windows."""
        return f"{self.start}.safetensors"


def batches(windows: int) -> list[Batch]:
    """Return the batches of ``windows`` windows."""
    return [Batch(start, min(BATCH, windows - start)) for start in range(0, windows, BATCH)]


@dataclass(frozen=True)
class WriteWindows:
    """Pool task in which a model writes some batches of windows, a file for each in ``directory``.

    ``length`` is that of a window without the BOS token that stands before every text, ``total`` the number of windows
    of all batches. A batch whose file is there is not written again.
    """

    model: Path
    directory: Path
    batches: tuple[Batch, ...]
    length: int
    total: int
    seed: int

    @property
    def label(self) -> str:
        return f"write[{self.batches[0].start}]"

    @property
    def makes(self) -> tuple[Path, ...]:
        """Directory that the task writes to."""
        return (self.directory,)

    @property
    def work(self) -> float:
        """Windows to be written."""
        return sum(batch.count for batch in self.batches)

    def run(self, state: dict[Any, Any]) -> None:
        """Write the batches that are missing."""
        missing = [
            batch for batch in self.batches if saved_rows(self.directory / batch.file, batch, self.length) is None
        ]
        if not missing:
            return
        writer = Writer(ModelFolder(self.model), best_device())
        try:
            for index, batch in enumerate(missing):
                rows = writer.write(batch, self.length, self.total, self.seed, (index, len(missing)))
                atomic_write_bytes(self.directory / batch.file, save({ROWS: rows}))
        finally:
            del writer
            release_memory()


def tasks(
    model: Path, directory: Path, counts: Mapping[str, int], length: int, seed: int, workers: int
) -> list[WriteWindows]:
    """Return the tasks that write what is missing of ``counts`` windows by split; each loads the model once."""
    total = sum(counts.values())
    missing = [b for b in batches(total) if saved_rows(directory / b.file, b, length) is None]
    share = ceil(len(missing) / max(1, workers))
    parts = [tuple(missing[start : start + share]) for start in range(0, len(missing), share or 1)]
    return [WriteWindows(model, directory, part, length, total, seed) for part in parts]


def saved_rows(path: Path, batch: Batch, length: int) -> np.ndarray | None:
    """Return the windows int64 (count, length) in a batch's file, None if it is missing or damaged."""
    try:
        rows: np.ndarray = load_file(path)[ROWS]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return rows if rows.shape == (batch.count, length) else None


def written_rows(directory: Path, counts: Mapping[str, int], length: int) -> dict[str, np.ndarray] | None:
    """Return all windows int64 (n, length) by split, None unless every batch is there and whole."""
    found = []
    for batch in batches(sum(counts.values())):
        if (rows := saved_rows(directory / batch.file, batch, length)) is None:
            return None
        found.append(rows)
    splits = [split for split in SPLITS if split in counts]
    ends = np.cumsum([counts[split] for split in splits])[:-1]
    return dict(zip(splits, np.split(np.concatenate(found), ends), strict=True))


def writing_script(folder: Path, tokenizer: ModelTokenizer, length: int) -> Script:
    """Return what stands around the text that a model writes, in windows of ``length`` tokens.

    Raises TextError if there is nothing to begin with, or if that alone fills half a window.
    """
    ends: set[int] = set()
    for file in (folder / name for name in CONFIGS):
        found = read_json_object(file).get("eos_token_id") if file.is_file() else None
        ends |= {index for index in (found if isinstance(found, list) else [found]) if isinstance(index, int)}
    script = script_of(tokenizer, ends)
    if len(script.start) > length // 2:
        raise TextError(
            f"expected text.window at least twice what the chat template begins with ({len(script.start)} tokens), "
            f"found {length}"
        )
    return script


class Writer:
    """Holds a whole model that writes. Raises ModelFolderError if transformers cannot load it."""

    def __init__(self, folder: ModelFolder, device: torch.device):
        self.folder, self.device = folder, device
        disable_progress_bar()  # of transformers, beside ours
        self.tokenizer = load_tokenizer(folder.path)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder.path, dtype=compute_type("auto", device), trust_remote_code=False
            )
        except Exception as error:  # whatever transformers makes of a folder that does not fit
            found = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelFolderError(
                f"expected a model that transformers can load from {folder.path}, found {found}"
            ) from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.model.generation_config = GenerationConfig()  # plain: what samples is ours

    @torch.inference_mode()
    def write(self, batch: Batch, length: int, total: int, seed: int, place: tuple[int, int] = (0, 1)) -> np.ndarray:
        """Return the windows int64 (count, length) of a batch, without the BOS token that stands before every text.

        ``total`` is the number of windows over all batches; ``place`` is this batch's among those of its task.
        """
        script = writing_script(self.folder.path, self.tokenizer, length)
        before = 0 if self.tokenizer.bos is None else 1
        new = length + before - len(script.start)
        draws = np.stack([
            np.random.default_rng([seed, DRAWS, window]).random(new)
            for window in range(batch.start, batch.start + batch.count)
        ])  # fmt: skip
        beginning = First(seed, total, range(batch.start, batch.start + batch.count), self.forbidden_first())
        sampler = Sampler(script, torch.from_numpy(draws).to(self.device), beginning, self.unused(), place)
        start = torch.tensor([script.start] * batch.count, device=self.device)
        ids = self.model.generate(
            start,
            attention_mask=torch.ones_like(start),
            generation_config=GenerationConfig(
                max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )
        rows: np.ndarray = ids[:, before:].cpu().numpy().astype(np.int64)
        return rows

    def unused(self) -> Tensor:
        """Return which ids (V,) of the head are no token."""
        unused = torch.ones(self.model.get_output_embeddings().weight.shape[0], dtype=torch.bool)
        unused[list(self.tokenizer.backend.get_vocab().values())] = False
        return unused.to(self.device)

    def forbidden_first(self) -> list[int]:
        """Return the ids that no text begins with: control tokens."""
        return [token["id"] for token in self.tokenizer.tables.get("added_tokens", ()) if token.get("special")]


@dataclass(frozen=True)
class First:
    """Draws the first tokens of ``total`` windows without replacement, of which ``ranks`` are wanted.

    Where there are fewer tokens than windows, they come again.
    """

    seed: int
    total: int
    ranks: range
    forbidden: Sequence[int]

    def choose(self, scores: Tensor) -> list[int]:
        """Return the tokens for the logits ``scores`` (V,) after the start, which all windows share.

        The largest sums of log probability and Gumbel noise are draws without replacement (Efraimidis and Spirakis).
        """
        random = np.random.default_rng([self.seed, FIRST])
        keys = scores.double().log_softmax(-1).cpu().numpy() + random.gumbel(size=len(scores))
        keys[list(self.forbidden)] = -np.inf
        usable = int(np.isfinite(keys).sum())
        order = np.argsort(-keys, kind="stable")[: max(1, min(self.total, usable))]
        places = random.permutation(max(self.total, len(order)))[list(self.ranks)]
        return [int(order[place % len(order)]) for place in places]


class Sampler(LogitsProcessor):
    """Chooses the next token of each window, and leaves transformers no other one."""

    def __init__(
        self, script: Script, draws: Tensor, first: First, unused: Tensor, place: tuple[int, int] = (0, 1)
    ):  # fmt: skip
        self.pens = [Pen(script) for _ in range(len(draws))]
        self.draws, self.first, self.unused = draws, first, unused
        self.step, self.place = 0, place

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (B, V) with all but one token of each window at minus infinity."""
        scores = scores.float().masked_fill(self.unused, -torch.inf)
        chosen = drawn(scores, self.draws[:, self.step]).tolist() if self.step else self.first.choose(scores[0])
        tokens = [pen.next(token) for pen, token in zip(self.pens, chosen, strict=True)]
        self.step += 1
        done, count = self.place
        tell([Step(done * self.draws.shape[1] + self.step, count * self.draws.shape[1], "token")])
        only = torch.full_like(scores, -torch.inf)
        only[torch.arange(len(tokens)), torch.tensor(tokens, device=scores.device)] = 0.0
        return only


def drawn(scores: Tensor, draws: Tensor) -> Tensor:
    """Return a token (B,) for each row of logits ``scores`` (B, V), where ``draws`` (B,) in [0, 1) fall among them."""
    sums = scores.softmax(-1).double().cumsum(-1)
    found = torch.searchsorted(sums, (draws * sums[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=scores.shape[-1] - 1)
