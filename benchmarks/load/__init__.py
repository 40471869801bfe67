"""Load that is not the bottleneck: a scripted model API and a reader of many sockets, both in C."""

from benchmarks.load.programs import Provider, Seen, Tap, provider, tap

__all__ = ["Provider", "Seen", "Tap", "provider", "tap"]
