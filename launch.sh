# Sourced by train.sh and train_sft.sh, from the folder of all three: what both do around the flags of their command.
#
# Variables, all of which can come from the environment:
#   LAUNCHER           colossalai (default): `colossalai run` on the hosts of HOSTFILE
#                      torchrun: torchrun on these hosts, started over ssh; MAX_RESTARTS=N starts failed ranks again
#                      slurm: `srun` on the nodes of the present job; see train.example.sbatch
#   HOSTFILE, NPROC_PER_NODE, MASTER_PORT: where, how many processes on each host, and a free port of the first host
#   CHECK_HOSTS        no: do not check the hosts (python -m colossal_llama2.train.doctor) before the launch
#   PASS_ENVIRONMENT   names of variables that colossalai passes to the hosts besides those it passes anyway
#   RUN_NAME           name of the run below PARENT_SAVE_DIR, PARENT_TENSORBOARD_DIR and PARENT_CONFIG_FILE. Without
#                      it, a new command gets PROJECT_NAME and the time, and the same command again the same name.
#   RESUME             auto: continue the run, if it has saved anything. The default for a run that was started before,
#                      and with MAX_RESTARTS.
#                      never: without RUN_NAME, start another run; with it, train.py refuses a run that has saved.

# stop MESSAGE: end with one line and exit code 2.
stop() {
    echo "$0: error: $*" >&2
    exit 2
}

# launch SCRIPT ARGUMENT...: check everything, name the run, and replace this shell by the launch.
launch() {
    local script=$1
    shift
    # Which command was started under which name: a line each, with the command's hash and the name.
    names_file="${PARENT_SAVE_DIR%/}/run_names.txt"
    check_launcher
    local -a words=("$@") run_words=()
    local hash
    hash=$(command_hash "$script" "$PROJECT_NAME" "$@")
    name_run "$hash" "$@"
    local -a arguments=(
        --save_dir "${PARENT_SAVE_DIR%/}/$RUN_NAME"
        --tensorboard_dir "${PARENT_TENSORBOARD_DIR%/}/$RUN_NAME"
        --config_file "${PARENT_CONFIG_FILE%/}/$RUN_NAME.json"
        ${run_words[@]+"${run_words[@]}"}
        ${words[@]+"${words[@]}"}
    )
    check_before_launch "$script" "${arguments[@]}"
    local word
    for word in ${words[@]+"${words[@]}"}; do
        if [[ $word == --help || $word == -h ]]; then
            exit 0
        fi
    done
    if [[ ${CHECK_HOSTS:-yes} != no ]]; then
        local -a hosts=(--hostfile "$HOSTFILE")
        # It finds the nodes of the job itself.
        if [[ $LAUNCHER == slurm ]]; then hosts=(); fi
        python -m colossal_llama2.train.doctor --quick ${hosts[@]+"${hosts[@]}"} --nproc_per_node "$NPROC_PER_NODE" \
            --master_port "$MASTER_PORT" --launcher "$LAUNCHER" "$script" "${arguments[@]}"
    fi
    mkdir -p "$PARENT_SAVE_DIR" "$PARENT_TENSORBOARD_DIR" "$PARENT_CONFIG_FILE"
    keep_name "$hash"
    record_launch "${arguments[@]}"
    # `exec` leaves without the trap.
    if [[ $LAUNCHER == slurm ]]; then rm -f "$HOSTFILE"; fi
    exec python -m colossal_llama2.cluster.watch_launch --launcher "$LAUNCHER" --hostfile "$HOSTFILE" \
        --nproc_per_node "$NPROC_PER_NODE" --master_port "$MASTER_PORT" --max_restarts "${MAX_RESTARTS:-0}" \
        --pass_environment "${PASS_ENVIRONMENT:-}" --name "${0##*/}" "$script" "${arguments[@]}"
}

# What is wrong with the launcher and the environment, before anything else.
check_launcher() {
    case $LAUNCHER in
        colossalai | torchrun) ;;
        slurm)
            if [[ -z ${SLURM_JOB_ID:-} ]]; then
                stop "LAUNCHER=slurm outside of a Slurm job; submit one: sbatch train.sbatch" \
                    "(cp train.example.sbatch train.sbatch)"
            fi
            HOSTFILE=$(mktemp)
            trap 'rm -f "$HOSTFILE"' EXIT
            scontrol show hostnames "$SLURM_JOB_NODELIST" >"$HOSTFILE"
            ;;
        *) stop "LAUNCHER is $LAUNCHER; give colossalai, torchrun or slurm" ;;
    esac
    if ! [[ $MASTER_PORT =~ ^[0-9]{1,5}$ ]] || ((10#$MASTER_PORT < 1 || 10#$MASTER_PORT > 65535)); then
        stop "MASTER_PORT is $MASTER_PORT; give a port from 1 to 65535"
    fi
    if ! [[ ${MAX_RESTARTS:-0} =~ ^[0-9]{1,6}$ ]]; then
        stop "MAX_RESTARTS is $MAX_RESTARTS; give a whole number from 0 on"
    fi
    if ((10#${MAX_RESTARTS:-0} > 0)) && [[ $LAUNCHER != torchrun ]]; then
        stop "MAX_RESTARTS=$MAX_RESTARTS needs LAUNCHER=torchrun; $LAUNCHER starts ranks once"
    fi
    if ! command -v python >/dev/null; then
        stop "no python on PATH; activate the virtual environment: source .venv/bin/activate"
    fi
    if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        stop "$(command -v python) has no PyTorch; activate the virtual environment: source .venv/bin/activate"
    fi
    if [[ $LAUNCHER == colossalai ]] && ! command -v colossalai >/dev/null; then
        stop "no colossalai on PATH; activate the virtual environment: source .venv/bin/activate"
    fi
}

# command_hash WORD...: the same for the same command. Whether it resumes makes no difference.
command_hash() {
    printf '%s\0' "$@" | sed -z '/^--resume$/,+1d; /^--resume=/d' | sha256sum | cut -c 1-16
}

# name_run HASH ARGUMENT...: set RUN_NAME, and run_words of `launch` if the run continues.
name_run() {
    local named="" started=""
    if [[ -z ${RUN_NAME:-} ]]; then
        if [[ -f $names_file && ${RESUME:-auto} != never ]]; then
            RUN_NAME=$(sed -n "s/^$1 //p" "$names_file" | tail -n 1)
            named=${RUN_NAME:+", which $names_file has for this command; RESUME=never starts another"}
        fi
        if [[ -z ${RUN_NAME:-} ]]; then
            RUN_NAME="$PROJECT_NAME-$(date +%Y-%m-%d-%H-%M-%S)"
            if [[ ${RESUME:-} == auto || " ${*:2}" == *" --resume"* ]]; then
                echo "${0##*/}: starting the run $RUN_NAME; $names_file has none for this command;" \
                    "RUN_NAME=... continues an earlier run" >&2
            fi
        fi
    fi
    if [[ -d ${PARENT_SAVE_DIR%/}/$RUN_NAME ]]; then
        started=yes
    fi
    case ${RESUME:-} in
        auto) run_words=(--resume auto) ;;
        never) ;;
        "")
            # Ranks that torchrun starts again continue too.
            if [[ -n $started || ${MAX_RESTARTS:-0} != 0 ]]; then
                run_words=(--resume auto)
            fi
            ;;
        *) stop "RESUME is $RESUME; give auto or never" ;;
    esac
    if [[ -n $started && ${#run_words[@]} -gt 0 ]]; then
        echo "${0##*/}: continuing the run $RUN_NAME$named" >&2
    fi
}

# keep_name HASH: remember the run of this command.
keep_name() {
    if ! grep -qxF "$1 $RUN_NAME" "$names_file" 2>/dev/null; then
        printf '%s %s\n' "$1" "$RUN_NAME" >>"$names_file"
    fi
}

# record_launch ARGUMENT...: into the file LAUNCH_RECORD, if it is set, write the run's folder and its newest
# checkpoint, a line each. train.sbatch compares them with what is there afterwards.
record_launch() {
    if [[ -z ${LAUNCH_RECORD:-} ]]; then
        return
    fi
    local folder="" newest
    # As for train.py, the last one counts.
    while (($#)); do
        case $1 in
            --save_dir) folder=${2:-} ;;
            --save_dir=*) folder=${1#--save_dir=} ;;
        esac
        shift
    done
    newest=$(cat "$folder/latest" 2>/dev/null || true)
    printf '%s\n' "$folder" "${newest:-none}" >"$LAUNCH_RECORD"
}

# check_before_launch SCRIPT ARGUMENT...: here and once. A mistake is one line, to which a launcher would add dozens.
# From 128 on, a signal ended the check, as Ctrl-C does. Other codes do not concern the flags.
check_before_launch() {
    local checked=0
    python -m colossal_llama2.train.before_launch --nproc_per_node "$NPROC_PER_NODE" --hostfile "$HOSTFILE" "$@" ||
        checked=$?
    if ((checked == 2 || checked >= 128)); then
        exit "$checked"
    fi
}
