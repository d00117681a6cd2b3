"""A method's figures are those of a plain model with its weights put in."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evaluators.prepare.input_group import InputGroup, group_file
from evaluators.study.bench import MeasureMethod, MethodResult, StudySetup
from evaluators.study.methods import BudgetMethod, Gptq, Method, Quantile, Rounding, Threshold
from evaluators.study.mutual_information import middles
from evaluators.study.statistics import AllocationStatistics
from quantizers.simulated.channel_mixed import simulate
from quantizers.simulated.layer_rules import LayerRule
from search.types import Fidelity
from tests.conftest import EMBEDDED, SmallBank

STATE: dict = {}  # a warm worker, as a pool has it


def measured(small_bank: SmallBank, method: Method, whole_model: bool = False) -> MethodResult:
    fidelity = Fidelity("test", 1024)
    groups = tuple(small_bank.groups)
    setup = StudySetup(
        EMBEDDED,
        small_bank.directory,
        groups,
        small_bank.windows_file,
        fidelity,
        0.01,
        whole_model,
        None,
        f"{whole_model}",
    )
    return MeasureMethod(setup, method).run(STATE)


@pytest.mark.parametrize("whole_model", [False, True])
def test_figures_equal_those_of_a_plain_model_in_float64(whole_model: bool, small_bank: SmallBank) -> None:
    method = Rounding(bits=4)
    found = measured(small_bank, method, whole_model)
    ids = torch.from_numpy(small_bank.windows.take("test", 1024))
    full, treated = (AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32) for _ in range(2))
    errors = powers = zeros = weights = 0.0
    for group in (InputGroup.load(group_file(small_bank.directory, name)) for name in small_bank.groups):
        for name in group.tensors:
            if "layers" not in name and not whole_model:
                continue
            parameter = treated.get_parameter(name)
            W = parameter.data.clone()
            parameter.data = simulate(W, torch.full((W.shape[1],), 4), method.grid).weights
            dW, H = (W - parameter.data).double(), group.hessian.double()
            errors += float(torch.trace(dW @ H @ dW.T))
            powers += float(torch.trace(W.double() @ H @ W.double().T))
            zeros += int((parameter.data == 0).sum())
            weights += W.numel()
    with torch.inference_mode():
        p, q = (model(ids).logits.double().log_softmax(-1) for model in (full, treated))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    nll = -float(q[:, :-1].gather(2, ids[:, 1:, None]).mean())
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert found.reconstruction == pytest.approx(errors / powers, rel=1e-3)
    assert found.sparsity == pytest.approx(zeros / weights)
    assert found.average_bits == 4 and found.stored_bits == 4.5


def test_compensation_beats_rounding_and_a_budget_beats_fixed_bits(small_bank: SmallBank) -> None:
    plain, gptq, budget = (
        measured(small_bank, m) for m in (Rounding(bits=3), Gptq(bits=3), BudgetMethod(target_avg_bits=3))
    )
    assert gptq.kl < 0.6 * plain.kl
    assert budget.average_bits == 3 and budget.reconstruction < gptq.reconstruction


def test_a_method_is_measured_alike_after_any_other(small_bank: SmallBank) -> None:
    first = measured(small_bank, Quantile())
    measured(small_bank, Gptq(bits=2))
    again = measured(small_bank, Quantile())
    assert (again.kl, again.layers) == (first.kl, first.layers)


def test_rules_give_each_layer_its_own_average(small_bank: SmallBank) -> None:
    rules = (LayerRule(5.0, "self_attn"), LayerRule(3.5, "mlp"))
    found = measured(small_bank, BudgetMethod(targets=rules))
    assert {r.average_bits for r in found.layers if "self_attn" in r.tensor} == {5.0}
    assert {r.average_bits for r in found.layers if "mlp" in r.tensor} == {3.5}


def test_statistics_count_channels_by_level(small_bank: SmallBank) -> None:
    found = measured(small_bank, Threshold())
    statistics = AllocationStatistics("threshold", found.layers)
    frame = statistics.to_frame()
    assert frame.channels.sum() == sum(statistics.channels.values()) == 6 * (6 * 256 + 768)
    assert statistics.average_bits == pytest.approx(found.average_bits)
    one = frame[frame.tensor == "model.layers.0.mlp.down_proj.weight"]
    assert one.percent.sum() == pytest.approx(100)
    assert (one.bits * one.channels).sum() / one.channels.sum() == pytest.approx(one.average_bits.iloc[0])
    assert one.importance_min.iloc[0] < 1 < one.importance_max.iloc[0]


def test_groups_lie_among_all_members_in_the_order_of_their_values() -> None:
    assert middles(np.array([0.3, 0.1, 0.2]), np.array([2, 1, 5])).tolist() == [7 / 8, 0.5 / 8, 3.5 / 8]
