"""Reports mutual information: what channels and layers share, how they were grouped, and what that cost."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from evaluators.model.folder import ModelFolder
from evaluators.prepare.activation_samples import layer_series, sampled_input
from evaluators.prepare.bank import group_tensors
from evaluators.prepare.input_group import group_file
from evaluators.study.bench import MethodResult, StudySetup
from evaluators.study.mutual_information import MutualInformation
from quantizers.statistics.clustering import group, redundancy
from quantizers.statistics.mutual_information import pairwise_information

mpl.use("Agg")  # pictures are files; no display is needed
from matplotlib import pyplot

CHANNELS_PICTURE, LAYERS_PICTURE = "mutual-information-channels.png", "mutual-information-layers.png"
MOST_TICKS = 64  # members named on an axis


def write_grouping_report(path: Path, setup: StudySetup, method: MutualInformation) -> str:
    """Draw how ``method`` groups the channels of the middle input group and the layers of the model; return Markdown.

    Pictures are written to the directory ``path``.
    """
    assert setup.samples is not None
    sampled = [name for name in setup.groups if group_file(setup.samples, name).is_file()]
    middle = sampled[len(sampled) // 2]
    sample = sampled_input(setup.samples, middle)
    assert sample is not None
    found, _ = sample.information(method.estimate, method.bins)
    affinity = (found.normalized() if method.normalized else found.information).numpy()
    draw(path / CHANNELS_PICTURE, affinity, group(affinity, method.groups, method.clustering), f"channels of {middle}")
    members = {name: group_tensors(group_file(setup.calibration, name)) for name in setup.groups}
    names, series = layer_series(ModelFolder(setup.model), setup.samples, members)
    layers = pairwise_information(series, method.estimate, method.bins)
    affinity = (layers.normalized() if method.normalized else layers.information).numpy()
    labels = group(affinity, min(method.groups, len(names)), method.clustering)
    draw(path / LAYERS_PICTURE, affinity, labels, "layers, by the norm of their outputs", names)
    return "\n".join(
        [
            f"## Mutual information ({method.label}, {len(series):,} samples)",
            "",
            f"![channels]({CHANNELS_PICTURE})",
            f"![layers]({LAYERS_PICTURE})",
            "",
        ]
    )


def costs(results: Sequence[MethodResult]) -> list[str]:
    """Return Markdown rows of what each method of groups cost, in seconds.

    Mutual information is computed once and kept for later methods.
    """
    grouped = [result for result in results if result.method["kind"] == "mutual_information"]
    return [
        "| method | groups | KL | seconds | mutual information and clusters, at first |",
        "|---|---|---|---|---|",
        *(
            f"| {r.label} | {r.method['groups']} | {r.kl:.5f} | {r.seconds:.1f} | {r.grouping_seconds:.2f} |"
            for r in grouped
        ),
        "",
    ]


def draw(path: Path, affinity: np.ndarray, labels: np.ndarray, title: str, names: Sequence[str] = ()) -> None:
    """Draw the matrix ``affinity`` (n, n) in the order of its groups, and each group's size and redundancy.

    ``labels`` (n,) are the groups; ``names``, if given, label the rows.
    """
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    figure, (matrix, bars) = pyplot.subplots(1, 2, figsize=(13, 7), width_ratios=(3, 2), layout="constrained")
    off_diagonal = affinity[~np.eye(len(affinity), dtype=bool)]
    limit = float(np.quantile(off_diagonal, 0.995)) if len(off_diagonal) else 1.0
    image = matrix.imshow(affinity[np.ix_(order, order)], vmin=0, vmax=limit or 1.0, cmap="magma")
    for edge in np.cumsum(sizes)[:-1]:
        matrix.axhline(edge - 0.5, color="white", linewidth=0.4)
        matrix.axvline(edge - 0.5, color="white", linewidth=0.4)
    if names and len(names) <= MOST_TICKS:
        words = [names[i].removeprefix("model.layers.").removesuffix(".weight") for i in order]
        matrix.set_yticks(range(len(words)), words, fontsize=6)
    figure.colorbar(image, ax=matrix, shrink=0.7)
    matrix.set_title(f"mutual information, {title}", fontsize=10)
    shared = redundancy(affinity, labels)
    drawn = bars.bar(range(len(sizes)), sizes, color=mpl.colormaps["magma"](np.clip(shared / (limit or 1.0), 0, 1)))
    bars.bar_label(drawn, [f"{value:.2f}" for value in shared], fontsize=6, rotation=90, padding=2)
    bars.set(xlabel="group", ylabel="members (above: mean information of its pairs)")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
