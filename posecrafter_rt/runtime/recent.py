"""The last few things that were computed, by what they were computed from.

Layer 5.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """At most `most` values; the one that was used longest ago goes first. Who still holds one that went keeps it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not kept."""
        if key not in self._values:
            if len(self) == self.most:
                self._values.popitem(last=False)  # before a new one takes memory, too
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]

    def forget(self, key: Hashable) -> None:
        """Keep nothing of a key."""
        self._values.pop(key, None)

    def clear(self) -> None:
        """Keep none."""
        self._values.clear()
