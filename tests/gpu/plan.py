"""Which parts does a run have, and in what order? The most valuable come first, since time may run out."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tests.gpu import figures
from tests.gpu.parts import Figures, Part, printed_figures

MACHINE, INPUTS, ADAM = "machine", "inputs", "build Adam"
CORRECT, SPEED, KERNELS, SAVING, GENERATION = "correct", "speed", "kernels", "saving", "generation"
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
# A CPU that is shared with other work takes longer, and nothing is measured on it.
CPU_PATIENCE = 4


@dataclass(frozen=True)
class Size:
    """How large the parts are. Lengths are in tokens, batches in samples of a step, steps are optimizer steps."""

    length: int
    batch: int
    speed_steps: int
    selftest_steps: int
    saved_length: int
    saved_batch: int
    generated: int
    adam_parameters: int
    matrix_width: int
    copied_bytes: int


FULL = Size(
    length=4096,
    batch=2,
    speed_steps=15,
    selftest_steps=10,
    saved_length=1024,
    saved_batch=4,
    generated=128,
    adam_parameters=2 * 10**8,
    matrix_width=8192,
    copied_bytes=2**30,
)
# --benchmark takes at least 6 steps.
SMALL = Size(
    length=64,
    batch=1,
    speed_steps=6,
    selftest_steps=2,
    saved_length=128,
    saved_batch=1,
    generated=8,
    adam_parameters=2**20,
    matrix_width=256,
    copied_bytes=2**20,
)


@dataclass(frozen=True)
class Place:
    """Where a run takes place.

    Attributes:
        work_dir: existing folder for models, data and checkpoints.
        on_gpu: the device is a GPU, not the CPU.
        small: the smallest form.
    """

    work_dir: Path
    on_gpu: bool
    small: bool

    @property
    def size(self) -> Size:
        return SMALL if self.small else FULL

    def model(self, name: str) -> Path:
        """The folder of a model that `inputs` makes."""
        return self.work_dir / "models" / name

    def environment(self, given: str | None) -> dict[str, str]:
        """Variables of all parts; `given` is CUDA_VISIBLE_DEVICES as it was found, of which the first GPU is used."""
        if not self.on_gpu:
            return {**QUIET, "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
        headers = [os.environ.get("CPLUS_INCLUDE_PATH", ""), *cuda_headers()]
        visible = "0" if given is None else given.split(",")[0]
        return {
            **QUIET,
            "CUDA_VISIBLE_DEVICES": visible,
            "CPLUS_INCLUDE_PATH": os.pathsep.join(filter(None, headers)),
        }


def cuda_headers() -> list[str]:
    """Folders of CUDA headers that PyTorch brings. Compilers read them last: a toolkit may lack some, as cuBLAS'."""
    found = importlib.util.find_spec("nvidia")
    folders = found.submodule_search_locations if found is not None else None
    return sorted(str(path) for folder in folders or () for path in Path(folder).glob("*/include"))


@dataclass(frozen=True)
class Training:
    """A way to train that is timed: a model of `inputs`, and flags of train.py."""

    model: str
    plugin: str
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.model, self.plugin, *(flag.removeprefix("--") for flag in self.flags)))

    @property
    def all_flags(self) -> tuple[str, ...]:
        return ("--plugin", self.plugin, "--mixed_precision", "bf16", "--use_flash_attn", *self.flags)


# Plugin, precision and further flags of a self-test, in order of value.
SELF_TESTS = (
    ("zero2", "bf16", ()),
    ("gemini", "bf16", ()),
    ("3d", "bf16", ("--zero", "1")),
    ("zero2", "fp32", ()),
    ("3d", "fp32", ("--zero", "0")),
    ("ddp", "bf16", ()),
    ("zero2_cpu", "bf16", ()),
    ("gemini_auto", "bf16", ()),
    ("zero2", "bf16", ("--chunked_loss", "off")),
    ("zero2_cpu", "fp32", ()),
)
# On a CPU one of each kind of plugin, in the precision that is quick there; all plugins except ddp are timed there too.
SMALL_SELF_TESTS = (SELF_TESTS[3], SELF_TESTS[1], SELF_TESTS[4])
FIRST_TRAININGS = (
    Training("1.3B", "zero2"),
    Training("7B", "zero2", ("--use_grad_checkpoint",)),
    Training("1.3B", "gemini"),
    Training("1.3B", "3d"),
)
LATER_TRAININGS = (
    Training("1.3B", "zero2", ("--chunked_loss", "off")),
    Training("1.3B", "zero2_cpu"),
    Training("1.3B", "gemini_auto"),
    Training("1.3B", "ddp"),
    Training("7B", "gemini", ("--use_grad_checkpoint",)),
)
# On a CPU those of a plugin that is not among the first.
SMALL_LATER_TRAININGS = LATER_TRAININGS[1:3]
PROFILED = FIRST_TRAININGS[0]


def all_parts(place: Place) -> list[Part]:
    """All parts of a run, in the order in which they are started. All others need the first."""
    device = ["--gpu"] if place.on_gpu else []
    machine = _module(MACHINE, MACHINE, "machine", "--work_dir", place.work_dir, *device, seconds=90)
    later = LATER_TRAININGS if place.on_gpu else SMALL_LATER_TRAININGS
    parts = [
        _module(ADAM, CORRECT, "adam", seconds=180),
        _inputs(place),
        *self_tests(place),
        *(forecast(place, training) for training in FIRST_TRAININGS + later),
        _ceilings(place),
        _adam(place),
        timed(place, PROFILED),
        _baseline(place, "bare", "1.3B"),
        _step_kernels(place),
        *(timed(place, training) for training in FIRST_TRAININGS[1:]),
        *saving(place),
        _generation(place),
        _baseline(place, "trainer", "1.3B"),
        *(timed(place, training) for training in later),
    ]
    parts = [machine, *(replace(part, needs=(MACHINE, *part.needs)) for part in parts)]
    return [replace(part, seconds=part.seconds * (1 if place.on_gpu else CPU_PATIENCE)) for part in parts]


def _module(
    name: str, section: str, module: str, *flags, seconds: float, read: Callable[[str], Figures] = printed_figures, **of
) -> Part:
    """A part that is a module of this folder."""
    return Part(name, section, ("-m", f"tests.gpu.{module}", *map(str, flags)), seconds, read, **of)


def _inputs(place: Place) -> Part:
    tokens = place.size.length * place.size.batch
    flags = ["--small"] if place.small else []
    return _module(INPUTS, MACHINE, "inputs", "--work_dir", place.work_dir, "--tokens", tokens, *flags, seconds=150)


def self_tests(place: Place) -> Iterator[Part]:
    """The self-test of each plugin; its samples are documents that attention keeps apart."""
    for plugin, precision, flags in SELF_TESTS if place.on_gpu else SMALL_SELF_TESTS:
        name = " ".join(("self-test", plugin, precision, *(flag.removeprefix("--") for flag in flags)))
        own = ("--work_dir", str(place.work_dir / name.replace(" ", "-")), "--steps", str(place.size.selftest_steps))
        compute = ("--plugin", plugin, "--mixed_precision", precision, "--use_flash_attn", *flags)
        command = ("-m", "colossal_llama2.train.selftest", *compute, *own)
        yield Part(name, CORRECT, command, 100, figures.selftest, needs=(ADAM,))


def _benchmark(place: Place, training: Training) -> tuple[str, ...]:
    size = place.size
    flags = ("--benchmark", "--pretrained", place.model(training.model), "--max_length", size.length)
    flags += ("--micro_batch_size", size.batch, "--num_samples", size.batch * size.speed_steps)
    return ("train.py", *map(str, flags), *training.all_flags)


def forecast(place: Place, training: Training) -> Part:
    """The dry run of a training that is timed later."""
    command = (*_benchmark(place, training), "--dry_run")
    return Part(f"forecast {training.name}", SPEED, command, 60, figures.forecast, needs=(INPUTS,))


def timed(place: Place, training: Training) -> Part:
    """train.py --benchmark."""
    command = _benchmark(place, training)
    if training == PROFILED:
        command += ("--profile", str(place.work_dir / "profile"))
    name = f"speed {training.name}"
    return Part(name, SPEED, command, 90, figures.benchmark, needs=(INPUTS, ADAM), is_alone=True)


def _ceilings(place: Place) -> Part:
    flags = ("--width", place.size.matrix_width, "--copied_bytes", place.size.copied_bytes)
    return _module("ceilings", SPEED, "ceilings", *flags, seconds=60, is_alone=True)


def _adam(place: Place) -> Part:
    flags = ("--compare", place.size.adam_parameters)
    return _module("compare Adam", CORRECT, "adam", *flags, seconds=60, needs=(ADAM,), is_alone=True)


def _baseline(place: Place, baseline: str, model: str) -> Part:
    flags = (baseline, "--model_dir", place.model(model), "--length", place.size.length, "--batch", place.size.batch)
    return _module(f"{baseline} {model}", SPEED, "baselines", *flags, seconds=90, needs=(INPUTS,), is_alone=True)


def _step_kernels(place: Place) -> Part:
    needs = (f"speed {PROFILED.name}",)
    return _module("step kernels", KERNELS, "step_kernels", place.work_dir / "profile", seconds=60, needs=needs)


def _generation(place: Place) -> Part:
    flags = ("--model_dir", place.model("1.3B"), "--tokens", place.size.generated)
    return _module("generate 1.3B", GENERATION, "generation", *flags, seconds=90, needs=(INPUTS,), is_alone=True)


def saving(place: Place) -> Iterator[Part]:
    """Prepare text, train and save, resume from the middle, verify, and answer with the trained model."""
    work, size = place.work_dir, place.size
    prepared = work / "prepared"
    folders = {"data_cache_dir": "cache", "data_jsonl_output_dir": "jsonl", "data_arrow_output_dir": "arrow"}
    outputs = [str(word) for flag, name in folders.items() for word in (f"--{flag}", prepared / name)]
    inputs = ("--data_input_dirs", work / "documents", "--tokenizer_dir", work / "tokenizer")
    shape = ("--max_length", size.saved_length, "--num_spliced_dataset_bins", 1, "--num_workers", 1, "--no_jsonl")
    command = ("prepare_pretrain_dataset.py", *map(str, inputs + shape), *outputs)
    yield Part("prepare", SAVING, command, 60, figures.nothing, needs=(INPUTS,))
    # Four steps of eight lie before the checkpoint that is resumed.
    whole, resumed = work / "whole", work / "resumed"
    training, checkpoint = _training(place, whole), str(whole / "checkpoints" / "epoch-0_step-4")
    yield Part("train and save", SAVING, training, 90, figures.saved, needs=("prepare", ADAM), is_alone=True)
    logs = [folder / "checkpoints" / "train_log.jsonl" for folder in (whole, resumed)]
    resuming = (*_training(place, resumed), "--load_checkpoint", checkpoint)
    read = partial(figures.resumed, whole=logs[0], resumed=logs[1])
    yield Part("resume", SAVING, resuming, 90, read, needs=("train and save",), is_alone=True)
    verify = ("-m", "colossal_llama2.train.verify", checkpoint)
    yield Part("verify", SAVING, verify, 60, figures.verified, needs=("train and save",))
    model = str(whole / "checkpoints" / "modeling")
    answer = ("inference_example.py", "--model_path", model, "--input_txt", "def", "--max_new_tokens", "8")
    yield Part("answer", GENERATION, answer, 60, figures.answered, needs=("train and save",))


def _training(place: Place, folder: Path) -> tuple[str, ...]:
    size = place.size
    inputs = ("--pretrained", place.model("checkpointed"), "--dataset", place.work_dir / "prepared/arrow/part-00000")
    recipe = ("--max_length", size.saved_length, "--micro_batch_size", size.saved_batch, "--max_steps", 8)
    saving = ("--save_interval", 4, "--save_dir", folder / "checkpoints", "--tensorboard_dir", folder / "logs")
    flags = (*inputs, *recipe, *saving, "--config_file", folder / "config.json")
    return ("train.py", *map(str, flags), *Training("checkpointed", "zero2").all_flags)
