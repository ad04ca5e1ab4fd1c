"""Mistakes that newcomers make on a command line: each gives one line with what to type."""

import shlex

import pytest

from colossal_llama2.cli import data_flags, flag_names, inference_flags, train_flags
from tests.test_arguments import FLAGS, error_of

MAKERS = {make.__name__.removesuffix("_parser"): make for make in FLAGS} | {"selftest": train_flags.selftest_parser}
NEEDED = {
    "train": "--pretrained m --dataset d",
    "train_sft": "--pretrained m --dataset d",
    "prepare_pretrain": "--data_input_dirs a --tokenizer_dir t",
    "prepare_sft": "--data_input_dirs a --tokenizer_dir t",
    "init_model": "--source_model_and_tokenizer_path a --target_tokenizer_path b --target_model_path c",
    "compare": "--tokenizer_dirs a --data_input_dirs b",
}
# Command, words as a shell would split them, and the message. The flags that the command needs come first.
MISTAKES = [
    ("train", "--use_flash_attn yes", "--use_flash_attn takes no value, 'yes' given; give the flag alone"),
    ("train", "--benchmark False", "leave --benchmark out"),
    ("prepare_sft", "--data_input_dirs a b", "type --data_input_dirs a,b"),
    ("prepare_sft", "--data_input_dirs a, b", "type --data_input_dirs a,b"),
    ("prepare_sft", "--data_input_dirs a , b", "type --data_input_dirs a,b"),
    ("prepare_sft", "--data_input_dirs a,b,", "'a,b,' has an empty entry; type a,b"),
    ("compare", "--tokenizer_dirs a b", "type --tokenizer_dirs a,b"),
    ("train", "--dataset a/part-0,a/part-1", "type --dataset a/part-0 a/part-1"),
    ("train", "--mixture zh=0.5,en=0.5", "type --mixture zh=0.5 en=0.5"),
    ("train", "--eval_dataset en=a,zh=b", "type --eval_dataset en=a zh=b"),
    ("train", "--lr = 1e-4", "type --lr 1e-4"),
    ("train", "--lr =1e-4", "type --lr=1e-4"),
    ("train", "--lr= 1e-4", "type --lr 1e-4"),
    ("train", "--save_dir = out", "type --save_dir out"),
    ("train", "–lr 1e-4", "–lr begins with U+2013, a dash that web pages substitute for two hyphens; type --lr"),
    ("train", "—save_intervall 5", "type --save_intervall"),
    ("train", "−−lr 1e-4", "U+2212"),
    ("train", "-lr 1e-4", "-lr has one hyphen; type --lr"),
    ("train", "-save_dir out", "-save_dir has one hyphen; type --save_dir"),
    ("train", "--lr", "--lr needs a value: --lr LR"),
    ("train", "--lr --plugin zero2", "--lr needs a value"),
    ("train", "--plugin", "--plugin {gemini,gemini_auto,zero2,zero2_cpu,3d,ddp}"),
    ("train", "--lr -1e-4", "'-1e-4' given, a number above 0 allowed"),
    ("train", "--max_steps 1e3.", "a whole number of at least 1 allowed"),
    ("train", "--max_steps 1e3", "type 1000"),
    ("train", "--max_steps 1,000", "type 1000"),
    ("train", "--max_steps 10.0", "type 10"),
    ("train", "--lr 0,001", "type 0.001"),
    ("train", "--weight_decay 10%", "type 0.1"),
    ("train", "--warmup_steps None", "leave --warmup_steps out"),
    ("train", "--load_checkpoint None", "--load_checkpoint is 'None', which means \"no value\" only in Python"),
    ("train", "--load_checkpoint null", "leave --load_checkpoint out"),
    ("train", "--save_dir ''", "--save_dir has an empty value"),
    ("train", "--save_dir ' '", "--save_dir has an empty value"),
    ("train", "--save_dir 'out '", "type --save_dir out"),
    ("train", "--save_dir=~/out", "the shell does not expand ~ after = or in quotes"),
    ("prepare_sft", "--data_input_dirs a,~/b", "the shell does not expand ~ after a comma"),
    ("train", "--save_dir '$HOME/out'", "a variable that the shell did not expand"),
    ("train", r"--save_dir 'C:\Users\me\out'", "is a Windows path"),
    ("train", r"--save_dir '.\out'", "is a Windows path"),
    ("train", "--save_dir ^", "^ continues a line only in Windows' cmd"),
    ("train", "--save_dir 'out\r'", "sed -i"),
    ("train", "--save_dir out ' '", "a \\ that continues a line must be its last character"),
    (
        "train",
        "--save_dir “my out”",
        "has typographic quotes, which the shell does not treat as quotes; type --save_dir 'my out'",
    ),
    ("train", "--save_dir “out”", "type --save_dir out"),
    ("train", "--save_dir '\"out\"'", "contains literal quotes"),
    ("train", "--save_dir my out", "quote a value that has spaces"),
    ("train", "--learning_rate 1e-4", "unknown argument --learning_rate; it is called --lr here"),
    ("train", "--model_name_or_path x", "it is called --pretrained here"),
    ("train", "--output_dir x", "it is called --save_dir here"),
    ("prepare_sft", "--output_dir x", "it is called --data_arrow_output_dir here"),
    ("train", "--per_device_train_batch_size 4", "--micro_batch_size"),
    ("train", "--epochs 3", "--num_epochs"),
    ("train", "--bf16", "give --mixed_precision bf16"),
    ("train", "--use_peft", "unknown argument --use_peft; it is called --lora_rank here"),
    ("train_sft", "--lora_r 8", "it is called --lora_rank here"),
    ("train_sft", "--target_modules q_proj", "it is called --lora_targets here"),
    ("train_sft", "--lora_rank 8 --lora_targets q_proj,w1", "'w1' given, all, or a comma-separated list of q_proj, k"),
    ("train", "--use_qlora", "the base model is not quantized; train an adapter of it with --lora_rank"),
    ("train", "--nproc_per_node 8", "put it before the name of the script"),
    ("train", "--local-rank=0", "torch.distributed.launch adds it"),
    ("train", "--Save-Dir x", "did you mean --save_dir?"),
    ("train_sft", "--use_nefft", "did you mean --use_neft?"),
    ("inference", "--input_txt two words", "quote a value that has spaces: --input_txt 'two words'"),
    ("train", "--mixture zh=0.5,", "type --mixture zh=0.5"),
    ("train", "--lr 0,12345678", "type 0.12345678"),
    ("prepare_sft", "--data_input_dirs a，b", "type --data_input_dirs a,b"),
    ("prepare_sft", "--data_input_dirs 'my data,,b'", "type 'my data,b'"),
    ("inference", "--input_txt -hello", "write a text that begins with a hyphen as --input_txt=-hello"),
    ("inference", "--input_txt '--what?'", "a text that begins with a hyphen as '--input_txt=--what?'"),
    ("inference", "--input_txt --temperature 1", "--input_txt needs a value"),
    ("inference", "--temperature 0", "give --do_sample False"),
    ("inference", "--temperature 0.0", "give --do_sample False"),
    ("inference", "--top_k -1", "as large as the vocabulary"),
    ("inference", "--prompt Hi", "it is called --input_txt here"),
    ("init_model", "--overwrite True", "give the flag alone"),
    ("init_model", "--nproc_per_node 8", "unknown argument --nproc_per_node"),
]


@pytest.mark.parametrize("command, words, answer", MISTAKES, ids=[f"{case[0]} {case[1]!a}" for case in MISTAKES])
def test_a_mistake_is_answered_with_what_to_type(command, words, answer, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = [*shlex.split(NEEDED.get(command, "")), *shlex.split(words)]
    assert answer in error_of(MAKERS[command], given, capsys)


@pytest.mark.parametrize("command", MAKERS)
def test_switches_take_no_value_and_each_flag_names_its_own(command, capsys):
    for action in MAKERS[command]().actions:
        for flag in action.option_strings:
            if action.dest == "help":
                continue
            if action.nargs == 0:
                for words in ([flag, "True"], [f"{flag}=True"], [flag, "0"], [f"{flag}="]):
                    assert f"{flag} takes no value" in error_of(MAKERS[command], words, capsys)
            else:
                assert f"{flag} needs a value" in error_of(MAKERS[command], [flag], capsys)


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--input_txt –lr-is-no-flag", "input_txt", "–lr-is-no-flag"),
        ("--input_txt “quoted”", "input_txt", "“quoted”"),
        ("--input_txt =", "input_txt", "="),
        ("--input_txt None", "input_txt", "None"),
        ("--input_txt=-5", "input_txt", "-5"),
        ("--input_txt ''", "input_txt", ""),
        ("--input_txt 'C:\\x'", "input_txt", "C:\\x"),
        ("--input_txt –snake_case", "input_txt", "–snake_case"),
        ("--input_txt ^", "input_txt", "^"),
        ("--input_txt '`'", "input_txt", "`"),
        ("--input_txt 'a line\r'", "input_txt", "a line\r"),
        ("--input_txt '- a list'", "input_txt", "- a list"),
        ("--input_txt '--what is this'", "input_txt", "--what is this"),
        ("--input_txt=--lr", "input_txt", "--lr"),
    ],
)
def test_every_text_is_a_prompt(words, name, value):
    assert getattr(inference_flags.inference_parser().parse_args(shlex.split(words)), name) == value


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--save_dir -5", "save_dir", "-5"),
        ("--save_dir ~nobody-of-this-name", "save_dir", "~nobody-of-this-name"),
        ('--save_dir "it\'s here"', "save_dir", "it's here"),
        ("--save_dir 输出/ü", "save_dir", "输出/ü"),
        ("--mixture a,b=0.5 c=1", "mixture", ["a,b=0.5", "c=1"]),
    ],
)
def test_unusual_names_are_accepted(words, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = shlex.split(f"{NEEDED['train']} {words}")
    assert getattr(train_flags.train_parser().parse_args(given), name) == value


def test_a_word_by_itself_may_follow_a_flag_with_its_value(capsys):
    parser = data_flags.inspect_data_parser
    for words in ("--tokenizer_dir t part", "--tokenizer_dir=t part", "part --tokenizer_dir t"):
        assert parser().parse_args(words.split()).part == "part"
    assert "unexpected b; --tokenizer_dir takes one" in error_of(parser, "a --tokenizer_dir t b".split(), capsys)


def test_what_exists_is_never_called_a_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["None", "~", "a,b", "“x”", "–snake_case", "$HOME", "c d", " e"]
    for name in names:
        (tmp_path / name).mkdir()
    args = train_flags.train_parser().parse_args(["--pretrained", "None", "--dataset", *names, "--save_dir", "c d"])
    assert args.dataset == names and args.pretrained == "None"


def test_a_list_that_is_given_again_is_reported(capsys):
    words = ["--pretrained", "m", "--dataset", "a", "--lr", "1", "--dataset", "b", "c", "--lr", "2"]
    assert train_flags.train_parser().parse_args(words).dataset == ["b", "c"]
    assert capsys.readouterr().err == "train.py: warning: --dataset is given 2 times; only the last one is used: b c\n"


def test_other_tools_names_lead_to_flags_that_exist():
    ours = {spelling[2:] for make in MAKERS.values() for spelling in make().by_spelling}
    for name, equivalents in flag_names.EQUIVALENTS.items():
        assert set(equivalents) <= ours, name


def test_edits_are_counted():
    pairs = {("lr", "lr"): 0, ("abc", "acb"): 1, ("abc", "xbcd"): 2, ("", "ab"): 2}
    assert {pair: flag_names.edits(*pair) for pair in pairs} == pairs
    assert flag_names.nearest("lora_rank", ["num_ranks", "lr"]) is None
