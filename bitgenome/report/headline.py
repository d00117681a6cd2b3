"""Says what a run has come to: the numbers of its headline, and where it all comes from."""

from collections.abc import Mapping
from typing import Any

import yaml

from bitgenome.common.numbers import perplexity_text
from bitgenome.report.names import duration, is_ours, kl_text, legend, megabytes, plain
from bitgenome.report.page import Section, Table, Tile
from bitgenome.report.source import RunView

MOST_SAID = 140  # characters of a sample
PLACES = ("storage_path", "storage_url")  # of the machine that made the run


def tiles(view: RunView) -> list[Tile]:
    """Return the headline's numbers, as they stand in best.json; of a run without a proof those of the simulation."""
    best, proof = view.best, view.proof
    if not best:
        return []
    size = proof.get("file_bytes") or best.get("gguf_bytes") or best["winner"]["file_bytes"]
    number, unit = megabytes(size).split(" ")
    under = 100 * (1 - size / best["budget_bytes"])
    bits = f"{best['bits_per_weight']:.3f} bits per weight, {under:.2f}\u00a0% under the budget"
    found = [Tile("File", size, number, unit, bits)]
    if not proof:
        row = next((row for row in reversed(best["rows"][:2]) if is_ours(row["name"])), None)
        return [*found, Tile("KL, simulated", row["kl"], kl_text(row["kl"]), note="nats per token")] if row else found
    figures, speed = proof["figures"], proof["generated_tokens_per_second"]
    kl, perplexity, ratio, same = (
        figures[name]["value"] for name in ("mean_kl", "perplexity", "perplexity_ratio", "same_top")
    )
    found += [
        Tile(
            "KL by llama.cpp",
            kl,
            kl_text(kl),
            note=f"nats per token{_error(figures, 'mean_kl')}; simulated {kl_text(proof['simulated_kl'])}",
        ),
        Tile(
            "Perplexity by llama.cpp",
            perplexity,
            perplexity_text(perplexity),
            note=f"full precision {perplexity_text(figures['base_perplexity']['value'])}, ratio {ratio:.4f}",
        ),
        Tile(
            "Same next token",
            same,
            f"{100 * same:.2f}",
            "%",
            "as full precision" + _error(figures, "same_top", 100, 2, "\u00a0%"),
        ),
        Tile(
            "Generates",
            speed,
            f"{speed:,.0f}",
            "tokens/s",
            f"reads {proof['prompt_tokens_per_second']:,.0f} tokens/s, where it was proved",
        ),
    ]
    return found


def sample(view: RunView) -> list[str]:
    """Return what the file wrote when it was proved, where it was asked to."""
    if not (found := view.proof.get("sample")):
        return []
    prompt, answer = (shortened(" ".join(found[key].split())) for key in ("prompt", "answer"))
    return [f"To “{prompt}” it {'answers' if found['chat'] else 'goes on'}: “{answer}”"]


def shortened(text: str) -> str:
    """Return the first MOST_SAID characters of a text."""
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID].rstrip()}…"


def figures_people_quote(view: RunView) -> Section | None:
    """Show all figures of the file by llama.cpp, with standard errors, where they were taken by this version."""
    from exporters.runtime.figures import Figures  # noqa: PLC0415 - where there are any, it is imported

    mix = view.proof.get("mix") or {}
    try:
        figures = Figures.from_json(view.proof["figures"])
        others = Figures.from_json(mix["figures"]).rows() if mix else []
    except (KeyError, TypeError):  # none, or those of another version
        return None
    columns = ("figure", "this file", *([f"llama.cpp's {mix['mix']}"] if mix else []))
    beside = [[value] for _, value in others] or [[]] * len(figures.rows())
    rows = [(name, value, *more) for (name, value), more in zip(figures.rows(), beside, strict=True)]
    says = [
        f"By llama.cpp on {figures.windows:,} windows of test text, as llama-perplexity defines them; ± is a standard "
        "error over windows."
    ]
    return Section("figures", "All figures", says, table=Table(columns, rows), half=True)


def simple_mixes(view: RunView) -> Section | None:
    """Say what the names of the other mixes mean."""
    found = legend(plain(row["name"]) for row in view.best.get("rows", []))
    return (
        Section("names", "What the names mean", table=Table(("name", "is"), found, words=2), half=True)
        if found
        else None
    )


def provenance(view: RunView) -> Section:
    """Say what the run was made of, and by what."""
    record, best = view.record, view.best
    digests: Mapping[str, str] = record.get("digests", {})
    compute = record.get("compute") or {}
    known = {
        "model": view.config.get("model"),
        "file": best.get("gguf"),
        "file, sha256": best.get("gguf_sha256"),
        "configuration, digest": record.get("config_digest"),
        **{f"{name}, digest": digest for name, digest in digests.items()},
        "full precision": best.get("full_precision"),
        "products in": " on ".join(filter(None, (compute.get("type"), compute.get("device")))),
        "versions": ", ".join(f"{name} {number}" for name, number in record.get("packages", {}).items()),
        "Python": record.get("python"),
    }
    rows = [(name, str(value)) for name, value in known.items() if value]
    config = {key: value for key, value in view.config.items() if key not in PLACES}
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else None
    says = ["The same configuration, model and versions give the same file again, on any number of workers."]
    return Section("provenance", "Provenance", says, table=Table(("", ""), rows, words=2), text=text)


def state(view: RunView) -> tuple[str, float | None]:
    """Return what a run is doing, and how far its search is, from 0 to 1; "" and None of a finished one."""
    now = view.status
    if now.state == "finished":
        return "", None
    if now.state != "running":
        return f"{now.state.capitalize()}{f': {now.error}' if now.error else ''}. bitgenome resume continues it.", None
    words = [f"Running: {now.stage or 'beginning'}"]
    done = None
    if now.stage == "search" and now.expected:
        done = min(1.0, now.evaluations / now.expected)
        words.append(f"generation {now.generation}, {now.evaluations:,} of {now.expected:,} genomes")
    if now.best_kl is not None and not view.best:
        words.append(f"best KL so far {kl_text(now.best_kl)} on search text")
    if now.seconds_left is not None:
        words.append(f"about {duration(now.seconds_left)} of the search left")
    return ", ".join(words) + ".", done


def _error(figures: Mapping[str, Any], name: str, scale: float = 1.0, digits: int = 5, unit: str = "") -> str:
    """Return the standard error of a figure as text, "" where there is none."""
    error = (figures.get(name) or {}).get("standard_error")
    return "" if error is None else f" ± {scale * error:.{digits}f}{unit}"
