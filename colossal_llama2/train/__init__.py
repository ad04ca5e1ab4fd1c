"""Training: what one run is made of (run), what a step is (loop), what is kept (checkpoint), how it is split (engine)."""
