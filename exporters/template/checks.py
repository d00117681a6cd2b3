"""Checks a template against its model before any weight is read."""

from pathlib import Path

from bitgenome.common.errors import UserError
from evaluators.data.tokenizer import find_tokenizer
from exporters.metadata.source import ModelSource
from exporters.opening.source import FLOATS, GgufModel, read_model
from exporters.template.candidates import GRAPHS

NUMBERS = ("I8", "I16", "I32", "I64", "F64")  # types that are neither weights nor quantized
MOST_OTHER = 0.01  # share of the vocabulary that converters may write otherwise
SIZES = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size"}


class TemplateError(UserError):
    """Raised for a file that is no template of the model; the message is one sentence for the user."""


def read_template(path: Path) -> GgufModel:
    """Return the headers of a template, a GGUF file or the first part of a split one.

    Raises GgufModelError for a file that is missing or damaged, and TemplateError for one that is quantized or of an
    architecture that this version of gguf has no names for.
    """
    template = read_model(path)
    for tensor in template.tensors.values():
        if tensor.type_name not in FLOATS + NUMBERS:
            raise TemplateError(
                f"expected a template in F16, BF16 or F32, found {tensor.name} in {tensor.type_name} in {path}: "
                "it is already quantized"
            )
    if template.architecture not in GRAPHS:
        raise TemplateError(
            f"expected a template of an architecture that gguf knows, found {template.architecture!r} in {path}"
        )
    return template


def check_sizes(template: GgufModel, source: ModelSource) -> None:
    """Raise TemplateError unless the sizes in a template's key-values are those in config.json."""
    stored, config = template.hyperparameters(), source.config.get("text_config", source.config)
    for key, name in SIZES.items():
        ours, theirs = config.get(name), stored.get(key)
        if not (isinstance(ours, int) and isinstance(theirs, int)):
            continue
        if key == "block_count":
            theirs -= stored.get("nextn_predict_layers", 0)  # blocks that guess further tokens stand behind the others
        if ours != theirs:
            raise TemplateError(
                f"expected a template of this model, whose {name} is {ours}, found {template.architecture}.{key} "
                f"{theirs} in {template.path}"
            )


def check_vocabulary(template: GgufModel, source: ModelSource) -> None:
    """Raise TemplateError unless the tokens in a template are those of the model's tokenizer.json, where it has one."""
    tokens = template.key_values.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise TemplateError(f"expected a template with a tokenizer, found no tokens in {template.path}")
    tokenizer = find_tokenizer(source.path)
    if tokenizer is None:
        return
    known = tokenizer.backend.get_vocab(with_added_tokens=False)
    other = [token for token, i in known.items() if i >= len(tokens) or tokens[i] != token]
    if len(other) > MOST_OTHER * len(known):
        first = min(other, key=known.__getitem__)
        i = known[first]
        found = f"{tokens[i]!r}" if i < len(tokens) else "none"
        raise TemplateError(
            f"expected a template with the model's vocabulary, found {len(other)} of {len(known)} tokens to differ in "
            f"{template.path}, such as {i}: {first!r} in the model, {found} in the template"
        )
