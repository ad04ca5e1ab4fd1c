#!/usr/bin/env bash
# Fine-tune on conversations on every host of `hostfile`:
# cp train_sft.example.sh train_sft.sh, set the variables below, bash train_sft.sh.
#
# Each variable can come from the environment instead, and arguments go to train_sft.py, where a flag's last value counts:
#   NPROC_PER_NODE=2 DATASET="arrow_sft/part-00000 arrow_sft/part-00001" bash train_sft.sh --plugin gemini --lr 2e-5
# train.example.sh is its twin, apart because each is copied and edited by itself.
# Paths are relative to this script's folder. On several hosts it and the paths must be the same on each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# For hosts joined by InfiniBand: which adapters and which network interface NCCL uses. Set what `ibstat` and
# `ip link` list; elsewhere NCCL finds its way without them.
# export NCCL_IB_DISABLE=0
# export NCCL_IB_HCA=mlx5_1:1,mlx5_2:1,mlx5_3:1,mlx5_4:1
# export NCCL_SOCKET_IFNAME=eth0

# Where to run.
HOSTFILE="${HOSTFILE:-hostfile}"
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
MASTER_PORT="${MASTER_PORT:-30013}"

# What to run. The name of each run is PROJECT_NAME and the time, below each of the parent folders.
PROJECT_NAME="${PROJECT_NAME:-colossal-llama-2-sft}"
PARENT_SAVE_DIR="${PARENT_SAVE_DIR:-runs/checkpoints}"
PARENT_TENSORBOARD_DIR="${PARENT_TENSORBOARD_DIR:-runs/tensorboard}"
PARENT_CONFIG_FILE="${PARENT_CONFIG_FILE:-runs/configs}"
PRETRAINED_MODEL_PATH="${PRETRAINED_MODEL_PATH:-checkpoint_dir/modeling}"

# All part-* folders to train on, from one output folder of prepare_sft_dataset.py or several. Prepare them with
# --splicing best_fit: samples are then packed, conversations stay apart, and almost nothing is padded. For samples of
# one conversation each, add --group_by_length below.
declare -a dataset=(
    "arrow_sft/part-00000"
    "arrow_sft/part-00001"
)
if [[ -n "${DATASET:-}" ]]; then
    # -d '' takes line breaks as separators too; read then ends without its delimiter, which it calls a failure.
    read -r -d '' -a dataset <<<"$DATASET" || true
fi

# Without these checks `colossalai run` ends with exit code 0 and no training, or trains only on this host.
if [[ ! -s "$HOSTFILE" ]]; then
    echo "$0: error: no file $HOSTFILE, or an empty one; cp hostfile.example hostfile and write your hosts into it" >&2
    exit 2
fi
if [[ -n "$(sort "$HOSTFILE" | uniq -d)" ]]; then
    echo "$0: error: $HOSTFILE names $(sort "$HOSTFILE" | uniq -d | head -n 1) twice; name each host once" >&2
    exit 2
fi

while read -r host _; do
    if [[ -n "$host" ]] && ! getent hosts "$host" >/dev/null; then
        echo "$0: error: $HOSTFILE names $host, which this host cannot find; write your hosts' names into it" >&2
        exit 2
    fi
done <"$HOSTFILE"

RUN_NAME="${RUN_NAME:-$PROJECT_NAME-$(date +%Y-%m-%d-%H-%M-%S)}"

declare -a arguments=(
    --pretrained "$PRETRAINED_MODEL_PATH"
    --dataset "${dataset[@]}"
    --plugin zero2
    --save_interval 400
    --save_dir "${PARENT_SAVE_DIR%/}/$RUN_NAME"
    --tensorboard_dir "${PARENT_TENSORBOARD_DIR%/}/$RUN_NAME"
    --config_file "${PARENT_CONFIG_FILE%/}/$RUN_NAME.json"
    --num_epochs 1
    --micro_batch_size 8
    --accumulation_steps 8
    --lr 5e-5
    --mixed_precision bf16
    --gradient_clipping 1.0
    --weight_decay 0.01
    --warmup_steps 100
    --use_grad_checkpoint
    --use_flash_attn
    --use_neft
    "$@"
)

# Here and once: a mistake is one line, to which the launcher would add dozens. From 128 on, a signal ended the check, as
# Ctrl-C does. Other codes do not concern the flags, such as that there is no `python`.
checked=0
python -m colossal_llama2.train.before_launch --nproc_per_node "$NPROC_PER_NODE" --hostfile "$HOSTFILE" \
    train_sft.py "${arguments[@]}" || checked=$?
if ((checked == 2 || checked >= 128)); then
    exit "$checked"
fi
for word in "$@"; do
    if [[ "$word" == --help || "$word" == -h ]]; then
        exit 0
    fi
done
mkdir -p "$PARENT_SAVE_DIR" "$PARENT_TENSORBOARD_DIR" "$PARENT_CONFIG_FILE"

# `colossalai run` writes every variable of its environment into a command line for each host's shell, in double quotes
# with nothing escaped, where secrets can be read and a "$" is expanded. So it gets only what training needs, and no key or password.
declare -a environment=()
while IFS= read -r name; do
    environment+=("$name=${!name}")
done < <(compgen -e | grep -E '^(PATH|HOME|USER|LOGNAME|LANG|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|SSH_AUTH_SOCK|HF_HOME)$|^(NCCL|CUDA|OMP|GLOO|TORCH|UCX|WANDB|MLFLOW|SWANLAB)_' | grep -vE '^(WANDB|MLFLOW|SWANLAB)_.*(KEY|PASSWORD|TOKEN|SECRET)')

# It also joins the arguments with spaces: @Q quotes them.
env -i "${environment[@]}" \
    colossalai run --nproc_per_node "$NPROC_PER_NODE" --hostfile "$HOSTFILE" --master_port "$MASTER_PORT" \
    train_sft.py "${arguments[@]@Q}"
