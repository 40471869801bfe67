"""Celery's consumer, with one hole mended: a worker must outlive a broker that went away under it."""

from __future__ import annotations

import logging

from celery.worker.consumer import Consumer

logger = logging.getLogger(__name__)


class LastingConsumer(Consumer):  # type: ignore[misc]  # Celery has no types
    """Reconnects whatever the clean-up of the broken connection comes to."""

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Take the broken connection apart; Celery reconnects afterwards."""
        try:
            super().on_connection_error_after_connected(exc)
        except AttributeError as error:
            # With runs under way, kombu wants to give their messages back over the connection that Celery has taken
            # apart just before (kombu 5.7), and that would end the worker with every run it holds. The
            # messages need no giving back: the runs go on here, and one that does not is found by its lease.
            logger.warning("The broken connection to the broker is left as it is: %r", error)
