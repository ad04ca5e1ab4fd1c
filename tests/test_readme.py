"""README.md and docs/: their commands are run as written, their flags and links exist, flags.md is up to date."""

import base64
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from tests import flag_tables, fork_server, tiny
from tests.conftest import ROOT
from tests.import_graph import arrows
from tests.launching import free_port

# In reading order: later pages use what the commands of earlier ones wrote.
PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "install vocabulary data training parallelism scaling checkpoints cluster recipe inference evaluation "
            "first_gpu_run "
            "troubleshooting flags equality training_step benchmarks differences architecture"
        ).split()
    ),
    "CONTRIBUTING.md",
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
MAX_README_LINES = 260
SCRIPTS = flag_tables.COMMANDS.keys()
# The first line of a block whose commands no test runs. It states their requirements.
NOT_RUN = re.compile(r"# (Downloads [a-z0-9]+|Takes [a-z ]+|Needs GPUs|Needs a cluster|Needs other programs)\b.*\.")
EXAMPLE_SCRIPT = ["cp train.example.sh train.sh", "bash train.sh"]
# Flags of launchers, other tools and this repository's test scripts, which no parser of the package has.
FOREIGN_FLAGS = set(
    "--help --nproc_per_node --hostfile --host --master_port --master_addr --nnodes --node_rank --long --array --wrap "
    "--no-deps --no-build-isolation --output --only --unrepaired --mutants --precision --kept_memory --download_dir "
    "--learning_rate --local-dir --exclude --small --smallest --minutes --python --transformers --without "
    "--target --model --model_args --apply_chat_template --tasks --output_dir --outfile --override-kv "
    "--gpus-per-node --gpus-per-task --signal --rdzv_id --max_restarts".split()
)


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language on all pages, in reading order."""
    return [
        block
        for text in TEXTS.values()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ]


def commands() -> list[str]:
    """Every command that is not marked as not run, once, in reading order, with continued lines joined."""
    found = [command for block in blocks("bash") if not NOT_RUN.match(block) for command in as_commands(block)]
    return list(dict.fromkeys(found))


def as_commands(block: str) -> list[str]:
    """The commands of a block, without comments and line continuations."""
    lines = block.replace("\\\n", " ").splitlines()
    found = [" ".join(shlex.join(shlex.split(line, comments=True)).split()) for line in lines]
    return [command for command in found if command]


def shown_outputs() -> dict[str, list[str]]:
    """The lines that README.md shows below a command, by command."""
    pairs = re.findall(r"^```bash\n([^`]*)```\n\n```text\n([^`]*)```", TEXTS["README.md"], flags=re.MULTILINE)
    return {command: text.splitlines() for block, text in pairs for command in as_commands(block)}


def shape(line: str) -> str:
    """A line of output without its time, numbers and alignment; of `Answer: ...`, what precedes the dots."""
    line = re.sub(r"^\d\d:\d\d:\d\d \| ", "", line).removesuffix("...")
    return " ".join(re.sub(r"\d[\d,.]*%?", "#", line).split())


def script_of(command: str) -> str | None:
    """The script or module of the package that a command starts."""
    return next((word for word in shlex.split(command) if word in SCRIPTS), None)


def slug(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def test_every_page_is_read():
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} == {page for page in PAGES if "/" in page}


def test_the_readme_is_read_in_one_sitting():
    assert len(TEXTS["README.md"].splitlines()) <= MAX_README_LINES


def test_every_command_is_run_or_marked():
    assert [command for command in commands() if not script_of(command) and command not in EXAMPLE_SCRIPT] == []


def test_every_script_has_a_command_that_is_run():
    assert {script_of(command) for command in commands()} - {None} == set(SCRIPTS)


def test_the_page_of_flags_is_up_to_date():
    assert TEXTS["docs/flags.md"] == flag_tables.page(), "run python -m tests.flag_tables --output docs/flags.md"


@pytest.mark.parametrize("command", SCRIPTS)
def test_every_flag_is_on_the_page_of_flags(command):
    """In its own section, or in that of the command whose flags it shares."""
    make_parser, base = flag_tables.COMMANDS[command]
    text = flag_tables.section(command) + (flag_tables.section(base) if base else "")
    spellings = {spelling for spelling in make_parser().by_spelling if spelling not in ("-h", "--help")}
    assert {spelling for spelling in spellings if f"`{spelling}`" not in text} == set()


def test_no_page_names_an_unknown_flag():
    known = FOREIGN_FLAGS.union(*(make().by_spelling for make, _ in flag_tables.COMMANDS.values()))
    for page, text in TEXTS.items():
        named = set(re.findall(r"(?<![\w-])--[a-z]\w[\w-]*", prose(text)))
        assert named - known == set(), page


def test_every_link_leads_somewhere():
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
            if re.match(r"https?://", target):
                continue
            path, _, fragment = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            assert file.exists(), (page, target)
            if fragment:
                content = file.read_text(encoding="utf-8")
                headings = {slug(heading) for heading in re.findall(r"^#+ (.*)$", content, flags=re.MULTILINE)}
                assert fragment in headings, (page, target)


def test_no_place_is_left_to_fill_in():
    for page, text in TEXTS.items():
        assert not re.findall(r"@[A-Z_]{3,}@", text), page


def test_the_map_names_every_folder_of_the_package_in_the_order_of_imports():
    """docs/architecture.md has one row for each folder, and a folder imports only those of earlier rows."""
    folders = re.findall(r"^\| `(colossal_llama2[\w/]*)/` \|", TEXTS["docs/architecture.md"], flags=re.MULTILINE)
    package = ROOT / "colossal_llama2"
    assert sorted(folders) == sorted({path.parent.relative_to(ROOT).as_posix() for path in package.rglob("*.py")})
    row = {folder: number for number, folder in enumerate(folders)}
    upwards = [a for a in arrows(package) if row[str(a.target.parent)] > row[str(a.source.parent)]]
    assert list(map(str, upwards)) == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_the_files_that_developers_are_sent_to_exist(page):
    """Paths are those of the repository, or of the package."""
    paths = re.findall(r"`([\w/]+\.(?:py|md|sh))`", TEXTS[page])
    found = [path for path in paths if not (ROOT / path).is_file() and not (ROOT / "colossal_llama2" / path).is_file()]
    assert paths and found == []


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder as a reader has it: the repository's scripts, a source model, text, a hostfile."""
    folder = tmp_path_factory.mktemp("reader")
    scripts = [name for name in SCRIPTS if name.endswith(".py")]
    for name in [*scripts, "colossal_llama2", "train.example.sh", "launch.sh"]:
        os.symlink(ROOT / name, folder / name)
    tiny.make_model(folder / "llama-2-7b", tiny.make_tokenizer(folder / "tokenizer"))
    pieces = ["你好", "人工智能", "明月", "天气"]
    write_jsonl(folder / "new_tokens.jsonl", ({"piece": piece} for piece in pieces))
    english = tiny.english_documents()[:150]
    write_jsonl(folder / "data" / "en" / "a.jsonl", ({"target": text, "category": "docs"} for text in english))
    write_jsonl(folder / "data" / "zh" / "a.jsonl", ({"target": f"{tiny.CHINESE}{n}" * 20} for n in range(20)))
    messages = [{"from": "human", "content": "你好"}, {"from": "assistant", "content": tiny.CHINESE}]
    write_jsonl(folder / "data" / "chat" / "a.jsonl", ({"messages": messages} for _ in range(20)))
    (folder / "hostfile").write_text("localhost\n")
    (folder / "prompts.txt").write_text("你好\n天气\n", encoding="utf-8")
    write_ranks(folder / "llama-3-8b" / "original" / "tokenizer.model")
    return folder


def write_ranks(path):
    """A file in tiktoken's format with as many tokens as LLaMA-3's: single bytes, and what follows in order."""
    path.parent.mkdir(parents=True)
    printable = range(33, 127)
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(parts) for size in (2, 3) for parts in itertools.product(printable, repeat=size)]
    tokens = tokens[:128_000]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))


def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def run(command: str, folder) -> str:
    """Run a command in a shell, as a reader does. Returns its output."""
    scripts = os.path.dirname(sys.executable)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    environment["PATH"] = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, f"{command}\n{process.stderr[-3000:]}"
    return process.stdout + process.stderr


def run_forked(command: str, folder) -> str:
    """Run `python ...`, or what a launcher would start, in forks of a process that has imported the libraries."""
    words = shlex.split(command)
    ranks = int(words[words.index("--nproc_per_node") + 1]) if "--nproc_per_node" in words else 0
    start = next(number for number, word in enumerate(words) if word in SCRIPTS)
    argv = words[start:] if words[start].endswith(".py") else ["-m", *words[start:]]
    process = fork_server.run(argv, ranks=ranks, cwd=folder, timeout=600)
    assert process.returncode == 0, f"{command}\n{process.stderr[-3000:]}"
    return process.stdout + process.stderr


def scaled_down(command: str) -> str:
    """A command for this machine: 2 processes or ranks instead of 8 or 64, 2 optimizer steps, and a short answer."""
    if script_of(command) in ("train.py", "train_sft.py") and "--dry_run" not in command:
        command += " --max_steps 2"
    command = command.replace("--nproc_per_node 8", f"--nproc_per_node 2 --master_port {free_port()}")
    command = command.replace("--master_port 30013", f"--master_port {free_port()}")
    return command.replace("--num_ranks 64", "--num_ranks 2").replace("--max_new_tokens 512", "--max_new_tokens 8")


@pytest.mark.slow
def test_the_pipeline_runs_as_it_is_written(workplace):
    """Only what `scaled_down` changes is not as written. What README.md shows is what is printed.

    The first command with python, and the first with colossalai run, start as they are written. The others are forked.
    """
    outputs, shown, in_shell = {}, shown_outputs(), {"python", "colossalai"}
    for command in commands():
        script, program = script_of(command), command.split()[0]
        if script:
            output = (run if program in in_shell else run_forked)(scaled_down(command), workplace)
            in_shell.discard(program)
            outputs[script] = outputs.get(script, "") + output
            printed = "\n".join(map(shape, output.replace("\r", "\n").splitlines()))
            missing = [line for line in shown.pop(command, ()) if shape(line) not in printed]
            assert not missing, f"{command}\n{output}"
    assert not shown
    assert "requested 4, added " in outputs["init_tokenizer.py"]
    assert (workplace / "mined_tokens.jsonl").is_file()
    assert "tokenizer-zh" in outputs["colossal_llama2.tokenizer.compare"]
    assert "tokens per bin" in outputs["prepare_pretrain_dataset.py"]
    assert "trained | " in outputs["colossal_llama2.dataset.inspect_data"]
    assert (workplace / "charts" / "categories.png").is_file()
    assert not (workplace / "planned").exists()
    assert "all as they were written" in outputs["colossal_llama2.train.verify"]
    assert (workplace / "checkpoint_dir_sft" / "modeling" / "tokenizer.model").is_file()
    assert "tensors of checkpoint_dir/modeling changed by" in outputs["colossal_llama2.model.merge_lora"]
    assert "Answer:" in outputs["inference_example.py"]


@pytest.mark.slow
def test_the_example_script_runs_here_as_it_is(workplace):
    """cp, bash train.sh: on two processes of this machine, by the real launcher."""
    run(f"{EXAMPLE_SCRIPT[0]} && echo localhost > hostfile", workplace)
    dataset = "spliced_tokenized_output_arrow/part-00000 spliced_tokenized_output_arrow/part-00001"
    settings = f"NPROC_PER_NODE=2 MASTER_PORT={free_port()} DATASET='{dataset}'"
    run(f"{settings} {EXAMPLE_SCRIPT[1]} --micro_batch_size 1 --max_length 4096 --max_steps 2", workplace)
    (run_folder,) = (path for path in (workplace / "runs" / "checkpoints").iterdir() if path.is_dir())
    assert (run_folder / "modeling" / "config.json").is_file()
    assert json.loads(next((workplace / "runs" / "configs").iterdir()).read_text())["warmup_steps"] == 100
