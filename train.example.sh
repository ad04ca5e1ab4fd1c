#!/usr/bin/env bash
# Continue the pre-training on every host of `hostfile`:
# cp train.example.sh train.sh, set the variables below, bash train.sh.
#
# Each variable can come from the environment instead, and arguments go to train.py, where a flag's last value counts:
#   NPROC_PER_NODE=2 DATASET="arrow/part-00000 arrow/part-00001" bash train.sh --plugin gemini --lr 3e-4
# All three stages of docs/recipe.md, one after the other, each from the weights of the one before, and the second one
# from its place in the data too:
#   STAGE=align RUN_NAME=align ALIGN_STEPS=1000 bash train.sh
#   STAGE=inject RUN_NAME=inject AFTER=runs/checkpoints/align/epoch-0_step-1000 bash train.sh
#   STAGE=replay RUN_NAME=replay PRETRAINED_MODEL_PATH=runs/checkpoints/inject/modeling MIXTURE="zh=0.5 en=0.5" \
#       bash train.sh
# train_sft.example.sh is its twin, apart because each is copied and edited by itself; what both do is in launch.sh.
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
PROJECT_NAME="${PROJECT_NAME:-colossal-llama-2-pretrain}"
PARENT_SAVE_DIR="${PARENT_SAVE_DIR:-runs/checkpoints}"
PARENT_TENSORBOARD_DIR="${PARENT_TENSORBOARD_DIR:-runs/tensorboard}"
PARENT_CONFIG_FILE="${PARENT_CONFIG_FILE:-runs/configs}"
PRETRAINED_MODEL_PATH="${PRETRAINED_MODEL_PATH:-llama-2-7b-zh}"

# Which stage of the recipe this is:
#   align    only the rows that init_model.py added: new tokens are aligned, and nothing else changes
#   inject   all weights, bucket by bucket: the knowledge of the new language
#   replay   all weights, with the old language mixed in (MIXTURE), to restore it
STAGE="${STAGE:-inject}"
# For align: after how many optimizer steps it ends.
ALIGN_STEPS="${ALIGN_STEPS:-1000}"
# For inject: the checkpoint of align to continue from, with the same data; empty if there was none.
AFTER="${AFTER:-}"
# For replay: shares of the sources of `dataset` in the tokens of each bucket, such as "zh=0.5 en=0.5". A source is
# named as the folder that contains its part-* folders, or NAME of NAME=PATH.
MIXTURE="${MIXTURE:-}"

# All part-* folders to train on, from one output folder of prepare_pretrain_dataset.py or several.
declare -a dataset=(
    "arrow/part-00000"
    "arrow/part-00001"
)
if [[ -n "${DATASET:-}" ]]; then
    # -d '' takes line breaks as separators too; read then ends without its delimiter, which it calls a failure.
    read -r -d '' -a dataset <<<"$DATASET" || true
fi

case "$STAGE" in
    align) stage=(--bucketed --train_new_rows_only --lr 3e-4 --max_steps "$ALIGN_STEPS") ;;
    inject)
        stage=(--bucketed --lr 1e-4)
        if [[ -n "$AFTER" ]]; then
            stage+=(--load_checkpoint "${AFTER%/}/modeling" --continue_data)
        fi
        ;;
    replay)
        if [[ -z "$MIXTURE" ]]; then
            stop "STAGE=replay needs MIXTURE, shares of sources such as MIXTURE=\"zh=0.5 en=0.5\""
        fi
        read -r -a mixture <<<"$MIXTURE"
        stage=(--bucketed --mixture "${mixture[@]}" --lr 3e-5)
        ;;
    *) stop "STAGE is $STAGE; give align, inject or replay" ;;
esac

declare -a arguments=(
    --pretrained "$PRETRAINED_MODEL_PATH"
    --dataset "${dataset[@]}"
    --plugin zero2
    --save_interval 400
    --num_epochs 1
    --micro_batch_size 8
    "${stage[@]}"
    --mixed_precision bf16
    --gradient_clipping 1.0
    --weight_decay 0.01
    --warmup_steps 100
    --use_grad_checkpoint
    --use_flash_attn
    "$@"
)

launch train.py "${arguments[@]}"
