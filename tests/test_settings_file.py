"""--load_config: settings of one run used by another, and every way in which a file can be wrong."""

import json

import pytest

from colossal_llama2.cli import dependent_flags, settings_file, train_flags

REQUIRED = ["--pretrained", "m", "--dataset", "d/part-00000", "d/part-00001"]
FULL = [
    *REQUIRED,
    "--plugin",
    "3d",
    "--tp",
    "2",
    "--zero",
    "0",
    "--lr",
    "1e-4",
    "-w",
    "0",
    "-s",
    "7",
    "--keep_last",
    "3",
    "--use_flash_attn",
    "--sp_mode",
    "ring",
    "--save_dir=-odd",
    "--dist_timeout",
    "60",
    "--chunked_loss",
    "off",
]


@pytest.fixture
def file_of(tmp_path):
    """Write settings as --config_file does, with changes."""

    def write(words=FULL, make_parser=train_flags.train_parser, **changes) -> str:
        found = {"versions": {"torch": "2.5.1"}, "world_size": 2, "total_steps": 9, **changes}
        path = tmp_path / "settings.json"
        path.write_text(json.dumps({**vars(make_parser().parse_args(words)), **found}))
        return str(path)

    return write


@pytest.mark.parametrize("make_parser", [train_flags.train_parser, train_flags.train_sft_parser])
def test_every_setting_is_read_back(file_of, make_parser):
    path = file_of(make_parser=make_parser)
    again = make_parser().parse_args(["--load_config", path])
    assert {**vars(again), "load_config": None} == vars(make_parser().parse_args(FULL))


def test_the_command_line_wins_whatever_the_order(file_of):
    path = file_of()
    for words in (["--lr", "5e-5", f"--load_config={path}"], [f"--load_config={path}", "--lr", "5e-5"]):
        words += ["--dataset", "e", "--batch_size", "4", "--weight_decay", "1"]
        args = train_flags.train_parser().parse_args(words)
        assert (args.lr, args.dataset, args.micro_batch_size, args.weight_decay) == (5e-5, ["e"], 4, 1.0)
        assert args.plugin == "3d" and args.use_flash_attn


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"save_intervall": 3}, ["save_intervall is not a flag, did you mean save_interval?"]),
        ({"qqqq": 3}, ["qqqq is not a flag"]),
        ({"lr": "fast"}, ["lr", "'fast' given", "a number above 0"]),
        ({"lr": -1}, ["lr", "-1", "a number above 0"]),
        ({"lr": True}, ["lr is true", "a number allowed"]),
        ({"lr": [1, 2]}, ["lr is [1, 2]", "one value allowed"]),
        ({"num_epochs": 1.5}, ["num_epochs", "1.5", "a whole number"]),
        ({"plugin": "zero3"}, ["plugin", "zero3", "gemini_auto"]),
        ({"plugin": 3}, ["plugin", "3 given", "gemini_auto"]),
        ({"zero": 5}, ["zero", "5 given", "0, 1, 2"]),
        ({"save_dir": 5}, ["save_dir is 5", "text allowed"]),
        ({"use_flash_attn": "yes"}, ['use_flash_attn is "yes"', "true or false"]),
        ({"dataset": "d"}, ['dataset is "d"', "a list of values"]),
        ({"dataset": []}, ["dataset is []", "a list of values"]),
        ({"stage": "sft"}, ["was written by train_sft.py", "train.py"]),
    ],
)
def test_a_wrong_entry_is_one_line(file_of, capsys, changes, words):
    path = file_of(**changes)
    with pytest.raises(SystemExit) as end:
        train_flags.train_parser().parse_args(["--load_config", path, *REQUIRED])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"train.py: error: --load_config {path}: ")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("{", "is not JSON"), ("[]", "not a JSON object"), (b"\xff", "not JSON")],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, content, words):
    path = tmp_path / "a"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as end:
        train_flags.train_parser().parse_args(["--load_config", str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and words in line and "--config_file" in line


def test_without_arguments_the_required_flags_are_named(capsys):
    with pytest.raises(SystemExit):
        train_flags.train_parser().parse_args([])
    assert "required: --pretrained, --dataset" in capsys.readouterr().err


def test_defaults_of_lists_and_unused_flags_are_written(file_of):
    args = dependent_flags.with_defaults(train_flags.train_parser().parse_args(REQUIRED))
    path = file_of(REQUIRED, **dependent_flags.used_flags(args))
    again = train_flags.train_parser().parse_args(["--load_config", path])
    assert not dependent_flags.unused_flags(again) and (again.zero, again.eval_dataset) == (None, None)


def test_required_flags_are_still_required(tmp_path, capsys):
    (tmp_path / "a").write_text('{"pretrained": "m", "plugin": null}')
    with pytest.raises(SystemExit):
        train_flags.train_parser().parse_args(["--load_config", str(tmp_path / "a")])
    assert "required: --dataset" in capsys.readouterr().err


def test_pairs_are_written_as_on_the_command_line():
    parser = train_flags.train_parser()
    for value in ([["zh", 0.8], ["en", 0.2]], {"zh": 0.8, "en": 0.2}, ["zh=0.8", "en=0.2"]):
        action = parser.by_spelling["--mixture"]
        assert settings_file._words(action, value, "here") == ["--mixture", "zh=0.8", "en=0.2"]
