"""A bank built as calibration goes has the bytes of one from kept Hessians, whatever interrupts it, in little space."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from bitgenome.common import devices
from bitgenome.common.digests import digest_of_file
from bitgenome.common.errors import UserError
from bitgenome.config.run import load_config
from bitgenome.plan import disk
from bitgenome.plan.disk import hessian_bytes, keeps_hessians, stretches
from bitgenome.plan.plan import Plan, make_plan
from bitgenome.plan.text import read_windows
from bitgenome.run.bank import build_bank
from bitgenome.run.calibration import calibrate
from bitgenome.run.prepare import record_inputs, save_imatrix
from bitgenome.run.streamed_bank import build_streamed, input_statistics
from bitgenome.storage.prune import artefacts
from bitgenome.storage.run_directory import RunDirectory
from bitgenome.storage.staged import staged_pool
from evaluators.data.windows import TokenWindows
from evaluators.prepare import calibration
from evaluators.prepare.bank import tensor_file
from evaluators.prepare.input_group import group_file
from tests.conftest import no_progress
from tests.small_models import save_small_model
from tests.workers.storage.test_staging import OtherNode
from workers.pool.base import SerialPool, Task

LAYERS = 3
SETTINGS = {
    "budget": {"bits_per_weight": 9},
    "levels": ["W4", "W8"],
    "text": {
        "window": 32,
        "tokens": {"calibration": 256, "sensitivity": 32, "search": 32, "validation": 32, "test": 32},
    },
    "workers": {"ray": "off"},
}


class KilledError(Exception):
    """Stands for kill -9 between two tasks, or within one."""


class FrailPool(SerialPool):
    """A serial pool that ends with its ``last`` task, and notes the Hessians on disk after each."""

    def __init__(self, storage: Path, last: int | None = None):
        super().__init__()
        self.storage, self.last = storage, last
        self.labels: list[str] = []
        self.largest = 0

    def map(self, tasks: Sequence[Task]) -> Iterator[Any]:
        for result, task in zip(super().map(tasks), tasks, strict=True):
            self.labels.append(task.label)
            groups = [f for f in self.storage.glob("shared/bank/*/.passing/*") if not f.name.startswith("hidden-")]
            self.largest = max(self.largest, sum(f.stat().st_size for f in groups))
            if len(self.labels) == self.last:
                raise KilledError
            yield result


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other take long for small tensors on a busy machine."""
    monkeypatch.setattr(devices, "usable_cpus", lambda: 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=LAYERS)


def plan_in(storage: Path, model: Path, url: str | None = None, **quantization: Any) -> Plan:
    text = storage / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}; " for n in range(400)))
    settings = {**SETTINGS, "text": {**SETTINGS["text"], "path": str(text)}}  # type: ignore[dict-item]
    quantization |= {"refinement_rounds": 0}
    config = {"name": "run", "storage_path": url or str(storage), "model": str(model), "quantization": quantization}
    file = storage / "run.yaml"
    file.write_text(yaml.safe_dump(settings | config))
    return make_plan(load_config(file))


def content(directory: Path) -> dict[str, str | None]:
    return {f.name: digest_of_file(f) for f in directory.iterdir() if f.is_file()}


def tensors(directory: Path) -> dict[str, dict[str, Any]]:
    return {f.name: {k: t.tolist() for k, t in load_file(f).items()} for f in directory.glob("model*.safetensors")}


def streamed(plan: Plan, windows: TokenWindows, pool: FrailPool) -> tuple[Path, list[str], Path]:
    with RunDirectory.owned(plan.config) as run:
        record_inputs(plan, windows, run)
        return build_streamed(plan, windows, run, pool, no_progress)


@pytest.mark.parametrize(("upstream", "last"), [(None, 1), ("W4", 4)])
def test_an_interrupted_streamed_bank_ends_with_the_bytes_of_kept_hessians(
    upstream: str | None, last: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, dropped = tmp_path / "kept", tmp_path / "dropped"
    for path in (kept, dropped):
        path.mkdir()
    plan = plan_in(kept, model, upstream_level=upstream)
    windows = read_windows(plan)
    hessians, groups = calibrate(plan, windows, SerialPool(), no_progress, upstream)
    expected = content(build_bank(plan, hessians, groups, SerialPool(), no_progress))
    save_imatrix(plan, windows, [group_file(hessians, name) for name in groups], kept / "imatrix.gguf")

    plan = plan_in(dropped, model, upstream_level=upstream, keep_hessians=False)
    of_block = (hessian_bytes(plan) - 4 * 64**2) // LAYERS
    monkeypatch.setattr(disk, "HESSIANS_AT_ONCE", 2 * of_block)
    assert stretches(plan) == [range(2), range(2, 4)]
    monkeypatch.setattr(calibration, "SAVE_EVERY_S", 0.0)
    labels, largest = [], 0
    for _ in range(20):  # each attempt gets a few tasks further
        pool = FrailPool(dropped, last)
        try:
            statistics, names, bank = streamed(plan, windows, pool)
        except KilledError:
            last = last % 5 + 2
            continue
        finally:
            labels += pool.labels
            largest = max(largest, pool.largest)
        break
    assert content(bank) == expected
    assert names == groups
    assert largest < 2.8 * of_block, "of two blocks, with their moments and the head"
    assert not list(dropped.rglob("*hidden*"))
    assert {artefact.name.split("/")[0]: artefact.runs for artefact in artefacts(str(dropped))} == {
        "bank": ("run",),
        "statistics": ("run",),
    }
    save_imatrix(plan, windows, [group_file(statistics, name) for name in names], dropped / "imatrix.gguf")
    assert digest_of_file(dropped / "imatrix.gguf") == digest_of_file(kept / "imatrix.gguf")
    built = [label for label in labels if label.startswith("bank")]
    assert len(built) <= len(set(built)) + 6, "no tensor is built again but that of the task in hand"

    victim = tensor_file(bank, "model.layers.2.mlp.up_proj.weight")
    victim.write_bytes(b"")
    pool = FrailPool(dropped)
    streamed(plan, windows, pool)
    assert content(bank) == expected
    assert pool.labels == ["calibrate[2:4]", "bank[model.layers.2.mlp.gate_proj]"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_hessians_go_through_the_storage_only_where_other_machines_build_and_do_not_stay_there(
    elsewhere: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITGENOME_CACHE", str(tmp_path / "here"))
    monkeypatch.setattr(disk, "HESSIANS_AT_ONCE", 1)  # a block at a time
    (tmp_path / "kept").mkdir()
    plan = plan_in(tmp_path / "kept", model)
    windows = read_windows(plan)
    hessians, groups = calibrate(plan, windows, SerialPool(), no_progress)
    expected = content(build_bank(plan, hessians, groups, SerialPool(), no_progress))

    seen: set[str] = set()  # of what passes through the storage

    class Watched(OtherNode):
        one_machine = not elsewhere

        def _run(self, task: Task) -> Any:
            result = super()._run(task) if elsewhere else SerialPool._run(self, task)
            seen.update(f.name for f in (tmp_path / "stored").rglob("*.safetensors") if "passing" in f.parts)
            return result

    storage = tmp_path / "url"
    storage.mkdir()
    plan = plan_in(storage, model, keep_hessians=False, url=(tmp_path / "stored").as_uri())
    pool = staged_pool(Watched(tmp_path / "there", monkeypatch), plan.config, plan.folder)
    with RunDirectory.owned(plan.config) as run:
        record_inputs(plan, windows, run)
        _, _, bank = build_streamed(plan, windows, run, pool, no_progress)
    assert content(bank) == content(tmp_path / "stored" / "shared" / "bank" / bank.name) == expected
    assert bool(seen) == elsewhere
    assert {file.removesuffix(".safetensors") for file in seen} - {f"hidden-{n}" for n in range(9)} == (
        set(groups) if elsewhere else set()
    )
    left = [f for f in tmp_path.rglob("*") if f.is_file() and {"passing", ".passing"} & set(f.parts)]
    assert left == []


def test_calibration_goes_on_from_the_block_that_it_has_reached(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SAVE_EVERY_S", 0.0)
    plan = plan_in(tmp_path, model)
    windows = read_windows(plan)
    directory, groups = calibrate(plan, windows, SerialPool(), no_progress)
    expected = tensors(directory)
    (directory / "groups.json").unlink()
    group_file(directory, groups[-1]).unlink()
    whole, ran = calibration.calibrate_block, []

    def noting(model: Any, block: int, *arguments: Any, **settings: Any) -> Any:
        ran.append(block)
        if block == 2 and ran.count(2) == 1:
            raise MemoryError
        return whole(model, block, *arguments, **settings)

    monkeypatch.setattr(calibration, "calibrate_block", noting)
    with pytest.raises(Exception, match="MemoryError"):
        calibrate(plan, windows, SerialPool(), no_progress)
    assert calibrate(plan, windows, SerialPool(), no_progress) == (directory, groups)
    assert ran == [0, 1, 2, 2, 3]
    assert tensors(directory) == expected


def test_small_hessians_stay_and_moments_are_gathered_without_a_bank(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_in(tmp_path, model)
    assert keeps_hessians(plan)
    monkeypatch.setattr(disk, "KEPT_HESSIANS", 0)
    assert not keeps_hessians(plan)
    with RunDirectory.owned(plan.config) as run:
        windows = read_windows(plan)
        record_inputs(plan, windows, run)
        directory, names = input_statistics(plan, windows, run, SerialPool(), no_progress)
    assert len(names) == 4 * LAYERS + 1
    assert sum(f.stat().st_size for f in directory.iterdir() if f.is_file()) < hessian_bytes(plan) / 4


@pytest.mark.parametrize(("key", "value"), [("scaling", {"kind": "awq"}), ("mutation_prior", "five_dimensional")])
def test_hessians_that_are_read_again_are_not_removed(key: str, value: Any, model: Path, tmp_path: Path) -> None:
    quantization = {"keep_hessians": False} | ({key: value} if key == "scaling" else {})
    path = tmp_path / "run.yaml"
    search = {"search": {key: value}} if key != "scaling" else {}
    config = {"name": "run", "model": str(model), "quantization": quantization}
    path.write_text(yaml.safe_dump(SETTINGS | search | config))
    with pytest.raises(UserError, match=f"keep_hessians auto or true with .*{key}, found false"):
        load_config(path)
