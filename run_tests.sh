#!/usr/bin/env bash
# Lint, check types and run every test, in .venv beside this file (made if there is none). Arguments go to pytest, such
# as -m "not slow" for the fast subset. Two test files run at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./.ci/environment.sh
install_requirements requirements.txt requirements-ray.txt requirements-dev.txt
python -m ruff check .
python -m ruff format --check .
python -m mypy
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
