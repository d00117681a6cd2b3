"""What is said of a batch: why a run failed, how long the others take, and a page that only shows."""

import shlex
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from bitgenome.batch.batch import BatchOrder, run_batch
from bitgenome.batch.config import load_batch
from bitgenome.batch.results import COLUMNS, results_frame, show_results
from bitgenome.batch.state import RunState, Stage, last_words
from bitgenome.batch.view import BatchView, duration
from bitgenome.cli.batch import continuation
from bitgenome.common.errors import UserError
from bitgenome.report.leaderboard import leaderboard
from bitgenome.storage.run_directory import RunDirectory
from tests.bitgenome.batch.test_config import write


@pytest.fixture
def states(tmp_path: Path) -> list[RunState]:
    runs = load_batch([write(tmp_path, matrix={"search.seed": [0, 1, 2]})])
    waiting, searching, failed = (RunState(run, tmp_path / f"{run.name}.log") for run in runs)
    searching.stage, searching.doing, searching.generation, searching.genomes = Stage.SEARCHING, "search", 1, 4
    searching.best_loss, searching.seconds_left = 0.125, 200.0
    failed.stage, failed.sentence = Stage.FAILED, "expected <b>room</b>, found none"
    return [waiting, searching, failed]


@pytest.mark.parametrize(
    ("log", "code", "sentence"),
    [
        ("12:00 bank\nerror: expected text, found none\n", 2, "expected text, found none"),
        ("Traceback\nKeyError: 'x'\n", 1, "it ended with exit code 1, last said: KeyError: 'x'"),
        ("12:00 bank\n", -9, "it ended by signal 9, last said: 12:00 bank"),
        ("", -15, "found it ended by signal 15"),
        (
            '{"levelname": "ERROR", "message": "worker 1: lost"}\n{"levelname": "ERROR", "message": "no room"}\n'
            '{"levelname": "INFO", "message": "stored"}\n',
            2,
            "no room",
        ),
        ('{"asctime": "12:00", "levelname": "INFO", "message": "bank"}\n', -9, "by signal 9, last said: bank"),
    ],
)
def test_a_run_fails_with_its_own_last_words(log: str, code: int, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log", code).endswith(sentence)


def test_what_an_earlier_attempt_said_stays_in_the_log_and_is_not_why_this_one_failed(states: list[RunState]) -> None:
    state = states[0]
    state.log.write_text("error: expected memory, found little\n")
    state.begin()
    with state.log.open("a") as log:
        log.write("12:00 bank\n")
    state.end(-9)
    assert state.sentence == "expected the run to finish, found it ended by signal 9, last said: 12:00 bank"
    assert "found little" in state.log.read_text()


def test_what_an_earlier_process_had_come_to_is_not_where_a_run_stands(states: list[RunState]) -> None:
    state = states[0]
    directory = RunDirectory.create(state.run.config)
    directory.record["stage"] = {"name": "search", "since": time.time() - 60, "evaluations": 0}
    directory.record.save()
    state.begin()
    assert not state.refresh() and state.stage is Stage.PREPARING
    with directory.stage("search"):
        assert state.refresh() and state.stage is Stage.SEARCHING


def test_the_command_that_continues_a_batch_is_for_a_shell_and_repeats_every_option() -> None:
    overrides = ["search.seed=1", "budget={bits_per_weight: 3.5}"]
    again = continuation([Path("my runs.yaml")], overrides, BatchOrder("six", 2))
    told = ["--set", overrides[0], "--set", overrides[1], "--name", "six", "--max-parallel", "2", "--resume"]
    assert shlex.split(again) == ["bitgenome", "batch", "my runs.yaml", *told]
    assert continuation([Path("a.yaml")], [], BatchOrder("a")) == "bitgenome batch a.yaml --name a --resume"


def test_a_line_says_where_a_run_stands(states: list[RunState], capsys: pytest.CaptureFixture[str]) -> None:
    view = BatchView(states, Console(width=200))
    for state in states:
        view.changed(state)
    assert capsys.readouterr().out.splitlines() == [
        "stdlib-6m-s0: waiting",
        "stdlib-6m-s1: searching, generation 1/2, best loss 0.125000, 4 evaluations, about 3 min left",
        "stdlib-6m-s2: failed: expected <b>room</b>, found none",
    ]
    assert [duration(seconds) for seconds in (40, 700, 12600)] == ["40 s", "12 min", "3.5 h"]
    assert view.table().row_count == 3


def test_a_page_of_a_batch_without_any_result_names_what_failed_and_escapes_it(
    states: list[RunState], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = results_frame(states, tmp_path / "runs" / "batch-x")
    assert list(frame.columns) == list(COLUMNS) and frame.mean_kl.isna().all()
    page = leaderboard(frame, "x & y", {})
    assert "<h1>x &amp; y</h1>" in page and "expected &lt;b&gt;room&lt;/b&gt;" in page
    assert "0 of 3 runs finished" in page and '<a href="../stdlib-6m-s2/">' in page
    show_results(frame, tmp_path, Console())
    assert "stdlib-6m-s2" in capsys.readouterr().out


def test_the_page_keeps_the_order_of_the_rows_and_marks_the_first(states: list[RunState], tmp_path: Path) -> None:
    rows = results_frame(states, tmp_path).assign(stage=str(Stage.FINISHED), file_bytes=10, evaluations=1, seconds=1.0)
    figures = {"bits_per_weight": 3.0, "perplexity": 9.0, "base_perplexity": 8.0, "mean_kl": 0.3, "gguf": "x"}
    rows = rows.assign(**figures, simulated_kl=[0.3, 0.1, 0.2])
    ordered = rows.sort_values("simulated_kl")
    page = leaderboard(ordered, "x", {})
    places = [page.index(f">{name}</a>") for name in ordered.name]
    assert places == sorted(places) and page.count('class="marked"') == 1


def test_a_batch_may_not_be_named_out_of_its_storage(tmp_path: Path) -> None:
    runs = load_batch([write(tmp_path, matrix={"search.seed": [0]})])
    with pytest.raises(UserError, match="expected a batch's name of letters, .*, found '../x': choose it by --name"):
        run_batch(runs, BatchOrder("../x"), Console(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_at_80_columns_tables_rather_leave_out_columns_than_fold_names(states: list[RunState], tmp_path: Path) -> None:
    rows = results_frame(states, tmp_path).assign(stage=str(Stage.FINISHED), file_bytes=4_321_000_000, evaluations=1000)
    figures = {"bits_per_weight": 3.0, "perplexity": 9.0, "mean_kl": 0.3, "simulated_kl": 0.3, "seconds": 36000.0}
    for name, columns in {
        "s2": "run MB bits simulated KL perplexity tried s",
        "stdlib-6m-3.0bpw-genetic": "run MB bits simulated KL perplexity",
        "stdlib-6m-3.0bpw-genetic-population-64": "run MB simulated KL",
        "n" * 70: "run MB",
    }.items():
        out = StringIO()
        named = rows.assign(**figures, name=[f"{name}{n}" for n in range(len(rows))])
        show_results(named, tmp_path, Console(file=out))
        table = out.getvalue().partition(" table  ")[0]
        assert max(map(len, table.splitlines())) <= 80 and table.count("4321.000") == len(states) and "…" not in table
        assert all(f"{name}{n}" in table for n in range(len(rows))) is (len(name) < 70)
        assert columns.split() in [line.split() for line in table.splitlines()]
    name, plan = "stdlib-6m-3.0bpw-genetic", states[0].run.plan
    renamed = replace(plan, config=plan.config.model_copy(update={"name": name}))
    states[0].run, states[0].stage, states[0].doing = replace(states[0].run, plan=renamed), Stage.PREPARING, "bank"
    Console(file=out, width=80).print(BatchView(states, Console(quiet=True)).table())
    assert [name, "bank"] in [line.split() for line in out.getvalue().splitlines()]
