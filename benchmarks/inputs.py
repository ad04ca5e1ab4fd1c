"""The --work_dir of benchmarks that write files."""

import argparse
from pathlib import Path


def make_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Make the folder of --work_dir, which is removed at the end and so must be new. Ends with code 2 if it is not."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        parser.error(f"--work_dir {folder}: {error.strerror}; give a folder that does not exist and can be made")
