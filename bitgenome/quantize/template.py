"""Makes the template that a model needs which the exporter cannot write by itself."""

from pathlib import Path

from bitgenome.common import layout
from bitgenome.common.digests import digest_of
from bitgenome.config.run import RunConfig
from bitgenome.plan.template import check_exportable
from bitgenome.storage.shared import shared_directory
from evaluators.model.folder import ModelFolder, is_gguf
from exporters.metadata.architectures import UnsupportedArchitectureError
from exporters.metadata.pretokenizers import UnknownPretokenizerError
from exporters.runtime.converter import ConverterError, convert, find_converter

OUTTYPE = "bf16"


def needed_template(config: RunConfig, folder: ModelFolder, converter: Path | None, place: Path | None) -> Path | None:
    """Return the template that a run of ``folder``'s model needs and its configuration lacks; None if it needs none.

    llama.cpp's converter makes it, once, in the folder ``place``, by default among what runs share. Without one the
    error names the command that makes a template. Raises UserError for a model that no template can serve.
    """
    try:
        check_exportable(config, folder)
    except (UnsupportedArchitectureError, UnknownPretokenizerError) as error:
        if is_gguf(config.model):  # of a coarse type, which no converter reads
            raise
        try:
            script = find_converter(converter)
        except ConverterError:
            if converter is not None:
                raise
            raise error from None
    else:
        return None
    kept = place or shared_directory(config, layout.TEMPLATE_KIND, digest_of(OUTTYPE, folder.digest))
    path = kept / f"{folder.name}-{OUTTYPE}.gguf"
    if not path.is_file():
        convert(script, folder.path, path, OUTTYPE)
    return path.absolute()
