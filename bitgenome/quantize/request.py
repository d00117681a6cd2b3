"""Holds what a user asks for, and finds the run that the same request has begun."""

from dataclasses import dataclass
from pathlib import Path

from bitgenome.common import layout
from bitgenome.quantize.size import WantedSize
from workers.storage.folders import is_url, mirror_root


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    model: str
    size: WantedSize
    seconds: float  # that the run may take
    text: Path | None = None
    strategy: str | None = None
    name: str | None = None
    storage: str = "runs"
    template: Path | None = None
    converter: Path | None = None
    template_place: Path | None = None  # folder for a template that has to be made
    overrides: tuple[str, ...] = ()  # such as search.generations=20, after everything else

    @property
    def words(self) -> list[str]:
        """The request as words of a command line: two that differ in nothing that matters are the same."""
        size, device = self.size, self.size.device
        options = {
            "--size": size.size, "--bits": size.bits, "--like": size.like, "--device-memory": device and device.memory,
            "--context": device and device.context, "--kv": device and device.kv, "--mmproj": device and device.mmproj,
            "--margin": device and device.margin, "--text": self.text, "--strategy": self.strategy,
            "--time": f"{self.seconds:g}s", "--name": self.name, "--storage": self.storage, "--template": self.template,
        }  # fmt: skip
        words = [self.model]
        for option, value in options.items():
            words += [] if value is None else [option, str(value)]
        return words + [word for override in self.overrides for word in ("--set", override)]


def kept_settings(request: Request, command: str) -> Path | None:
    """Return the settings of the run that this very ``command`` has begun, if there is one."""
    root = mirror_root(request.storage) if is_url(request.storage) else Path(request.storage)
    for file in sorted(root.glob(f"*/{layout.SETTINGS}")):
        with file.open(encoding="utf-8", errors="replace") as lines:
            if next(lines, "").strip() == f"# {command}":
                return file
    return None
