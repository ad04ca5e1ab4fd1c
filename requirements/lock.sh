#!/usr/bin/env bash
# Write the files of pinned packages at the repository's root, with the hashes of all their wheels and sources:
#
#   bash requirements/lock.sh [--upgrade | --upgrade-package NAME]...
#
# Their sources are the .in files beside this one, which also say why a version is held. Pins stay as they are unless an
# .in file or a flag asks for another. Flags go to `uv pip compile`. Needs uv 0.9 or newer (pip install uv) and a
# network, and downloads metadata alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v uv >/dev/null || {
    echo "lock.sh: uv is not installed; run pip install uv" >&2
    exit 2
}
upgrade=("$@")
stacks=(requirements.txt requirements-current.txt requirements-image.txt)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# lock OUTPUT HEADER ARGUMENT...: resolve for every system and Python version at once. Only Windows needs colorama.
lock() {
    local output=$1 header=$2
    echo "$output"
    if [[ -f $output ]]; then cp "$output" "$work/locked"; else rm -f "$work/locked"; fi
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
        --no-emit-package colorama "${upgrade[@]}" --output-file "$work/locked" "${@:3}"
    {
        printf '# %s\n' "$header" "Written by: bash requirements/lock.sh"
        # Without the list of what other files have, and the paths of temporary files.
        sed -e '/^# The following packages were excluded/,$d' -e "\|^ *# .* $work/|d" "$work/locked"
    } >"$output"
}

# pins FILE...: the lines with packages, each package once, as the first of these files has it.
pins() {
    awk '/^[a-z0-9]/ { split($1, pin, "=="); if (!(pin[1] in seen)) { seen[pin[1]]; sub(/ \\$/, ""); print } }' "$@"
}

# add NAME HEADER ARGUMENT...: requirements-NAME.txt, which is installed after any of the stacks. What the first has is
# left out (tests/test_requirements.py checks that the others have it too), and what others have is at their version.
add() {
    local installed=() package
    pins "${stacks[@]}" >"$work/constraints"
    for package in $(pins "${stacks[0]}" | sed 's/==.*//'); do
        installed+=(--no-emit-package "$package")
    done
    lock "requirements-$1.txt" "$2" "requirements/$1.in" --constraints "$work/constraints" "${installed[@]}" "${@:3}"
}

lock requirements.txt "What the commands need: pip install --no-deps -r requirements.txt" \
    requirements/suite.in requirements/legacy.in
lock requirements-current.txt "Instead of requirements.txt: pip install --no-deps -r requirements-current.txt" \
    requirements/suite.in requirements/current.in
lock requirements-image.txt "Instead of requirements.txt: pip install --no-deps -r requirements-image.txt" \
    requirements/suite.in requirements/image.in
add ray "For --executor ray: pip install --no-deps -r requirements-ray.txt"
add dev "For the tests, benchmarks and quick start: pip install --no-deps -r requirements-dev.txt"
add real "For REAL=1 quickstart.sh: pip install --no-deps -r requirements-real.txt" --no-deps
add llama-cpp "For tests/test_llama_cpp.py: pip install --no-deps -r requirements-llama-cpp.txt" --no-deps
add gpu "For GPUs: pip install --no-deps --no-build-isolation -r requirements-gpu.txt"
pins requirements.txt | grep '^protobuf==' >"$work/overrides"
add trackers "For --report_to: pip install --no-deps -r requirements-trackers.txt" --overrides "$work/overrides"

# Programs that read a saved model, each for an environment of its own. They leave PyTorch out, since it depends on the
# machine which build of it, for CPUs or GPUs, is installed first; so do packages that are compiled against it, which
# vLLM needs for pictures and sound alone.
printf '%s ; python_version < "3"\n' torch torchaudio torchcodec torchvision >"$work/left-out"
for source in requirements/clients/*.in; do
    lock "${source%.in}.txt" "For python -m tests.clients, which installs it" "$source" --overrides "$work/left-out"
done
