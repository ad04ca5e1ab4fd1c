"""Continue a prompt with a trained model.

python inference_example.py --model_path checkpoint_dir/modeling --input_txt "明月松间照，"
"""

from colossal_llama2 import errors, logs
from colossal_llama2.cli import inference_flags


def main(argv=None) -> None:
    args = inference_flags.inference_parser().parse_args(argv)
    logs.configure_logging()
    with errors.one_line_errors("inference_example.py"):
        from colossal_llama2.inference.run import run
        from colossal_llama2.inference.settings import InferenceSettings

        run(InferenceSettings.from_flags(vars(args)))


if __name__ == "__main__":
    main()
