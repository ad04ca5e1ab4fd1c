"""Which kernels does a step run, and how much of its time is the GPU busy? Read from the trace of --profile."""

import argparse
import json
from collections import Counter
from pathlib import Path

from colossal_llama2.train.settings.flag_problems import PROFILED_STEPS
from tests.gpu.parts import Figures, print_figures

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op",)
SHOWN = 15
NAME_CHARACTERS = 90


def main() -> None:
    """Read rank-00000.json in the folder and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.step_kernels", description=__doc__)
    parser.add_argument("folder", type=Path, help="that of --profile")
    args = parser.parse_args()
    events = json.loads((args.folder / "rank-00000.json").read_text())["traceEvents"]
    print_figures(**summary([event for event in events if event.get("ph") == "X"]))


def summary(events: list[dict]) -> Figures:
    """Counts and times of one step; without a GPU those of the operations on the host."""
    chosen = [event for event in events if event.get("cat") in ON_DEVICE]
    on_device = bool(chosen)
    chosen = chosen or [event for event in events if event.get("cat") in ON_HOST]
    if not chosen:
        raise SystemExit("ValueError: the trace has no operations")
    times, counts = Counter[str](), Counter[str]()
    for event in chosen:
        times[event["name"]] += event["dur"]
        counts[event["name"]] += 1
    span = max(map(end_of, chosen)) - min(event["ts"] for event in chosen)
    return {
        "on_device": on_device,
        "busy_percent": 100 * busy_time(chosen) / span,
        "operations": len(chosen) / PROFILED_STEPS,
        "longest": [
            [name[:NAME_CHARACTERS], counts[name] / PROFILED_STEPS, 100 * time / sum(times.values())]
            for name, time in times.most_common(SHOWN)
        ],
    }


def end_of(event: dict) -> float:
    """When an event ends, in microseconds."""
    return event["ts"] + event["dur"]


def busy_time(events: list[dict]) -> float:
    """Microseconds in which at least one event ran."""
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        total += max(end_of(event) - max(event["ts"], reached), 0.0)
        reached = max(reached, end_of(event))
    return total


if __name__ == "__main__":
    main()
