#!/usr/bin/env bash
# Lint and run every test, in .venv beside this file (made if there is none). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./.ci/environment.sh
install_requirements requirements.txt requirements-dev.txt
python -m ruff check .
python -m ruff format --check .
python -m pytest "$@"
