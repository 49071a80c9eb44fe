"""Counts and times of a server, for Prometheus. No label names a session, so the number of metrics is fixed.

Layer 7: prometheus_client with a registry of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)


class Metrics:
    """The metrics of one server. num_sessions: called when the numbers are read."""

    def __init__(self, num_sessions: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        Gauge("posecrafter_sessions", "Clients connected now.", registry=registry).set_function(num_sessions)
        self.refused = Counter("posecrafter_sessions_refused", "Clients over the cap.", registry=registry)
        self.received = Counter("posecrafter_poses_received", "Poses of all clients.", registry=registry)
        self.dropped = Counter(
            "posecrafter_poses_dropped",
            "Poses without a frame: overtaken by a newer one or a reset, older than a second, over the rate limit, or lost "
            "in a step that failed.",
            ["reason"],
            registry=registry,
        )
        for reason in ("overtaken", "stale", "limited", "failed"):
            self.dropped.labels(reason)
        self.frames = Counter("posecrafter_frames", "Frames by what was done for them.", ["kind"], registry=registry)
        for kind in ("rendered", "held", "repeat"):
            self.frames.labels(kind)
        self.errors = Counter("posecrafter_step_errors", "Steps that failed.", registry=registry)
        self.wait = Histogram(
            "posecrafter_wait_seconds", "What a pose waited for its turn.", buckets=_SECONDS, registry=registry
        )
        self.render = Histogram(
            "posecrafter_render_seconds", "What a pose's step took.", buckets=_SECONDS, registry=registry
        )
        self.age = Histogram(
            "posecrafter_frame_age_seconds", "From a pose's arrival to the sending of its frame.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
