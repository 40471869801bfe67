"""Benchmarks: ratios measured side by side in one run. `scripts/bench` runs them all."""
