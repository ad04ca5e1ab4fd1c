#!/usr/bin/env bash
# Fine-tune on conversations on every host of `hostfile`:
# cp train_sft.example.sh train_sft.sh, set the variables below, bash train_sft.sh.
#
# Each variable can come from the environment instead, and arguments go to train_sft.py, where a flag's last value
# counts:
#   NPROC_PER_NODE=2 DATASET="arrow_sft/part-00000 arrow_sft/part-00001" bash train_sft.sh --plugin gemini --lr 2e-5
# train.example.sh is its twin, apart because each is copied and edited by itself; what both do is in launch.sh.
# Paths are relative to this script's folder. On several hosts it and the paths must be the same on each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source ./launch.sh

# For hosts joined by InfiniBand: which adapters and which network interface NCCL uses. Set what `ibstat` and
# `ip link` list; elsewhere NCCL finds its way without them.
# export NCCL_IB_DISABLE=0
# export NCCL_IB_HCA=mlx5_1:1,mlx5_2:1,mlx5_3:1,mlx5_4:1
# export NCCL_SOCKET_IFNAME=eth0

# Where to run, and with which launcher: launch.sh describes these and the other variables of a launch.
LAUNCHER="${LAUNCHER:-colossalai}"
HOSTFILE="${HOSTFILE:-hostfile}"
NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
MASTER_PORT="${MASTER_PORT:-30013}"

# What to run. The name of a run is RUN_NAME, or else PROJECT_NAME and the time, below each of the parent folders. The
# same command again continues its run.
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

declare -a arguments=(
    --pretrained "$PRETRAINED_MODEL_PATH"
    --dataset "${dataset[@]}"
    --plugin zero2
    --save_interval 400
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

launch train_sft.py "${arguments[@]}"
