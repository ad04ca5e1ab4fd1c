"""Suggestions for unknown flags: misspelt ones, and those of other training tools.

A suggestion is made only where it is almost certainly right: the same name in another spelling, a name that differs by
a few letters, or an entry of the tables below.
"""

from collections.abc import Iterable

from colossal_llama2.cli.flag_definitions import FlagParser

# Flags of other tools, and the equivalents here; the first one that the command has is suggested.
EQUIVALENTS: dict[str, tuple[str, ...]] = {
    "model": ("pretrained", "model_path", "source_model_and_tokenizer_path"),
    "model_name": ("pretrained", "model_path", "source_model_and_tokenizer_path"),
    "model_name_or_path": ("pretrained", "model_path", "source_model_and_tokenizer_path"),
    "pretrained_model_name_or_path": ("pretrained", "model_path", "source_model_and_tokenizer_path"),
    "pretrained_model": ("pretrained", "model_path", "source_model_and_tokenizer_path"),
    "pretrained_path": ("pretrained", "model_path", "source_model_and_tokenizer_path"),
    "base_model": ("pretrained", "model_path", "source_model_and_tokenizer_path"),
    "model_dir": ("pretrained", "model_path", "source_model_and_tokenizer_path"),
    "model_path": ("pretrained", "source_model_and_tokenizer_path"),
    "pretrained": ("model_path", "source_model_and_tokenizer_path"),
    "tokenizer": ("tokenizer_dir", "source_tokenizer_dir", "target_tokenizer_path"),
    "tokenizer_path": ("tokenizer_dir", "source_tokenizer_dir", "target_tokenizer_path"),
    "tokenizer_name": ("tokenizer_dir", "source_tokenizer_dir", "target_tokenizer_path"),
    "tokenizer_name_or_path": ("tokenizer_dir", "source_tokenizer_dir", "target_tokenizer_path"),
    "tokenizer_dir": ("source_tokenizer_dir", "target_tokenizer_path"),
    "output": ("save_dir", "data_arrow_output_dir", "target_model_path", "target_tokenizer_dir", "output_file"),
    "output_dir": ("save_dir", "data_arrow_output_dir", "target_model_path", "target_tokenizer_dir", "output_file"),
    "output_path": ("save_dir", "data_arrow_output_dir", "target_model_path", "target_tokenizer_dir", "output_file"),
    "save_path": ("save_dir", "data_arrow_output_dir", "target_model_path", "target_tokenizer_dir", "output_file"),
    "data_output_dirs": ("data_arrow_output_dir",),
    "data": ("dataset", "data_input_dirs"),
    "data_dir": ("dataset", "data_input_dirs"),
    "data_path": ("dataset", "data_input_dirs"),
    "dataset_dir": ("dataset", "data_input_dirs"),
    "dataset_name": ("dataset", "data_input_dirs"),
    "train_data": ("dataset", "data_input_dirs"),
    "train_file": ("dataset", "data_input_dirs"),
    "input_dir": ("dataset", "data_input_dirs"),
    "dataset": ("data_input_dirs",),
    "data_input_dirs": ("dataset",),
    "new_tokens_file": ("expand_tokens_file",),
    "new_tokens": ("expand_tokens_file",),
    "vocab_file": ("expand_tokens_file",),
    "learning_rate": ("lr",),
    "per_device_train_batch_size": ("micro_batch_size",),
    "train_batch_size": ("micro_batch_size",),
    "train_micro_batch_size_per_gpu": ("micro_batch_size",),
    "gradient_accumulation_steps": ("accumulation_steps",),
    "gradient_accumulation": ("accumulation_steps",),
    "grad_accum": ("accumulation_steps",),
    "epochs": ("num_epochs",),
    "epoch": ("num_epochs",),
    "max_epochs": ("num_epochs",),
    "num_train_epochs": ("num_epochs",),
    "max_train_steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "total_steps": ("max_steps",),
    "max_grad_norm": ("gradient_clipping",),
    "clip_grad": ("gradient_clipping",),
    "gradient_checkpointing": ("use_grad_checkpoint",),
    "grad_checkpoint": ("use_grad_checkpoint",),
    "flash_attn": ("use_flash_attn",),
    "flash_attention": ("use_flash_attn",),
    "use_flash_attention": ("use_flash_attn",),
    "use_flash_attention_2": ("use_flash_attn",),
    "attn_implementation": ("use_flash_attn",),
    "dtype": ("mixed_precision",),
    "precision": ("mixed_precision",),
    "torch_dtype": ("mixed_precision", "dtype"),
    "save_steps": ("save_interval",),
    "eval_steps": ("eval_interval",),
    "save_total_limit": ("keep_last",),
    "resume_from_checkpoint": ("load_checkpoint",),
    "checkpoint": ("load_checkpoint",),
    "logging_dir": ("tensorboard_dir",),
    "neftune_noise_alpha": ("neft_alpha",),
    **dict.fromkeys(("lora_r", "lora", "use_lora", "use_peft", "peft", "lora_dim"), ("lora_rank",)),
    **dict.fromkeys(("lora_target", "lora_target_modules", "target_modules", "lora_modules"), ("lora_targets",)),
    "lora_scaling": ("lora_alpha",),
    "finetuning_type": ("lora_rank",),
    "tensor_parallel_size": ("tp",),
    "tensor_model_parallel_size": ("tp",),
    "pipeline_parallel_size": ("pp",),
    "pipeline_model_parallel_size": ("pp",),
    "max_seq_length": ("max_length",),
    "max_seq_len": ("max_length",),
    "seq_length": ("max_length",),
    "seq_len": ("max_length",),
    "block_size": ("max_length",),
    "cutoff_len": ("max_length",),
    "model_max_length": ("max_length",),
    "context_length": ("max_length",),
    "num_bins": ("num_spliced_dataset_bins",),
    "num_proc": ("num_workers",),
    "preprocessing_num_workers": ("num_workers",),
    "prompt": ("input_txt",),
    "text": ("input_txt",),
    "input": ("input_txt",),
    "input_text": ("input_txt",),
    "query": ("input_txt",),
    "max_tokens": ("max_new_tokens",),
    "max_gen_len": ("max_new_tokens",),
}

_QLORA = "the base model is not quantized; train an adapter of it with --lora_rank"
_LAUNCHER = "it is a flag of the launcher; put it before the name of the script"
_PROCESSES = "the launcher sets the number of processes: colossalai run --nproc_per_node N --hostfile FILE SCRIPT ..."
_QUANTIZED = "quantized weights are not supported; give a model in float16, bfloat16 or float32"
_PLUGIN = "ColossalAI does this; choose with --plugin"
_SCHEDULE = "AdamW with linear warm-up and a cosine schedule is used; set --lr, --warmup_steps and --weight_decay"
# Flags without an equivalent, and what to do instead.
EXPLANATIONS: dict[str, str] = {
    **dict.fromkeys(("qlora", "use_qlora", "lora_4bit"), _QLORA),
    **dict.fromkeys(("nproc_per_node", "nnodes", "node_rank", "hostfile", "host", "master_addr"), _LAUNCHER),
    **dict.fromkeys(("master_port", "standalone", "rdzv_backend", "rdzv_endpoint", "include", "exclude"), _LAUNCHER),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpu", "ngpus", "num_processes", "devices"), _PROCESSES),
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "quantization", "quantization_bit"), _QUANTIZED),
    **dict.fromkeys(("deepspeed", "fsdp"), _PLUGIN),
    "ddp": "give --plugin ddp",
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "optim", "optimizer"), _SCHEDULE),
    "local_rank": "torch.distributed.launch adds it; start with torchrun or colossalai run, which use the environment",
    "bf16": "give --mixed_precision bf16",
    "fp16": "give --mixed_precision fp16",
    "fp32": "give --mixed_precision fp32",
    "warmup_ratio": "give a number of steps with --warmup_steps; without it, 2.5 % of all steps are warm-up",
    "trust_remote_code": "code in a model's folder is never run; leave it out",
    "zero_cpu_offload": "give --plugin zero2_cpu",
    "llama_version": "config.json and the tokenizer describe the model; leave it out",
    "use_wandb": "give --report_to wandb, or --report_to tensorboard,wandb",
    "padding_mode": "each micro batch is padded to its longest sample; leave it out",
    "overwrite_output_dir": "this command does not overwrite an existing folder; give a new one",
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias"), "--lora_rank trains plain LoRA; leave it out"),
    "modules_to_save": "embeddings are trained with --lora_rank where init_model.py added rows; leave it out",
    "do_train": "leave it out",
    "do_eval": "give held-out data with --eval_dataset NAME=DIR",
}
# Explanations that apply only to training commands.
_TRAINING = (_LAUNCHER, _PROCESSES, _PLUGIN, _SCHEDULE)
# The most edits of a misspelling, and the fewest letters of the flag for each edit.
MAX_EDITS, LETTERS_PER_EDIT = 2, 3


def unknown_flag(flag: str, parser: FlagParser) -> str:
    """The error message for a flag, such as "--learning_rate", that the parser does not define."""
    spellings = [spelling for spelling in parser.by_spelling if spelling.startswith("--")]
    name = _plain(flag)
    for spelling in spellings:
        if _plain(spelling) == name:
            return f"unknown argument {flag}, did you mean {spelling}?"
    equivalent = next((f"--{other}" for other in EQUIVALENTS.get(name, ()) if f"--{other}" in spellings), None)
    if equivalent:
        return f"unknown argument {flag}; it is called {equivalent} here"
    if name in EXPLANATIONS and _is_for(EXPLANATIONS[name], spellings):
        return f"unknown argument {flag}: {EXPLANATIONS[name]}"
    near = nearest(name, [spelling[2:] for spelling in spellings])
    return f"unknown argument {flag}" + (f", did you mean --{near}?" if near else "")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or the only one that begins with it; None if there is none."""
    known = list(known)
    distances = {other: edits(name, _plain(other)) for other in known}
    best = min(distances, key=distances.__getitem__, default=None)
    if best is not None and distances[best] <= min(MAX_EDITS, len(name) // LETTERS_PER_EDIT):
        return best
    longer = [other for other in known if len(name) > LETTERS_PER_EDIT and other.startswith(name)]
    return longer[0] if len(longer) == 1 else None


def edits(one: str, other: str) -> int:
    """Damerau-Levenshtein distance: letters to insert, remove or replace, and neighbours to swap."""
    before: list = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, last, row = row, before, [i]
        for j, target in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != target)))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == target:
                row[j] = min(row[j], last[j - 2] + 1)
    return row[-1]


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_").lower()


def _is_for(explanation: str, spellings: Iterable[str]) -> bool:
    """Whether the command has every flag that an explanation names, except those of the launcher."""
    if explanation in _TRAINING and "--plugin" not in spellings:
        return False
    named = {word.strip(";,:.") for word in explanation.split() if word.startswith("--")}
    return named <= {*spellings, "--nproc_per_node", "--hostfile"}
