"""Defines the settings of the text for calibration, search, validation and test."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from bitgenome.common.section import Section
from bitgenome.config.paths import UserPath, UserPathOrName

SourceName = Literal["stdlib", "file", "files", "chat", "datasets", "self"]
Split = Literal["calibration", "search", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
OF_SELF: tuple[Split, ...] = ("calibration", "search")  # where others give the text on which figures are measured
PLACES = {"splits", "path", "files"}  # settings that are paths: a run records digests of what it read there


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


class DatasetConfig(Section):
    """Settings of a data set that the datasets library loads (``pip install datasets``)."""

    id: UserPathOrName = Field(description="of the Hugging Face hub, or a folder")
    subset: str | None = Field(None, description="its configuration, where it has several")
    split: str = Field("train", description="of the data set; its rows are divided by text.shares")
    column: str | None = Field(
        None, description="of texts, or of lists of messages (a conversation each); by default text or messages"
    )
    revision: str | None = Field(None, description="commit or tag; by default the newest")


class Places(Section):
    """Settings that say where the text of a source lies."""

    splits: UserPath = Field(
        Path("models/stdlib-6m/splits.json"), description="of stdlib: the JSON file that names held-out modules"
    )
    path: UserPath | None = Field(None, description="of file and chat: one file")
    files: dict[str, UserPath] | None = Field(None, description="of files and chat: a file for each split")
    dataset: DatasetConfig | None = Field(None, description="of datasets: which one")

    def check_place(self, source: SourceName, fills: tuple[str, ...]) -> None:
        """Raise ValueError unless there is what ``source`` is read from, for each of the splits ``fills``."""
        wanted = {"file": self.path, "datasets": self.dataset, "chat": self.path or self.files}
        key = {"file": "path", "datasets": "dataset", "chat": "path or text.files"}
        if source in wanted and not wanted[source]:
            raise ValueError(f"expected text.{key[source]} for source: {source}, found none")
        if source == "chat" and self.path and self.files:
            raise ValueError("expected one of text.path and text.files for source: chat, found both")
        if (source == "files" or (source == "chat" and self.files)) and set(self.files or {}) != set(fills):
            raise ValueError(
                f"expected text.files for {', '.join(fills)}, found {', '.join(self.files or {}) or 'none'}"
            )


class SourceConfig(Places):
    """One source of a mix. Its windows are ``share`` of those of the splits that it fills, relative to other shares.

    By default it fills all splits; ``self`` fills calibration and search where other sources fill all the others.
    """

    source: SourceName = Field(description="where text comes from")
    share: float = Field(1.0, gt=0, description="of windows, relative to the other sources of the same split")
    fills: tuple[Split, ...] | None = Field(None, min_length=1, description="splits that get text from this source")


class TextConfig(Places):
    """Settings of where calibration, search, validation and test text come from; the splits are always disjoint.

    ``source`` is one of these, or a list of them, which are mixed by ``share``:

    - ``stdlib``: held-out modules of the running interpreter's standard library, Python code.
    - ``file``: one text file in UTF-8, divided by ``shares`` at ends of lines.
    - ``files``: one such file per split.
    - ``chat``: conversations in JSON lines, such as ``{"messages": [{"role": "user", "content": "..."}, ...]}``. The
      model's own chat template writes them, with its special tokens. One file divided by ``shares``, or one per split.
    - ``datasets``: a data set of texts or conversations, by the datasets library, divided by ``shares``.
    - ``self``: what the model itself writes: turns of its chat template, or text from its first token, at temperature
      1. Every window is a draw of its own. Figures on such text say how well the file follows the model where the
      model goes by itself, not on text of others.

    Every window begins with the BOS token where the tokenizer puts it before a text. Of large texts evenly spread
    slices are read, no more than the tokens asked for need.
    """

    source: Annotated[
        Annotated[SourceName, Tag("<name>")] | Annotated[tuple[SourceConfig, ...], Tag("<list>")],
        Discriminator(lambda value: "<list>" if isinstance(value, list | tuple) else "<name>"),
    ] = Field("stdlib", description="where text comes from: a name, or a list of sections that are mixed")
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {"calibration": 0.4, "search": 0.2, "validation": 0.2, "test": 0.2},
        description="of one file or data set: what share of its lines, conversations or rows each split gets (of its "
        "bytes, for text above 4 MiB)",
    )
    window: int = Field(512, ge=8, description="tokens that are read together, BOS included")
    tokens: TokensConfig = Field(TokensConfig(), description="number of tokens of each split")
    seed: int = Field(0, ge=0, lt=2**32, description="of the order of windows, and of what the model writes")

    @model_validator(mode="after")
    def complete(self) -> Self:
        """Raise ValueError if a place of a source is not given, a split has no source, or ``shares`` other splits."""
        if set(self.shares) != set(SPLITS):
            raise ValueError(f"expected text.shares for {', '.join(SPLITS)}, found {', '.join(self.shares)}")
        if isinstance(self.source, str):
            self.check_place(self.source, SPLITS)
            return self
        if beside := next((name for name in ("path", "files", "dataset") if getattr(self, name)), None):
            raise ValueError(f"expected text.{beside} within the sources of a mix, found it beside them")
        if [source.source for source in self.sources].count("self") > 1:
            raise ValueError("expected self once in a mix, found it again")
        for source in self.sources:
            source.check_place(source.source, source.fills or ())
        if empty := next((s for s in SPLITS if not any(s in (source.fills or ()) for source in self.sources)), None):
            raise ValueError(f"expected a source that fills {empty}, found none")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the mix, one for a source by name, each with the splits that it fills."""
        if isinstance(self.source, str):
            places = {name: getattr(self, name) for name in Places.model_fields}
            return (SourceConfig.model_construct(source=self.source, share=1.0, fills=SPLITS, **places),)
        others = [s for s in self.source if s.source != "self"]
        measured = all(any(split in (s.fills or SPLITS) for s in others) for split in SPLITS if split not in OF_SELF)
        by_default = {"self": OF_SELF if measured else SPLITS}
        return tuple(
            s if s.fills else s.model_copy(update={"fills": by_default.get(s.source, SPLITS)}) for s in self.source
        )

    @property
    def names(self) -> str:
        """The names of the sources, with the shares of a mix."""
        if isinstance(self.source, str):
            return self.source
        return ", ".join(f"{source.source} ({source.share:g})" for source in self.source)

    def result_keys(self) -> dict[str, Any]:
        """Return the settings that decide the text, but for the paths at which it is read, as JSON values."""
        found = self.model_dump(mode="json", exclude=PLACES)
        if not isinstance(self.source, str):
            found["source"] = [source.model_dump(mode="json", exclude=PLACES) for source in self.source]
        return found


def absolute_text(text: TextConfig) -> TextConfig:
    """Return ``text`` with absolute paths of its files, and of a data set in a folder."""
    update = absolute_places(text)
    if not isinstance(text.source, str):
        update["source"] = tuple(source.model_copy(update=dict(absolute_places(source))) for source in text.source)
    return text.model_copy(update=update)


def absolute_places(places: Places) -> dict[str, Any]:
    """Return the settings of ``places`` that are paths, made absolute."""
    files: Mapping[str, Path] | None = places.files
    dataset = places.dataset
    if dataset and Path(dataset.id).is_dir():
        dataset = dataset.model_copy(update={"id": str(Path(dataset.id).absolute())})
    return {
        "splits": places.splits.absolute(),
        "path": places.path and places.path.absolute(),
        "files": None if files is None else {split: path.absolute() for split, path in files.items()},
        "dataset": dataset,
    }
