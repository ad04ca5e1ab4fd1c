#!/usr/bin/env bash
# Start, break and resume runs on pretended hosts, with each launcher; prepare data on a Ray cluster that loses nodes;
# let the doctor find faults. Prints a table of what happened:
#
#   bash tests/cluster/run.sh [--launcher colossalai|torchrun|slurm|ray|doctor] [--only WORD] [--quick] [--at_once N]
#                             [--keep DIR] [--patience FACTOR] [--repeats N] [--limit SECONDS] [--skip_if_missing]
#
# It takes 17 to 20 minutes on two idle cores, --quick three to four minutes. It prints each cell when done,
# and ends with code 1 if a cell is not as expected. It needs root, iproute2 and openssh-server; with slurm-wlm and
# munge also Slurm is tested, with tcsh its login shell, and with requirements-ray.txt Ray. It installs nothing. --quick
# has the cells whose outcome does not depend on the speed of the machine: each launcher trains, loses a host, gets
# SIGTERM; Ray loses a node.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    # The comment above is the help.
    sed -n '2,/^set /s/^# \{0,1\}//p' tests/cluster/run.sh
    exit
fi
python=.venv/bin/python
if [[ ! -x $python ]]; then
    echo "$0: error: no .venv here; make it with bash run_tests.sh" >&2
    exit 2
fi
exec "$python" -m tests.cluster.table "$@"
