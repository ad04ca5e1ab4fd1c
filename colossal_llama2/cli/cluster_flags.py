"""The flags of doctor.py."""

import argparse

from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.cli.value_types import positive_int

SCRIPTS = ("train.py", "train_sft.py")
# The default of torchrun and of colossalai run.
DEFAULT_PORT = 29500
MAX_PORT = 65535
LAUNCHERS = ("colossalai", "torchrun", "slurm")


def doctor_parser() -> CommandParser:
    """Flags of colossal_llama2/train/doctor.py; those of a script may follow its name."""
    parser = CommandParser(
        "python -m colossal_llama2.train.doctor",
        "Check the hosts of a job before it is launched: each fault is one line with its cure. Exit code 2 if there is "
        "one.",
        "  python -m colossal_llama2.train.doctor --hostfile hostfile --nproc_per_node 8 \\\n"
        "      train.py --pretrained llama-2-7b-zh --dataset arrow_output --save_dir runs/first",
    )
    group = parser.flag_group()
    group.add("--hostfile", metavar="FILE", help="the hosts, as for colossalai run (default: this host alone)")
    group.add(
        "--nproc_per_node",
        type=positive_int,
        metavar="N",
        help="processes per host, one per GPU; compared with slots= of the hostfile and with the GPUs",
    )
    group.add(
        "--master_port",
        type=_port,
        metavar="PORT",
        default=DEFAULT_PORT,
        help="port of the first host, which has to be free, and which the others have to reach",
    )
    group.add(
        "--launcher",
        choices=LAUNCHERS,
        default=LAUNCHERS[0],
        help="what is going to start the processes: colossalai run, which uses fabric; torchrun over OpenSSH; or srun, "
        "inside a Slurm job, whose nodes are checked",
    )
    group.add(
        "--quick", action="store_true", help="print no table, and compare model and data by names and sizes alone"
    )
    group.add("--dist", action="store_true", help="also let the hosts exchange data over gloo, and NCCL where GPUs are")
    group.add(
        "--dist_seconds", type=positive_int, metavar="SECONDS", default=20, help="limit of --dist, with its imports"
    )
    group.add(
        "script",
        nargs="?",
        metavar="SCRIPT ...",
        choices=SCRIPTS,
        help="train.py or train_sft.py with its flags: model, data and --save_dir are compared too",
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} given, a port from 1 to {MAX_PORT} allowed")
    return int(text)
