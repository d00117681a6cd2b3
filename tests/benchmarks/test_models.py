"""The rows of docs/models.md are configurations of their types, and its page is made of the results that are there."""

import pytest

pytest.importorskip("transformers")

from benchmarks.models.case import cases
from benchmarks.models.made import config_of
from benchmarks.models.table import PAGE, page


def test_every_row_is_a_configuration_of_its_type() -> None:
    for case in cases().values():
        assert config_of(case).model_type == case.type


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
