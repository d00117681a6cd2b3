"""What a report says and draws, by figures worked out by hand."""

import json
import re
from typing import Any

import pytest

from bitgenome.report.course import MOST_POINTS, best_so_far, thinned
from bitgenome.report.gains import against_mix, against_simple, compared
from bitgenome.report.leaderboard import Standing, ranks
from bitgenome.report.levels import short_names
from bitgenome.report.page import TEMPLATES, as_json
from bitgenome.report.source import Scored


def test_the_best_so_far_begins_anew_with_each_draw_of_text() -> None:
    scored = [Scored(loss, draw, 1) for loss, draw in ((3.0, 0), (2.0, 0), (2.5, 0), (4.0, 1), (3.5, 1))]
    assert best_so_far(scored) == [(1, 3.0), (2, 2.0), (3, 2.0), (4, None), (4, 4.0), (5, 3.5), (5, 3.5)]


def test_of_a_long_search_every_best_is_drawn_and_few_others() -> None:
    scored = [Scored(10.0 - (n in (7, 9_999)) * n, 0, 1) for n in range(10_000)]
    shown = thinned(scored)
    assert {0, 7, 9_999} <= set(shown) and len(shown) <= MOST_POINTS + 3


@pytest.mark.parametrize(
    ("kl", "error", "words"),
    [
        (0.09, 0.001, "10\u00a0% less KL than"),
        (0.12, 0.001, "20\u00a0% more KL than"),
        (0.0999, 0.001, "no clear difference in KL from"),
        (0.05, None, "no clear difference in KL from"),
    ],
)
def test_a_difference_within_two_standard_errors_is_not_told_as_a_gain(
    kl: float, error: float | None, words: str
) -> None:
    assert compared(kl, 0.1, error) == words


def test_the_search_is_said_to_be_level_where_its_lead_is_noise() -> None:
    def told(difference: float | None, error: float | None) -> str:
        found = {"reference": "exact kl", "kl_difference": difference, "standard_error": error}
        return against_simple({"validation": found})

    assert "no difference beyond noise from the best simple mix, “exact kl”: 0.00006 ± 0.00017 KL" in told(
        -0.00006, 0.00017
    )
    assert "better than" in told(-0.001, 0.0002) and "worse than" in told(0.001, 0.0002)
    assert "added nothing: the simple mix “exact kl” ships" in told(None, None)


def test_llamacpps_own_file_is_named_with_both_figures_and_sizes() -> None:
    def figures(kl: float) -> dict[str, Any]:
        return {"mean_kl": {"value": kl, "standard_error": 0.001}}

    mix = {"mix": "Q3_K_M", "file_bytes": 1000, "figures": figures(0.1)}
    proof = {"file_bytes": 950, "figures": figures(0.05), "mix": mix}
    assert against_mix(proof) == (
        "By llama.cpp the file has 50\u00a0% less KL than llama.cpp's own Q3_K_M (0.05000 against 0.10000), and is "
        "5.0\u00a0% smaller."
    )
    assert against_mix({**proof, "mix": None}) == ""


def test_runs_that_the_text_does_not_tell_apart_share_a_rank() -> None:
    windows = {"a": (1.0, 2.0, 3.0), "b": (1.1, 1.9, 3.0), "c": (2.0, 3.0, 4.1), "d": (2.0, 3.0, 4.1), "e": ()}
    standings = {name: Standing("text", kl) for name, kl in windows.items()}
    assert ranks(list("abcde"), standings) == ["1=", "1=", "3=", "3=", "5"]
    assert ranks(["a", "b"], {**standings, "b": Standing("another text", windows["b"])}) == ["1", "2"]


def test_kinds_are_named_by_the_shortest_ending_that_is_their_own() -> None:
    kinds = ["self_attn.q_proj", "mlp.experts.up_proj", "mlp.shared_expert.up_proj"]
    assert list(short_names(kinds).values()) == ["q_proj", "experts.up_proj", "shared_expert.up_proj"]


def test_figures_are_strict_json_that_no_script_element_ends_in() -> None:
    text = as_json({"</script>": [float("nan"), 0.12345678]})
    assert "<" not in text and json.loads(text) == {"</script>": [None, 0.123457]}


def test_words_and_data_stand_out_from_the_page_light_and_dark() -> None:
    style = (TEMPLATES / "page.css").read_text()
    light, dark, wished = (
        dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in style.split(" color-scheme: ")[1:4]
    )
    assert dark == wished and light.keys() == dark.keys()  # the dark page is chosen by the system, or by its button
    for colors in (light, dark):
        assert min(contrast(colors[name], colors["page"]) for name in ("text", "soft", "link")) >= 4.5
        data = ("blue", "orange", "green", "red", "purple", "grey")
        assert min(contrast(colors[name], colors["page"]) for name in data) >= 3


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, by the Web Content Accessibility Guidelines 2.2."""

    def luminance(color: str) -> float:
        parts = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
