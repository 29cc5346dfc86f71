"""Floor 2: data. Conversations, their tokens and labels, batches; `tasks/` holds one file a task."""
