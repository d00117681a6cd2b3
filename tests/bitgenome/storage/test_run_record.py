"""What run.json says of the seconds that a run took."""

from contextlib import suppress
from pathlib import Path

from bitgenome.storage.run_record import RunRecord


def attempt(record: RunRecord, stages: dict[str, float], fails: bool = False) -> dict[str, float]:
    with suppress(OSError), record.ending():
        for stage, seconds in stages.items():
            record.end_stage(stage, seconds)
        if fails:
            raise OSError
    return record.seconds


def test_seconds_add_up_until_a_run_is_finished_and_stay_when_it_is_proved_again(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run.json", {"stages": {}})
    assert attempt(record, {"workers": 2.0, "bank": 5.0}, fails=True) == {"workers": 2.0, "bank": 5.0}
    finished = attempt(record, {"workers": 2.0, "bank": 1.0, "proof": 3.0})
    assert finished == {"workers": 4.0, "bank": 6.0, "proof": 3.0}
    assert attempt(record, {"workers": 9.0, "bank": 0.0, "proof": 4.0}) == finished
