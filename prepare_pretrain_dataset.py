"""Turn pre-training jsonl into spliced, tokenized samples in bins.

    python prepare_pretrain_dataset.py --data_input_dirs data/zh,data/en \\
        --tokenizer_dir tokenizer-zh --data_arrow_output_dir arrow --max_length 4096
"""

from colossal_llama2 import errors, logs
from colossal_llama2.cli import data_flags


def main(argv=None) -> None:
    args = data_flags.prepare_pretrain_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("prepare_pretrain_dataset.py"):
        from colossal_llama2.dataset.write.prepare import prepare_pretrain

        prepare_pretrain(**vars(args))


if __name__ == "__main__":
    main()
