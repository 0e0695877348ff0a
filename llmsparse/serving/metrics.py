"""What Prometheus may ask: how much was asked, answered and abandoned, how long it took, and what is running now."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from llmsparse.serving.engine import State

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Of one server."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("llmsparse_requests", "Requests answered", ["path", "status"], registry=self._registry)
        self.abandoned = Counter("llmsparse_abandoned", "Requests whose client hung up", registry=self._registry)
        self.prompt_tokens = Counter("llmsparse_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self.tokens = Counter("llmsparse_generated_tokens", "Tokens of answers", registry=self._registry)
        self.first = Histogram(
            "llmsparse_first_token_seconds", "From request to first token", registry=self._registry, buckets=SECONDS
        )
        self.seconds = Histogram(
            "llmsparse_request_seconds", "From request to last token", registry=self._registry, buckets=SECONDS
        )
        self._registry.register(_Now(state))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Now:
    """The engine's state, asked when somebody asks."""

    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        yield GaugeMetricFamily("llmsparse_running", "Answers in the batch", state.running)
        yield GaugeMetricFamily("llmsparse_waiting", "Answers in the queue", state.waiting)
        yield GaugeMetricFamily("llmsparse_reserved_tokens", "Tokens that room is set aside for", state.reserved)
        yield GaugeMetricFamily("llmsparse_room_tokens", "Tokens that there is room for", state.room)
