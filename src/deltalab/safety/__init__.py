"""Floor 5: which weights carry safety, and what became of it: scores, groups, judges, evaluation, verdicts."""
