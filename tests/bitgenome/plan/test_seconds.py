"""Claims about the time that stages are expected to take, from rates that are easy to reckon with."""

import json
from dataclasses import replace
from math import ceil

import pytest
import torch

from bitgenome.config.run import load_config
from bitgenome.plan import objective
from bitgenome.plan.disk import bank_bytes, hessian_bytes
from bitgenome.plan.forecast import StageForecast, compared, forecast, too_large
from bitgenome.plan.objective import factor_bytes, factored_tensors, rounds_by_loss
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.seconds import STEP_SECONDS, Work, input_groups, roundings
from evaluators.gradient.output_factors import FACTOR_TOKENS
from evaluators.model.sizes import StageMemory
from evaluators.prepare.bank import Bank
from evaluators.prepare.writing import BATCH
from evaluators.probes.rates import Rates, RoundingRate
from quantizers.rounding.row_order import ROW_STEPS
from tests.bitgenome.conftest import Finished, Runs, call_here

LAYERS, TENSORS, LEVELS = 6, 43, 4  # of the embedded model, and of the tests' runs


@pytest.fixture
def plan(runs: Runs) -> Plan:
    return planned(runs)


def planned(runs: Runs, *changes: str) -> Plan:
    return make_plan(load_config(runs.write("planned"), list(changes)))


def rates(plan: Plan, **changes: float) -> Rates:
    """Every unit of work takes no time but those in ``changes``."""
    nothing = dict.fromkeys(
        ("block", "block_float32", "block_gradient", "head", "head_gradient", "block_calibration", "factor", "decode"),
        0.0,
    )
    kinds = roundings(plan)
    tables = {
        "hessian": {str(k.columns): 0.0 for k in kinds},
        "rounding": {k.key: RoundingRate(0.0, 0.0, 1024) for k in kinds},
    }
    return Rates(device="cpu", threads=1, host_flops=1e12, **{**nothing, **changes}, **tables)  # type: ignore[arg-type]


def work(plan: Plan, workers: int = 1, **changes: float) -> Work:
    return Work(plan, rates(plan, **changes), workers, resident=True)


def test_tensors_that_read_one_input_are_one_group(plan: Plan) -> None:
    groups = input_groups(plan)
    assert len(groups) == 4 * LAYERS + 1  # q/k/v, o, gate/up, down; the embedding is the head too
    assert sum(group.weights for group in groups) == sum(gene.weights for gene in plan.space.genes)
    assert {group.columns for group in groups} == {256, 768}


def test_calibration_runs_every_block_once_over_its_text(runs: Runs) -> None:
    plan = planned(runs, "quantization.objective=output")
    tokens = plan.config.text.tokens.calibration
    assert work(plan, block_calibration=1.0, block_gradient=1.0, head=1.0).calibration() == tokens * LAYERS


def test_rounding_by_the_loss_takes_a_pass_each_way_and_the_loop_over_columns_in_steps(runs: Runs) -> None:
    loss, output = (planned(runs, f"quantization.objective={name}") for name in ("loss", "output"))
    tokens = min(FACTOR_TOKENS, loss.config.text.tokens.calibration)
    more = [work(plan, block_calibration=1.0, block_gradient=2.0, head=0.5).calibration() for plan in (loss, output)]
    assert more[0] - more[1] == pytest.approx(tokens * (3 * LAYERS + 2 * 0.5), rel=1e-3), "logits twice"
    for plan in (loss, output):
        inner = next(group for group in input_groups(plan) if group.block)
        assert inner.rounding.two_sided == (plan is loss)
        kinds = {k.key: RoundingRate(1.0, 0.0, 64) for k in roundings(plan)}
        seconds = replace(work(plan), rates=replace(rates(plan), rounding=kinds)).group_seconds(inner)
        rows = inner.weights / inner.columns
        assert seconds == inner.columns * ceil(rows / 64 / (ROW_STEPS if plan is loss else 1)), "a step is a batch"
        head = next(group for group in input_groups(plan) if not group.block)
        seconds = replace(work(plan), rates=replace(rates(plan), rounding=kinds)).group_seconds(head)
        rows, parts = head.weights / head.columns, 32 if plan is loss else 1
        assert seconds == head.columns * parts * ceil(rows / 64 / parts), "groups of rows have loops of their own"


def test_the_objective_goes_by_the_bytes_of_the_factors(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(runs, "quantization.objective=auto")
    assert rounds_by_loss(plan) and not rounds_by_loss(
        planned(runs, "quantization.objective=auto", "quantization.compensation=false")
    )
    monkeypatch.setattr(objective, "KEPT_FACTORS", factor_bytes(plan) - 1)
    assert not rounds_by_loss(plan)
    assert rounds_by_loss(planned(runs, "quantization.objective=loss"))
    pruned = planned(
        runs,
        "quantization.objective=loss",
        "quantization.pruning.sparsity=0.25",
        "levels=[W4,W8]",
        "budget.bits_per_weight=6",
    )
    assert not factored_tensors(pruned), "pruned tensors are rounded on one side"
    assert rounds_by_loss(pruned), "the embedding is not pruned: it has its rows"


def test_text_that_the_model_writes_takes_a_step_for_each_token_of_the_batches_that_one_worker_has(runs: Runs) -> None:
    assert "text" not in dict(work(planned(runs)).stages())
    plan = planned(runs, "text.source=self", "text.tokens.calibration=65536")
    windows = (65536 + 512 + 512 + 1024) // 256
    found = [dict(work(plan, workers, written=1.0).stages())["text"] for workers in (1, 2, 1000)]
    tasks = ceil(windows / BATCH)
    assert tasks % 2, "one of two workers has a batch more"
    assert found == pytest.approx([256 * n * (BATCH * LAYERS + STEP_SECONDS) for n in (tasks, ceil(tasks / 2), 1)])


def test_workers_share_the_bank_up_to_its_largest_task(plan: Plan) -> None:
    def bank(workers: int) -> float:
        found = rates(plan)
        found.rounding.update({kind.key: RoundingRate(0.0, 1.0, 1024) for kind in roundings(plan)})
        return Work(plan, found, workers, resident=True).bank()

    weights = sum(gene.weights for gene in plan.space.genes)
    assert bank(1) == weights
    assert bank(2) == weights / 2
    assert bank(1000) == 4096 * 256  # the embedding


def test_exact_sensitivities_run_half_the_blocks_for_every_level(plan: Plan) -> None:
    tokens = plan.config.text.tokens.sensitivity
    choices, reference = TENSORS * LEVELS * tokens * LAYERS / 2, tokens * LAYERS
    assert work(plan, block=1.0).sensitivity() == choices + reference


def test_gradients_are_far_less_work(runs: Runs) -> None:
    exact, gradient = (planned(runs, f"sensitivity.measure={m}") for m in ("kl", "gradient"))
    units = {"block": 1.0, "block_float32": 1.0, "block_gradient": 2.0}
    assert work(gradient, **units).sensitivity() < work(exact, **units).sensitivity() / 10


def test_twice_the_generations_take_twice_the_search(runs: Runs) -> None:
    few, many = (planned(runs, f"search.generations={n}") for n in (10, 20))
    once, twice = (work(p, head=1.0).search() for p in (few, many))
    assert twice == pytest.approx(2 * once, rel=0.1)  # the reference is measured once


def test_what_is_streamed_is_decoded_for_every_task(plan: Plan) -> None:
    found = rates(plan, decode=1.0)
    resident, streamed = (Work(plan, found, 1, resident=r).sensitivity() for r in (True, False))
    assert streamed == pytest.approx(-(-TENSORS // 8) * resident)


def test_healing_off_takes_no_time(runs: Runs) -> None:
    assert work(planned(runs, "healing.enabled=off"), block_gradient=1.0).healing() == 0
    assert work(planned(runs, "healing.enabled=on"), block_gradient=1.0).healing() > 0


def test_the_bank_takes_the_disk_that_was_said(runs: Runs, finished: Finished) -> None:
    plan = make_plan(load_config(runs.write("base")))
    bank = Bank(runs.bank("base"))
    packed = [bank.packed(t, fmt).numel() for gene in plan.space.genes for t in gene.tensors for fmt in gene.formats]
    assert bank_bytes(plan) == sum(packed)
    assert hessian_bytes(plan) == 4 * (LAYERS * (3 * 256**2 + 768**2) + 256**2)


def test_stages_above_the_memory_that_may_be_used_are_named(runs: Runs) -> None:
    plan = planned(runs, "evaluation.memory='1 GiB'")  # for each of two workers
    large = StageMemory(host={"states": 3 << 29})
    stages = [StageForecast(stage, 1.0, 0, large) for stage in ("calibration", "search")]
    assert too_large(plan, stages, torch.device("cpu")) == ["search 1.5 GiB of 1.0"]  # calibration has both shares
    assert too_large(plan, forecast(plan, rates(plan), 2)) == []


def test_a_finished_run_says_what_was_expected(runs: Runs, finished: Finished) -> None:
    record = json.loads((runs.storage / "base" / "run.json").read_text())
    assert record["forecast"].keys() <= {*record["stages"], "healing"}
    assert all(seconds >= 0 for seconds in record["forecast"].values())
    assert "seconds taken (expected): workers" in finished.stdout


def test_every_stage_is_forecast_and_the_closing_line_compares_them(plan: Plan) -> None:
    stages = {s.stage: s.seconds for s in forecast(plan, rates(plan, head=1e-3), 2)}
    assert {"calibration", "bank", "sensitivity", "search", "validation", "healing", "test", "proof"} <= stages.keys()
    line = compared({"bank": 10.0, "search": 20.0}, {"bank": 12.0, "search": 15.0, "staging": 99.0})
    assert line == "seconds taken (expected): bank 12 (10), search 15 (20); together 27 (30)"


def test_the_plan_as_json_is_one_object_with_every_gene_and_stage(runs: Runs) -> None:
    done = call_here("plan", runs.write("planned"), "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert len(found["genes"]) == TENSORS and found["budget_bytes"] < found["largest_bytes"]
    assert {"bank", "search", "proof"} <= {stage["stage"] for stage in found["stages"]}
    named = call_here("plan", runs.write("planned"), "--tensors").stdout
    assert all(gene["name"].removesuffix(".weight") in named for gene in found["genes"])
