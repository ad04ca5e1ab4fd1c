"""One rank of a test job: runs many training commands in one process group, since a launch costs seconds.

    torchrun --standalone --nproc_per_node 2 tests/train_worker.py JOBS.json

JOBS.json is a list of {"name", "script", "flags", "moments": bool}. Each is parsed and run as its script would; rank 0
writes <name>.json with "error" (null, or the UserError's message) and, where asked for, Adam's first moment after
step 1 ("first_moment_norm").
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import arguments, logs
from colossal_llama2.errors import UserError
from colossal_llama2.train import run
from colossal_llama2.train.engine.booster import Engine, launch, leave

PARSERS = {"train.py": arguments.train_parser, "train_sft.py": arguments.train_sft_parser}


def first_moments(engine: Engine) -> float:
    """Norm of Adam's first moment over all ranks, over 1 - beta1: after one step, the norm of what Adam was given."""
    import torch
    import torch.distributed as dist

    sharded_by_zero = engine.settings.plugin != "3d" or engine.settings.zero_stage > 0
    squares = torch.zeros((), dtype=torch.float64)
    for group in engine.optimizer.optim.param_groups:
        # Tensor parallelism splits every matrix of a LLaMA, which decay, and repeats the norms, which do not.
        repeats = 1 if group["weight_decay"] else engine.settings.tp_size
        repeats *= 1 if sharded_by_zero else engine.data_size
        for param in group["params"]:
            state = engine.optimizer.optim.state.get(param, {})
            if state:
                squares += state["exp_avg"].double().square().sum() / repeats
    dist.all_reduce(squares)
    return math.sqrt(squares) / (1 - group["betas"][0])


def record_moments(into: dict):
    """Wrap Engine.step so that the first call notes Adam's first moment. Returns the function that takes it back."""
    step = Engine.step

    def recording_step(engine, **kwargs):
        norm = step(engine, **kwargs)
        into.setdefault("first_moment_norm", first_moments(engine))
        return norm

    Engine.step = recording_step
    return lambda: setattr(Engine, "step", step)


def run_job(job: dict) -> dict:
    """Run one command in the open process group."""
    result = {"error": None}
    restore = record_moments(result) if job.get("moments") else lambda: None
    try:
        args = PARSERS[job["script"]]().parse_args(job["flags"])
        run.run(args, run.check_inputs(args))
    except UserError as error:
        result["error"] = str(error)
    finally:
        restore()
    return result


def main() -> None:
    jobs_path = Path(sys.argv[1])
    logs.configure_logging()
    launch(seed=1024)
    for job in json.loads(jobs_path.read_text()):
        logs.get_logger().info("### %s", job["name"])
        result = run_job(job)
        if logs.is_first_rank():
            jobs_path.with_name(f"{job['name']}.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main()
