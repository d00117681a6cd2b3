"""The front says what is measured, and what is predicted from it."""

import json

import numpy as np
import pytest

from bitgenome.front.sizes import calibrated
from search.allocation.sensitivity import SensitivityTable
from search.types import Evaluation, Genome
from tests.bitgenome.conftest import Runs, call_here


def measured(genome: Genome, kl: float) -> Evaluation:
    return Evaluation(genome, kl, kl, 0.0, 1.0, 0.0, 1, "test", 1)


def test_predictions_pass_through_uniform_genomes_and_those_of_chosen_ones_through_their_mean() -> None:
    table = SensitivityTable("kl", (np.array([0.4, 0.2, 0.02]), np.array([0.4, 0.1, 0.02])))
    uniform = {(0, 0): 0.8, (2, 2): 0.02}  # twice, and half of what the sum says, which is 0.8 and 0.04
    known = {genome: measured(genome, factor) for genome, factor in uniform.items()}
    predict = calibrated(table, known, set(uniform))
    assert [predict(g) for g in uniform] == pytest.approx([0.8, 0.02])
    between = predict((1, 1)) / 0.3
    assert 0.5 < between < 1
    chosen = calibrated(table, known | {(1, 1): measured((1, 1), 0.45)}, set(uniform))
    assert chosen((1, 1)) == pytest.approx(0.45)
    assert chosen((0, 1)) / predict((0, 1)) == pytest.approx(0.45 / predict((1, 1)))
    assert calibrated(table, {}, set())((1, 1)) == pytest.approx(0.3)


@pytest.mark.usefixtures("finished")
def test_the_front_of_a_run_spans_all_sizes_with_what_it_measured_and_where_llamacpps_files_lie(runs: Runs) -> None:
    shown = call_here("front", "base", "--storage", runs.storage)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(call_here("front", "base", "--storage", runs.storage, "--json").stdout)
    sizes, best = found["sizes"], runs.best("base")
    assert [size["file_bytes"] for size in sizes] == sorted(size["file_bytes"] for size in sizes)
    assert (sizes[0]["file_bytes"], sizes[-1]["file_bytes"]) == (found["smallest"], found["largest"])
    own = next(size for size in sizes if size["file_bytes"] == best["gguf_bytes"])
    searched = next(row for row in best["rows"] if row["name"].startswith("searched"))
    assert own["measured"] and own["kl"] == searched["kl"] and "base" in own["notes"][0]
    assert any(not size["measured"] for size in sizes)
    kls = [size["kl"] for size in sizes]
    assert kls == sorted(kls, reverse=True)
    assert found["smallest"] < found["mixes"]["Q3_K_M"] < found["mixes"]["Q4_K_M"] < found["largest"]
    for size in sizes:
        assert f"{size['file_bytes'] / 1e6:,.3f} MB" in shown.stdout
    assert "size of Q4_K_M" in shown.stdout and "predicted" in shown.stdout
