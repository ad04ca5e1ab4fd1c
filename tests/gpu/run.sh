#!/usr/bin/env bash
# Install a bundle that bundle.sh collected beside this machine's own packages, without a network, and run tests.gpu:
#
#   bash tests/gpu/run.sh BUNDLE_DIR [FLAG...]
#
# The flags are those of python -m tests.gpu. PYTHON names the interpreter that has PyTorch, python3 by default. The
# packages go into a temporary folder that comes before all others, so the machine's own environment stays as it is. It
# is no virtual environment: one that is made from another one does not see that one's packages.
set -euo pipefail

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

(($#)) || fail "no bundle given; give the folder that tests/gpu/bundle.sh wrote"
[[ -d $1 ]] || fail "$1 is not a folder; give the one that tests/gpu/bundle.sh wrote"
bundle=$(cd "$1" && pwd)
shift
compgen -G "$bundle/*.whl" >/dev/null || fail "$bundle holds no wheels; give the folder that tests/gpu/bundle.sh wrote"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "PYTHON=$python is no program here; give the interpreter that has PyTorch"

packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
"$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
    --target "$packages" "$bundle"/*.whl || fail "the bundle does not fit $("$python" -V); see --python of bundle.sh"
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# --output and --work_dir are relative to where the user is.
export PYTHONPATH=$PYTHONPATH:$root
"$python" -m tests.gpu "$@"
