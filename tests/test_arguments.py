"""Every flag of the original parses under every spelling that it ever had, with the README's defaults."""

import math
from collections import Counter

import pytest

from colossal_llama2.cli import (
    data_flags,
    dependent_flags,
    flag_names,
    inference_flags,
    tokenizer_flags,
    train_flags,
    value_types,
)

REQUIRED = object()

PREPARE = {
    ("--data_input_dirs",): ("a,b", ["a", "b"], REQUIRED),
    ("--tokenizer_dir",): ("t", "t", REQUIRED),
    ("--data_cache_dir",): ("c", "c", "cache"),
    ("--data_jsonl_output_dir",): ("j", "j", "jsonl_output"),
    ("--data_arrow_output_dir",): ("o", "o", "arrow_output"),
    ("--max_length",): ("2048", 2048, 4096),
    ("--num_spliced_dataset_bins",): ("7", 7, 10),
    ("--executor",): ("ray", "ray", "local"),
    ("--ray_address",): ("10.0.0.1:6379", "10.0.0.1:6379", None),
}
TRAIN = {
    ("--pretrained",): ("m", "m", REQUIRED),
    ("--dataset",): (["d/part-00000", "d/part-00001"], ["d/part-00000", "d/part-00001"], REQUIRED),
    ("--bucketed",): ([], True, False),
    ("--mixture",): (["zh=0.8", "en=0.2"], ["zh=0.8", "en=0.2"], None),
    ("--mixture_end",): ("stop", "stop", "repeat"),
    ("--plugin",): ("3d", "3d", "gemini"),
    ("--load_checkpoint",): ("c", "c", None),
    ("--resume",): ("auto", "auto", None),
    ("--keep_last",): ("3", 3, None),
    ("--keep_every",): ("1000", 1000, None),
    ("--max_bad_steps",): ("2", 2, 0),
    ("--dist_timeout",): ("60", 60.0, 600.0),
    ("--save_interval",): ("400", 400, 1000),
    ("--save_dir",): ("s", "s", "checkpoint_dir"),
    ("--tensorboard_dir",): ("b", "b", "logs_dir"),
    ("--report_to",): ("mlflow,tensorboard", "mlflow,tensorboard", "tensorboard"),
    ("--config_file",): ("f", "f", "config_file"),
    ("--num_epochs",): ("3", 3, 1),
    ("--micro_batch_size", "--batch_size"): ("8", 8, 1),
    ("--lr",): ("1e-4", 1e-4, 3e-4),
    ("--max_length",): ("2048", 2048, 4096),
    ("--mixed_precision",): ("bf16", "bf16", "fp16"),
    ("--gradient_clipping", "--grad_clip"): ("0.5", 0.5, 1.0),
    ("--weight_decay", "-w"): ("0.01", 0.01, 0.1),
    ("--warmup_steps", "-s"): ("100", 100, None),
    ("--use_grad_checkpoint",): ([], True, False),
    ("--use_flash_attn",): ([], True, False),
    ("--chunked_loss",): ("off", "off", "auto"),
    ("--document_mask",): ("on", "on", "auto"),
    ("--train_new_rows_only",): ([], True, False),
    ("--freeze_non_embeds_params",): ([], True, False),
    ("--tp",): ("2", 2, 1),
    ("--zero", "--zero_stage"): ("2", 2, 1),
    ("--pp",): ("2", 2, 1),
    ("--microbatch_size",): ("4", 4, 1),
    ("--enable_sequence_parallelism",): ([], True, False),
    ("--sp_mode",): ("ring", "ring", "split_gather"),
    ("--sp",): ("2", 2, 1),
    ("--accumulation_steps",): ("4", 4, 1),
    ("--max_steps",): ("90", 90, None),
    ("--continue_data",): ([], True, False),
    ("--eval_dataset",): (["en=a", "zh=b"], ["en=a", "zh=b"], None),
    ("--eval_interval",): ("200", 200, None),
    ("--eval_tasks",): ("icl,mmlu=a", "icl,mmlu=a", None),
    ("--eval_limit",): ("9", 9, 200),
    ("--eval_num_fewshot",): ("2", 2, None),
    ("--eval_prompts",): ("p.txt", "p.txt", None),
    ("--eval_prompt_tokens",): ("9", 9, 64),
    ("--forgetting_alarm",): ("en=0.05", ["en=0.05"], None),
    ("--on_forgetting",): ("stop", "stop", "warn"),
}
# Per parser: all spellings of a flag -> (words given, value parsed, the README's default).
FLAGS = {
    tokenizer_flags.init_tokenizer_parser: {
        ("--source_tokenizer_dir",): ("a", "a", REQUIRED),
        ("--target_tokenizer_dir",): ("b", "b", REQUIRED),
        ("--expand_tokens_file",): ("c", "c", REQUIRED),
    },
    tokenizer_flags.init_model_parser: {
        ("--source_model_and_tokenizer_path",): ("a", "a", REQUIRED),
        ("--target_tokenizer_path",): ("b", "b", REQUIRED),
        ("--target_model_path",): ("c", "c", REQUIRED),
        ("--dtype",): ("bfloat16", "bfloat16", "source"),
        ("--overwrite",): ([], True, False),
    },
    tokenizer_flags.mine_tokens_parser: {
        ("--data_input_dirs",): ("a,b", ["a", "b"], REQUIRED),
        ("--source_tokenizer_dir",): ("s", "s", REQUIRED),
        ("--output_file",): ("f", "f", REQUIRED),
        ("--plot",): ("p.png", "p.png", None),
        ("--num_new_tokens",): ("500", 500, 37104),
        ("--script",): ("any", "any", "han"),
        ("--max_piece_length",): ("4", 4, 8),
        ("--min_count",): ("2", 2, 5),
        ("--sample_bytes",): ("1000", 1000, 100_000_000),
        ("--held_out",): ("0.5", 0.5, 0.125),
        ("--seed",): ("7", 7, 1024),
    },
    tokenizer_flags.compare_parser: {
        ("--tokenizer_dirs",): ("a,b", ["a", "b"], REQUIRED),
        ("--data_input_dirs",): ("c,d", ["c", "d"], REQUIRED),
        ("--output_file",): ("f", "f", None),
        ("--sample_documents",): ("10", 10, 10_000),
    },
    data_flags.prepare_pretrain_parser: PREPARE,
    data_flags.prepare_sft_parser: PREPARE
    | {
        ("--assistant_roles",): ("bing, bard", ["bing", "bard"], None),
        ("--assistant_first",): ("train", "train", "mask"),
    },
    train_flags.train_parser: TRAIN,
    train_flags.train_sft_parser: TRAIN | {("--accumulation_steps",): ("4", 4, 8), ("--use_neft",): ([], True, False)},
    inference_flags.inference_parser: {
        ("--model_path",): ("m", "m", "hpcai-tech/Colossal-LLaMA-2-7b-base"),
        # The original's cuda:0 where there is a GPU; cpu elsewhere.
        ("--device",): ("cuda:0", "cuda:0", None),
        ("--max_new_tokens",): ("256", 256, 512),
        ("--do_sample",): ("False", False, True),
        ("--temperature",): ("0.7", 0.7, 0.3),
        ("--top_k",): ("5", 5, 50),
        ("--top_p",): ("0.9", 0.9, 0.95),
        ("--input_txt",): ("你好 world", "你好 world", "明月松间照，"),
        ("--dtype",): ("bf16", "bf16", "auto"),
        ("--prompt_style",): ("sft", "sft", "auto"),
        ("--no_stream",): ([], True, False),
        ("--interactive",): ([], True, False),
        ("--input_file",): ("f", "f", None),
        ("--output_file",): ("f", "f", None),
        ("--batch_size",): ("4", 4, None),
        ("--num_return_sequences",): ("3", 3, 1),
        ("--repetition_penalty",): ("1.1", 1.1, 1.0),
    },
}
PARSERS = pytest.mark.parametrize("make_parser", FLAGS, ids=lambda make: make.__name__)


def words_of(given) -> list:
    return given if isinstance(given, list) else [given]


def required_words(flags: dict) -> list:
    required = [(names[0], given) for names, (given, _, default) in flags.items() if default is REQUIRED]
    return [word for name, given in required for word in (name, *words_of(given))]


def destination(names: tuple) -> str:
    return names[0].lstrip("-")


@PARSERS
def test_every_flag_of_the_original_parses_under_each_spelling(make_parser):
    flags = FLAGS[make_parser]
    for names, (given, value, _) in flags.items():
        for name in names:
            parsed = make_parser().parse_args([*required_words(flags), name, *words_of(given)])
            assert getattr(parsed, destination(names)) == value, name


@PARSERS
def test_defaults_are_those_of_the_readme(make_parser):
    flags = FLAGS[make_parser]
    parsed = dependent_flags.with_defaults(make_parser().parse_args(required_words(flags)))
    for names, (_, value, default) in flags.items():
        assert getattr(parsed, destination(names)) == (value if default is REQUIRED else default), names


@PARSERS
def test_required_flags_are_required(make_parser, capsys):
    flags = FLAGS[make_parser]
    for names, (_, _, default) in flags.items():
        if default is REQUIRED:
            others = {other: flags[other] for other in flags if other != names}
            assert names[0] in error_of(make_parser, required_words(others), capsys)


@PARSERS
def test_each_spelling_is_defined_once_and_explained(make_parser):
    actions = make_parser().actions
    spellings = Counter(spelling for action in actions for spelling in action.option_strings)
    assert set(spellings.values()) == {1}
    assert all(action.help for action in actions)


@PARSERS
def test_abbreviations_are_refused(make_parser, capsys):
    flags = FLAGS[make_parser]
    longest = max((names[0] for names in flags), key=len)
    abbreviation = longest[:-2]
    message = error_of(make_parser, [*required_words(flags), abbreviation, "1"], capsys)
    assert f"unknown argument {abbreviation}, did you mean {longest}?" in message


def error_of(make_parser, words, capsys) -> str:
    """The parser's answer to wrong words: one line on stderr, exit code 2."""
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args(words)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith(f"{make_parser().prog}: error: ")
    assert "--help" in captured.err
    return captured.err


@pytest.mark.parametrize(
    "misspelt, meant",
    [
        ("--save_intervall", "--save_interval"),
        ("--warmup-steps", "--warmup_steps"),
        ("--weight-decay=0.1", "--weight_decay"),
    ],
)
def test_a_near_miss_is_suggested(misspelt, meant, capsys):
    message = error_of(train_flags.train_parser, [misspelt, "5"], capsys)
    assert f"unknown argument {misspelt.split('=')[0]}, did you mean {meant}?" in message


def test_an_unknown_flag_without_a_near_one_gets_no_suggestion(capsys):
    assert "did you mean" not in error_of(train_flags.train_parser, ["--qqqq"], capsys)


@pytest.mark.parametrize(
    "flag, advice",
    [
        ("--use_wandb", "give --report_to wandb, or --report_to tensorboard,wandb"),
        ("--ddp", "give --plugin ddp"),
        ("--deepspeed", "ColossalAI does this; choose with --plugin"),
    ],
)
def test_flags_of_other_tools_are_explained(flag, advice, capsys):
    assert f"unknown argument {flag}: {advice}" in error_of(train_flags.train_parser, [flag], capsys)


def test_no_flag_is_explained_as_unknown():
    flags = {spelling.lstrip("-") for spelling in train_flags.train_sft_parser().by_spelling}
    assert not flags & flag_names.EXPLANATIONS.keys()


@pytest.mark.parametrize(
    "make_parser, flag, value, allowed",
    [
        (train_flags.train_parser, "--lr", "0", "a number above 0"),
        (train_flags.train_parser, "--lr", "nan", "a number above 0"),
        (train_flags.train_parser, "--lr", "inf", "a number above 0"),
        (train_flags.train_parser, "--weight_decay", "-0.1", "a number of at least 0"),
        (train_flags.train_parser, "--gradient_clipping", "much", "a number of at least 0"),
        (train_flags.train_parser, "--warmup_steps", "-1", "a whole number of at least 0"),
        (train_flags.train_parser, "--save_interval", "0", "a whole number of at least 1"),
        (train_flags.train_parser, "--micro_batch_size", "1.5", "a whole number of at least 1"),
        (train_flags.train_parser, "--max_length", "7", "a whole number from 8 to 1048576"),
        (train_flags.train_parser, "--plugin", "zero3", "zero2"),
        (train_flags.train_parser, "--mixed_precision", "fp8", "bf16"),
        (train_flags.train_parser, "--zero", "3", "2"),
        (data_flags.prepare_sft_parser, "--num_spliced_dataset_bins", "0", "from 1 to 100000"),
        (data_flags.prepare_sft_parser, "--num_spliced_dataset_bins", "100001", "from 1 to 100000"),
        (data_flags.prepare_sft_parser, "--data_input_dirs", "a,,b", "empty entry"),
        (data_flags.prepare_sft_parser, "--assistant_roles", "a,,b", "empty entry"),
        (inference_flags.inference_parser, "--do_sample", "yes", "True or False"),
        (inference_flags.inference_parser, "--top_p", "1.5", "above 0 and at most 1"),
        (inference_flags.inference_parser, "--top_p", "0", "above 0 and at most 1"),
        (inference_flags.inference_parser, "--temperature", "0", "a number above 0"),
        (inference_flags.inference_parser, "--top_k", "0", "a whole number of at least 1"),
    ],
)
def test_a_bad_value_is_one_line_with_the_allowed_values(make_parser, flag, value, allowed, capsys):
    message = error_of(make_parser, [*required_words(FLAGS[make_parser]), f"{flag}={value}"], capsys)
    assert flag in message and value in message and allowed in message


def test_a_value_split_at_its_spaces_is_reported(capsys):
    message = error_of(inference_flags.inference_parser, ["--input_txt", "two", "words"], capsys)
    assert "unexpected words" in message and "quote" in message


@pytest.mark.parametrize("word", ["True", "true", "TRUE"])
def test_true_and_false_are_words(word):
    assert value_types.true_or_false(word) is True
    assert value_types.true_or_false("False") is False


def test_bounds_themselves_are_accepted():
    assert value_types.bin_count("1") == 1 and value_types.bin_count("100000") == value_types.MAX_BINS
    assert value_types.probability("1") == 1.0
    assert value_types.non_negative_float("0") == 0.0
    assert math.isclose(value_types.positive_float("1e-12"), 1e-12)


def test_fine_tuning_has_the_flags_of_pre_training_and_its_own():
    def flags(make_parser):
        return {spelling for action in make_parser().actions for spelling in action.option_strings}

    assert flags(train_flags.train_sft_parser) - flags(train_flags.train_parser) == {
        "--use_neft",
        "--neft_alpha",
        "--group_by_length",
    }
