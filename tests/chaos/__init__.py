"""Real processes, real faults, and a checker that compares what every reader saw with what was stored."""
