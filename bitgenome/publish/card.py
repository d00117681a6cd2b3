"""Writes the model card of a run's file: README.md of a repository on a hub."""

from collections.abc import Iterable, Sequence

import yaml

from bitgenome.common import layout
from bitgenome.common.numbers import perplexity_text
from bitgenome.publish.facts import Facts, settings_text
from exporters.runtime.figures import Figures

TAGS = ["gguf", "quantized", "bitgenome"]


def model_card(facts: Facts, repository: str, version: str) -> str:
    """Return the card of a file in ``repository``, made by bitgenome ``version``: front matter, then Markdown."""
    sections = (title(facts, version), usage(facts, repository), worth(facts), recipe(facts), making(facts))
    return f"---\n{front_matter(facts)}---\n\n" + "\n\n".join(sections) + "\n"


def front_matter(facts: Facts) -> str:
    """Return what hubs read of a card, as YAML: the model that it is made of, that one's licence, and tags."""
    base = facts.base
    found = {"base_model": base.hub_id, "base_model_relation": "quantized"} if base.hub_id else {}
    return yaml.safe_dump({**found, "pipeline_tag": "text-generation", **base.about, "tags": TAGS}, sort_keys=False)


def title(facts: Facts, version: str) -> str:
    """Return the heading, and what the file is."""
    base = facts.base
    model = f"[{base.hub_id}](https://huggingface.co/{base.hub_id})" if base.hub_id else base.name
    licence = "" if base.license else "\n\nThe licence of the model is not stated here: see that of the model."
    return (
        f"# {base.name}, {facts.bits_per_weight:.2f} bits per weight, GGUF\n\n"
        f"`{facts.file}` ({facts.file_bytes:,} bytes, {facts.bits_per_weight:.4f} bits of the file for each weight) is "
        f"{model} in mixed precision, made by bitgenome {version}: a search chose the type of every tensor, and the "
        f"{'integers' if scales_tuned(facts) else 'bytes'} that it scored are those of the file.{licence}"
    )


def scales_tuned(facts: Facts) -> bool:
    """Return whether the scales of blocks are others than the search scored."""
    return bool((facts.result.healing or {}).get("scales"))


def usage(facts: Facts, repository: str) -> str:
    """Return how to run the file."""
    return (
        f"## Use\n\n    llama-cli -hf {repository} --hf-file {facts.file}\n"
        f"    llama-server -hf {repository} --hf-file {facts.file}"
    )


def worth(facts: Facts) -> str:
    """Return the figures of the file, as llama.cpp measured them."""
    proof, text = facts.proof, facts.config.text.names
    lines = [
        f"## What it is worth\n\nMeasured by llama.cpp on {proof['tokens']:,} tokens that nothing in the search has "
        f"seen (text: {text}). KL is the divergence of the file's next-token distribution from the model's in "
        f"{facts.full_precision}, in nats per token.\n"
    ]
    figures = Figures.from_json(proof["figures"])
    rows = [("full precision", "", "", perplexity_text(figures.base_perplexity.value))]
    files = [("this file", facts.file_bytes, figures)]
    if mix := proof.get("mix"):
        name = f"llama.cpp's {mix['mix']}, same importance matrix"
        files.append((name, mix["file_bytes"], Figures.from_json(mix["figures"])))
    rows += [
        (name, f"{size:,}", f"{f.mean_kl.value:.5f}", perplexity_text(f.perplexity.value)) for name, size, f in files
    ]
    lines.append(table(("", "bytes", "KL", "perplexity"), rows))
    lines.append("\n" + table(("figure", "this file"), figures.rows()))
    return "\n".join(lines)


def recipe(facts: Facts) -> str:
    """Return which types the tensors have."""
    total = sum(kind.weights for kind in facts.types)
    rows = [(t.name, str(t.tensors), f"{100 * t.weights / total:.1f} %") for t in facts.types]
    beside = [name for name in (layout.RECIPE, layout.IMATRIX) if name in facts.files]
    named = f"`{layout.RECIPE}` has the type of each tensor, for `llama-quantize --tensor-type-file`, which quantizes "
    named += "anew: the same types and size, without the compensation of this file."
    if layout.IMATRIX in beside:
        named += f" `{layout.IMATRIX}` is the importance matrix, `{layout.RECIPE_COMMAND}` the command."
    return f"## Recipe\n\n{table(('type', 'tensors', 'weights'), rows)}\n\n{named}"


def making(facts: Facts) -> str:
    """Return the command that made the file, and its settings."""
    healed = facts.result.healing and facts.result.healing["applied"]
    what = "Norms, biases and scales of blocks" if scales_tuned(facts) else "Norms and biases"
    note = f"\n\n{what} were tuned after the search." if healed else ""
    settings = settings_text(facts.config, facts.base.hub_id or facts.base.name)
    indented = "\n".join(f"    {line}" for line in settings.splitlines())
    return f"## How it was made\n\n    {facts.command}\n\nwith these settings:\n\n{indented}{note}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are of figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
