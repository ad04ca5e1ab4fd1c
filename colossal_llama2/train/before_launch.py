"""Check the flags and folders of a run once, before a launcher starts a process for each GPU.

    python -m colossal_llama2.train.before_launch --nproc_per_node 8 --hostfile hostfile train.py --pretrained ...

prints nothing and exits with code 0, or prints one line and exits with 2. The run itself checks again. It imports no
torch and writes nothing. Folders are checked only on this host.
"""

import argparse
from collections.abc import Sequence

from colossal_llama2 import errors, launcher, logs
from colossal_llama2.cli import train_flags
from colossal_llama2.cluster.hostfile import check_slots, read
from colossal_llama2.errors import UserError

PARSERS = {"train.py": train_flags.train_parser, "train_sft.py": train_flags.train_sft_parser}
# No job has more; a larger number is a mistake.
MOST_RANKS = 1_000_000


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags of the launcher and of the script, and check those of the script."""
    own = own_parser().parse_args(argv)
    with errors.one_line_errors(own.script):
        launcher.stand_for(world_size(own.nproc_per_node, own.hostfile))
    args = PARSERS[own.script]().parse_args(own.words)
    logs.configure_logging()
    logs.get_logger().disabled = True
    with errors.one_line_errors(own.script):
        from colossal_llama2.train.settings.from_flags import resolve

        resolve(args)


def own_parser() -> argparse.ArgumentParser:
    """The launcher's flags that decide the number of processes, and the script with its own flags."""
    parser = argparse.ArgumentParser(prog="before_launch", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--nproc_per_node", required=True, help="as for colossalai run")
    parser.add_argument("--hostfile", required=True, help="as for colossalai run")
    parser.add_argument("script", choices=PARSERS, help="what is going to be launched; its arguments follow")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def world_size(per_host: str, hostfile: str) -> int:
    """Number of processes of the job. Raises UserError if the number per host or the hostfile is invalid."""
    if not per_host.isdecimal() or not 1 <= int(per_host) <= MOST_RANKS:
        raise UserError(f"NPROC_PER_NODE is {per_host!r}; give the number of GPUs per host, such as 8")
    hosts = read(hostfile)
    check_slots(hostfile, hosts, int(per_host))
    return int(per_host) * len(hosts)


if __name__ == "__main__":
    main()
