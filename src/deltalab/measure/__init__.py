"""Floor 4: what a delta moves. Knows deltas and plain indices, neither studies nor safety."""
