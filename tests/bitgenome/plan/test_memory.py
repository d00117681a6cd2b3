"""What `bitgenome plan` says of memory, and what it refuses."""

from pathlib import Path

import pytest

from bitgenome.common.errors import UserError
from bitgenome.config.run import load_config
from bitgenome.plan.memory import check_memory, memory_line
from bitgenome.plan.plan import make_plan
from tests.conftest import REPOSITORY

CONFIG = REPOSITORY / "configs" / "stdlib-6m.yaml"


def test_a_plan_tells_resident_from_streamed() -> None:
    assert memory_line(make_plan(load_config(CONFIG, ["evaluation.memory=2GiB"]))).endswith("resident")
    streamed = memory_line(make_plan(load_config(CONFIG, ["evaluation.memory=250 MiB"])))
    assert streamed.endswith("streamed, 0.15 GiB of weights in all formats")


def test_memory_that_cannot_hold_a_block_is_refused_with_what_would_do() -> None:
    plan = make_plan(load_config(CONFIG, ["evaluation.memory=100 MiB"]))
    with pytest.raises(UserError, match=r"expected at least 0\.\d+ GiB of memory for a worker.*found 0\.10 GiB: use"):
        check_memory(plan)


@pytest.mark.parametrize("size", ["-1", "a lot", "0"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(UserError, match="evaluation.memory"):
        load_config(CONFIG, [f"evaluation.memory={size}"])


def test_memory_does_not_decide_the_result(tmp_path: Path) -> None:
    digests = {load_config(CONFIG, overrides).digest for overrides in ([], ["evaluation.memory=1GiB"])}
    assert len(digests) == 1
