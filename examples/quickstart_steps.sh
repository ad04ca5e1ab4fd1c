# Sourced by quickstart.sh: what its steps share, with the toy model and the real one. Expects the variables `out`, the
# folder to write to, `steps`, the number of steps, and `step_number`, 0.

# step FUNCTION TITLE OUTPUT...: announce, then run FUNCTION unless an earlier run finished it. What an interrupted run
# left of its outputs is removed first, and a step that runs makes all later ones run again.
step() {
    local work=$1 title=$2 started=$SECONDS old
    shift 2
    step_number=$((step_number + 1))
    if [[ -f $out/done/$step_number ]]; then
        echo "== [$step_number/$steps] $title: done before"
        return
    fi
    echo "== [$step_number/$steps] $title"
    for ((old = step_number; old <= steps; old++)); do
        rm -f -- "$out/done/$old"
    done
    rm -rf -- "$@"
    # Called plainly, not in a condition: there, bash would ignore `set -e` inside the function.
    "$work"
    mkdir -p "$out/done"
    touch "$out/done/$step_number"
    echo "   $((SECONDS - started)) s"
}

# prepare SCRIPT MAX_LENGTH BINS TOKENIZER NAME DIR,DIR: from jsonl to bins under $out/NAME/arrow.
prepare() {
    python "$1" --max_length "$2" --num_spliced_dataset_bins "$3" --tokenizer_dir "$4" --data_input_dirs "$6" \
        --data_cache_dir "$out/$5/cache" --data_jsonl_output_dir "$out/$5/jsonl" --data_arrow_output_dir "$out/$5/arrow"
}

# outputs NAME: the flags for the output folders of a stage.
outputs() {
    printf '%s\n' --save_dir "$out/$1" --tensorboard_dir "$out/logs/$1" --config_file "$out/config/$1.json"
}

# evaluate STAGE FOLDER [ARGUMENT...]: measure $out/FOLDER/modeling, which train.py or train_sft.py wrote, on the
# held-out text.
evaluate() {
    python examples/quickstart_evaluate.py --held_out_dir "$out/data/held_out" --output_file "$out/results.json" \
        --stage "$1" --model_path "$out/$2/modeling" --tensorboard_dir "$out/logs/$2" \
        --config_file "$out/config/$2.json" "${@:3}"
}

# with_torchrun ARGUMENT...: two ranks on this machine, one thread each.
with_torchrun() {
    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 "$@"
}

# show_results: the table of all stages, and the time taken.
show_results() {
    echo
    python examples/quickstart_table.py --results_file "$out/results.json"
    echo
    echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. TensorBoard: .venv/bin/tensorboard --logdir $out/logs"
}
