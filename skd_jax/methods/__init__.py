"""One file a method: what it prepares before a task, its loss, and what it keeps after."""
