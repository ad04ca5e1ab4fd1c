"""The traits of a flag: what it needs, whether it changes the numbers of training, whether the model card lists it."""

import pytest

from colossal_llama2.cli import dependent_flags, train_flags
from colossal_llama2.train.checkpointing import resuming
from colossal_llama2.train.report import model_card

PARSERS = pytest.mark.parametrize("make_parser", [train_flags.train_parser, train_flags.train_sft_parser])
# Training computes the same numbers whatever these are.
CHANGE_NO_NUMBERS = set(
    "save_dir save_interval skip_save_each_epoch load_checkpoint continue_data resume keep_last keep_every "
    "max_bad_steps dist_timeout report_to tensorboard_dir config_file load_config use_grad_checkpoint eval_dataset "
    "eval_interval eval_tasks eval_limit eval_num_fewshot eval_prompts eval_prompt_tokens forgetting_alarm "
    "on_forgetting benchmark num_samples profile peak_tflops dry_run num_ranks suggest model_size vocab_size gpu "
    "tokens step_tokens gpu_hour_price storage_gb_per_s".split()
)
# These do change them, but name paths; the card describes model and data differently.
OFF_CARD = {"pretrained", "dataset"}
# Compared with a checkpoint by meaning, not by text: the data by its hashes, a mixture by its shares.
COMPARED_BY_MEANING = set(
    "pretrained dataset bucketed group_by_length mixture mixture_end seed train_new_rows_only freeze_non_embeds_params "
    "lora_rank lora_alpha lora_targets".split()
)
SETTINGS = {"lr": 1e-4, "eval_interval": 10, "mixture": ["zh=1"], "stage": "pretrain"}


@PARSERS
def test_every_flag_of_training_has_decided_traits(make_parser):
    traits = make_parser().traits
    assert all(type(trait.changes_numbers) is bool and type(trait.on_card) is bool for trait in traits.values())
    assert {name for name, trait in traits.items() if not trait.changes_numbers} == CHANGE_NO_NUMBERS
    assert {name for name, trait in traits.items() if not trait.on_card} == CHANGE_NO_NUMBERS | OFF_CARD


@PARSERS
def test_flags_with_needs_are_unset_in_argparse_and_have_their_default_elsewhere(make_parser):
    parser = make_parser()
    for action in parser.actions:
        traits = parser.traits.get(action.dest)
        if traits and traits.needs:
            assert action.default is None, action.dest
            assert traits.default is None or f"(default: {traits.default})" in action.help
        elif traits:
            assert action.default == traits.default, action.dest


def test_every_flag_with_a_need_is_reported_where_it_is_unused():
    args = train_flags.train_sft_parser().parse_args(["--pretrained", "m", "--dataset", "d"])
    needing = {name: trait.needs for name, trait in dependent_flags.train_traits().items() if trait.needs}
    for name, need in needing.items():
        setattr(args, name, "given")
        unused = [] if need.is_met(args) else [f"--{name} given {need.sentence}; leave it out"]
        assert dependent_flags.unused_flags(args) == unused
        setattr(args, name, None)
    assert needing.keys() > {"zero", "sp_mode", "mixture_end", "num_samples", "resume"}


def test_a_resumed_run_compares_the_flags_that_change_numbers():
    traits = train_flags.train_sft_parser().traits
    compared = {name for name in traits if resuming._is_compared(name)}
    assert compared == traits.keys() - CHANGE_NO_NUMBERS - COMPARED_BY_MEANING
    # Not flags, but settings of a checkpoint: which command it was, and the padding token.
    assert resuming._is_compared("stage") and resuming._is_compared("pad_token")


def test_the_card_lists_only_flags():
    shown = model_card.card_settings({**SETTINGS, "world_size": 2, "versions": {}, "run_id": "x", "warmup_steps": None})
    assert shown == {"lr": 1e-4, "mixture": ["zh=1"]}
