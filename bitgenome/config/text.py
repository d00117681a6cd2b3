"""Defines the settings of the text for calibration, search, validation and test."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from bitgenome.common.section import Section
from bitgenome.config.paths import UserPath
from evaluators.data.stdlib import SPLITS


class TokensConfig(Section):
    """Settings of the number of tokens of each split.

    Sensitivities read the first ``sensitivity`` tokens of the search text, genomes the rungs of ``search.ladder``.
    """

    calibration: int = Field(98304, gt=0, description="for Hessians and healing; 80,000 or more recommended")
    sensitivity: int = Field(
        4096, gt=0, description="first tokens of the search text, on which sensitivities are measured"
    )
    search: int = Field(8192, gt=0, description="on which genomes are scored")
    validation: int = Field(16384, gt=0, description="on which the winner is chosen")
    test: int = Field(16384, gt=0, description="for the final figures and the proof in llama.cpp")

    @model_validator(mode="after")
    def nested(self) -> Self:
        """Raise ValueError if ``sensitivity`` exceeds ``search``."""
        if self.sensitivity > self.search:
            raise ValueError(f"expected sensitivity at most search ({self.search}), found {self.sensitivity}")
        return self


class TextConfig(Section):
    """Settings of where calibration, search, validation and test text come from; the splits are always disjoint.

    ``source`` is one of:

    - ``stdlib``: held-out modules of the running interpreter's standard library.
    - ``file``: one text file in UTF-8, divided by ``shares`` at ends of lines.
    - ``files``: one such file per split.

    Every window begins with the BOS token where the tokenizer puts it before a text. Of large texts evenly spread
    slices are read, no more than the tokens asked for need.
    """

    source: Literal["stdlib", "file", "files"] = Field("stdlib", description="where text comes from")
    splits: UserPath = Field(
        Path("models/stdlib-6m/splits.json"), description="of stdlib: the JSON file that names held-out modules"
    )
    path: UserPath | None = Field(None, description="of file: one text file")
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {"calibration": 0.4, "search": 0.2, "validation": 0.2, "test": 0.2},
        description="of file: what share of its lines each split gets (of its bytes, above 4 MiB)",
    )
    files: dict[str, UserPath] | None = Field(None, description="of files: a file for each split")
    window: int = Field(512, ge=8, description="tokens that are read together, BOS included")
    tokens: TokensConfig = Field(TokensConfig(), description="number of tokens of each split")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of windows")

    @model_validator(mode="after")
    def complete(self) -> Self:
        """Raise ValueError if a file of ``source`` is not given, or ``files`` or ``shares`` name other splits."""
        if self.source == "file" and self.path is None:
            raise ValueError("expected text.path for source: file, found none")
        if self.source == "files" and set(self.files or {}) != set(SPLITS):
            raise ValueError(
                f"expected text.files for {', '.join(SPLITS)}, found {', '.join(self.files or {}) or 'none'}"
            )
        if set(self.shares) != set(SPLITS):
            raise ValueError(f"expected text.shares for {', '.join(SPLITS)}, found {', '.join(self.shares)}")
        return self


def absolute_text(text: TextConfig) -> TextConfig:
    """Return ``text`` with absolute paths of its files."""
    files = None if text.files is None else {split: path.absolute() for split, path in text.files.items()}
    found = {"splits": text.splits.absolute(), "path": text.path and text.path.absolute(), "files": files}
    return text.model_copy(update=found)
