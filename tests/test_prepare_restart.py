"""Killed, refused, finished, out of space: however a command ends, running it again gives the same bytes."""

import errno
import gzip
import json
import os
import resource
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest

from colossal_llama2.dataset.layout import store
from colossal_llama2.dataset.layout.locks import RefusedError
from colossal_llama2.dataset.layout.output_folder import OutputDirs
from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write import prepare
from colossal_llama2.errors import RunError, UserError
from tests import tiny
from tests.conftest import ROOT
from tests.preparing import contents, flags, settings, write_lines

# Gives one command again and again, each time in a fork that ends with SIGKILL: after some number of renamed or removed
# files, or after some time, both drawn from a seed; or of one share of three, drawn too. Prints how many were killed
# before one ended with all done.
KILLER = """
import json, os, random, signal, sys, time
from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write import prepare

def count_down(function):
    def counted(*args, **keywords):
        result = function(*args, **keywords)
        counted_calls[0] -= 1
        if counted_calls[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return counted

how, keywords = sys.argv[1], json.loads(sys.argv[2])
manifest = os.path.join(keywords["data_arrow_output_dir"], "manifest.json")
drawn, killed, counted_calls = random.Random(4), 0, [0]
while killed < 300:
    # A few runs by the clock, then one that may end.
    seconds = drawn.uniform(0.02, 0.6) if how == "time" and killed < 10 else None
    counted_calls[0] = drawn.randint(1, 7)
    if how == "shares":
        keywords["shard"] = drawn.randint(1, 3), 3
    child = os.fork()
    if not child:
        os.dup2(2, 1)
        if how != "time":
            os.replace, os.rename, os.unlink = map(count_down, (os.replace, os.rename, os.unlink))
        prepare.prepare_pretrain(**keywords, sizes=WorkSizes(unit_bytes=6000))
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        killed += 1
    elif code or os.path.isfile(manifest):
        print(killed)
        sys.exit(code)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs") / "in"
    rows = [{"target": text, "category": f"topic-{n % 3}"} for n, text in enumerate(tiny.english_documents()[:120])]
    write_lines(folder / "large.jsonl", rows[:90])
    write_lines(folder / "small.jsonl", rows[90:93])
    (folder / "tail.json").write_text(json.dumps(rows[93:95], indent=1))
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows[95:])
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    return folder


SMALL_UNITS = WorkSizes(unit_bytes=6000)


def options(inputs, tokenizer_dir, output, **others) -> dict:
    """The keywords of a run in small units."""
    return command_options(inputs, tokenizer_dir, output, **{"sizes": SMALL_UNITS, **others})


def command_options(inputs, tokenizer_dir, output, **others) -> dict:
    """Those of them that are flags."""
    return settings([inputs], tokenizer_dir, output, bins=3, eval_fraction=0.2, on_bad_row="skip", **others)


@pytest.fixture
def undisturbed(inputs, tokenizer_dir, tmp_path) -> dict:
    """The files of an undisturbed run."""
    prepare.prepare_pretrain(**options(inputs, tokenizer_dir, tmp_path / "undisturbed"))
    return contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("how, num_workers, least", [("files", 1, 20), ("shares", 1, 20), ("time", 2, 3)])
def test_any_kill_is_survived(how, num_workers, least, inputs, tokenizer_dir, tmp_path, undisturbed):
    keywords = {**command_options(inputs, tokenizer_dir, tmp_path / "killed"), "num_workers": num_workers}
    done = subprocess.run(
        [sys.executable, "-c", KILLER, how, json.dumps(keywords)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= least
    assert contents(tmp_path / "killed") == undisturbed
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["arrow", "cache", "jsonl"]


# The command, with units so small that there are many.
COMMAND = """
from colossal_llama2.dataset.layout.prepare_settings import WorkSizes
from colossal_llama2.dataset.write import prepare
import prepare_pretrain_dataset

command = prepare.prepare_pretrain
prepare.prepare_pretrain = lambda **flags: command(**flags, sizes=WorkSizes(unit_bytes=6000))
prepare_pretrain_dataset.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_shares_at_the_same_time(count, inputs, tokenizer_dir, tmp_path, undisturbed):
    keywords = command_options(inputs, tokenizer_dir, tmp_path / "shared")
    shares = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND, *map(str, flags({**keywords, "shard": f"{number}/{count}"}))],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(1, count + 1)
    ]
    ends = [share.communicate(timeout=100) for share in shares]
    assert [share.returncode for share in shares] == [0] * count, ends
    # One, whichever is last, writes the bins and prints the token counts.
    assert sorted("tokens per bin" in out for out, _ in ends) == [False] * (count - 1) + [True]
    assert all(("tokens per bin" in out) != ("this share is done" in err) for out, err in ends)
    assert contents(tmp_path / "shared") == undisturbed


def stop_before_the_bins(monkeypatch, keywords) -> None:
    """Leave an unfinished run."""

    def stop(task):
        raise RunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_bin", stop)
        with pytest.raises(RunError, match="stopped"):
            prepare.prepare_pretrain(**keywords)


def test_an_unfinished_run_continues_only_with_the_same_work(monkeypatch, inputs, tokenizer_dir, tmp_path, undisturbed):
    keywords = options(inputs, tokenizer_dir, tmp_path / "out")
    stop_before_the_bins(monkeypatch, keywords)
    before = contents(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"unfinished run, but since then: --seed was 1024, now 7; run the earlier command"
    ):
        prepare.prepare_pretrain(**{**keywords, "seed": 7})
    with pytest.raises(UserError, match="writing jsonl was True, now False"):
        prepare.prepare_pretrain(**{**keywords, "no_jsonl": True})
    with pytest.raises(UserError, match=r"--data_arrow_output_dir was .*/out/arrow, now .*/out/other"):
        prepare.prepare_pretrain(**{**keywords, "data_arrow_output_dir": str(tmp_path / "out" / "other")})
    path = inputs / "small.jsonl"
    times = path.stat()
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(UserError, match=rf"{path} has changed"):
        prepare.prepare_pretrain(**keywords)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert contents(tmp_path / "out") == before
    prepare.prepare_pretrain(**keywords)
    assert contents(tmp_path / "out") == undisturbed


def test_finished_units_are_not_computed_again(monkeypatch, inputs, tokenizer_dir, tmp_path, undisturbed):
    keywords = options(inputs, tokenizer_dir, tmp_path / "out")
    stop_before_the_bins(monkeypatch, keywords)
    monkeypatch.setattr(prepare, "do_unit", None)
    prepare.prepare_pretrain(**keywords)
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    "name", ["unit-00000001.pieces", "unit-00000001.tokens", "dealt/part-00001.members", "dealt/eval.members gone"]
)
def test_a_truncated_cache_file_is_written_again(monkeypatch, name, inputs, tokenizer_dir, tmp_path, undisturbed):
    keywords = options(inputs, tokenizer_dir, tmp_path / "out")
    stop_before_the_bins(monkeypatch, keywords)
    path = tmp_path / "out" / "cache" / name.removesuffix(" gone")
    if name.endswith(" gone"):
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    prepare.prepare_pretrain(**keywords)
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("name", ["unit-00000001.json", "dealt/names.json"])
def test_a_damaged_cache_is_reported(monkeypatch, name, inputs, tokenizer_dir, tmp_path):
    keywords = options(inputs, tokenizer_dir, tmp_path / "out")
    stop_before_the_bins(monkeypatch, keywords)
    (tmp_path / "out" / "cache" / name).write_bytes(b'{"a')
    with pytest.raises(RunError, match=rf"{name} is damaged .*; delete .* and prepare the data again"):
        prepare.prepare_pretrain(**keywords)


def test_members_are_written_in_any_number_of_steps(inputs, tokenizer_dir, tmp_path, undisturbed):
    one_at_a_time = replace(SMALL_UNITS, held_pieces=1)
    prepare.prepare_pretrain(**options(inputs, tokenizer_dir, tmp_path / "out", sizes=one_at_a_time))
    assert contents(tmp_path / "out") == undisturbed


def test_a_second_run_is_refused_at_once(monkeypatch, inputs, tokenizer_dir, tmp_path, undisturbed):
    keywords = options(inputs, tokenizer_dir, tmp_path / "out")
    stop_before_the_bins(monkeypatch, keywords)
    before = contents(tmp_path / "out")
    folders = OutputDirs(**{name: str(tmp_path / "out" / name) for name in ("cache", "jsonl", "arrow")})
    with folders.locked(None):
        for shard in (None, (1, 2)):
            with pytest.raises(RefusedError, match="another run is using"):
                prepare.prepare_pretrain(**keywords, shard=shard)
        # Another cache does not help: the output is the same.
        with pytest.raises(RefusedError, match="another run is using"):
            prepare.prepare_pretrain(**{**keywords, "data_cache_dir": str(tmp_path / "out" / "other")})
    assert contents(tmp_path / "out") == before
    with folders.locked((1, 2)), pytest.raises(RefusedError, match="another run is using"):
        prepare.prepare_pretrain(**keywords, shard=(1, 2))


def test_finished_output_is_reported_and_other_settings_are_refused(
    run_forked, assert_user_error, inputs, tokenizer_dir, tmp_path
):
    keywords = settings([inputs], tokenizer_dir, tmp_path / "out", bins=2)
    first = run_forked("prepare_pretrain_dataset.py", *flags(keywords), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    before = contents(tmp_path / "out")
    again = run_forked("prepare_pretrain_dataset.py", *flags(keywords), cwd=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stderr and again.stdout == first.stdout
    other = run_forked("prepare_pretrain_dataset.py", *flags({**keywords, "max_length": 64}), cwd=tmp_path)
    assert_user_error(other, "already exists and differs from this command: --max_length was 128, now 64")
    assert contents(tmp_path / "out") == before


def test_output_that_is_damaged_or_foreign_is_refused(inputs, tokenizer_dir, tmp_path):
    keywords = settings([inputs], tokenizer_dir, tmp_path / "out", bins=2)
    stop_before_the_bins(pytest.MonkeyPatch(), keywords)
    planned = tmp_path / "out" / "cache" / "plan.json"
    content = planned.read_text()
    for damaged in ("{", "[]", '{"a": 1}'):
        planned.write_text(damaged)
        with pytest.raises(UserError, match=rf"--data_cache_dir: {planned} is damaged, or from another program"):
            prepare.prepare_pretrain(**keywords)
    planned.write_text(content)
    prepare.prepare_pretrain(**keywords)
    for missing in ("jsonl/part-00001.jsonl", "arrow/part-00000/state.json"):
        whole = (tmp_path / "out" / missing).read_bytes()
        (tmp_path / "out" / missing).unlink()
        with pytest.raises(UserError, match=rf"{missing} is missing \(1 such file\)"):
            prepare.prepare_pretrain(**keywords)
        (tmp_path / "out" / missing).write_bytes(whole)
    for damaged in ("{", "[]", '{"a": 1}'):
        (tmp_path / "out" / "arrow" / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match=r"manifest.json is damaged or from another program"):
            prepare.prepare_pretrain(**keywords)


@pytest.mark.parametrize("change", ["longer", "gone"])
def test_an_input_that_changes_while_it_is_read_is_reported(change, monkeypatch, tokenizer_dir, tmp_path):
    path = write_lines(tmp_path / "in" / "rows.jsonl", [{"target": f"text {number}"} for number in range(9)])
    do_unit = prepare.do_unit

    def do_and_change(task):
        done = do_unit(task)
        if change == "gone":
            path.unlink()
        else:
            with path.open("ab") as file:
                file.write(b'{"target": "one more"}\n')
        return done

    monkeypatch.setattr(prepare, "do_unit", do_and_change)
    with pytest.raises(UserError, match=rf"{path} (changed|disappeared) while it was read"):
        prepare.prepare_pretrain(**settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_finished_command_leaves_another_s_cache_alone(monkeypatch, inputs, tokenizer_dir, tmp_path):
    first = settings([inputs], tokenizer_dir, tmp_path / "one", bins=2)
    prepare.prepare_pretrain(**first)
    second = {**settings([inputs], tokenizer_dir, tmp_path / "two", bins=2), "data_cache_dir": first["data_cache_dir"]}
    stop_before_the_bins(monkeypatch, second)
    before = contents(tmp_path / "one" / "cache")
    prepare.prepare_pretrain(**first)
    assert contents(tmp_path / "one" / "cache") == before and "plan.json" in before


def test_shares_of_another_number_are_refused(inputs, tokenizer_dir, tmp_path):
    keywords = options(inputs, tokenizer_dir, tmp_path / "out")
    folders = OutputDirs(**{name: str(tmp_path / "out" / name) for name in ("cache", "jsonl", "arrow")})
    with folders.locked((1, 2)):
        with pytest.raises(RefusedError, match="another run is using .*shares-of-2.lock"):
            prepare.prepare_pretrain(**keywords, shard=(2, 3))
        with pytest.raises(RefusedError, match="another run is using .*share-1-of-2.lock"):
            prepare.prepare_pretrain(**keywords, shard=(1, 2))
        prepare.prepare_pretrain(**keywords, shard=(2, 2))


def test_a_newer_input_of_the_same_size_is_compared_by_its_hash(tokenizer_dir, tmp_path):
    path = write_lines(tmp_path / "in" / "rows.jsonl", [{"target": "old text"}])
    keywords = settings([tmp_path / "in"], tokenizer_dir, tmp_path / "out")
    prepare.prepare_pretrain(**keywords)
    later = (tmp_path / "out" / "arrow" / "manifest.json").stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    prepare.prepare_pretrain(**keywords)
    write_lines(path, [{"target": "new text"}])
    os.utime(path, ns=(later, later))
    with pytest.raises(UserError, match="rows.jsonl has different content"):
        prepare.prepare_pretrain(**keywords)


def test_a_full_disk_is_reported_with_needed_and_free_bytes(tmp_path):
    with pytest.raises(RunError, match=rf"a: No space left.*about 7,000 bytes needed, [0-9,]+ free in {tmp_path};"):
        with store.full_disk_reported(tmp_path / "a", 7000):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_no_room_is_one_line_and_the_run_continues(inputs, tokenizer_dir, tmp_path):
    """The limit on the size of a file simulates a full disk."""
    for name in ("limited", "free"):
        keywords = settings([inputs], tokenizer_dir, tmp_path / name, bins=2)
        command = [sys.executable, str(ROOT / "prepare_pretrain_dataset.py"), *map(str, flags(keywords))]
        if name == "limited":
            done = subprocess.run(
                command,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=100,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)),
            )
            assert done.returncode == 1, done.stderr
            assert len(done.stderr.splitlines()) == 1 and "bytes needed; raise the limit" in done.stderr
            assert not (tmp_path / name / "arrow").exists()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "limited") == contents(tmp_path / "free")


def test_finished_output_of_the_previous_version_is_accepted_if_rows_mean_the_same(tokenizer_dir, tmp_path):
    """Version 3 accepts rows that were bad before, and reads loss marks of conversations."""
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    for name, command, lines in (
        ("good", prepare.prepare_pretrain, [{"target": "a text"}]),
        ("bad", prepare.prepare_pretrain, [{"target": "a text"}, {"target": 1}]),
        ("talk", prepare.prepare_sft, [talk]),
    ):
        write_lines(tmp_path / name / "rows.jsonl", lines)
        output = tmp_path / f"out-{name}"
        keywords = settings([tmp_path / name], tokenizer_dir, output, max_length=512, on_bad_row="skip")
        command(**keywords)
        path = output / "arrow" / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
        with nullcontext() if name == "good" else pytest.raises(UserError, match="it was made by another version"):
            command(**keywords)
