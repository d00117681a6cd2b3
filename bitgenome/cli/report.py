"""Prints plans, outcomes and proofs as tables on the terminal."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from bitgenome.run.healing import verdict
from bitgenome.run.memory import memory_line
from bitgenome.run.outcome import Outcome
from bitgenome.run.plan import Plan, estimated_seconds
from bitgenome.run.proof import Proof
from search.loop.winner import Winner


def megabytes(size: int) -> str:
    """Return a size in bytes as text in MB (10^6 bytes)."""
    return f"{size / 1e6:.3f} MB"


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Show the closing table of a run."""
    table = Table(title="Held-out test text, simulated from the packed bytes", title_justify="left")
    for column in ("genome", "size", "bits/weight", "KL", "perplexity"):
        table.add_column(column, justify="left" if column == "genome" else "right")
    for row in sorted(outcome.rows, key=lambda r: (r.file_bytes, -r.kl)):
        style = "bold" if row.name.startswith(("searched", "healed")) else ""
        figures = (megabytes(row.file_bytes), f"{row.bits_per_weight:.3f}", f"{row.kl:.5f}", f"{row.perplexity:.3f}")
        table.add_row(row.name, *figures, style=style)
    console.print(table)
    console.print(lead_on_validation(outcome.winner))
    if outcome.healing:
        console.print(verdict(outcome.healing))
    show_proof(outcome.proof, console)
    under = 100 * (1 - outcome.proof.file_bytes / outcome.budget_bytes)
    console.print(
        f"Budget {outcome.budget_bytes:,} bytes, file {outcome.proof.file_bytes:,} bytes ({under:.3f} % under), "
        f"{outcome.bits_per_weight:.4f} bits per weight"
    )
    timed = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in outcome.seconds.items())
    console.print(f"{outcome.evaluations} evaluations; {timed}")
    for what, path in (("GGUF", outcome.gguf), ("recipe", outcome.recipe), ("run", outcome.run)):
        console.print(f"{what:>6}  {path}", soft_wrap=True)


def lead_on_validation(winner: Winner) -> str:
    """Return a sentence on the searched genome's lead over the best uniform, greedy or exact one, and its certainty."""
    if winner.lead is None:
        found = f"no other genome beats {winner.reference} on validation text"
    else:
        word = "beats" if winner.lead.mean < 0 else "trails"
        found = (
            f"searched {word} {winner.reference} by {abs(winner.lead.mean):.5f} ± {winner.lead.standard_error:.5f} KL "
            f"on validation text (paired, {winner.lead.windows} windows)"
        )
    return found + (f"; {winner.ties} other finalists are within one standard error" if winner.ties else "")


def show_proof(proof: Proof, console: Console) -> None:
    """Show llama.cpp's figures for the file beside the simulated ones."""
    title = f"{proof.file} on {proof.tokens:,} tokens of test text"
    console.print(title, style="italic")
    table = Table()
    for column in ("", "KL", "perplexity"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("full precision", "", f"{proof.full_perplexity:.3f}")
    table.add_row("simulated", f"{proof.simulated_kl:.5f}", f"{proof.simulated_perplexity:.3f}")
    if proof.eight_bit_kl is not None:
        table.add_row("simulated, 8-bit inputs", f"{proof.eight_bit_kl:.5f}", "")
    table.add_row("llama.cpp", f"{proof.runtime_kl:.5f}", f"{proof.runtime_perplexity:.3f}", style="bold")
    console.print(table)
    if proof.eight_bit_to_runtime_kl is not None:
        console.print(f"KL from simulation with 8-bit inputs to llama.cpp {proof.eight_bit_to_runtime_kl:.2e}")
    console.print(
        f"KL from simulation to llama.cpp {proof.simulated_to_runtime_kl:.2e}; same next token as full precision "
        f"{100 * proof.top1_agreement:.1f} %; {proof.prompt_tokens_per_second:.0f} prompt and "
        f"{proof.generated_tokens_per_second:.0f} generated tokens/s"
    )


def searched(rungs: list[tuple[int, int]]) -> str:
    """Return the evaluations of a search by the tokens they read, as text; ``rungs`` are (tokens, evaluations)."""
    first, *others = [f"{count} {{}}of {tokens:,}" for tokens, count in rungs]
    return ", ".join([first.format("evaluations "), *(other.format("") for other in others)]) + " tokens"


def show_plan(plan: Plan, workers: int, console: Console) -> None:
    """Show genes, sizes, budget, evaluations and estimated time."""
    space, config = plan.space, plan.config
    table = Table(title=f"{config.name}: {config.model}", title_justify="left")
    for column in ("gene", "shape", "smallest", "largest"):
        table.add_column(column, justify="left" if column == "gene" else "right")
    for gene in space.genes:
        last = len(gene.formats) - 1
        ends = [f"{gene.formats[c].name} {gene.size_bytes(c):,}" for c in (0, last)]
        table.add_row(gene.name.removesuffix(".weight"), " ".join("x".join(map(str, s)) for s in gene.shapes), *ends)
    console.print(table)
    bounds = [space.file_bytes(genome) for genome in (space.smallest(), space.largest())]
    console.print(
        f"{len(space.genes)} genes, {space.weights:,} weights; files from {bounds[0]:,} to {bounds[1]:,} bytes, "
        f"{space.fixed_bytes:,} of them fixed"
    )
    budget = plan.budget.file_bytes
    console.print(f"budget {budget:,} bytes = {8 * budget / space.weights:.4f} bits per weight")
    if plan.sparsity:
        counts = Counter(map(str, plan.sparsity.values()))
        console.print("pruned: " + ", ".join(f"{sparsity} of {count} tensors" for sparsity, count in counts.items()))
    console.print(memory_line(plan))
    seconds = estimated_seconds(plan, workers, config.workers.cpus_per_worker)
    console.print(
        f"{plan.sensitivity_evaluations} sensitivities ({config.sensitivity.measure}) of "
        f"{config.text.tokens.sensitivity:,} tokens, "
        f"{searched(plan.search_rungs)} ({config.search.strategy}); "
        f"about {seconds / 60:.1f} minutes on {workers} workers like this machine's"
    )
