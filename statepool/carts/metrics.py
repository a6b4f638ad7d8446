"""Metrics for Prometheus."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

from attrs import evolve
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from statepool.carts.database import Cart
from statepool.carts.sending import Content
from statepool.carts.service import Service
from statepool.carts.spans import Span


class Metrics(Collector):
    """
    A collector that counts the work of this process, and reads the database when metrics are
    requested.

    :param service: the measured service
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "statepool_carts_requests",
            "Requests that were answered",
            ["method", "status"],
            registry=self._registry,
        )
        self._sent = Counter(
            "statepool_carts_sent_bytes", "Bytes of carts and pools sent", registry=self._registry
        )
        self._registry.register(self)

    def asked(self, method: str, status: int) -> None:
        """Count a request."""
        known = method if method in ("GET", "HEAD", "POST", "DELETE") else "other"
        self._requests.labels(known, str(status)).inc()

    def counted(self, content: Content) -> Content:
        """:returns: the same content, with its bytes counted when they are sent"""

        def read(start: int, stop: int) -> Iterator[bytes | Span]:
            for data in content.read(start, stop):
                yield data
                self._sent.inc(len(data))

        return evolve(content, read=read)

    def collect(self) -> Iterable[Metric]:
        """:returns: the present values"""
        carts = GaugeMetricFamily("statepool_carts", "Carts by status", labels=["status"])
        with self._service.database.session():
            there = Cart.select(Cart.status).where(Cart.deleted_date.is_null())
            for status, number in collections.Counter(cart.status for cart in there).items():
                carts.add_metric([status], number)
        yield carts
        yield GaugeMetricFamily(
            "statepool_carts_free_bytes", "Room for carts", self._service.volume.free()
        )

    def describe(self) -> Iterable[Metric]:
        """:returns: nothing: the metrics are only known when they are collected"""
        return ()

    def text(self) -> tuple[bytes, str]:
        """:returns: all metrics as text, and the type of the text"""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
