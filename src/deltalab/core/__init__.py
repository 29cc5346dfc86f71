"""Floor 0: errors, specs, files, records and statistics. Knows nothing of models."""
