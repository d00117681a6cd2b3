"""A search that multiplies in 16 bits says what that costs, and reports its winner in float32."""

import re

import pytest

from tests.bitgenome.conftest import Runs, call_here


def test_a_run_in_bfloat16_tells_its_floor_and_reports_float32(runs: Runs) -> None:
    config = runs.write(
        "bfloat16",
        evaluation={"compute": "bfloat16"},
        search={"population": 4, "generations": 1},
        healing={"enabled": False},
        workers={"ray": "off"},
    )
    done = call_here("run", config)
    assert done.returncode == 0, done.stderr
    events = (runs.storage / "bfloat16" / "events.log").read_text()
    found = re.search(r"multiply in bfloat16 .* KL of (\S+) from itself in float32 \(512 tokens", events)
    assert found and 1e-7 < float(found[1]) < 1e-3
    best = runs.best("bfloat16")
    (tested,) = (
        e for e in runs.evaluations("bfloat16") if e["split"] == "test" and e["genome"] == best["winner"]["genome"]
    )
    assert tested["kl"] == pytest.approx(best["proof"]["simulated_kl"], rel=1e-5)


def test_an_unknown_compute_type_is_one_sentence(runs: Runs) -> None:
    done = call_here("plan", runs.write("int4", evaluation={"compute": "int4"}))
    assert done.returncode == 2
    assert "evaluation.compute" in done.stderr and "Traceback" not in done.stderr
