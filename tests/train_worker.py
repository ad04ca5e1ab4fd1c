"""One rank of a training command of a test, with changes and observations that no flag offers.

    torchrun --standalone --nproc_per_node 2 tests/train_worker.py NAME.job

NAME.job is JSON. The command is parsed and run as its script would; rank 0 writes <name>.json with "error" (null, or
the message of a UserError, RunError or Stopped), and the records of `recording_first_step` and the others below.
A job has "name", "script", "flags", and may have
    moments             true: record the first step, with `recording_first_step`
    noise               true: record "noise", the tokens and the greatest noise of each document of rank 0's first pass
    initial_scale       of fp16's loss
    plugin_arguments    arguments of Gemini that no flag offers
    lifted              true: run what settings_problems refuses
    unrepaired          names of fixes to leave out
    signal_at           rank 1 gets a SIGTERM when it has collated this many batches of evaluations; "after" is how
                        many it collated after that
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from colossal_llama2 import launcher, logs
from colossal_llama2.cli import train_flags
from colossal_llama2.engine import llama_forward, loss_scale
from colossal_llama2.engine.engine import Engine
from colossal_llama2.engine.patches import bug_fixes
from colossal_llama2.engine.plugins import Gemini
from colossal_llama2.engine.process_group import launch, leave
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.errors import RunError, Stopped, UserError
from colossal_llama2.model.neftune import EmbeddingNoise
from colossal_llama2.train import run
from colossal_llama2.train.evaluation import accuracies, evaluator
from colossal_llama2.train.settings import flag_problems
from colossal_llama2.train.settings.from_flags import resolve
from colossal_llama2.train.stepping.stopping import NoSignals, StopSignals
from tests.pictures import undrawn

PARSERS = {"train.py": train_flags.train_parser, "train_sft.py": train_flags.train_sft_parser}


def without_repair(name: str) -> contextlib.AbstractContextManager:
    """Within it, ColossalAI is unpatched. Called before an engine is created."""
    if name == "loss_in_float32":
        return mock.patch.object(llama_forward, "in_float32", lambda logits: logits)
    # A fix that is a context becomes one that does nothing.
    return mock.patch.object(bug_fixes, name, lambda *args: contextlib.nullcontext())


def first_moments(engine: Engine) -> float:
    """Norm of Adam's first moment over all ranks, over 1 - beta1: after one step, the norm of Adam's input."""
    import torch
    import torch.distributed as dist

    sharded_by_zero = engine.plugin.zero_stage > 0
    squares = torch.zeros((), dtype=torch.float64)
    for group in engine.optimizer.optim.param_groups:
        # Tensor parallelism splits every matrix of a LLaMA (which decay), and repeats the norms (which do not).
        repeats = 1 if group["weight_decay"] else engine.settings.tp_size
        # Ranks of --sp are data-parallel ones to ZeRO and hold the same parameters without it.
        repeats *= 1 if sharded_by_zero else engine.data_size * engine.settings.sp_size
        for param in group["params"]:
            state = engine.optimizer.optim.state.get(param, {})
            if state:
                squares += state["exp_avg"].double().square().sum() / repeats
    dist.all_reduce(squares)
    return math.sqrt(squares) / (1 - group["betas"][0])


def chunks_kept_whole(engine: Engine) -> list[bool] | None:
    """For each of Gemini's chunks of parameters, whether every rank keeps all of it; None for other plugins."""
    manager = getattr(engine.model, "chunk_manager", None)
    if manager is None:
        return None
    return [chunk.keep_gathered for group in manager.chunk_groups.values() for chunk in group]


def buffers_error(engine: Engine) -> float:
    """The largest relative error of the model's floating buffers, against a new model of the same config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(engine.unwrapped_model.config.to_dict())
    with torch.device("meta"):
        new = LlamaForCausalLM(config)
    exact = type(new.model.rotary_emb)(config).inv_freq
    rotary = engine.unwrapped_model.model.rotary_emb
    names = {"model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq"}
    # transformers 4 keeps the second as an attribute.
    assert names.issuperset(dict(new.named_buffers())), new.named_buffers()
    found = [rotary.inv_freq, rotary.original_inv_freq]
    return max(float(((buffer.double() - exact.double()) / exact.double()).abs().max()) for buffer in found)


@contextlib.contextmanager
def recording_first_step(into: dict) -> Iterator[None]:
    """Within it, the first step records "first_moment_norm", "chunks" and "buffers_error": see the functions above."""
    step = Engine.step

    def recording_step(engine, **kwargs):
        norm = step(engine, **kwargs)
        if "first_moment_norm" not in into:
            into.update(
                first_moment_norm=first_moments(engine),
                chunks=chunks_kept_whole(engine),
                buffers_error=buffers_error(engine),
            )
        return norm

    with mock.patch.object(Engine, "step", recording_step):
        yield


@contextlib.contextmanager
def recording_noise(into: dict) -> Iterator[None]:
    """Within it, NEFTune's noise in the first pass on this rank is recorded: [tokens, greatest number] by document."""
    add = EmbeddingNoise.add

    def recording_add(noise, module, inputs, embeddings):
        noisy = add(noise, module, inputs, embeddings)
        added = (noisy - embeddings).detach().abs().amax(-1)
        for row, documents in enumerate(noise._documents if "noise" not in into else ()):
            places = [documents == number for number in range(1, int(documents.max()) + 1)]
            into.setdefault("noise", []).extend([int(at.sum()), float(added[row][at].max())] for at in places)
            assert not added[row][documents == 0].any()
        return noisy

    with mock.patch.object(EmbeddingNoise, "add", recording_add):
        yield


def adding_arguments(extra: dict) -> contextlib.AbstractContextManager:
    """Within it, Gemini is built with these additional arguments."""
    build = Gemini.arguments
    return mock.patch.object(Gemini, "arguments", lambda self, **keys: {**build(self, **keys), **extra})


@contextlib.contextmanager
def signal_after(batches: int, into: dict) -> Iterator[NoSignals]:
    """Within it, rank 1 gets a SIGTERM after it has collated this many batches of evaluations; yields the recorder."""
    done = 0

    def counting(share):
        def counted(*args):
            nonlocal done
            for batch in share(*args):
                done += 1
                if done == batches and collectives.place()[0] == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                    # A thread records the signal.
                    while not any(stop.received()):
                        time.sleep(0.001)
                into["after"] = done - batches
                yield batch

        return counted

    with StopSignals(has_partners=True) as stop, contextlib.ExitStack() as changes:
        for module in (evaluator, accuracies):
            changes.enter_context(mock.patch.object(module, "_share", counting(module._share)))
        yield stop


def run_job(job: dict) -> dict:
    """Run one command in the open process group."""
    result = {"error": None}
    with contextlib.ExitStack() as changes:
        changes.enter_context(undrawn())
        stop = changes.enter_context(signal_after(job["signal_at"], result)) if "signal_at" in job else None
        if job.get("moments"):
            changes.enter_context(recording_first_step(result))
        if job.get("noise"):
            changes.enter_context(recording_noise(result))
        if "initial_scale" in job:
            changes.enter_context(mock.patch.object(loss_scale, "INITIAL_SCALE", job["initial_scale"]))
        changes.enter_context(adding_arguments(job.get("plugin_arguments", {})))
        for name in job.get("unrepaired", ()):
            changes.enter_context(without_repair(name))
        if job.get("lifted"):
            changes.enter_context(mock.patch.object(flag_problems, "settings_problems", lambda *args, **keys: []))
        try:
            args = PARSERS[job["script"]]().parse_args(job["flags"])
            run.run(resolve(args), stop)
        except (UserError, RunError, Stopped) as error:
            result["error"] = str(error)
    return result


def main() -> None:
    """Run the job that the command line names."""
    path = Path(sys.argv[1])
    launcher.settle()
    logs.configure_logging()
    launch(seed=1024)
    job = json.loads(path.read_text())
    try:
        result = run_job(job)
    except BaseException:
        # The other ranks may be waiting for this one, which must not wait for them in turn.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if logs.is_first_rank():
        path.with_name(f"{job['name']}.json").write_text(json.dumps(result))
    leave()


if __name__ == "__main__":
    main()
