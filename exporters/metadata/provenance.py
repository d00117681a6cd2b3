"""Records where a file came from, as key-values ``bitgenome.*`` of fixed length.

Their length in bytes depends only on the model and the number of genes, not on the result of the search, so the exact
file size of a genome is known before the file is written.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from exporters.metadata.key_values import KeyValues

TYPE_WIDTH = 8  # characters of a GGUF type's name, padded with spaces
VERSION_WIDTH = 24
DIGESTS = ("model_digest", "text_digest", "run_digest")
NO_DIGEST = "0" * 64
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Provenance:
    """Describes the search that a file came from. Raises ValueError for digests, version or genome that are invalid."""

    genome: tuple[int, ...]  # choice of each gene, in the search space's order
    budget_bytes: int
    kl: float = math.nan  # nats per token, on text that the search did not use
    model_digest: str = NO_DIGEST  # SHA-256, as the other two
    text_digest: str = NO_DIGEST
    run_digest: str = NO_DIGEST
    version: str = ""

    def __post_init__(self) -> None:
        for name in DIGESTS:
            if not _DIGEST.fullmatch(getattr(self, name)):
                raise ValueError(f"expected 64 hexadecimal digits as {name}, found {getattr(self, name)!r}")
        if not self.version.isascii() or len(self.version) > VERSION_WIDTH:
            raise ValueError(f"expected a version of at most {VERSION_WIDTH} characters, found {self.version!r}")
        if not self.genome:
            raise ValueError("expected a genome with at least one gene")

    @classmethod
    def blank(cls, genes: int) -> "Provenance":
        """Return a placeholder of the right length for ``genes`` genes."""
        return cls(genome=(0,) * genes, budget_bytes=0)

    def key_values(self, types: Sequence[str]) -> KeyValues:
        """Return the key-values, given the GGUF type names of the quantizable tensors in file order."""
        keys = KeyValues()
        keys.string("bitgenome.version", self.version.ljust(VERSION_WIDTH))
        keys.array("bitgenome.genome", [int(choice) for choice in self.genome])
        keys.array("bitgenome.types", [name.ljust(TYPE_WIDTH) for name in types])
        keys.uint64("bitgenome.budget_bytes", self.budget_bytes)
        keys.float32("bitgenome.kl", self.kl)
        for name in DIGESTS:
            keys.string(f"bitgenome.{name}", getattr(self, name))
        return keys
