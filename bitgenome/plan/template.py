"""Says what a run's file will hold: what its template holds, or what the exporter builds where there is none."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from bitgenome.common import layout
from bitgenome.common.digests import digest_of, digests_of_files
from bitgenome.config.run import RunConfig
from bitgenome.storage.shared import build_once, note_use, shared_directory
from bitgenome.storage.staged import local_model
from evaluators.model.block_model import BlockModel
from evaluators.model.folder import ModelFolder, is_gguf
from exporters.files.built_layout import BuiltLayout
from exporters.files.file_layout import FileLayout
from exporters.metadata.architectures import UnsupportedArchitectureError
from exporters.metadata.hyperparameters import model_metadata
from exporters.metadata.pretokenizers import UnknownPretokenizerError
from exporters.opening.source import GgufModel, files_of, read_model
from exporters.template.checks import check_sizes, check_vocabulary, read_template
from exporters.template.explanation import Explanation, expected_of, explain
from exporters.template.layout import TemplateLayout, load_explanation, save_explanation

log = logging.getLogger(__name__)

SCHEMA = 4  # raise when another explanation is found of the same files
BLOCK = re.compile(r"\.\d+\.")  # of a block, in names of either kind
NAMED = 3  # tensors, in a message


def template_of(config: RunConfig) -> Path | None:
    """Return the file that a run's file is made after: that of the settings, else a GGUF model itself if in floats."""
    if config.template is not None:
        return config.template
    if not is_gguf(config.model):
        return None
    path = local_model(config.model)
    return None if read_model(path).coarse else path


def template_digest(config: RunConfig) -> str | None:
    """Return the digest of a run's template and of all its parts, None if it has none."""
    path = template_of(config)
    return None if path is None else digest_of(*digests_of_files(files_of(path), path).values())


def file_layout(config: RunConfig, folder: ModelFolder) -> FileLayout:
    """Return what the file of a run of ``folder``'s model will hold.

    What stands behind a template's tensors is found once: it is a shared artefact. Raises UserError for a file that is
    no template of the model, and for a model that cannot be exported without one.
    """
    path = template_of(config)
    if path is None:
        with naming_convert(config.model):
            return BuiltLayout(folder)
    if path.parent.parent.name == layout.TEMPLATE_KIND:  # made for a run, among what runs share
        note_use(config, f"{layout.TEMPLATE_KIND}/{path.parent.name}")
    template = read_template(path)
    check_sizes(template, folder)
    check_vocabulary(template, folder)
    return TemplateLayout(template, _explanation(config, template, folder, path))


def check_exportable(config: RunConfig, folder: ModelFolder) -> None:
    """Raise UnsupportedArchitectureError for a model that cannot be exported without a template, if it has none."""
    if template_of(config) is None:
        with naming_convert(config.model):
            model_metadata(folder)


@contextmanager
def naming_convert(model: str) -> Iterator[None]:
    """Add to the error of a model that has no export of its own the command that makes a template."""
    try:
        yield
    except (UnsupportedArchitectureError, UnknownPretokenizerError) as error:
        raise type(error)(f"{error}; a template serves other models: bitgenome convert {model} makes one") from None


def _explanation(config: RunConfig, template: GgufModel, folder: ModelFolder, path: Path) -> Explanation:
    if folder.headers_alone:
        return expected_of(template, folder, multiplied(folder).__contains__)
    digest = digest_of(SCHEMA, folder.digest, template_digest(config))
    file = shared_directory(config, layout.TEMPLATE_KIND, digest) / layout.EXPLANATION
    if found := load_explanation(file):
        return found

    def build() -> None:
        log.info("comparing the weights of %s with those of %s, row by row", path, folder.path)
        found = explain(template, folder, multiplied(folder).__contains__)
        save_explanation(found, file)

    build_once(
        config, file.parent, "the comparison with the template", lambda: load_explanation(file) is not None, build
    )
    found = load_explanation(file)
    assert found is not None, "written by build"
    return found


def multiplied(folder: ModelFolder) -> frozenset[str]:
    """Return the Hugging Face names of the weights that are searched: of linear layers, lookup tables and head."""
    model = BlockModel(folder, torch.device("cpu"))
    linears = (name for block in range(len(model.blocks)) for name, _ in model.linears(block))
    return frozenset([*linears, *model.lookup_names, model.head_name])


def report(file: TemplateLayout) -> None:
    """Say in the log which tensors of the model stay as they are in the template, and why."""
    alike: dict[tuple[str, ...], list[str]] = {}  # names of tensors of other blocks with the same reason
    for name, reason in file.refused.items():
        alike.setdefault((BLOCK.sub(".", name), BLOCK.sub(".", reason)), []).append(name)
    for (first, *others), reason in ((names, file.refused[names[0]]) for names in alike.values()):
        more = f", as {len(others)} of other blocks," if others else ""
        log.warning("%s%s stays as it is in %s: %s", first, more, file.path.name, reason)
    if file.unsearched:
        log.warning(
            "%d tensors that llama.cpp quantizes stay in floats (%.3g MB of the file), as what they hold is no linear "
            "layer of transformers' model, or in another order than its rows: %s",
            len(file.unsearched), sum(t.float_bytes for t in file.unsearched) / 1e6,
            _some([tensor.name for tensor in file.unsearched]),
        )  # fmt: skip
    for kind, names in file.retyped.items():
        log.info("stored in %s, as the type in %s loses values of the model: %s", kind, file.path.name, _some(names))
    if file.unhealed:
        log.info("not healed, as %s holds other values: %s", file.path.name, _some(file.unhealed))


def _some(names: Sequence[str]) -> str:
    """Return the first of ``names``, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
