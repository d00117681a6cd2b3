"""What a run needs and this machine lacks is found, with a remedy, before a run stumbles over it."""

import json
import os
from pathlib import Path

import pytest

from bitgenome.cli import doctor
from bitgenome.cli.doctor import START_RAY, of_machine, of_ray, of_started, probe
from tests.bitgenome.conftest import call_here
from tests.conftest import REPOSITORY


def test_a_broken_library_and_a_storage_that_cannot_be_written_are_named_and_all_else_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('libggml.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(REPOSITORY))))
    done = call_here("doctor", "--json", "--storage", "/proc/runs")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert {"llama.cpp", "storage"} <= set(found["broken"])
    by_name = {finding["what"]: finding for finding in found["findings"]}
    assert by_name["llama.cpp"]["found"] == "libggml.so: cannot open shared object file"
    assert all(finding["remedy"] for finding in found["findings"] if finding["state"] != "ok")
    assert {by_name[name]["state"] for name in ("Python", "devices", "cores", "Ray")} <= {"ok", "note"}


def test_quotas_few_bytes_and_an_absent_gpu_are_told() -> None:
    machine = {"torch": "2", "accelerators": [{"name": "H100", "bytes": 80 << 30}], "cores": 1}
    told = list(of_machine(machine | {"free_bytes": 1 << 30, "total_bytes": 8 << 30}))
    assert "H100 (80 GiB)" in told[0].found and told[2].state == "note" and told[2].remedy
    assert [finding.state for finding in of_machine({"error": "no"})] == ["broken"]


def test_ray_in_a_folder_whose_sockets_are_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + 60 * "x")
    told = {finding.what: finding for finding in of_ray({"version": "2"})}
    assert told["Ray's folder"].state == "note" and "RAY_TMPDIR" in told["Ray's folder"].remedy
    assert [finding.state for finding in of_ray({"error": "no module"})] == ["broken"]


def test_a_cluster_that_a_run_would_join_and_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    told = of_started(probe(START_RAY))
    assert told.state == "broken" and told.remedy and told.found.startswith("expected a Ray cluster at 127.0.0.1:1")


def test_a_package_that_is_older_than_the_checkout_asks_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "asked_for", lambda: (">=3.11", ["rich>=900", "typer", "nobody-has-this>=1"]))
    told = {finding.what: finding for finding in doctor.packages()}
    assert told["rich"].found.endswith("expected >=900") and told["rich"].found.startswith("version ")
    assert (told["nobody-has-this"].found, told["packages"].state) == ("missing, expected >=1", "broken")
    assert "typer" not in told and told["packages"].found.endswith("1 of 3 as asked for")
