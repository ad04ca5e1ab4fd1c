"""Evaluate models on the sets of Colossal-LLaMA-2's tables, and on what these do not measure.

python -m colossal_llama2.evaluation --model_path MODEL --tasks cmmlu,icl --data_dir evaluation_sets
"""

from collections.abc import Sequence

from colossal_llama2 import errors, launcher, logs
from colossal_llama2.cli import evaluation_flags


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, and print the table."""
    launcher.settle()
    args = evaluation_flags.evaluation_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors(evaluation_flags.COMMAND):
        from colossal_llama2.evaluation.run import run
        from colossal_llama2.evaluation.settings import EvaluationSettings

        run(EvaluationSettings.from_flags(vars(args)))


if __name__ == "__main__":
    main()
