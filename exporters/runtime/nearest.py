"""Makes llama.cpp's own file that is nearest in size to a run's, so that a run ends in an outside measure."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from exporters.files.file_layout import FileLayout
from exporters.files.imatrix import read_imatrix
from exporters.metadata.source import ModelSource
from exporters.runtime.mix_file import MixFile, mixes_by_size
from exporters.runtime.original import original_of

log = logging.getLogger(__name__)

MOST_WEIGHTS = 250_000_000  # up to which auto makes it: a minute on two cores, for the slowest types
SECONDS_A_WEIGHT = 4e-7  # of one core: 1e-7 for K types with importance, up to 8e-7 for codebook types (measured)
SCRATCH = ".mix-"


def mix_wanted(wanted: str, weights: int) -> bool:
    """Return whether the setting ``wanted`` (on, off, auto) asks for a mix of a model of so many ``weights``."""
    return wanted == "on" or (wanted == "auto" and weights <= MOST_WEIGHTS)


@contextmanager
def nearest_mix(
    wanted: str, weights: int, source: ModelSource, layout: FileLayout, size: int, imatrix: Path
) -> Iterator[tuple[str, Path] | None]:
    """Yield the mix of llama.cpp whose file is nearest to ``size`` bytes, and the file, there while the context lasts.

    It is quantized by llama.cpp's own C functions with the importance matrix ``imatrix``. None where ``wanted`` is off,
    or auto for more than MOST_WEIGHTS weights, and, with a warning, for a model of which llama.cpp's rules are not
    known. ``layout`` is what the files of the model ``source`` hold.
    """
    for stale in imatrix.parent.glob(f"{SCRATCH}*"):  # left by a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    if not mix_wanted(wanted, weights):
        yield None
        return
    with TemporaryDirectory(dir=imatrix.parent, prefix=SCRATCH) as scratch:
        try:
            original = original_of(source, layout, Path(scratch) / "original.gguf")
            mix = min(mixes_by_size(original), key=lambda mix: (abs(mix.size - size), -mix.size))
        except ValueError as error:
            log.warning("no file of llama.cpp's own is made to compare with: %s", error)
            yield None
            return
        yield mix.mix, written(mix, imatrix, Path(scratch))


def written(mix: MixFile, imatrix: Path, folder: Path) -> Path:
    """Write the file of ``mix`` into ``folder``, and return its path."""
    path = folder / f"{mix.mix}.gguf"
    mix.write(path, read_imatrix(imatrix))
    return path
