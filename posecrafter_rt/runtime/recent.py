"""The last few computed values, by what they were computed from.

Layer 5.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Keeps at most `most` values and drops the least recently used first. Whoever holds a dropped one still has it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key; make it if it is not kept."""
        if key not in self._values:
            if len(self) == self.most:
                self._values.popitem(last=False)  # dropped before the new one takes memory
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]

    def forget(self, key: Hashable) -> None:
        """Drop the value of a key."""
        self._values.pop(key, None)

    def clear(self) -> None:
        """Drop all values."""
        self._values.clear()
