#!/usr/bin/env bash
# Start, break and resume runs on pretended hosts, with each launcher, and print a table of what happened:
#
#   bash tests/cluster/run.sh [--launcher colossalai|torchrun|slurm] [--only WORD] [--keep DIR] [--patience FACTOR]
#
# It takes half an hour on two busy cores, less on idle ones, and prints each cell when it is done. It ends with code 1
# if a cell is not as expected. It needs root, iproute2 and openssh-server; with slurm-wlm and munge also Slurm is
# tested, and with tcsh its login shell. It installs nothing.
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
exec "$python" -m tests.cluster.scenarios "$@"
