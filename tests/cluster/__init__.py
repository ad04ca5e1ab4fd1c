"""Pretended hosts on one Linux machine, and what training over several hosts is tested with."""
