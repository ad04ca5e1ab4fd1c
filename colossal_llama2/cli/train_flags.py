"""The flags of train.py, train_sft.py, selftest.py and verify.py."""

import argparse
from typing import Any

from colossal_llama2.cli import settings_file
from colossal_llama2.cli.flag_definitions import FlagGroup, FlagParser, Need
from colossal_llama2.cli.parser import CommandParser
from colossal_llama2.cli.value_types import (
    SWITCH,
    at_least_two,
    fraction,
    logit_task_list,
    matrix_list,
    named_path,
    named_share,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed_number,
    sequence_length,
    source_weight,
    task_list,
    tracker_list,
)
from colossal_llama2.gpus import DEFAULT_GPU, GPUS
from colossal_llama2.layer_matrices import LAYER_MATRICES
from colossal_llama2.model_sizes import MODEL_SIZES, VOCABULARIES
from colossal_llama2.plugin_names import HYBRID_3D, PLUGIN_NAMES
from colossal_llama2.task_names import ICL, LOGIT_TASK_NAMES, WITH_EXAMPLES
from colossal_llama2.tracker_names import TENSORBOARD, TRACKER_NAMES

PRECISIONS = ("fp16", "bf16", "fp32")
SP_MODES = ("split_gather", "ring", "all_to_all")
MIXTURE_ENDS = ("repeat", "stop")


def train_parser() -> CommandParser:
    """Flags of train.py."""
    parser = CommandParser(
        "train.py",
        "Continue the pre-training of a LLaMA model on prepared data, with ColossalAI.",
        "  colossalai run --nproc_per_node 8 --hostfile hostfile train.py \\\n"
        "      --pretrained llama-2-7b-zh --dataset arrow_output/part-00000 arrow_output/part-00001 \\\n"
        "      --plugin zero2 --mixed_precision bf16 --lr 1e-4 --use_grad_checkpoint --use_flash_attn",
    )
    _add_training_arguments(parser, accumulation_steps=1)
    parser.set_defaults(stage="pretrain", pad_token="unk")
    return parser


def train_sft_parser() -> CommandParser:
    """Flags of train_sft.py: those of train.py and NEFTune."""
    parser = CommandParser(
        "train_sft.py",
        "Fine-tune a LLaMA model on prepared conversations, with ColossalAI.",
        "  colossalai run --nproc_per_node 8 --hostfile hostfile train_sft.py \\\n"
        "      --pretrained llama-2-7b-zh --dataset sft_arrow_output/part-00000 sft_arrow_output/part-00001 \\\n"
        "      --plugin zero2 --mixed_precision bf16 --lr 5e-5 --accumulation_steps 8 --use_neft",
    )
    _add_training_arguments(parser, accumulation_steps=8)
    parser.set_defaults(stage="sft", pad_token="eos")
    sft = parser.flag_group("fine-tuning", changes_numbers=True)
    sft.add("--use_neft", action="store_true", help="add NEFTune noise to the embeddings while training")
    sft.add(
        "--neft_alpha",
        metavar="ALPHA",
        type=positive_float,
        default=5.0,
        needs=Need("needs --use_neft", lambda args: args.use_neft),
        help="scale of NEFTune's noise; the paper tries 5, 10 and 15",
    )
    sft.add(
        "--group_by_length",
        action="store_true",
        help="put conversations of similar length into one batch, with less padding; samples that "
        "prepare_sft_dataset.py has spliced (--splicing best_fit) need no such order",
    )
    return parser


def selftest_parser() -> CommandParser:
    """Flags of colossal_llama2.train.selftest: those of train.py that decide how a step is computed, and its own."""
    parser = CommandParser(
        "selftest",
        "Compare training on this machine with a plain PyTorch loop, and a resumed run with the uninterrupted one.",
        "  colossalai run --nproc_per_node 8 --hostfile hostfile -m colossal_llama2.train.selftest \\\n"
        "      --plugin zero2 --mixed_precision bf16 --work_dir /shared/selftest",
    )
    own = parser.flag_group("test")
    own.add(
        "--work_dir",
        metavar="DIR",
        default="selftest",
        help="new folder that all hosts share; removed if everything is equal",
    )
    own.add("--steps", metavar="N", type=at_least_two, default=10, help="optimizer steps")
    _add_compute_arguments(parser.flag_group("model", changes_numbers=True))
    recipe = parser.flag_group("optimization", changes_numbers=True)
    _add_recipe_arguments(recipe, accumulation_steps=1)
    _add_parallel_arguments(parser)
    parser.set_defaults(micro_batch_size=2, mixed_precision="bf16")
    return parser


def _add_training_arguments(parser: CommandParser, *, accumulation_steps: int) -> None:
    _add_model_arguments(parser)
    recipe = parser.flag_group("optimization", changes_numbers=True)
    _add_length_arguments(recipe)
    _add_recipe_arguments(recipe, accumulation_steps=accumulation_steps)
    _add_lora_arguments(parser)
    _add_parallel_arguments(parser)
    _add_evaluation_arguments(parser)
    _add_output_arguments(parser)
    _add_dry_run_arguments(parser)
    _add_settings_arguments(parser)
    _add_benchmark_arguments(parser)


def _add_model_arguments(parser: CommandParser) -> None:
    data = parser.flag_group("data and model", changes_numbers=True)
    data.add(
        "--pretrained",
        metavar="DIR",
        required=True,
        on_card=False,
        help="Hugging Face LLaMA model (safetensors) and tokenizer to start from",
    )
    data.add(
        "--dataset",
        metavar="DIR",
        nargs="+",
        required=True,
        on_card=False,
        help="prepared part-* folders in reading order, or folders that contain them; NAME=DIR names the source",
    )
    _add_order_arguments(data)
    data.add(
        "--max_length",
        metavar="TOKENS",
        type=sequence_length,
        default=4096,
        help="maximum length of a sample; a longer one is an error; at most the number of positions of the model",
    )
    data.add(
        "--train_new_rows_only",
        action="store_true",
        help="train only the embedding rows that init_model.py added; everything else stays the same bit for bit",
    )
    _add_compute_arguments(data)


def _add_order_arguments(data: FlagGroup) -> None:
    data.add(
        "--bucketed",
        action="store_true",
        help="read bucket after bucket: bucket k is part k of every source, shuffled on its own; without it all "
        "samples are shuffled together",
    )
    data.add(
        "--mixture",
        metavar="SOURCE=WEIGHT",
        nargs="+",
        type=source_weight,
        default=None,
        help="share of each source in the tokens of a bucket; the source named first is read exactly once (default: "
        "the sizes of the sources)",
    )
    data.add(
        "--mixture_end",
        choices=MIXTURE_ENDS,
        default="repeat",
        needs=Need("needs --mixture", lambda args: args.mixture is not None),
        help="what to do when a source of --mixture runs out: repeat it, or end the bucket",
    )


def _add_compute_arguments(data: FlagGroup) -> None:
    data.add(
        "--document_mask",
        choices=SWITCH,
        default="auto",
        help="keep the documents of a sample apart in attention, positions and loss; auto: on if the data has "
        "document lengths; off: as in the original",
    )
    data.add("--freeze_non_embeds_params", action="store_true", help="train only the input and output embeddings")
    data.add(
        "--use_flash_attn",
        action="store_true",
        help="use flash-attn on GPUs that support it; everywhere else PyTorch's scaled_dot_product_attention is used",
    )
    data.add(
        "--use_grad_checkpoint",
        action="store_true",
        changes_numbers=False,
        help="recompute activations in the backward pass: less memory, slower steps",
    )
    data.add(
        "--chunked_loss",
        choices=SWITCH,
        default="auto",
        help="compute the loss without holding the logits of the whole vocabulary at once; auto: wherever that works",
    )


def _add_length_arguments(recipe: FlagGroup) -> None:
    recipe.add("--num_epochs", metavar="N", type=positive_int, default=1, help="passes over the data")
    recipe.add(
        "--max_steps",
        metavar="STEPS",
        type=positive_int,
        default=None,
        help="stop after this many optimizer steps, even in the middle of an epoch (default: at the end of the last "
        "epoch)",
    )


def _add_recipe_arguments(recipe: FlagGroup, *, accumulation_steps: int) -> None:
    recipe.add(
        "--micro_batch_size",
        "--batch_size",
        metavar="N",
        type=positive_int,
        default=1,
        help="samples per forward pass and data-parallel rank",
    )
    recipe.add(
        "--accumulation_steps",
        metavar="N",
        type=positive_int,
        default=accumulation_steps,
        help="micro batches per optimizer step",
    )
    recipe.add(
        "--lr",
        metavar="LR",
        type=positive_float,
        default=3e-4,
        help="peak learning rate; a cosine schedule lowers it to a tenth",
    )
    recipe.add(
        "-s",
        "--warmup_steps",
        metavar="STEPS",
        type=non_negative_int,
        default=None,
        help="optimizer steps of linear warm-up (default: 2.5 %% of all steps)",
    )
    recipe.add(
        "-w",
        "--weight_decay",
        metavar="W",
        type=non_negative_float,
        default=0.1,
        help="AdamW's weight decay; norm layers have none",
    )
    recipe.add(
        "--gradient_clipping",
        "--grad_clip",
        metavar="NORM",
        type=non_negative_float,
        default=1.0,
        help="maximum gradient norm; 0 turns clipping off",
    )
    recipe.add(
        "--mixed_precision",
        choices=PRECISIONS,
        default="fp16",
        help="dtype of the forward and backward passes; fp32 is for tests and rehearsals, and does not work with "
        "gemini",
    )
    recipe.add(
        "--seed", metavar="N", type=seed_number, default=1024, help="seed of the data order and of NEFTune noise"
    )


def _add_lora_arguments(parser: CommandParser) -> None:
    lora = parser.flag_group("LoRA", changes_numbers=True)
    need = Need("needs --lora_rank", lambda args: args.lora_rank is not None)
    lora.add(
        "--lora_rank",
        metavar="R",
        type=positive_int,
        default=None,
        help="train a LoRA adapter of this rank, such as 8, and save it instead of the whole model; new embedding rows "
        "that init_model.py added are trained with it (default: train the model's own weights)",
    )
    lora.add(
        "--lora_alpha",
        metavar="ALPHA",
        type=positive_float,
        default=None,
        needs=need,
        help="scale of the adapter: its product is multiplied by ALPHA / R (default: twice --lora_rank)",
    )
    lora.add(
        "--lora_dropout",
        metavar="SHARE",
        type=fraction,
        default=0.0,
        needs=need,
        help="share of the adapter's inputs that are set to zero while training",
    )
    lora.add(
        "--lora_targets",
        metavar="NAMES",
        type=matrix_list,
        default="all",
        needs=need,
        help=f"matrices of each decoder layer that get an adapter: all, or names separated by commas: "
        f"{', '.join(LAYER_MATRICES)}",
    )


def _add_parallel_arguments(parser: CommandParser) -> None:
    parallel = parser.flag_group("parallelism", changes_numbers=True)
    parallel.add("--plugin", choices=PLUGIN_NAMES, default="gemini", help="how ColossalAI distributes the training")
    parallel.add("--tp", metavar="N", type=positive_int, default=1, help="tensor-parallel size, for --plugin 3d")
    parallel.add(
        "--zero",
        "--zero_stage",
        type=int,
        choices=(0, 1, 2),
        default=1,
        needs=Need(f"needs --plugin {HYBRID_3D}", lambda args: args.plugin == HYBRID_3D),
        help="ZeRO stage, for --plugin 3d",
    )
    parallel.add(
        "--pp", metavar="N", type=positive_int, default=1, help="pipeline stages, for --plugin 3d with --zero 0 or 1"
    )
    parallel.add(
        "--microbatch_size",
        metavar="N",
        type=positive_int,
        default=1,
        needs=Need("needs --pp of at least 2", lambda args: args.pp > 1),
        help="samples that a pipeline stage passes on at a time; divides --micro_batch_size into at least --pp parts",
    )
    parallel.add(
        "--enable_sequence_parallelism",
        action="store_true",
        help="split samples along their length as well, for --plugin 3d",
    )
    parallel.add(
        "--sp_mode",
        choices=SP_MODES,
        default="split_gather",
        needs=Need("needs --enable_sequence_parallelism", lambda args: args.enable_sequence_parallelism),
        help="how samples are split: split_gather and ring over the tensor-parallel ranks, all_to_all over separate "
        "ranks, see --sp",
    )
    parallel.add(
        "--sp", metavar="N", type=positive_int, default=1, help="sequence-parallel size, for --sp_mode all_to_all"
    )


class _SwitchWithout(argparse.Action):
    """A switch after which some flags, which must be given otherwise, need not be given. `const` lists their names."""

    def __call__(  # type: ignore[override]
        self, parser: FlagParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, True)
        for action in parser.actions:
            if action.dest in (self.const or ()):
                action.required = False


def _add_benchmark_arguments(parser: CommandParser) -> None:
    benchmark = parser.flag_group("benchmark", changes_numbers=False)
    benchmark.add(
        "--benchmark",
        action=_SwitchWithout,
        const=("dataset",),
        nargs=0,
        default=False,
        help="measure steps on random tokens, instead of --dataset, and write nothing",
    )
    benchmark.add(
        "--num_samples",
        metavar="N",
        type=positive_int,
        default=500,
        needs=Need("needs --benchmark", lambda args: args.benchmark),
        help="number of random samples, each of --max_length tokens",
    )
    benchmark.add(
        "--profile", metavar="DIR", default=None, help="with --benchmark: folder for PyTorch's trace of two steps"
    )
    benchmark.add(
        "--peak_tflops",
        metavar="TFLOPS",
        type=positive_float,
        default=None,
        help="peak of one device, for MFU; also used while training (default: known for A100, A800, H100, H800 and "
        "some others)",
    )


def _add_evaluation_arguments(parser: CommandParser) -> None:
    evaluation = parser.flag_group("evaluation while training", changes_numbers=False)
    evaluation.add(
        "--eval_dataset",
        metavar="NAME=DIR",
        nargs="+",
        type=named_path,
        default=None,
        help="held-out data for loss and bits per byte, as NAME=DIR: a folder that a prepare command wrote with "
        "--eval_fraction",
    )
    evaluation.add(
        "--eval_interval",
        metavar="STEPS",
        type=positive_int,
        default=None,
        help="optimizer steps between evaluations; evaluations also run before the first step and at the end of each "
        "epoch and of the run",
    )
    evaluation.add(
        "--eval_tasks",
        metavar="icl|NAME=DIR,...",
        type=logit_task_list,
        default=None,
        help="accuracy at each evaluation, as python -m colossal_llama2.evaluation measures it, on a comma-separated "
        f"list of {', '.join(LOGIT_TASK_NAMES)}; DIR has the files of a set, icl is an in-context-learning probe, "
        "which needs none. agieval counts logits alone, not generated answers",
    )
    evaluation.add(
        "--eval_limit",
        metavar="N",
        type=positive_int,
        default=200,
        needs=Need("needs --eval_tasks", lambda args: bool(args.eval_tasks)),
        help="items of each of --eval_tasks, as --limit of python -m colossal_llama2.evaluation: icl has so many, and "
        "sets as many at most",
    )
    evaluation.add(
        "--eval_num_fewshot",
        metavar="N",
        type=non_negative_int,
        default=None,
        needs=Need(f"needs --eval_tasks with one of {', '.join(WITH_EXAMPLES)}", _has_examples),
        help="examples before each question of --eval_tasks, where a set has some (default: 5)",
    )
    evaluation.add(
        "--eval_prompts",
        metavar="FILE",
        default=None,
        needs=Need("needs --eval_dataset or --eval_tasks", lambda args: bool(args.eval_dataset or args.eval_tasks)),
        help="a few prompts, which the model answers at each evaluation, in the log, train_log.jsonl and TensorBoard: "
        "a *.txt or *.jsonl file like --input_file of inference_example.py",
    )
    evaluation.add(
        "--eval_prompt_tokens",
        metavar="TOKENS",
        type=positive_int,
        default=64,
        needs=Need("needs --eval_prompts", lambda args: bool(args.eval_prompts)),
        help="tokens of an answer to --eval_prompts, at most",
    )
    evaluation.add(
        "--forgetting_alarm",
        metavar="NAME=SHARE",
        nargs="+",
        type=named_share,
        default=None,
        help="warn when the bits per byte of that --eval_dataset exceed their first value by more than this fraction, "
        "or the accuracy on that one of --eval_tasks is lower than the first by more than this (0.1: 10 points)",
    )
    evaluation.add(
        "--on_forgetting",
        choices=("warn", "stop"),
        default="warn",
        needs=Need("needs --forgetting_alarm", lambda args: bool(args.forgetting_alarm)),
        help="what --forgetting_alarm does; warn: log a warning; stop: save, and exit with code 1",
    )


def _has_examples(args: argparse.Namespace) -> bool:
    """Whether a set of --eval_tasks has examples."""
    return any(name in WITH_EXAMPLES for name, _ in task_list(args.eval_tasks or ICL))


def _add_dry_run_arguments(parser: CommandParser) -> None:
    dry_run = parser.flag_group("dry run", changes_numbers=False)
    dry_run.add(
        "--dry_run",
        action="store_true",
        help="check everything, print the plan, memory and disk space, and exit before the first step; nothing is "
        "written; with --benchmark neither data nor weights are needed",
    )
    dry_run.add(
        "--num_ranks",
        metavar="N",
        type=positive_int,
        default=None,
        help="with --dry_run: plan for this many GPUs, which need not exist here (default: the launcher's processes)",
    )
    _add_suggestion_arguments(dry_run)


def _add_suggestion_arguments(dry_run: FlagGroup) -> None:
    need = Need("needs --suggest", lambda args: args.suggest)
    dry_run.add(
        "--suggest",
        action=_SwitchWithout,
        const=("pretrained", "dataset"),
        nargs=0,
        default=False,
        help="with --dry_run: compare all plugins and parallel sizes on --num_ranks GPUs by memory, speed and cost; "
        "needs no data and no weights; without --pretrained and --model_size, for LLaMA-2's three sizes",
    )
    dry_run.add(
        "--model_size",
        choices=tuple(MODEL_SIZES),
        default=None,
        needs=need,
        help="plan for a LLaMA-2 of this size instead of --pretrained",
    )
    dry_run.add(
        "--vocab_size",
        metavar="N",
        type=positive_int,
        default=VOCABULARIES[0],
        needs=Need("needs --model_size", lambda args: args.model_size is not None),
        help="tokens of that model's vocabulary",
    )
    dry_run.add("--gpu", choices=tuple(GPUS), default=DEFAULT_GPU, needs=need, help="kind of GPU to plan for")
    dry_run.add(
        "--tokens",
        metavar="N",
        type=positive_float,
        default=1e9,
        needs=need,
        help="tokens that the run trains on, such as 8.5e9",
    )
    dry_run.add(
        "--step_tokens",
        metavar="N",
        type=positive_int,
        default=2**22,
        needs=need,
        help="tokens of an optimizer step, over all GPUs; the default is about that of LLaMA-2",
    )
    dry_run.add(
        "--gpu_hour_price",
        metavar="PRICE",
        type=positive_float,
        default=None,
        needs=need,
        help="price of one GPU for an hour, in any currency (default: only GPU hours are printed)",
    )
    dry_run.add(
        "--storage_gb_per_s",
        metavar="GB",
        type=positive_float,
        default=2.0,
        needs=need,
        help="speed at which checkpoints are written, for the time of a save",
    )


def _add_output_arguments(parser: CommandParser) -> None:
    output = parser.flag_group("checkpoints and logs", changes_numbers=False)
    output.add(
        "--save_dir", metavar="DIR", default="checkpoint_dir", help="folder for checkpoints and the final modeling/"
    )
    output.add(
        "--save_interval", metavar="STEPS", type=positive_int, default=1000, help="optimizer steps between checkpoints"
    )
    output.add(
        "--skip_save_each_epoch",
        action="store_true",
        help="do not save at the end of each epoch; the end of the run is always saved",
    )
    output.add(
        "--load_checkpoint",
        metavar="DIR",
        default=None,
        needs=Need("is not for --benchmark, which loads none", lambda args: not args.benchmark),
        help="checkpoint folder to resume from, or its modeling/ folder to load only the weights",
    )
    output.add(
        "--continue_data",
        action="store_true",
        help="with --load_checkpoint CHECKPOINT/modeling: continue from that checkpoint's position in the data",
    )
    output.add(
        "--resume",
        choices=("auto",),
        default=None,
        needs=Need("is not for --benchmark, which saves nothing", lambda args: not args.benchmark),
        help="auto: continue from the newest complete checkpoint in --save_dir; start from the beginning if there is "
        "none",
    )
    output.add(
        "--keep_last",
        metavar="K",
        type=positive_int,
        default=None,
        help="keep the K newest checkpoints and remove older ones (default: keep all)",
    )
    output.add(
        "--keep_every",
        metavar="STEPS",
        type=positive_int,
        default=None,
        needs=Need("needs --keep_last", lambda args: args.keep_last is not None),
        help="with --keep_last: also keep checkpoints whose step is a multiple of this",
    )
    output.add(
        "--max_bad_steps",
        metavar="N",
        type=non_negative_int,
        default=0,
        help="number of steps with a NaN/Inf loss or gradient norm that are skipped; the next one ends the run",
    )
    output.add(
        "--dist_timeout",
        metavar="SECONDS",
        type=positive_float,
        default=600.0,
        help="how long ranks wait for each other; must be longer than a save takes",
    )
    output.add(
        "--report_to",
        metavar="NAMES",
        type=tracker_list,
        default=TENSORBOARD,
        help=f"trackers that get the figures of each step, separated by commas: {', '.join(TRACKER_NAMES)}; all but "
        "the first need a package of their own",
    )
    output.add(
        "--tensorboard_dir",
        metavar="DIR",
        default="logs_dir",
        help="folder for TensorBoard and for local files of other trackers; if it has events of another run, a folder "
        "inside it is used",
    )
    output.add(
        "--config_file",
        metavar="FILE",
        default="config_file",
        help="file to write the resolved settings to (JSON); if it belongs to another run, the name of --save_dir is "
        "added to it",
    )


def _add_settings_arguments(parser: CommandParser) -> None:
    settings = parser.flag_group("settings of another run", changes_numbers=False)
    settings.add(
        settings_file.FLAG,
        metavar="FILE",
        default=None,
        help="read settings from a file that --config_file wrote, such as SAVE_DIR/settings.json; flags on the command "
        "line take precedence, but a switch that the file turns on stays on",
    )


def verify_parser() -> CommandParser:
    """Flags of colossal_llama2/train/verify.py."""
    parser = CommandParser(
        "python -m colossal_llama2.train.verify",
        "Check one checkpoint: files, hashes, shapes, numbers, tokenizer. Exit code 0 if it is intact, 2 if not.",
        "  python -m colossal_llama2.train.verify checkpoint_dir/epoch-0_step-400",
    )
    parser.flag_group().add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of a checkpoint, such as checkpoint_dir/epoch-0_step-400, or of a run, whose newest one is "
        "checked",
    )
    return parser


def faster_precision_parser() -> CommandParser:
    """Flags of colossal_llama2/train/faster_precision.py."""
    parser = CommandParser(
        "python -m colossal_llama2.train.faster_precision",
        "Print the faster precision on this CPU, bf16 or fp32: the value of --mixed_precision for a rehearsal.",
        "  python -m colossal_llama2.train.faster_precision llama-small",
    )
    parser.flag_group().add(
        "pretrained", metavar="MODEL", help="folder of the model to rehearse with; a layer of its sizes is measured"
    )
    return parser
