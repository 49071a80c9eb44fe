"""How commands print: stages with the time left, durations for people."""

from __future__ import annotations

import pytest

from posecrafter_rt.cli.output import duration_of, print_table, stages


def test_stages_tell_the_time_left_where_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with stages("building") as on_stage:
        on_stage("loading", None)
        on_stage("compiling", 200.0)
        on_stage("writing", 4.6)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines() == [
        "building: loading",
        "building: compiling, about 3 min left",
        "building: writing, about 5 s left",
    ]


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
