"""Lets the model write the text that a configuration wants of it (``text.source: self``), before anything else."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.config.text import OF_SELF
from bitgenome.observe.progress import Track
from bitgenome.plan.text import ModelAndText, encode_text, row_length, written_counts
from bitgenome.storage.shared import build_once, shared_directory
from evaluators.data.tokenizer import load_tokenizer
from evaluators.data.windows import TokenWindows
from evaluators.prepare import writing
from workers.pool.base import Pool

log = logging.getLogger(__name__)

STAGE = "text"


def written_windows(
    plan: ModelAndText,
    ready: TokenWindows | None,
    pool: Pool,
    track: Track,
    stage: Callable[[str], AbstractContextManager[None]],
) -> TokenWindows:
    """Return the token windows of a plan: ``ready``, or if that is None all text, after the model has written its part.

    What it writes is kept by a digest of model and settings, a file for each batch of windows, from which an
    interrupted run goes on. ``stage`` times the work under a name.
    """
    if ready is not None:
        return ready
    text, tokenizer = plan.config.text, load_tokenizer(plan.folder.path)
    counts, length = written_counts(text), row_length(plan.config.text, tokenizer)
    own = [split for split in counts if split not in OF_SELF]
    log.info(
        "the model writes %d windows of %d tokens for %s%s", sum(counts.values()), text.window, ", ".join(counts),
        ": figures on them say how the file follows the model where it goes by itself, not on text of others"
        if own else "",
    )  # fmt: skip
    parts = plan.folder.digest, counts, length, text.seed, writing.BATCH
    directory = shared_directory(plan.config, layout.WRITTEN_KIND, digest_of(writing.SCHEMA, *parts))

    def build() -> None:
        tasks = writing.tasks(plan.folder.path, directory, counts, length, text.seed, pool.size)
        for _ in track(pool.map(tasks), len(tasks), "writing text"):
            pass

    def done() -> bool:
        return writing.written_rows(directory, counts, length) is not None

    with stage(STAGE):
        build_once(plan.config, directory, "the text", done, build)
        return encode_text(plan, writing.written_rows(directory, counts, length))
