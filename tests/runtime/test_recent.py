"""What was computed last is kept, a few at most."""

from __future__ import annotations

import weakref

import pytest

from posecrafter_rt.runtime.recent import Recent


class Thing:
    """Something that can be waited for to go."""


def test_a_value_is_made_once_and_what_was_used_longest_ago_goes_first() -> None:
    recent, made = Recent[str](2), list[str]()

    def get(name: str) -> str:
        return recent.get(name, lambda: made.append(name) or name.upper())

    assert [get("a"), get("b"), get("a"), get("c")] == ["A", "B", "A", "C"]
    assert made == ["a", "b", "c"] and len(recent) == 2
    get("a")
    assert made == ["a", "b", "c"]
    get("b")
    assert made == ["a", "b", "c", "b"]
    recent.forget("b")
    get("b")
    assert made == ["a", "b", "c", "b", "b"]
    recent.forget("not there")
    recent.clear()
    assert len(recent) == 0


def test_what_goes_is_let_go_of_before_the_next_is_made_unless_somebody_holds_it() -> None:
    recent = Recent[Thing](1)
    gone, held = weakref.ref(recent.get("a", Thing)), recent.get("a", Thing)

    def made_alone() -> Thing:
        assert gone() is held  # who holds it keeps it
        return Thing()

    second = weakref.ref(recent.get("b", made_alone))
    assert second() is not None
    recent.get("c", lambda: pytest.fail("it is still kept") if second() is not None else Thing())


def test_what_could_not_be_made_is_not_kept() -> None:
    recent = Recent[int](2)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert recent.get("a", lambda: 3) == 3 and len(recent) == 1
