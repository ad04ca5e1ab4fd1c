#!/usr/bin/env bash
# Collect the wheels that a ready-made GPU machine without a network lacks, at most 64 MiB in all:
#
#   bash tests/gpu/bundle.sh OUTPUT_DIR [--transformers pinned|own] [--python 3.12] [--without NAME]...
#
# Such a machine brings Python, PyTorch, triton, transformers, tokenizers, TensorBoard, matplotlib and what those need.
# --transformers pinned (the default) adds transformers of requirements.txt with tokenizers, huggingface_hub and requests,
# which fit it; own leaves them to the machine. --python is the machine's version. --without leaves a package out that
# the machine has: pyarrow is two thirds of the bundle. tests/gpu/run.sh installs the bundle. Needs bash, Python with
# pip, and a network.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
limit=$((64 * 2 ** 20))

fail() {
    echo "bundle.sh: $1" >&2
    exit 2
}

# What the training commands import, and a machine with PyTorch and transformers may lack. ColossalAI is built here,
# since it is published as source alone.
packages=(pyarrow datasets dill multiprocess xxhash orjson backports.zstd sentencepiece einops liger-kernel)
# The oldest that the pinned datasets takes: with newer ones, the pinned transformers would not fit.
small_pyarrow=21.0.0

transformers=pinned python_version=3.12 output='' without=' '
while (($#)); do
    case $1 in
        --transformers | --python | --without)
            (($# > 1)) || fail "$1 needs a value"
            case $1 in
                --transformers) transformers=$2 ;;
                --python) python_version=$2 ;;
                --without) without+="$2 " ;;
            esac
            shift 2
            ;;
        -*) fail "$1 given; --transformers, --python and --without are allowed" ;;
        *)
            [[ -z $output ]] || fail "two output folders given, $output and $1; give one"
            output=$1
            shift
            ;;
    esac
done
[[ -n $output ]] || fail "no output folder given; give a new one"
[[ ! -e $output ]] || fail "$output already exists; give a new folder"
[[ $python_version =~ ^3\.[0-9]+$ ]] || fail "--python $python_version given; a version such as 3.12 is allowed"
case $transformers in
    pinned)
        packages+=(transformers tokenizers huggingface_hub requests urllib3 charset-normalizer)
        ;;
    own) ;;
    *) fail "--transformers $transformers given; pinned and own are allowed" ;;
esac

# pinned NAME: the requirement in requirements.txt, without its marker.
pinned() {
    if [[ $1 == pyarrow && $transformers == pinned ]]; then
        echo "pyarrow==$small_pyarrow"
    else
        # Without marker and hashes. Names are normalized there.
        grep -hoE "^${1//[_.]/[-_.]}==[^ ;]+" "$root/requirements.txt" "$root/requirements-gpu.txt" ||
            fail "no file of requirements pins $1"
    fi
}

# The tags of wheels for x86-64: pip matches each exactly.
platforms=()
for tag in manylinux1 manylinux2010 manylinux2014 manylinux_2_{5,12,17,24,26,27,28,31,34}; do
    platforms+=(--platform "${tag}_x86_64")
done
requirements=()
for name in "${packages[@]}"; do
    [[ $without == *" $name "* ]] || requirements+=("$(pinned "$name")")
done
partial=$(mktemp -d "$output.XXXXXX" 2>/dev/null) || fail "$output cannot be made; give a folder in one that exists"
trap 'rm -rf "$partial"' EXIT
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
    --python-version "$python_version" "${platforms[@]}" --dest "$partial" "${requirements[@]}" ||
    fail "pip could not download the wheels above"
if [[ $without != *" colossalai "* ]]; then
    python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$partial" "$(pinned colossalai)" ||
        fail "pip could not build colossalai"
fi

total=0
while read -r size path; do
    printf '%10s kB  %s\n' "$(((size + 999) / 1000))" "${path##*/}"
    total=$((total + size))
done < <(find "$partial" -type f -printf '%s %p\n' | sort -rn)
printf '%10s kB  in all, of %s allowed\n' "$(((total + 999) / 1000))" "$((limit / 1000))"
if ((total > limit)); then
    fail "$((total - limit)) bytes over the limit of 64 MiB; leave out what the machine has with --without NAME"
fi
chmod 755 "$partial"
mv -T "$partial" "$output"
trap - EXIT
