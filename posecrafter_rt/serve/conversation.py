"""What a client may send: poses and commands, limited in size and rate.

Layer 7: on the event loop; used for WebSockets and data channels alike.
"""

from __future__ import annotations

import time

from posecrafter_rt.serve.options import MAX_MESSAGE_BYTES
from posecrafter_rt.serve.protocol import Configure, ProtocolError, Record, Reset, decode_pose, parse_command
from posecrafter_rt.serve.security import POLICY_VIOLATION, TOO_BIG, TokenBucket
from posecrafter_rt.serve.service import Service
from posecrafter_rt.serve.session import Session, Waiting

# (rate per second, burst). Cameras give up to 60 poses per second. Faster ones are dropped; a flood disconnects.
POSE_RATE, FLOOD_RATE, COMMAND_RATE = (120.0, 120.0), (1000.0, 2000.0), (10.0, 40.0)


class Disconnect(Exception):
    """The client must go. error: what it is told. code: of the close."""

    def __init__(self, error: ProtocolError, code: int) -> None:
        super().__init__(str(error))
        self.error, self.code = error, code


class Conversation:
    """One client's messages, in order."""

    def __init__(self, service: Service, session: Session) -> None:
        self._service, self._session = service, session
        self._poses, self._all, self._commands = (
            TokenBucket(*limit) for limit in (POSE_RATE, FLOOD_RATE, COMMAND_RATE)
        )

    def hear(self, message: bytes | str) -> None:
        """Act on a message. Raises: Disconnect for one that is not in the protocol, too long, or one too many."""
        now_s = time.perf_counter()
        is_command = isinstance(message, str)
        num_bytes = len(message.encode() if isinstance(message, str) else message)
        if num_bytes > MAX_MESSAGE_BYTES:
            raise Disconnect(ProtocolError(f"a message of {num_bytes} bytes", f"{MAX_MESSAGE_BYTES} at most"), TOO_BIG)
        if not self._all.take(now_s) or (is_command and not self._commands.take(now_s)):
            raise Disconnect(ProtocolError("too many messages", "send poses at the rate of a camera"), POLICY_VIOLATION)
        try:
            if isinstance(message, str):
                self._obey(message)
            else:
                self._offer(message, now_s)
        except ProtocolError as error:
            raise Disconnect(error, POLICY_VIOLATION) from error

    def _offer(self, message: bytes, now_s: float) -> None:
        pose = decode_pose(message)
        if self._poses.take(now_s):
            self._service.offer(
                self._session, Waiting(pose, self._service.watch.earliest_s(now_s), self._session.num_resets)
            )
        else:
            self._session.count_limited()

    def _obey(self, message: str) -> None:
        command = parse_command(message)
        if isinstance(command, Configure):
            self._session.configure(command)
        elif isinstance(command, Reset):
            self._session.reset()
        else:
            assert isinstance(command, Record)
            self._service.record(self._session, command.on)
