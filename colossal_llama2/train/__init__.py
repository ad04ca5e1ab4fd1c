"""Training: a run and its parts (run), a step (loop), what is kept (checkpoint), how it is split (engine)."""
