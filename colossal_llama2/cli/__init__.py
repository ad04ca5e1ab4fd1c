"""Every flag of every command, defined once, in plain argparse.

A flag that the original's README and code spell differently has both spellings on one line. What argparse can judge by
itself (type, range, choice) is judged here. What needs two flags or the file system is judged by the command, which
asks `dependent_flags.unused_flags` for flags that would change nothing.
These modules import little but the standard library, so `--help` is instant.
"""
