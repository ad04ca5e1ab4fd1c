"""The page about a run, in Markdown, from its JSON.

python -m tests.gpu.page gpu_run/gpu.json
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.parts import FAILED, PASSED, SKIPPED

GB, GIB = 1e9, 2**30
TAIL_LINES = 25
# Packages whose versions the page shows whatever they are.
SHOWN_PACKAGES = (
    "colossalai",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "flash-attn",
    "liger-kernel",
    "apex",
)
# Of the requirements, what the training commands do without.
UNUSED_PACKAGES = ("flash-attn", "liger-kernel", "apex")

Record = dict[str, Any]
Table = list[Sequence[str]]


def main() -> None:
    """Print the page of a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.page", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="gpu.json of a run")
    print(page(json.loads(parser.parse_args().file.read_text(encoding="utf-8"))), end="")


def page(record: Record) -> str:
    """The whole page."""
    found = Found(record)
    sections = [
        ("Machine", machine(found)),
        ("Is training correct?", correct(found)),
        ("How fast is it, and how much memory does it take?", speed(found)),
        ("What the GPU does in a step", kernels(found)),
        ("Save and resume", saving(found)),
        ("Generate", generation(found)),
        ("Failed parts", failed(record)),
        ("Skipped parts", skipped(record)),
    ]
    blocks = [heading(record, found)]
    blocks += [f"## {title}\n\n{text}" for title, text in sections if text]
    return "\n\n".join(blocks) + "\n"


class Found:
    """The parts of a record by their names."""

    def __init__(self, record: Record):
        self.parts = {part["name"]: part for part in record["parts"]}

    def figures(self, name: str) -> dict[str, Any]:
        """The figures of a part; empty if there are none."""
        return self.parts.get(name, {}).get("figures", {})

    def reached(self, beginning: str) -> list[dict[str, Any]]:
        """The parts with this beginning of their name that were not skipped, in order."""
        return [p for n, p in self.parts.items() if n.startswith(beginning) and p["status"] != SKIPPED]


def heading(record: Record, found: Found) -> str:
    """Title, device, and how many parts passed."""
    facts, parts = found.figures("machine"), record["parts"]
    device = facts.get("device", "an unknown device")
    counts = {status: sum(part["status"] == status for part in parts) for status in (PASSED, FAILED, SKIPPED)}
    title = "# One run on a GPU" if facts.get("gpus") else "# One run on a CPU"
    form = (
        " in its smallest form, which checks that everything runs and measures nothing of use,"
        if record["small"]
        else ""
    )
    return (
        f"{title}\n\nWritten by `python -m tests.gpu`{form} on {record['date']}, on **{device}**.\n"
        f"{counts[PASSED]} of {len(parts)} parts passed, {counts[FAILED]} failed, {counts[SKIPPED]} were skipped, in "
        f"{record['seconds']:.0f} s of at most {60 * record['minutes']:.0f} s."
    )


def machine(found: Found) -> str:
    """The machine, and packages that are missing or of other versions than the pinned ones."""
    facts = found.figures("machine")
    if not facts:
        return ""
    versions = facts["packages"]
    rows: Table = [("", ""), ("device", facts["device"])]
    if facts["gpus"]:
        memory = f"{facts['memory_bytes'] / GIB:.1f} GiB, {facts['free_memory_bytes'] / GIB:.1f} GiB of it free"
        rows += [("compute capability", facts["capability"]), ("memory", memory), ("driver", text(facts["driver"]))]
        rows += [("PyTorch's flash attention", "yes" if facts["sdpa_flash"] else "no")]
    rows += [
        ("host", f"{facts['cores']} cores, {facts['host_memory_bytes'] / GIB:.0f} GiB; {facts['system']}"),
        ("compilers", f"nvcc {text(facts['nvcc'])}; {text(facts['compiler'])}"),
        ("Python, PyTorch, CUDA", f"{facts['python']}, {facts['torch']}, {text(facts['cuda'])}"),
        *((name, text(versions.get(name, [None])[0])) for name in SHOWN_PACKAGES),
    ]
    missing = [name for name, (here, _) in versions.items() if here is None and name not in UNUSED_PACKAGES]
    others = [f"{name} {here} (pinned: {pinned})" for name, (here, pinned) in versions.items() if differs(here, pinned)]
    lines = [table(rows)]
    lines += [f"Not installed: {', '.join(missing)}."] if missing else []
    lines += [f"Other versions than the pinned ones: {', '.join(others)}."] if others else []
    return "\n\n".join(lines)


def differs(here: str | None, pinned: str | None) -> bool:
    """Whether a package is installed in another version than the pinned one."""
    return None not in (here, pinned) and here.partition("+")[0] != pinned


def correct(found: Found) -> str:
    """Self-tests: what was found, and what is allowed."""
    rows: Table = [("self-test", "loss", "norm", "weights", "resumed loss", "resumed weights", "attention", "result")]
    columns = ("loss", "norm", "weights", "resumed loss", "resumed weights")
    for part in found.reached("self-test "):
        figures = part["figures"]
        gaps = ["{:.1e} / {:.1e}".format(*figures[name]) if name in figures else "-" for name in columns]
        name = part["name"].removeprefix("self-test ")
        rows.append((name, *gaps, attention(figures), part["status"]))
    lines = []
    if len(rows) > 1:
        lines += [
            "Differences from a plain PyTorch loop: found / allowed. Samples are documents kept apart.",
            table(rows),
        ]
    built, compared = found.figures("build Adam"), found.figures("compare Adam")
    if built:
        if built["is_compiled"]:
            lines.append(f"ColossalAI's Adam was built in {built['build_seconds']:.0f} s.")
        else:
            lines.append("Adam's kernels are PyTorch's: ColossalAI's are compiled only on GPUs, with a CUDA toolkit.")
    if compared:
        gaps = ("{}: {:.1e} / {:.1e}".format(place, *pair) for place, pair in compared["differences"].items())
        lines.append(
            f"Weights after steps of ColossalAI's Adam against PyTorch's, found / allowed: {'; '.join(gaps)}. Its step "
            f"takes {compared['time_over_pytorch']:.2f} times as long as that of PyTorch's fused AdamW."
        )
    return "\n\n".join(lines)


def attention(figures: dict[str, Any]) -> str:
    """The kernel of a logged attention, in a few words."""
    return figures.get("attention", "").partition(", since")[0] or "-"


def speed(found: Found) -> str:
    """Training by way: speed beside the bare loop's, MFU, parts of a step, memory beside the forecast."""
    ceilings, models = found.figures("ceilings"), found.figures("inputs").get("models", {})
    head = "training, tokens/s, over bare loop, TFLOPS, of the matrix product, MFU, forward, backward, optimizer, rest"
    rows: Table = [(*head.split(", "), "memory, GiB", "forecast, GiB", "forecast / measured")]
    for name in ("bare", "trainer"):
        rows += [baseline_row(part, found) for part in found.reached(f"{name} ") if part["figures"]]
    rows += [speed_row(part, found) for part in found.reached("speed ") if part["figures"]]
    if len(rows) == 1 and not ceilings:
        return ""
    lines = []
    if ceilings:
        lines.append(
            f"Measured ceilings: a bf16 matrix product {ceilings['matmul_tflops']:.3g} TFLOPS, a copy on the device "
            f"{ceilings['copy_bytes_per_second'] / GB:,.3g} GB/s read and written, from the host "
            f"{ceilings['from_host_bytes_per_second'] / GB:,.3g} GB/s."
        )
    cut = [
        f"{name} has {m['layers']} of {m['whole']} layers, {m['parameters'] / 1e9:.3g} G parameters"
        for name, m in models.items()
    ]
    lines += [f"Models: {'; '.join(cut)}. Random weights, full samples of random tokens, bf16."] if cut else []
    lines += [table(rows)] if len(rows) > 1 else []
    return "\n\n".join(lines)


def baseline_row(part: dict[str, Any], found: Found) -> Sequence[str]:
    """The row of a bare loop or a Trainer."""
    kind, _, model = part["name"].partition(" ")
    name = {"bare": "bare PyTorch loop", "trainer": "Hugging Face Trainer"}[kind]
    figures = part["figures"]
    blank = ["-"] * 7
    cells = [f"{model} {name}", f"{figures['tokens_per_second']:,.0f}", over_bare(model, figures, found)]
    return (*cells, *blank, f"{figures['memory_bytes'] / GIB:.2f}", "-", "-")


def speed_row(part: dict[str, Any], found: Found) -> Sequence[str]:
    """The row of a training command."""
    name, figures = part["name"].removeprefix("speed "), part["figures"]
    ceiling = found.figures("ceilings").get("matmul_tflops")
    planned = found.figures(f"forecast {name}").get("memory_bytes")
    mfu, shares = figures["mfu_percent"], figures["step_percent"]
    return (
        name,
        f"{figures['tokens_per_second']:,.0f}",
        over_bare(name.partition(" ")[0], figures, found),
        f"{figures['tflops']:.3g}",
        f"{100 * figures['tflops'] / ceiling:.1f} %" if ceiling else "-",
        "-" if mfu is None else f"{mfu:.1f} %",
        *(f"{shares[part]:.1f} %" for part in ("forward", "backward", "optimizer", "rest")),
        f"{figures['memory_bytes'] / GIB:.2f}",
        f"{planned / GIB:.2f}" if planned else "-",
        f"{planned / figures['memory_bytes']:.2f}" if planned else "-",
    )


def over_bare(model: str, figures: dict[str, Any], found: Found) -> str:
    """Speed over that of the bare loop of the same model."""
    bare = found.figures(f"bare {model}").get("tokens_per_second")
    return f"{figures['tokens_per_second'] / bare:.2f}" if bare else "-"


def kernels(found: Found) -> str:
    """The operations of a profiled step."""
    figures = found.figures("step kernels")
    if not figures:
        return ""
    where = "on the GPU" if figures["on_device"] else "on the host, as there is no GPU"
    rows: Table = [("operation", "times a step", "share of their time")]
    rows += [(f"`{name}`", f"{count:,.1f}", f"{share:.1f} %") for name, count, share in figures["longest"]]
    return (
        f"1.3B with zero2, by PyTorch's profiler: a step has {figures['operations']:,.0f} operations {where}, and at "
        f"least one of them was running in {figures['busy_percent']:.1f} % of its time.\n\n{table(rows)}"
    )


def saving(found: Found) -> str:
    """Bytes and seconds of a checkpoint, and the resumed run."""
    rows: Table = [("", "")]
    saved, resumed = found.figures("train and save"), found.figures("resume")
    if saved:
        size, seconds = saved["bytes"], saved["seconds"]
        rate = (
            f"{size / GB:.3g} GB in {seconds:.1f} s, {size / GB / seconds:.3g} GB/s" if seconds else f"{size:,} bytes"
        )
        rows.append(("save a checkpoint", rate))
    if resumed:
        difference = f"{resumed['loss_difference']:.1e} in {resumed['steps']} steps"
        rows.append(("loss after a resume, largest relative difference", difference))
        rows.append(("load a checkpoint", f"{text(resumed['seconds'])} s, in whole seconds"))
    if found.parts.get("verify", {}).get("status") == PASSED:
        rows.append(("verify", "all files as they were written"))
    return table(rows) if len(rows) > 1 else ""


def generation(found: Found) -> str:
    """Loading and generating, beside what memory allows."""
    figures = found.figures("generate 1.3B")
    if not figures:
        return ""
    size, speed = figures["weight_bytes"], figures["tokens_per_second"]
    rows: Table = [("", ""), ("load", f"{size / GB:.3g} GB in {figures['load_seconds']:.1f} s")]
    rows.append(("tokens/s, one prompt", f"{speed:,.1f}, over {figures['tokens']} tokens"))
    copied = found.figures("ceilings").get("copy_bytes_per_second")
    if copied:
        rows.append(("tokens/s, if only reading the weights took time", f"{copied / size:,.0f}"))
    return table(rows)


def failed(record: Record) -> str:
    """Each failed part with its reason, its command and the end of what it printed."""
    return "\n\n".join(_failures(record))


def _failures(record: Record) -> Iterator[str]:
    for part in record["parts"]:
        if part["status"] == FAILED:
            tail = "\n".join(part["tail"].strip().splitlines()[-TAIL_LINES:]).replace("```", "'''")
            yield f"**{part['name']}**, after {part['seconds']:.0f} s: {part['reason']}"
            yield f"```text\n$ {part['command']}\n{tail}\n```"


def skipped(record: Record) -> str:
    """Each skipped part with its reason."""
    lines = [f"- {part['name']}: {part['reason']}" for part in record["parts"] if part["status"] == SKIPPED]
    return "\n".join(lines)


def table(rows: Table) -> str:
    """Rows as a table; the first is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def text(value: object) -> str:
    """A value of which nothing may be known."""
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
