"""Sensitivity tables: records there and back, the smoothing worked out by hand, and refusals."""

import numpy as np
import pandas as pd
import pytest

from search.allocation.sensitivity import SensitivityTable
from tests.search.synthetic import odd_space, random_table

SPACE = odd_space([16, 32], ("W2", "W4", "W8"))
MEASURES = ("kl", "logit_mse", "reconstruction", "relative")
MEASURED = {measure: random_table(SPACE, seed).loss for seed, measure in enumerate(MEASURES)}
RECORDS = [
    {"gene": gene.name, "choice": c, "format": fmt.name} | {m: float(MEASURED[m][g][c]) for m in MEASURES}
    for g, gene in enumerate(SPACE.genes)
    for c, fmt in enumerate(gene.formats)
]


@pytest.mark.parametrize("measure", MEASURES)
def test_tables_come_back_from_a_data_frame_in_any_order(measure: str) -> None:
    frame = pd.DataFrame(RECORDS).sample(frac=1.0, random_state=0)
    table = SensitivityTable.from_records(SPACE, frame.to_dict("records"), measure)
    for expected, found in zip(MEASURED[measure], table.loss, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_prediction_is_the_sum_over_genes() -> None:
    table = SensitivityTable("kl", (np.array([4.0, 1.0]), np.array([2.0, 0.5])))
    assert table.predict((0, 1)) == 4.5


def with_kl(*values: float) -> list[dict]:
    return [{**record, "kl": value} for record, value in zip(RECORDS, values, strict=True)]


def test_an_inversion_becomes_the_mean_of_the_inverted_pair() -> None:
    noisy = with_kl(9.0, 1.0, 3.0, 5.0, 4.0, 1.0)
    assert SensitivityTable.from_records(SPACE, noisy).loss[0].tolist() == [9.0, 2.0, 2.0]
    assert SensitivityTable.from_records(SPACE, noisy).loss[1].tolist() == [5.0, 4.0, 1.0]
    assert SensitivityTable.from_records(SPACE, noisy, smooth=False).loss[0].tolist() == [9.0, 1.0, 3.0]


def test_losses_from_each_genes_least_keep_the_order_of_genomes() -> None:
    table = SensitivityTable("around_base", (np.array([0.5, 0.0, -0.25]), np.array([0.0, -1.0, -2.0])))
    counted = table.from_least()
    assert [values.min() for values in counted.loss] == [0.0, 0.0]
    assert {counted.predict((a, b)) - table.predict((a, b)) for a in range(3) for b in range(3)} == {2.25}


def test_records_that_do_not_fit_are_refused() -> None:
    refused = {
        "missing": RECORDS[:-1],
        "not finite": with_kl(1, 1, 1, 1, 1, float("nan")),
        "given twice": [*RECORDS, RECORDS[0]],
        "does not have": [{**RECORDS[0], "gene": "stranger"}],
        "expected 0 = Q2_K, 1 = Q4_K, 2 = Q8_0": [{**RECORDS[0], "format": "Q4_K"}],
    }
    for message, records in refused.items():
        with pytest.raises(ValueError, match=message):
            SensitivityTable.from_records(SPACE, records)
    with pytest.raises(ValueError, match="expected one of kl, logit_mse"):
        SensitivityTable.from_records(SPACE, RECORDS, "perplexity")
