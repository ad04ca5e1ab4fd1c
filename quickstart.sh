#!/usr/bin/env bash
# An English LLaMA learns Chinese, through every script of the suite, on two CPU cores:
#
#   bash quickstart.sh
#   REAL=1 bash quickstart.sh    the same with a real pretrained model; see examples/real_quickstart.sh
#
# Needs Python 3.11 and a network; makes .venv beside this file. All output goes to quickstart/ (quickstart-real/), or to
# QUICKSTART_DIR if that is set. An interrupted run continues, when started again, with the step it was in; delete the
# folder to start over.
set -euo pipefail
out=${QUICKSTART_DIR:+$(realpath -m -- "$QUICKSTART_DIR")}
case ${REAL:=0} in
0) out=${out:-quickstart} ;;
1) out=${out:-quickstart-real} ;;
*) echo "REAL=$REAL given; allowed are 0 and 1" >&2 && exit 2 ;;
esac
MINUTES=${MINUTES:-15}
PIECES=${PIECES:-8000}
for name in MINUTES PIECES; do
    if [[ ! ${!name} =~ ^[1-9][0-9]{0,5}$ ]]; then
        echo "$name=${!name} given; a whole number from 1 to 999999 is allowed" >&2
        exit 2
    fi
done
cd "$(dirname "${BASH_SOURCE[0]}")"
# Steps delete what they are about to write, so nothing but a quick start's own folder will do.
if [[ -e $out && ! -e $out/.quickstart ]]; then
    echo "$out exists and is not a quick start's folder; set QUICKSTART_DIR to a new one" >&2
    exit 2
fi
# Steps that are done are not repeated, so a folder keeps the settings that it was begun with.
settings="REAL=$REAL"
if ((REAL)); then
    settings+=" MINUTES=$MINUTES PIECES=$PIECES"
fi
mkdir -p "$out"
begun_with=$(cat "$out/.quickstart" 2>/dev/null || true)
if [[ -n $begun_with && $begun_with != "$settings" ]]; then
    echo "$out was begun with $begun_with, now $settings is given; delete it, or set QUICKSTART_DIR to a new folder" >&2
    exit 2
fi
echo "$settings" >"$out/.quickstart"
source ./.ci/environment.sh
install_requirements requirements.txt requirements-dev.txt

# A rehearsal for the CPU, also where there is a GPU: the two ranks would have to share it.
export CUDA_VISIBLE_DEVICES=-1
# Threads that wait sleep. Where other work shares the cores, waiting threads that spin make a step ten times slower.
export OMP_WAIT_POLICY=passive
step_number=0
source ./examples/quickstart_steps.sh
if ((REAL)); then
    source ./examples/real_quickstart.sh
    exit
fi

max_length=256
sft_max_length=192
# zero2 trains on all of these bins except the last, gemini only on the last: it needs bf16, which is slow on a CPU.
bins=40
steps=20

# with_colossalai SCRIPT ARGUMENT...: the same through ColossalAI's launcher. It writes every variable of the environment
# into a shell command, unescaped, so it gets only those that are needed; and it joins the arguments: @Q quotes them.
with_colossalai() {
    local script=$1 port
    shift
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    env -i PATH="$PATH" HOME="${HOME:-/}" LANG=C.UTF-8 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=-1 \
        colossalai run --nproc_per_node 2 --host localhost --master_port "$port" "$script" "${@@Q}"
}

write_corpus() {
    python examples/quickstart_corpus.py --output_dir "$out/data" --download_dir "$out/downloads"
}

write_source_model() {
    python examples/quickstart_source_model.py --english_dir "$out/data/en" --output_dir "$out/source"
}

prepare_english() {
    prepare prepare_pretrain_dataset.py "$max_length" 2 "$out/source" prepared-english "$out/data/en"
}

train_english() {
    local places
    mapfile -t places < <(outputs 1-english)
    with_torchrun train.py --pretrained "$out/source" --dataset "$out"/prepared-english/arrow/part-* \
        --plugin zero2 --mixed_precision fp32 --max_length "$max_length" --use_flash_attn \
        --micro_batch_size 2 --lr 2e-3 "${places[@]}"
}

evaluate_english() {
    evaluate "1 English" 1-english
}

extend_tokenizer() {
    python init_tokenizer.py --source_tokenizer_dir "$out/source" --target_tokenizer_dir "$out/2-tokenizer" \
        --expand_tokens_file "$out/data/new_pieces.jsonl"
}

extend_model() {
    python init_model.py --source_model_and_tokenizer_path "$out/1-english/modeling" \
        --target_tokenizer_path "$out/2-tokenizer" --target_model_path "$out/2-extended/modeling"
}

evaluate_extended() {
    python examples/quickstart_evaluate.py --held_out_dir "$out/data/held_out" --output_file "$out/results.json" \
        --stage "2 new pieces" --model_path "$out/2-extended/modeling"
}

prepare_both() {
    prepare prepare_pretrain_dataset.py "$max_length" "$bins" "$out/2-tokenizer" prepared-both \
        "$out/data/zh,$out/data/en"
}

train_zero2() {
    local parts=("$out"/prepared-both/arrow/part-*)
    local places
    mapfile -t places < <(outputs 3-zero2)
    with_colossalai train.py --pretrained "$out/2-extended/modeling" --dataset "${parts[@]:0:bins-1}" \
        --plugin zero2 --mixed_precision fp32 --max_length "$max_length" --use_flash_attn \
        --micro_batch_size 2 --lr 2e-3 "${places[@]}"
    # `colossalai run` ends with 0 also when it did not start anything.
    [[ -d $out/3-zero2/modeling ]]
}

evaluate_zero2() {
    evaluate "3 both languages (zero2)" 3-zero2
}

train_gemini() {
    local parts=("$out"/prepared-both/arrow/part-*)
    local places
    mapfile -t places < <(outputs 4-gemini)
    # --load_checkpoint with a modeling folder loads only the weights: optimizer and schedule start from the beginning.
    with_torchrun train.py --pretrained "$out/2-extended/modeling" --load_checkpoint "$out/3-zero2/modeling" \
        --dataset "${parts[@]:bins-1}" --plugin gemini --mixed_precision bf16 --max_length "$max_length" \
        --use_flash_attn --micro_batch_size 2 --warmup_steps 3 --lr 1e-4 "${places[@]}"
}

evaluate_gemini() {
    evaluate "4 both languages (gemini)" 4-gemini
}

prepare_dialogues() {
    prepare prepare_sft_dataset.py "$sft_max_length" 1 "$out/4-gemini/modeling" prepared-sft "$out/data/sft"
}

train_dialogues() {
    local places
    mapfile -t places < <(outputs 5-sft)
    with_torchrun train_sft.py --pretrained "$out/4-gemini/modeling" --dataset "$out"/prepared-sft/arrow/part-* \
        --plugin zero2 --mixed_precision fp32 --max_length "$sft_max_length" --use_flash_attn \
        --micro_batch_size 4 --accumulation_steps 2 --num_epochs 2 --lr 2e-4 --use_neft "${places[@]}"
}

evaluate_dialogues() {
    evaluate "5 dialogues (SFT)" 5-sft
}

continue_texts() {
    local prompt
    for prompt in "The for statement is used to" "中国人民" "酒店的服务"; do
        python inference_example.py --model_path "$out/5-sft/modeling" --max_new_tokens 48 --seed 1 \
            --prompt_style plain --input_txt "$prompt"
    done
}

prepare_few() {
    python examples/quickstart_dialogues.py --sft_dir "$out/data/sft" --held_out_dir "$out/data/held_out" \
        --output_dir "$out/data/chat"
    prepare prepare_sft_dataset.py "$sft_max_length" 1 "$out/5-sft/modeling" prepared-chat "$out/data/chat/learned"
}

train_few() {
    local places
    mapfile -t places < <(outputs 6-chat)
    with_torchrun train_sft.py --pretrained "$out/5-sft/modeling" --dataset "$out"/prepared-chat/arrow/part-* \
        --plugin zero2 --mixed_precision fp32 --max_length "$sft_max_length" --use_flash_attn \
        --micro_batch_size 4 --accumulation_steps 1 --num_epochs 60 --warmup_steps 5 --lr 1e-3 --skip_save_each_epoch \
        "${places[@]}"
}

# The form of the prompts is that of the training, which the model's folder records.
chat() {
    local name
    for name in learned new; do
        rm -f -- "$out/answers-$name.jsonl" "$out/answers-$name.jsonl.settings.json"
        python inference_example.py --model_path "$out/6-chat/modeling" --do_sample False --max_new_tokens 48 \
            --input_file "$out/data/chat/$name"/*.jsonl --output_file "$out/answers-$name.jsonl"
    done
    python examples/quickstart_answers.py --learned_file "$out/answers-learned.jsonl" \
        --new_file "$out/answers-new.jsonl"
    echo "Chat with it: .venv/bin/python inference_example.py --interactive --model_path $out/6-chat/modeling"
}

step write_corpus "Text: English, Chinese and dialogues from packages" "$out/data"
step write_source_model "Source model: English tokenizer, random weights" "$out/source"
step prepare_english "Prepare the English text" "$out/prepared-english"
step train_english "Stage 1: pre-train on English (zero2, torchrun)" "$out"/{1-english,logs/1-english,config/1-english.json}
step evaluate_english "Evaluate stage 1" "$out/results.json"
step extend_tokenizer "Stage 2: new Chinese pieces for the tokenizer" "$out/2-tokenizer"
step extend_model "Stage 2: their embeddings" "$out/2-extended"
step evaluate_extended "Evaluate stage 2"
step prepare_both "Prepare English and Chinese text in bins" "$out/prepared-both"
step train_zero2 "Stage 3: pre-train on both (zero2, colossalai run)" "$out"/{3-zero2,logs/3-zero2,config/3-zero2.json}
step evaluate_zero2 "Evaluate stage 3"
step train_gemini "Stage 4: pre-train on both (gemini, torchrun)" "$out"/{4-gemini,logs/4-gemini,config/4-gemini.json}
step evaluate_gemini "Evaluate stage 4"
step prepare_dialogues "Prepare the dialogues" "$out/prepared-sft"
step train_dialogues "Stage 5: fine-tune on dialogues (zero2, NEFTune)" "$out"/{5-sft,logs/5-sft,config/5-sft.json}
step evaluate_dialogues "Evaluate stage 5"
step continue_texts "Continue three texts"
step prepare_few "Choose and prepare a few dialogues" "$out/data/chat" "$out/prepared-chat"
step train_few "Stage 6: learn these dialogues by heart (zero2)" "$out"/{6-chat,logs/6-chat,config/6-chat.json}
step chat "Ask through the chat template"
show_results
