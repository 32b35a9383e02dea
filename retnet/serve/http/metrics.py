"""Metrics in Prometheus' text format. The values of every label come from a fixed set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from retnet.serve.http.access.record import Record
from retnet.serve.http.service import Service
from retnet.serve.http.sessions.store import SessionStore
from retnet.serve.http.stream import Stream

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Measure = Callable[[], Iterable[Metric]]
router = APIRouter()


class Metrics:
    """The metrics of one server, in a registry of its own. `measures` are further sources, asked at every scrape."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.measures: list[Measure] = [lambda: _engine_metrics(service)]
        self.registry.register(_Measures(self.measures))
        labels = ("route", "method", "status")
        self._requests = Counter("retnet_requests", "HTTP requests.", labels, registry=self.registry)
        self._seconds = Histogram(
            "retnet_request_seconds", "From a request to the end of its response.", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._queue, self._first, self._token = (
            Histogram(f"retnet_{name}_seconds", text, buckets=buckets, registry=self.registry)
            for name, text, buckets in (
                ("queue", "From submission to a slot, per output.", SECONDS),
                ("time_to_first_token", "From submission to the first token, per output.", SECONDS),
                ("time_per_token", "Mean time per token after the first, per output.", TOKEN_SECONDS),
            )
        )
        self._finished = Counter("retnet_outputs", "Outputs that ended.", ("reason",), registry=self.registry)
        service.observers.append(self._count_output)

    def count_request(self, record: Record) -> None:
        """Count an HTTP request that ended."""
        method = record.method if record.method in METHODS else "other"
        self._requests.labels(record.route, method, str(record.status)).inc()
        self._seconds.labels(record.route).observe(record.seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _count_output(self, stream: Stream) -> None:
        """Count an output that ended, and add it to the record of its request."""
        generation, record = stream.generation, stream.record
        reason = generation.finish_reason or "failed"
        self._finished.labels(reason).inc()
        queue = None if stream.slot_given is None else stream.slot_given - stream.submitted
        first = None if stream.first_token is None else stream.first_token - stream.submitted
        if queue is not None:
            self._queue.observe(queue)
        if stream.first_token is not None and first is not None:
            self._first.observe(first)
            if stream.num_tokens > 1:
                self._token.observe((stream.last_token - stream.first_token) / (stream.num_tokens - 1))
        if record is not None:
            record.prompt_tokens += generation.output_start
            record.cached_tokens += generation.cached
            record.new_tokens += stream.num_tokens
            record.finish_reasons.append(reason)
            record.queue_seconds = queue if record.queue_seconds is None else record.queue_seconds
            record.first_token_seconds = first if record.first_token_seconds is None else record.first_token_seconds


class _Measures(Collector):
    """Values that are read when they are asked for."""

    def __init__(self, measures: list[Measure]):
        self.measures = measures

    def collect(self) -> Iterable[Metric]:
        for measure in self.measures:
            yield from measure()


def _engine_metrics(service: Service) -> Iterable[Metric]:
    stats = service.stats
    cost = stats.bytes_per_slot
    gauges = {
        "slots": ("Slots of the engine.", stats.num_slots),
        "running": ("Requests in slots.", stats.running),
        "waiting": ("Requests that wait for a slot.", stats.waiting),
        "slot_state_bytes": ("Memory of the states of all slots.", cost.state * stats.num_slots),
        "slot_bytes": ("Memory of all slots, with sampling tables and indexes.", cost.total * stats.num_slots),
        "ready": ("Whether the server takes requests.", int(service.alive and not service.draining)),
    }
    counters = {
        "steps": ("Steps of the engine.", stats.steps),
        "prompt_tokens": ("Prompt tokens that were read.", stats.prompt_tokens),
        "new_tokens": ("Tokens that were generated.", stats.new_tokens),
        "drafted_tokens": ("Tokens that were drafted.", stats.drafted),
        "accepted_tokens": ("Drafted tokens that were right.", stats.accepted),
    }
    prefix = stats.prefix
    if prefix is not None:
        gauges["prefix_states"] = ("States in the prefix cache.", prefix.states)
        gauges["prefix_state_bytes"] = ("Memory of the states in the prefix cache.", prefix.state_bytes)
        counters["prefix_hits"] = ("Prompts that continued from a cached prefix.", prefix.hits)
        counters["prefix_tokens_saved"] = ("Prompt tokens that were not read again.", prefix.tokens_saved)
        counters["prefix_stored"] = ("States stored in the prefix cache.", prefix.stored)
        counters["prefix_evicted"] = ("States evicted from the prefix cache.", prefix.evicted)
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"retnet_{name}", text, value)
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"retnet_{name}", text, value)
    if prefix is not None:
        misses = CounterMetricFamily("retnet_prefix_misses", "Prompts without a cached prefix.", labels=["reason"])
        for reason, count in sorted(prefix.misses.items()):
            misses.add_metric([reason], count)
        yield misses


def session_metrics(store: SessionStore) -> Iterable[Metric]:
    """How many sessions there are, and what they take."""
    gauges = {
        "sessions": ("Sessions.", len(store)),
        "session_memory_bytes": ("Memory of the sessions' states.", store.memory_used),
        "session_disk_bytes": ("Disk that the sessions take.", store.disk_used),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"retnet_{name}", text, value)


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """All metrics, for Prometheus."""
    return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)
