#!/usr/bin/env bash
# Lint, check types and run every test:
#
#   bash run_tests.sh [--stack legacy|current|image] [--python PYTHON] [PYTEST_ARGUMENT]...
#
# --stack chooses what is installed: requirements.txt (legacy, the default), requirements-current.txt or
# requirements-image.txt. Each has an environment of its own beside this file, .venv, .venv-current or .venv-image, made
# if there is none. --python, such as python3.13, chooses the environment's Python, and makes it anew if it has another
# one. Other arguments go to pytest, such as -m "not slow" for the fast subset. Two test files run at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./.ci/environment.sh
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    # The comment above is the help.
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]##*/}"
    exit
fi
while [[ ${1:-} =~ ^(--stack|--python)(=|$) ]]; do
    flag=${BASH_REMATCH[1]}
    if [[ $1 == *=* ]]; then set -- "$flag" "${1#*=}" "${@:2}"; fi
    if [[ -z ${2:-} ]]; then
        echo "$flag needs a value" >&2
        exit 2
    fi
    if [[ $flag == --stack ]]; then choose_stack "$2"; else chosen_python=$2; fi
    shift 2
done
for argument in "$@"; do
    if [[ $argument =~ ^(--stack|--python)(=|$) ]]; then
        echo "${BASH_REMATCH[1]} comes after an argument for pytest; give it first" >&2
        exit 2
    fi
done
install_requirements "$stack_file" requirements-ray.txt requirements-dev.txt
python -m ruff check .
python -m ruff format --check .
python -m mypy
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
