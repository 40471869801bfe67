"""Runner: one run's life from claim to its one terminal event."""

from headwater.runner.attempt import Save
from headwater.runner.leases import Hold, LeaseKeeper, Stop
from headwater.runner.runner import Runner

__all__ = ["Hold", "LeaseKeeper", "Runner", "Save", "Stop"]
