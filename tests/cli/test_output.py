"""How commands print: stages with the time left, durations for people."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from posecrafter_rt.cli import output
from posecrafter_rt.cli.output import duration_of, print_table, stages


def test_stages_tell_the_time_left_where_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with stages("building") as on_stage:
        on_stage("loading", None)
        on_stage("compiling", 200.0)
        on_stage("writing", 4.6)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines() == [
        f"building: {output.NOT_KNOWN}",
        "building: loading",
        "building: compiling, about 3 min left",
        "building: writing, about 5 s left",
    ]


def test_only_a_build_that_begins_without_a_time_says_so_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    with stages("building") as on_stage:
        on_stage("loading", None)
        on_stage("writing", None)
    assert capsys.readouterr().err.count(output.NOT_KNOWN) == 1
    with stages("building") as on_stage:
        on_stage("loading", 9.0)
        on_stage("another", None)
    assert "not known" not in capsys.readouterr().err


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """What `stages` makes."""
    made: list[Progress] = []

    class Kept(Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options, auto_refresh=False)  # no thread that draws besides
            made.append(self)

    monkeypatch.setattr(output, "Progress", Kept)
    return made


def test_between_stages_the_time_left_counts_down(made: list[Progress], monkeypatch: pytest.MonkeyPatch) -> None:
    clock, screen = SimpleNamespace(now=50.0), io.StringIO()
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(output, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))

    def shown_at(now: float) -> str:
        clock.now = now
        screen.seek(0)
        screen.truncate()
        made[0].refresh()
        return screen.getvalue()

    with stages("building") as on_stage:
        on_stage("compiling", 200.0)
        assert "about 3 min left" in shown_at(51) and "about 80 s left" in shown_at(170)
        assert "building: compiling" in shown_at(251) and "left" not in shown_at(251)
        on_stage("writing", None)
        assert "building: writing" in shown_at(252) and "left" not in shown_at(252)


def test_where_the_time_left_is_not_known_any_more_the_bar_knows_no_end(made: list[Progress]) -> None:
    """As where a build finds that the user's cache lacks what the last one found there."""
    with stages("building") as on_stage:
        (task,) = made[0].tasks
        on_stage("loading", 300.0)
        assert (task.completed, task.total) == (0, 300)
        on_stage("exporting", None)
        assert task.total is None
        on_stage("compiling", 200.0)
        assert (task.completed, task.total) == (0, 200)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (89.4, "89 s"), (90, "2 min"), (3570, "1 h 0 min"), (5400, "1 h 30 min"), (7199, "2 h 0 min")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration_of(seconds) == text


def test_a_table_may_have_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([])
    assert capsys.readouterr().out == ""
    print_table([], ("name", "size"))
    assert capsys.readouterr().out.split() == ["name", "size"]
