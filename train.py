"""Continue the pre-training of a LLaMA model on prepared data, on one process or many.

    colossalai run --nproc_per_node 8 --hostfile hostfile train.py \\
        --pretrained llama-2-7b-zh --dataset arrow/part-00000 arrow/part-00001 \\
        --plugin zero2 --mixed_precision bf16 --lr 1e-4
"""

from colossal_llama2 import errors, launcher, logs
from colossal_llama2.cli import train_flags


def main(argv=None) -> None:
    # First, so that one process of each host reports what is wrong with the flags.
    launcher.settle()
    args = train_flags.train_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("train.py"):
        from colossal_llama2.train.start import train

        train(args)


if __name__ == "__main__":
    main()
