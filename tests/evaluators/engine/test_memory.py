"""A search keeps to the memory that it was given, and takes what was predicted."""

from pathlib import Path

import pytest

from benchmarks.memory import SLACK, measured_apart

LIMIT = 240 << 20


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """A search over ten blocks of width 512 under a limit on the memory that its process may write to."""
    path: Path = tmp_path_factory.mktemp("streamed")
    return measured_apart({"path": str(path), "layers": 10, "genomes": 4, "tokens": 512, "limit": LIMIT})


def test_a_model_whose_weights_exceed_the_limit_is_searched_within_it(streamed: dict[str, float]) -> None:
    assert streamed["all_weights"] > 1.3 * LIMIT
    assert not streamed["resident"]
    assert streamed["evaluations"] == 8
    assert streamed["measured"] < (1 + SLACK) * streamed["predicted"] <= (1 + SLACK) * LIMIT


def test_what_a_resident_search_takes_is_predicted(tmp_path: Path) -> None:
    case = {"path": str(tmp_path), "layers": 4, "genomes": 8, "tokens": 1024, "limit": None}
    resident = measured_apart(case)
    assert resident["resident"]
    assert resident["predicted"] == pytest.approx(resident["measured"], rel=SLACK)
