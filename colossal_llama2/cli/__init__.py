"""Every flag of every command, defined once, with plain argparse.

A flag that the original's README and code spell differently has both spellings. Types, ranges and choices are checked
here. Combinations of flags and the file system are checked by the command; `dependent_flags.unused_flags` lists flags
that would have no effect. These modules import little beyond the standard library, so `--help` is instant.
"""
