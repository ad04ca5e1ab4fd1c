"""Fine-tune a LLaMA model on prepared conversations, on one process or many.

    colossalai run --nproc_per_node 8 --hostfile hostfile train_sft.py \\
        --pretrained llama-2-7b-zh --dataset arrow_sft/part-00000 arrow_sft/part-00001 \\
        --plugin zero2 --mixed_precision bf16 --lr 5e-5 --accumulation_steps 8 --use_neft
"""

from colossal_llama2 import errors, launcher, logs
from colossal_llama2.cli import train_flags


def main(argv=None) -> None:
    # First, so that one process of each host reports what is wrong with the flags.
    launcher.settle()
    args = train_flags.train_sft_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("train_sft.py"):
        from colossal_llama2.train.start import train

        train(args)


if __name__ == "__main__":
    main()
