"""python -m tests.gpu: whole in its smallest form, and whatever becomes of a part. Also its bundle of wheels."""

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from colossal_llama2.cli import train_flags
from colossal_llama2.cli.dependent_flags import with_defaults
from colossal_llama2.plugin_names import PLUGIN_NAMES
from colossal_llama2.train.settings import from_flags, selftest_config
from colossal_llama2.train.settings.flag_problems import flag_problems
from tests.conftest import ROOT
from tests.gpu import page, plan, processes, step_kernels
from tests.gpu.__main__ import main, with_needed
from tests.gpu.parts import FAILED, PASSED, SKIPPED, Part, printed_figures
from tests.gpu.record import JSON_FILE, PAGE_FILE, Recorder
from tests.gpu.running import Limits, Schedule, reason_in

FIGURES = "from tests.gpu.parts import print_figures; print_figures(answer=42)"


def python(name, code, *, seconds=60.0, **of):
    return Part(name, plan.MACHINE, ("-c", code), seconds, printed_figures, **of)


def run_parts(tmp_path, parts, *, seconds=60.0, beside=1):
    """The record, the page and the outcomes of a run of these parts."""
    recorder = Recorder(tmp_path, parts, small=True, minutes=1)
    limits = Limits(time.monotonic() + seconds, beside)
    outcomes = Schedule(parts, limits=limits, starter=processes.start, folder=tmp_path / "output").run(recorder.add)
    return json.loads((tmp_path / JSON_FILE).read_text()), (tmp_path / PAGE_FILE).read_text(), outcomes


@pytest.mark.slow
def test_a_part_that_fails_crashes_or_hangs_ends_alone(tmp_path):
    child = tmp_path / "child"
    hangs = (
        f"import subprocess, time; p = subprocess.Popen(['sleep', '600']); open({str(child)!r}, 'w').write(str(p.pid))"
    )
    record, text, outcomes = run_parts(
        tmp_path,
        [
            python("crash", "import os; print('before', flush=True); os.abort()"),
            python("fault", "import sys; sys.exit('train.py: error: the disk is full')"),
            python("exception", "raise RuntimeError('no kernel')"),
            python("hang", f"{hangs}; print('waiting', flush=True); time.sleep(600)", seconds=2),
            python("silent", "pass"),
            python("needs it", FIGURES, needs=("fault",)),
            python("needs that", FIGURES, needs=("needs it",)),
            python("good", FIGURES),
        ],
    )
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        **dict.fromkeys(("crash", "fault", "exception", "hang", "silent"), FAILED),
        **dict.fromkeys(("needs it", "needs that"), SKIPPED),
        "good": PASSED,
    }
    assert {part["name"]: part["reason"] for part in record["parts"]} == {
        "crash": "it was ended by SIGABRT",
        "fault": "train.py: error: the disk is full",
        "exception": "RuntimeError: no kernel",
        "hang": "it had not ended after 2 s, and was killed",
        "silent": "no figures: its output has no line of figures",
        "needs it": 'it needs "fault", which failed',
        "needs that": 'it needs "needs it", which was skipped',
        "good": "",
    }
    assert record["parts"][-1]["figures"] == {"answer": 42}
    assert "1 of 8 parts passed, 5 failed, 2 were skipped" in text
    assert "**hang**, after 2 s: it had not ended after 2 s, and was killed\n\n```text\n$ python -c" in text
    assert "waiting\n```" in text and '- needs it: it needs "fault", which failed' in text
    assert not is_running(int(child.read_text()))


def is_running(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_parts_that_time_ran_out_for_are_skipped_with_the_reason(tmp_path):
    parts = [python("long", "import time; time.sleep(600)"), python("last", FIGURES)]
    record, text, _ = run_parts(tmp_path, parts, seconds=6)
    assert [part["status"] for part in record["parts"]] == [SKIPPED, SKIPPED]
    assert re.search(r"- long: the time of the run was over after \d s of this part\n- last: the time of the run", text)


def test_parts_run_beside_each_other_unless_they_measure(tmp_path):
    log = tmp_path / "log"
    begin = f"import time; f = open({str(log)!r}, 'ab', buffering=0); f.write(b'+')"
    end = f"f.write(b'-'); {FIGURES}"
    # Both of the first end only when both have begun.
    wait = "while not open(f.name).read().startswith('++'): time.sleep(0.05)"
    pair = [python(name, f"{begin}\n{wait}\n{end}") for name in "ab"]
    others = [python(name, f"{begin}; time.sleep(0.3); {end}", is_alone=name != "e") for name in "cde"]
    _, _, outcomes = run_parts(tmp_path, pair + others, beside=2)
    assert {outcome.status for outcome in outcomes.values()} == {PASSED}
    assert log.read_text() == "++--" + "+-" * 3


def test_files_are_written_after_each_part_and_name_those_that_were_not_reached(tmp_path):
    parts = [python("a", FIGURES), python("b", FIGURES)]
    recorder = Recorder(tmp_path, parts, small=True, minutes=1)

    def stop_after(part, outcome):
        recorder.add(part, outcome)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        schedule = Schedule(parts, limits=Limits(time.monotonic() + 60), starter=processes.start, folder=tmp_path / "x")
        schedule.run(stop_after)
    assert "1 of 2 parts passed" in (tmp_path / PAGE_FILE).read_text()
    assert "- b: the run ended before it" in (tmp_path / PAGE_FILE).read_text()


@pytest.mark.parametrize(
    "printed, reason",
    [
        ("12:00:01 | Plan\nselftest: error: not equal: loss. The runs are in x\n", "selftest: error: not equal: loss."),
        ("Traceback\n  raise x\ntorch.OutOfMemoryError: CUDA out of memory\nnote: y\n", "torch.OutOfMemoryError: CUDA"),
        ("only this\n\n", "only this"),
        ("", ""),
    ],
)
def test_the_reason_is_the_last_error(printed, reason):
    assert reason_in(printed).startswith(reason) and bool(reason) == bool(reason_in(printed))


@pytest.fixture(scope="module")
def gpu_parts(tmp_path_factory):
    return plan.all_parts(plan.Place(tmp_path_factory.mktemp("gpu"), on_gpu=True, small=False))


def test_every_part_comes_after_what_it_needs(gpu_parts):
    names = [part.name for part in gpu_parts]
    assert len(set(names)) == len(names)
    for number, part in enumerate(gpu_parts):
        assert set(part.needs) <= set(names[:number]), part.name


def test_every_plugin_is_tested_and_timed(gpu_parts):
    tested = {plugin for plugin, _, _ in plan.SELF_TESTS}
    timed = {training.plugin for training in plan.FIRST_TRAININGS + plan.LATER_TRAININGS}
    assert tested == timed == set(PLUGIN_NAMES)


def test_the_commands_for_a_gpu_are_accepted(gpu_parts):
    """Their flags; nothing of them is run here."""
    count = 0
    for part in gpu_parts:
        if part.command[0] == "train.py":
            args = train_flags.train_parser().parse_args(part.command[1:])
            whole = with_defaults(args)
            assert flag_problems(args, whole, from_flags.engine_settings(whole), world_size=1) == [], part.name
        elif part.command[1] == "colossal_llama2.train.selftest":
            args = train_flags.selftest_parser().parse_args(part.command[2:])
            # Raises a UserError if something is wrong with them.
            assert selftest_config.resolve(args, ranks=1).steps == plan.FULL.selftest_steps
        else:
            continue
        count += 1
    assert count == len(plan.SELF_TESTS) + 2 * len(plan.FIRST_TRAININGS + plan.LATER_TRAININGS) + 2


def test_compilers_find_the_headers_that_pytorch_brings(tmp_path, monkeypatch):
    """A toolkit may lack those of cuBLAS, without which ColossalAI's Adam does not compile."""
    include = tmp_path / "nvidia/cu13/include"
    include.mkdir(parents=True)
    (tmp_path / "nvidia/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")
    environment = plan.Place(tmp_path, on_gpu=True, small=False).environment("3,4")
    folders = environment["CPLUS_INCLUDE_PATH"].split(os.pathsep)
    assert folders[0] == "/mine" and str(include) in folders
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert plan.Place(tmp_path, on_gpu=False, small=True).environment("3")["CUDA_VISIBLE_DEVICES"] == "-1"


def test_parts_are_chosen_with_what_they_need(gpu_parts):
    assert [part.name for part in with_needed(gpu_parts, ["verify"])] == [
        *("machine", "build Adam", "inputs", "prepare", "train and save", "verify")
    ]
    assert with_needed(gpu_parts, ["nonsense"]) == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--device", "cpu"], "add --small"),
        (["--minutes", "0"], "a number above 0 is allowed"),
        (["--minutes", "nan"], "a number above 0 is allowed"),
        (["--only", "nonsense"], "--only nonsense given, which no part has in its name"),
        (["--work_dir", "missing"], "--work_dir missing: No such file or directory; give a folder that"),
        (["--output", "/dev/null/x"], "--output /dev/null/x: Not a directory; give a folder that can be"),
    ],
)
def test_wrong_flags_end_with_code_2(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_page_of_an_earlier_run_is_kept(tmp_path, capsys):
    (tmp_path / JSON_FILE).write_text("{}")
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path)])
    assert "has the page of an earlier run" in capsys.readouterr().err
    assert (tmp_path / JSON_FILE).read_text() == "{}"


@pytest.mark.slow
def test_without_a_gpu_the_page_says_so(tmp_path):
    command = [sys.executable, "-m", "tests.gpu", "--only", "inputs", "--output", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    text = (tmp_path / PAGE_FILE).read_text()
    assert done.returncode == 1 and "**machine**, after " in text
    assert "RuntimeError: PyTorch sees no GPU here; repair CUDA, or give --device cpu --small" in text
    assert '- inputs: it needs "machine", which failed' in text


@pytest.mark.slow
def test_the_smallest_form_runs_whole_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--small", "--minutes", "14", "--output", tmp_path]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    record = json.loads((tmp_path / JSON_FILE).read_text())
    assert {part["name"]: part["reason"] for part in record["parts"] if part["status"] != PASSED} == {}
    assert done.returncode == 0, done.stderr
    figures = {part["name"]: part["figures"] for part in record["parts"]}
    for name in ("self-test zero2 fp32", "self-test gemini bf16", "self-test 3d fp32 zero 0"):
        assert figures[name]["resumed weights"] == [0.0, 0.0]
        found, allowed = figures[name]["loss"]
        assert found <= allowed
    assert figures["speed 1.3B gemini"]["tokens_per_second"] > 0
    assert figures["speed 1.3B zero2"]["memory_bytes"] > figures["forecast 1.3B zero2"]["memory_bytes"] > 0
    assert figures["resume"] == {"loss_difference": 0.0, "steps": 4, "seconds": figures["resume"]["seconds"]}
    assert figures["generate 1.3B"]["tokens"] == plan.SMALL.generated
    text = (tmp_path / PAGE_FILE).read_text()
    assert text == page.page(record)
    assert f"{len(record['parts'])} of {len(record['parts'])} parts passed, 0 failed, 0 were skipped" in text
    assert re.search(r"^\| zero2 fp32 \| \S+ / 1\.0e-05 .* \| passed \|$", text, re.MULTILINE)
    assert re.search(r"^\| 1\.3B zero2 \| [\d,]+ \| \d+\.\d\d \| ", text, re.MULTILINE)
    assert "| loss after a resume, largest relative difference | 0.0e+00 in 4 steps |" in text


def test_the_page_of_a_gpu_has_its_figures():
    machine = {"gpus": 1, "device": "NVIDIA Made-up", "capability": "9.0", "memory_bytes": 80 * 2**30, "driver": None}
    machine |= {"free_memory_bytes": 79 * 2**30, "sdpa_flash": True, "cores": 8, "host_memory_bytes": 64 * 2**30}
    machine |= {"system": "Linux", "nvcc": None, "compiler": "g++", "python": "3.12", "torch": "2.11", "cuda": "13.0"}
    machine |= {"packages": {"datasets": ["5.0.1", "5.0.1"], "numpy": ["2.5.2", "2.3.5"], "ray": [None, "2.60.0"]}}
    shares = {"forward": 30.0, "backward": 60.0, "optimizer": 8.0, "rest": 2.0, "data": 0.0}
    timed = {"tokens_per_second": 9000.0, "step_percent": shares, "memory_bytes": 40 * 2**30, "tflops": 350.0}
    found = {
        "machine": machine,
        "inputs": {"models": {"1.3B": {"layers": 20, "whole": 24, "parameters": 1.1e9}}},
        "forecast 1.3B zero2": {"memory_bytes": 42 * 2**30, "moment": "backward"},
        "ceilings": {"matmul_tflops": 700.0, "copy_bytes_per_second": 4e12, "from_host_bytes_per_second": 5e10},
        "speed 1.3B zero2": {**timed, "mfu_percent": 35.4, "step_seconds": 0.9},
        "bare 1.3B": {"tokens_per_second": 10000.0, "step_seconds": 0.8, "memory_bytes": 41 * 2**30},
        "step kernels": {
            "on_device": True,
            "busy_percent": 93.0,
            "operations": 1234.0,
            "longest": [["fmha|x", 24.0, 9]],
        },
    }
    parts = [{"name": name, "status": PASSED, "reason": "", "figures": figures} for name, figures in found.items()]
    text = page.page({"parts": parts, "date": "today", "small": False, "minutes": 8.0, "seconds": 300.0})
    assert text.startswith("# One run on a GPU\n\nWritten by `python -m tests.gpu` on today, on **NVIDIA Made-up**.")
    assert "| memory | 80.0 GiB, 79.0 GiB of it free |" in text
    assert "Not installed: ray." in text and "pinned ones: numpy 2.5.2 (pinned: 2.3.5)." in text
    assert (
        "| 1.3B zero2 | 9,000 | 0.90 | 350 | 50.0 % | 35.4 % | 30.0 % | 60.0 % | 8.0 % | 2.0 % | 40.00 | 42.00 | 1.05 |"
        in text
    )
    assert "1.3B has 20 of 24 layers" in text
    assert "a step has 1,234 operations on the GPU" in text and "| `fmha/x` | 24.0 | 9.0 % |" in text


def test_kernels_of_a_trace_are_counted():
    def event(cat, name, begin, duration):
        return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": duration}

    events = [event("kernel", "a", 0, 40), event("kernel", "a", 20, 30), event("gpu_memcpy", "b", 90, 10)]
    found = step_kernels.summary([*events, event("cpu_op", "aten::mm", 0, 1000)])
    assert (found["on_device"], found["busy_percent"], found["operations"]) == (True, 60.0, 1.5)
    assert found["longest"] == [["a", 1.0, 87.5], ["b", 0.5, 12.5]]


# The bundle.

BUNDLE, RUN = ROOT / "tests/gpu/bundle.sh", ROOT / "tests/gpu/run.sh"
# In place of python3: pip download and pip wheel write one file each, of $BYTES bytes.
FAKE_PIP = """#!/usr/bin/env bash
while (($#)); do
    [[ $1 == --dest || $1 == --wheel-dir ]] && truncate -s "$BYTES" "$2/$1.whl"
    [[ $1 == *==* ]] && echo "$1" >>"$LOG"
    shift
done
"""


def bash(script, *arguments, **environment):
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(["bash", script, *map(str, arguments)], env=environment, capture_output=True, text=True)


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def collect(tmp_path, *flags, size):
    """Run bundle.sh with wheels of so many bytes."""
    fake = executable(tmp_path / "bin/python3", FAKE_PIP)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    return bash(BUNDLE, tmp_path / "bundle", *flags, PATH=path, BYTES=size, LOG=tmp_path / "log")


def test_a_bundle_has_what_the_requirements_pin(tmp_path):
    done = collect(tmp_path, size=1000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["2", "kB", "in", "all,", "of", "67108", "allowed"]
    assert len(list((tmp_path / "bundle").iterdir())) == 2
    pins = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-gpu.txt").read_text()
    asked = (tmp_path / "log").read_text().splitlines()
    assert [pin for pin in asked if pin not in pins] == ["pyarrow==21.0.0"]
    assert {"colossalai==0.5.0", "transformers==4.51.3", "datasets==5.0.1"} <= set(asked)


def test_a_bundle_of_a_package_without_a_pin_is_refused(tmp_path, assert_user_error):
    script = tmp_path / "tests/gpu/bundle.sh"
    script.parent.mkdir(parents=True)
    script.write_text(BUNDLE.read_text())
    for name in ("requirements.txt", "requirements-gpu.txt"):
        (tmp_path / name).write_text("xxhash==1.0\n")
    assert_user_error(bash(script, tmp_path / "bundle"), "bundle.sh: no file of requirements pins datasets")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_can_leave_out_what_the_machine_has(tmp_path):
    assert collect(tmp_path, "--transformers", "own", "--without", "xxhash", size=1).returncode == 0
    names = {pin.partition("==")[0] for pin in (tmp_path / "log").read_text().splitlines()}
    assert not names & {"transformers", "tokenizers", "huggingface_hub", "xxhash"} and "datasets" in names


def test_a_bundle_over_the_limit_is_refused(tmp_path, assert_user_error):
    done = collect(tmp_path, size=33 * 2**20)
    assert_user_error(done, "bundle.sh: 2097152 bytes over the limit of 64 MiB; leave out what the machine has with")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("bundle")] == []


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "no output folder given"),
        (["{here}"], "already exists; give a new folder"),
        (["{here}/a/b"], "cannot be made"),
        (["{here}/a", "--transformers", "mine"], "--transformers mine given; pinned and own are allowed"),
        (["{here}/a", "--python", "3"], "--python 3 given; a version such as 3.12 is allowed"),
        (["{here}/a", "--without"], "--without needs a value"),
        (["{here}/a", "--other"], "--other given; --transformers, --python and --without are allowed"),
    ],
)
def test_wrong_flags_of_the_bundle_are_refused(tmp_path, assert_user_error, flags, words):
    assert_user_error(bash(BUNDLE, *(flag.format(here=tmp_path) for flag in flags)), words)


# In place of the interpreter: shows what the run would find of the bundle.
FAKE_PYTHON = """#!/usr/bin/env bash
[[ $2 == tests.gpu ]] && exec {python} -c 'import carried, sys; print(carried.__file__, *sys.argv[1:])' "${{@:3}}"
exec {python} "$@"
"""


def test_a_bundle_is_installed_for_the_run_alone(tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    with zipfile.ZipFile(bundle / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    python3 = executable(tmp_path / "bin/python", FAKE_PYTHON.format(python=sys.executable))
    done = bash(RUN, bundle, "--minutes", "3", PYTHON=python3)
    assert done.returncode == 0, done.stderr
    place, *flags = done.stdout.split()
    assert flags == ["--minutes", "3"] and place.endswith("/carried.py") and not Path(place).exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no bundle given"),
        (["{here}/missing"], "is not a folder"),
        (["{here}"], "holds no wheels"),
    ],
)
def test_a_wrong_bundle_is_refused(tmp_path, assert_user_error, arguments, words):
    assert_user_error(bash(RUN, *(word.format(here=tmp_path) for word in arguments)), words)
