"""Random damage to JSON files from elsewhere: every command ends well, or with one line, soon, in little memory.

Hypothesis draws the damage. A case may end with exit code 0, 1 or 2; with an error in one line without control
characters, and nothing else that looks like one; within `LIMIT_SECONDS` of CPU time; and with `LIMIT_BYTES` of memory
at most. A command that refuses its input leaves no output behind.
"""

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from colossal_llama2.train import verify
from tests.faults import place as places
from tests.faults import warm
from tests.faults.place import Place
from tests.faults.rows import Row

LIMIT_SECONDS, LIMIT_BYTES = 10.0, 2**30
# A command that hangs uses no CPU time; on a busy machine, a good one needs several times its usual wall time.
HANGS_AFTER_SECONDS = 60.0
TRAIN_FLAGS = ["--micro_batch_size", 4, "--max_steps", 1, *places.PLUGINS["zero2"]]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


# ---------------------------------------------------------------------------------------------------------------------
# Damage

NAUGHTY_TEXT = ["", "x", "\x1b[2J", "\u202egpj.exe", "a\nb", "../../etc/passwd", "é" * 300, "\x00", "true", "{{7}}"]
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, -(2**31), 2**63, 10**9, 10**12, 10**19, 10**400, 0.0, -0.5, 0.5, 1e-300, 1e308]
SPECIAL = ["NaN", "Infinity", "-Infinity", "1e999", "-0"]


def values() -> st.SearchStrategy:
    """Values of every JSON type, with the extremes of each."""
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(NUMBERS),
        st.integers(-10, 10_000),
        st.floats(allow_nan=False),
        st.sampled_from(NAUGHTY_TEXT),
        st.text(max_size=8),
    )
    nested = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    )
    return st.one_of(scalars, nested, st.sampled_from(SPECIAL).map(Literal), st.integers(1, 2_000).map(Deep))


@dataclass(frozen=True)
class Literal:
    """A JSON literal that json.dumps would not write, such as 1e999."""

    text: str


@dataclass(frozen=True)
class Deep:
    """Lists in lists, this deep."""

    depth: int


def text_of(value: Any) -> str:
    """JSON with `Literal` and `Deep` written out, and numbers of any size."""
    if isinstance(value, Literal):
        return value.text
    if isinstance(value, Deep):
        return "[" * value.depth + "]" * value.depth
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {text_of(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return json.dumps(value)


def places_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value, excluding itself; for a long list, only the first few."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places_in(child, (*path, key))


@st.composite
def changed(draw, good: dict[str, Any], more_keys: list[str]) -> str:
    """The good object with one to three of its entries replaced or removed, or known keys added that it lacks."""
    content = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        paths = [*places_in(content), *[(key,) for key in more_keys if key not in content]]
        if not paths:
            break
        *outer, last = draw(st.sampled_from(paths))
        holder = content
        for key in outer:
            holder = holder[key]
        if draw(st.integers(0, 4)) or isinstance(holder, list) or last not in holder:
            holder[last] = draw(values())
        else:
            del holder[last]
    return text_of(content)


@st.composite
def broken(draw, good: bytes) -> bytes:
    """The good file cut, with bytes inserted or changed, or something else altogether."""
    kind = draw(st.sampled_from(["cut", "insert", "flip", "whole", "twice", "bom", "utf-16"]))
    position = draw(st.integers(0, len(good)))
    if kind == "cut":
        return good[:position]
    if kind == "insert":
        return good[:position] + draw(st.binary(min_size=1, max_size=8)) + good[position:]
    if kind == "flip" and position < len(good):
        return good[:position] + bytes([good[position] ^ draw(st.integers(1, 255))]) + good[position + 1 :]
    if kind == "twice":
        return good + good
    if kind == "bom":
        return b"\xef\xbb\xbf" + good
    if kind == "utf-16":
        return good.decode().encode("utf-16")
    return draw(st.one_of(st.binary(max_size=20), values().map(lambda value: text_of(value).encode())))


def damage(good: bytes, more_keys: list[str]) -> st.SearchStrategy:
    """Nine times in ten a changed entry, else broken bytes."""
    whole = changed(json.loads(good), more_keys).map(lambda text: text.encode("utf-8", "surrogatepass"))
    return st.integers(0, 9).flatmap(lambda number: broken(good) if number == 0 else whole)


# ---------------------------------------------------------------------------------------------------------------------
# Files to damage, and the commands that read them

CONFIG_KEYS = [
    "hidden_act",
    "rope_scaling",
    "rope_theta",
    "attention_bias",
    "mlp_bias",
    "head_dim",
    "pad_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "quantization_config",
    "temperature",
    "pretraining_tp",
    "initialized_rows",
    "attn_implementation",
    "auto_map",
    "use_cache",
    "num_key_value_heads",
    "generation_config",
    "task_specific_params",
    "id2label",
    "num_labels",
    "pruned_heads",
    "return_dict",
    "output_attentions",
    "problem_type",
    "attention_dropout",
]
TOKENIZER_KEYS = [
    "tokenizer_class",
    "add_bos_token",
    "add_eos_token",
    "legacy",
    "chat_template",
    "model_max_length",
    "padding_side",
    "added_tokens_decoder",
    "additional_special_tokens",
    "sp_model_kwargs",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "clean_up_tokenization_spaces",
    "add_prefix_space",
    "use_default_system_prompt",
    "extra_special_tokens",
]
GENERATION_KEYS = [
    "temperature",
    "top_p",
    "top_k",
    "do_sample",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "max_length",
    "num_beams",
    "cache_implementation",
    "watermarking_config",
    "stop_strings",
    "max_new_tokens",
    "typical_p",
    "num_return_sequences",
    "forced_eos_token_id",
    "suppress_tokens",
    "bad_words_ids",
    "transformers_version",
    "compile_config",
    "guidance_scale",
]
STATES_KEYS = ["first_sample", "evaluations", "ranks", "base_model", "versions", "skipped_steps"]
MANIFEST_KEYS = ["saved_at", "files", "tokens", "samples", "tokenizer", "max_length", "categories", "stage"]
ROW_KEYS = ["source", "target", "category", "messages", "weight", "extra"]


@dataclass(frozen=True)
class Scene:
    """A folder that each case starts from: model, samples, a checkpoint, rows to prepare."""

    good: Path
    folder: Path

    def renew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.good, self.folder, copy_function=os.link)

    def damage(self, name: str, content: bytes) -> None:
        path = self.folder / name
        # A link to the good file: writing through it would damage that file.
        path.unlink(missing_ok=True)
        path.write_bytes(content)


Command = Callable[[Path], list[str]]


def train_flags(folder: Path, *more: Any, save_dir: str = "new") -> list[str]:
    """train.py on the scene's model and samples."""
    words = ["train.py", "--pretrained", folder / "model", "--dataset", folder / "samples", "--max_length", 64]
    words += ["--save_dir", folder / save_dir, "--tensorboard_dir", folder / "tb", "--config_file", folder / "settings"]
    return [str(word) for word in [*words, *TRAIN_FLAGS, *more]]


def checkpoint_of(folder: Path) -> Path:
    """The scene's only checkpoint."""
    return next((folder / "run").glob("epoch-*_step-*"))


def prepare_flags(folder: Path, stage: str) -> list[str]:
    """A prepare script on the scene's rows."""
    words = [f"prepare_{stage}_dataset.py", "--data_input_dirs", folder / f"rows_{stage}", "--num_workers", 1]
    words += ["--tokenizer_dir", folder / "model", "--max_length", 64, "--num_spliced_dataset_bins", 1]
    for flag in ("cache", "jsonl_output", "arrow_output"):
        words += [f"--data_{flag}_dir", folder / "out" / flag]
    return [str(word) for word in words]


def inference_flags(folder: Path) -> list[str]:
    """Generate two tokens with the scene's model."""
    words = ["inference_example.py", "--model_path", folder / "model", "--device", "cpu", "--input_txt", "a"]
    return [str(word) for word in [*words, "--max_new_tokens", 2]]


def extend_flags(folder: Path) -> list[str]:
    """Add one new piece to the scene's tokenizer."""
    words = ["init_tokenizer.py", "--source_tokenizer_dir", folder / "model", "--target_tokenizer_dir", folder / "out"]
    return [str(word) for word in [*words, "--expand_tokens_file", folder / "pieces.jsonl"]]


def init_model_flags(folder: Path) -> list[str]:
    """The scene's model with its own tokenizer, which adds no rows."""
    words = ["init_model.py", "--source_model_and_tokenizer_path", folder / "model", "--target_tokenizer_path"]
    return [str(word) for word in [*words, folder / "model", "--target_model_path", folder / "out"]]


@dataclass(frozen=True)
class Target:
    """A file of the scene, by its path; the keys that it may have; the commands that read it, in turn."""

    name: str
    path: Callable[[Path], Path]
    more_keys: list[str]
    commands: list[Command]


TARGETS = [
    Target(
        "config.json",
        lambda folder: folder / "model/config.json",
        CONFIG_KEYS,
        [
            train_flags,
            inference_flags,
            lambda folder: train_flags(folder, "--dry_run"),
            init_model_flags,
        ],
    ),
    Target(
        "tokenizer_config.json",
        lambda folder: folder / "model/tokenizer_config.json",
        TOKENIZER_KEYS,
        [
            inference_flags,
            train_flags,
            extend_flags,
        ],
    ),
    Target(
        "generation_config.json",
        lambda folder: folder / "model/generation_config.json",
        GENERATION_KEYS,
        [
            train_flags,
            inference_flags,
        ],
    ),
    Target(
        "running_states.json",
        lambda folder: checkpoint_of(folder) / "running_states.json",
        STATES_KEYS,
        [
            lambda folder: train_flags(folder, "--resume", "auto", "--max_steps", 3, save_dir="run"),
            lambda folder: train_flags(folder, "--load_checkpoint", checkpoint_of(folder), "--max_steps", 3),
            lambda folder: ["verify", str(checkpoint_of(folder))],
        ],
    ),
    Target(
        "manifest.json of a checkpoint",
        lambda folder: checkpoint_of(folder) / "manifest.json",
        MANIFEST_KEYS,
        [
            lambda folder: train_flags(folder, "--resume", "auto", "--max_steps", 3, save_dir="run"),
            lambda folder: ["verify", str(checkpoint_of(folder))],
        ],
    ),
    Target(
        "manifest.json of samples",
        lambda folder: folder / "samples/manifest.json",
        MANIFEST_KEYS,
        [
            train_flags,
            lambda folder: train_flags(folder, "--dry_run"),
        ],
    ),
    Target(
        "a row of text",
        lambda folder: folder / "rows_pretrain/rows.jsonl",
        ROW_KEYS,
        [
            lambda folder: prepare_flags(folder, "pretrain"),
        ],
    ),
    Target(
        "a row of messages",
        lambda folder: folder / "rows_sft/rows.jsonl",
        ROW_KEYS,
        [
            lambda folder: prepare_flags(folder, "sft"),
        ],
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# Cases


def check(place: Place, *, cases: int, first_seed: int) -> list[Row]:
    """Damage each target `cases` times."""
    scene = _make_scene(place)
    return [_check_target(scene, target, cases=cases, first_seed=first_seed) for target in TARGETS]


def _make_scene(place: Place) -> Scene:
    """The good folder, with the checkpoint of a run on it."""
    good = place.folder / "good"

    def write() -> None:
        from colossal_llama2.dataset.write.prepare import prepare_pretrain

        shutil.copytree(place.model, good / "model")
        (good / "pieces.jsonl").write_text('{"piece": "人工智能"}\n', encoding="utf-8")
        _write_rows(good)
        out = good / "prepared"
        prepare_pretrain(
            data_input_dirs=[str(good / "rows_many")],
            tokenizer_dir=str(good / "model"),
            max_length=64,
            data_cache_dir=str(out / "cache"),
            data_jsonl_output_dir=str(out / "jsonl"),
            data_arrow_output_dir=str(out / "arrow"),
            num_spliced_dataset_bins=1,
            num_workers=1,
        )
        (out / "arrow").rename(good / "samples")
        shutil.rmtree(out)

    job = warm.Job(write, place.log("good"))
    assert job.wait() == 0, job.output
    flags = train_flags(good, "--save_interval", 1, save_dir="run")
    job = warm.train(flags[1:], place.log("run"))
    assert job.wait() == 0, job.output
    return Scene(good, place.folder / "scene")


def _write_rows(good: Path) -> None:
    from tests import tiny

    documents = tiny.english_documents()[:40]
    turns = [{"from": "human", "content": "Which?"}, {"from": "assistant", "content": "This one."}]
    rows = {
        "many": [{"source": "", "target": text, "category": "docs"} for text in documents],
        "pretrain": [{"source": "Here:", "target": documents[0], "category": "docs"}],
        "sft": [{"messages": turns, "category": "chat"}],
    }
    for name, lines in rows.items():
        (good / f"rows_{name}").mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (good / f"rows_{name}" / "rows.jsonl").write_text(text)


def _check_target(scene: Scene, target: Target, *, cases: int, first_seed: int) -> Row:
    row = Row(f"random damage to {target.name}: one line, below {LIMIT_SECONDS:g} s and 1 GB")
    good_path = target.path(scene.good)
    name = str(good_path.relative_to(scene.good))
    good = good_path.read_bytes()

    @seed(first_seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(content=damage(good, target.more_keys))
    def run(content: bytes) -> None:
        command = target.commands[row.faults % len(target.commands)]
        scene.renew()
        if name.endswith(".jsonl"):
            # Good rows around it: their output must not remain.
            content = good + content + b"\n" + good
        scene.damage(name, content)
        words = command(scene.folder)
        problem = _problem(scene, words)
        row.record(f"{' '.join(words[:1])} {content[:2000]!r}", problem)

    run()
    return row


def _problem(scene: Scene, words: list[str]) -> str | None:
    """The problem of how a command ended; None if it ended well."""
    before = _entries(scene.folder)
    job = warm.Job(lambda: _main(words), scene.folder.with_name("case.log"))
    seconds, code, peak = _wait(job)
    output = job.output
    errors = re.findall(r"^\S.*: error: .*", output, re.M)
    if seconds is None or seconds > LIMIT_SECONDS:
        return f"hangs: {output[-500:]}" if seconds is None else f"took {seconds:.1f} s of CPU time"
    if "Traceback" in output or code not in (0, 1, 2) or len(errors) != (code != 0):
        return f"exit code {code}: {output[-1500:]}"
    if peak > LIMIT_BYTES or "MemoryError" in output:
        return f"took {peak / 2**20:,.0f} MiB"
    if any(CONTROL.search(line) for line in errors):
        return f"control characters: {errors!r}"
    left = sorted(_entries(scene.folder) - before)
    if code == 2 and left:
        return f"left {left[:5]} behind: {errors}"
    return None


def _entries(folder: Path) -> set:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _wait(job: warm.Job) -> tuple:
    """CPU seconds (None if it hung and was killed), exit code, and bytes used beyond the parent's."""
    start, own = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while time.monotonic() < start + HANGS_AFTER_SECONDS:
        pid, status, usage = os.wait4(job.pids[0], os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            job.record_end(code)
            return usage.ru_utime + usage.ru_stime, code, (usage.ru_maxrss - own) * 1024
        time.sleep(0.005)
    os.killpg(job.pids[0], signal.SIGKILL)
    os.wait4(job.pids[0], 0)
    job.record_end(-signal.SIGKILL)
    return None, -signal.SIGKILL, 0


def _main(words: list[str]) -> None:
    # Limits private memory beyond the parent's: a far too large allocation fails at once.
    data = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + 4 * LIMIT_BYTES,) * 2)
    sys.argv = words
    if words[0] == "verify":
        return verify.main(words[1:])
    __import__(words[0].removesuffix(".py")).main(words[1:])
