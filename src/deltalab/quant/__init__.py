"""Floor 1: weights kept as codes."""
