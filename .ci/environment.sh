# Sourced by quickstart.sh and run_tests.sh from the repository's root: a virtual environment with what they need.

# install_requirements FILE...: make .venv if there is none, put it on PATH, and install the pinned packages into it.
# A stamp with the files' hash makes the next call instant.
install_requirements() {
    local python stamp wanted file
    # Also false for an environment whose making was interrupted before pip was in it.
    if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
        python=$(command -v python3.11 || command -v python3 || true)
        if [[ -z $python ]] || ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
            echo "Python 3.11 is needed: no python3.11 on PATH, and python3 is not 3.11" >&2
            exit 2
        fi
        echo "Making a virtual environment in .venv"
        "$python" -m venv --clear .venv
    fi
    export VIRTUAL_ENV=$PWD/.venv PATH=$PWD/.venv/bin:$PATH
    for file in "$@"; do
        stamp=.venv/installed-$file.sha256
        wanted=$(sha256sum <"$file")
        if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
            echo "Installing $file (PyTorch is a download of about 2.5 GB the first time)"
            python -m pip install --quiet --disable-pip-version-check --no-deps -r "$file"
            echo "$wanted" >"$stamp"
        fi
    done
}
