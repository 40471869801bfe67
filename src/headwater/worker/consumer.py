"""Celery's consumer, mended: a worker outlives a broker that goes away while runs are under way.

kombu keeps the messages of unfinished tasks. When the connection breaks, Celery takes it apart, and
kombu then still wants to use what was taken apart: to give those messages back, and to acknowledge
them when their tasks end. Both raise AttributeError (kombu 5.7), which Celery takes for a fault of
its own and ends the worker with every run it holds. Neither is needed here: the runs go on, and one
that does not is found by its lease.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from billiard.exceptions import RestartFreqExceeded
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer

from headwater.worker.oneline import OneLine

logger = logging.getLogger(__name__)


class LastingConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    """Reconnects in those cases too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # What an acknowledgement over a broken connection may raise: logged, and the worker goes on.
        self.connection_errors: tuple[type[Exception], ...] = (*self.connection_errors, AttributeError)
        broker = (*self.connection_errors, *self.channel_errors)
        for name in ("celery.worker.request", "kombu.asynchronous.hub", "kombu.transport.redis"):
            logging.getLogger(name).addFilter(OneLine(broker))
        # It waits a second and goes on: a server that is full refuses each new connection at once.
        logging.getLogger("celery.worker.consumer.consumer").addFilter(OneLine((RestartFreqExceeded,)))

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Take the broken connection apart; Celery reconnects afterwards."""
        try:
            with warnings.catch_warnings():
                # It warns of what a later version will do by default. We decided, in the configuration.
                warnings.simplefilter("ignore", CPendingDeprecationWarning)
                super().on_connection_error_after_connected(exc)
        except AttributeError as error:
            logger.warning("The broken connection to the broker is left as it is: %r", error)
