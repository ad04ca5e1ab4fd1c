# Sourced by quickstart.sh and run_tests.sh from the repository's root: virtual environments with what they need.

# The default: what requirements.txt pins. choose_stack changes these.
environment=.venv
python_versions=(3.11)
stack_file=requirements.txt
# A Python that the caller asked for by name or path, instead of the first in python_versions that is installed.
chosen_python=

# choose_stack NAME: set the folder of the environment, its Python versions, and the file of requirements.
choose_stack() {
    case $1 in
        legacy) ;;
        current) environment=.venv-current python_versions=(3.11 3.12 3.13) stack_file=requirements-current.txt ;;
        image) environment=.venv-image python_versions=(3.12 3.11 3.13) stack_file=requirements-image.txt ;;
        *)
            echo "--stack $1 given; legacy, current and image are allowed" >&2
            exit 2
            ;;
    esac
}

# version_of PYTHON: its version, such as 3.11; nothing if it cannot be run.
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# is_allowed VERSION: true if the stack's environment may have this version of Python.
is_allowed() {
    [[ -n $1 && " ${python_versions[*]} " == *" $1 "* ]]
}

# one_of WORD...: the words as in "a, b or c".
one_of() {
    local list
    list=$(printf ', %s' "${@:1:$#-1}")
    list=${list#, }
    echo "${list:+$list or }${!#}"
}

# find_python: print the Python to make the environment with.
find_python() {
    local candidate candidates=("${python_versions[@]/#/python}" python3) allowed found
    if [[ -n $chosen_python ]]; then candidates=("$chosen_python"); fi
    for candidate in "${candidates[@]}"; do
        if is_allowed "$(version_of "$candidate")"; then
            echo "$candidate"
            return
        fi
    done
    allowed=$(one_of "${python_versions[@]}")
    found="was not found as $(one_of "${candidates[@]}")"
    if [[ -n $chosen_python ]]; then
        found=$(version_of "$chosen_python")
        found="$chosen_python ${found:+is }${found:-cannot be run}"
    fi
    echo "Python $allowed is needed, but $found" >&2
    exit 2
}

# install_requirements FILE...: make the environment if there is none, put it on PATH, and install the pinned packages
# into it. A stamp with the files' hash makes the next call instant.
install_requirements() {
    local python stamp wanted file size version=
    # An environment whose making was interrupted before pip was in it is none.
    if "$environment/bin/python" -c 'import pip' 2>/dev/null; then
        version=$(version_of "$environment/bin/python")
    fi
    if [[ -n $chosen_python ]] || ! is_allowed "$version"; then
        python=$(find_python)
        if [[ $(version_of "$python") != "$version" ]]; then
            echo "Making a virtual environment in $environment"
            "$python" -m venv --clear "$environment"
        fi
    fi
    export VIRTUAL_ENV=$PWD/$environment PATH=$PWD/$environment/bin:$PATH
    for file in "$@"; do
        stamp=$environment/installed-$file.sha256
        wanted=$(sha256sum <"$file")
        if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
            size=
            if [[ $file == "$stack_file" ]]; then size=" (PyTorch and CUDA are a download of 3 GB the first time)"; fi
            echo "Installing $file$size"
            python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r "$file"
            echo "$wanted" >"$stamp"
        fi
    done
}
