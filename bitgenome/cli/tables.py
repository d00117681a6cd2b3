"""Prints plans, outcomes and proofs as tables on the terminal."""

import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bitgenome.cli.terminal import say
from bitgenome.cli.wording import lead_on_validation
from bitgenome.common import layout
from bitgenome.common.numbers import perplexity_text
from bitgenome.plan.forecast import compared
from bitgenome.report.names import legend, plain
from bitgenome.run.healing import verdict
from bitgenome.run.outcome import Outcome
from bitgenome.run.proof import MixProof, Proof, Sample
from exporters.runtime.figures import Figures


def megabytes(size: int, digits: int = 3) -> str:
    """Return a size in bytes as text in MB (10^6 bytes)."""
    return f"{size / 1e6:,.{digits}f} MB"


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Show the closing table of a run."""
    table = Table(title="Held-out test text, simulated from the packed bytes", title_justify="left")
    for column in ("genome", "size", "bits/weight", "KL", "perplexity"):
        table.add_column(column, justify="left" if column == "genome" else "right", overflow="fold")
    for row in sorted(outcome.rows, key=lambda r: (r.file_bytes, -r.kl)):
        style = "bold" if row.name.startswith(("searched", "healed")) else ""
        figures = (
            megabytes(row.file_bytes),
            f"{row.bits_per_weight:.3f}",
            f"{row.kl:.5f}",
            perplexity_text(row.perplexity),
        )
        table.add_row(plain(row.name), *figures, style=style)
    console.print(table)
    for word, meaning in legend(plain(row.name) for row in outcome.rows):
        say(console, f"{word}: {meaning}", style="dim")
    if outcome.full_precision:
        say(console, f"KL is from full precision, which here is {outcome.full_precision}")
    say(console, lead_on_validation(outcome.winner))
    if outcome.healing:
        say(console, verdict(outcome.healing))
    assert outcome.proof is not None
    show_proof(outcome.proof, console)
    under = 100 * (1 - outcome.proof.file_bytes / outcome.budget_bytes)
    say(
        console,
        f"Budget {outcome.budget_bytes:,} bytes, file {outcome.proof.file_bytes:,} bytes ({under:.3f} % under), "
        f"{outcome.bits_per_weight:.4f} bits per weight",
    )
    say(console, f"{outcome.evaluations} evaluations; {compared(outcome.expected, outcome.seconds)}")
    page = outcome.run / layout.REPORT
    report = [("report", page)] if page.is_file() else []
    for what, path in (("GGUF", outcome.gguf), ("recipe", outcome.recipe), *report, ("run", outcome.run)):
        console.print(f"{what:>6}  {path}", soft_wrap=True)
    show_use(outcome.gguf, outcome.proof.sample, console)
    if outcome.proof.mix is None:
        console.print(f"Beside llama.cpp's own files of its size: bitgenome compare {outcome.run}", soft_wrap=True)


def show_use(gguf: Path, sample: Sample | None, console: Console) -> None:
    """Show what a file is run with, and what it writes."""
    console.print("Run it with")
    for program in ("llama-cli", "llama-server"):
        console.print(f"        {program} -m {shlex.quote(str(gguf))}", soft_wrap=True)
    if sample:
        goes = "answers" if sample.chat else "goes on"
        say(console, f"To {one_line(sample.prompt)!r} it {goes}: {one_line(sample.answer)!r}")


def one_line(text: str) -> str:
    """Return ``text`` with white space as single spaces, and without what a terminal would act on."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def against_mix(proof: Proof, mix: MixProof) -> str:
    """Return a sentence that holds a file against llama.cpp's own of the nearest size."""
    size = 100 * (proof.file_bytes / mix.file_bytes - 1)
    word = f"{abs(size):.1f} % {'larger' if size > 0 else 'smaller'} than" if round(size, 1) else "of the size of"
    ours, theirs = proof.figures.mean_kl.value, mix.figures.mean_kl.value
    times = f"; its KL is {ours / theirs:.2f} of that one's" if theirs > 0 else ""
    named = f"{mix.mix} ({megabytes(mix.file_bytes)}, with the same importance matrix)"
    return f"The file is {word} llama.cpp's {named}{times}"


def show_proof(proof: Proof, console: Console) -> None:
    """Show llama.cpp's figures for the file beside the simulated ones."""
    title = f"{proof.file} on {proof.tokens:,} tokens of test text"
    console.print(title, style="italic")
    table = Table()
    for column in ("", "KL", "perplexity"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    f = proof.figures
    table.add_row("full precision", "", perplexity_text(f.base_perplexity.value))
    table.add_row("simulated", f"{proof.simulated_kl:.5f}", perplexity_text(proof.simulated_perplexity))
    if proof.eight_bit_alone_kl is not None:
        table.add_row("8-bit inputs alone", f"{proof.eight_bit_alone_kl:.5f}", "")
    if proof.eight_bit_kl is not None:
        table.add_row("simulated, 8-bit inputs", f"{proof.eight_bit_kl:.5f}", "")
    table.add_row("llama.cpp", *kl_and_perplexity(f), style="bold")
    if proof.mix:
        name = f"llama.cpp with its own {proof.mix.mix} file"
        table.add_row(name, *kl_and_perplexity(proof.mix.figures))
    console.print(table)
    if proof.mix:
        say(console, against_mix(proof, proof.mix))
    say(
        console,
        f"By llama.cpp, as llama-perplexity has it: KL {f.mean_kl.text()}, median "
        f"{f.median_kl.text()}, 99 % {f.kl_99.text()}; RMS of the change of the true token's probability "
        f"{f.rms_delta_p.text(100, 3, ' %')}",
    )
    if proof.eight_bit_to_runtime_kl is not None:
        say(console, f"KL from simulation with 8-bit inputs to llama.cpp {proof.eight_bit_to_runtime_kl:.2e}")
    say(
        console,
        f"KL from simulation to llama.cpp {proof.simulated_to_runtime_kl:.2e}; same next token as full precision "
        f"{100 * f.same_top.value:.1f} %; {proof.prompt_tokens_per_second:.0f} prompt and "
        f"{proof.generated_tokens_per_second:.0f} generated tokens/s",
    )


def kl_and_perplexity(figures: Figures) -> tuple[str, str]:
    """Return both as cells of a table."""
    return f"{figures.mean_kl.value:.5f}", perplexity_text(figures.perplexity.value)


def show_figures(figures: Figures, console: Console) -> None:
    """Show a file's figures beside its original's, each with its standard error over windows."""
    table = Table("", "as llama-perplexity has it")
    for name, value in figures.rows():
        table.add_row(name, value)
    console.print(table)
    if figures.windows > 1:
        say(console, f"± is the standard error over {figures.windows:,} windows; KL in nats per token")
