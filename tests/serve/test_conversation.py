"""What a client may say, by whichever way: messages of a data channel have no limit but this."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from posecrafter_rt.serve.conversation import Conversation, Disconnect
from posecrafter_rt.serve.security import POLICY_VIOLATION, TOO_BIG


@pytest.mark.parametrize(
    "message", [bytes(16385), " " * 16385, "\N{HIRAGANA LETTER A}" * 5462], ids=["bytes", "text", "utf-8"]
)
def test_a_message_that_is_too_long_is_refused_unread(message: bytes | str) -> None:
    nobody: Any = SimpleNamespace()  # has nothing that could be asked of a service or a session
    with pytest.raises(Disconnect) as refused:
        Conversation(nobody, nobody).hear(message)
    assert refused.value.code == TOO_BIG and "16384 at most" in str(refused.value.error.hint)


def test_the_longest_message_is_read() -> None:
    nobody: Any = SimpleNamespace()
    with pytest.raises(Disconnect) as refused:
        Conversation(nobody, nobody).hear(bytes(16384))
    assert refused.value.code == POLICY_VIOLATION and "type 0" in str(refused.value.error)
