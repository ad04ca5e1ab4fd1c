"""Faults on purpose: crashes at every point of a save, kills at random times, damaged files."""
