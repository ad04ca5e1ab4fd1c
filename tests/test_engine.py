"""The parts of engine/ that can be checked without a process group; test_training.py checks them together."""

import contextlib
import inspect
import io
import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from safetensors import safe_open

from colossal_llama2.engine import adam, plugins
from colossal_llama2.engine.patches import bug_fixes, checkpoint_io, cpu_device
from colossal_llama2.engine.plugins import PLUGINS, Gemini, GeminiAuto, Hybrid3D, Zero2, Zero2Cpu
from colossal_llama2.engine.ranks import collectives
from colossal_llama2.engine.settings import EngineSettings
from colossal_llama2.engine.settings_problems import settings_problems
from colossal_llama2.errors import UserError
from colossal_llama2.model.trainable import Embeddings
from colossal_llama2.plugin_names import PLUGIN_NAMES
from tests import launching
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("with_colossalai")


def settings(**changes) -> EngineSettings:
    values = {
        "plugin": "zero2",
        "precision": "bf16",
        "tp_size": 1,
        "zero_stage": 1,
        "max_norm": 1.0,
        "accumulation_steps": 1,
        "use_flash_attn": False,
        "chunked_loss": "auto",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
    }
    return EngineSettings(**{**values, **changes})


@pytest.mark.parametrize("on_cpu", [True, False])
def test_colossalai_accepts_the_plugin_arguments(on_cpu):
    from colossalai.booster.plugin import GeminiPlugin, HybridParallelPlugin, LowLevelZeroPlugin

    built = [
        (GeminiPlugin, GeminiAuto(settings()).arguments(parameters=10**9, on_cpu=on_cpu)),
        (LowLevelZeroPlugin, Zero2Cpu(settings()).arguments(parameters=10**9, on_cpu=on_cpu)),
        (
            HybridParallelPlugin,
            Hybrid3D(settings(tp_size=2)).arguments(parameters=10**9, on_cpu=on_cpu, fused_norm=not on_cpu),
        ),
        (
            HybridParallelPlugin,
            Hybrid3D(settings(pp_size=2, sp_mode="ring")).arguments(parameters=10**9, on_cpu=on_cpu),
        ),
    ]
    for plugin, arguments in built:
        assert arguments.keys() <= inspect.signature(plugin.__init__).parameters.keys()
        assert arguments["precision"] == "bf16" and arguments["max_norm"] == 1.0


def test_apex_s_norm_is_used_where_it_imports(monkeypatch):
    assert not plugins.has_apex_norm()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not plugins.has_apex_norm()
    apex = types.ModuleType("apex.normalization")
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.normalization", apex)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", types.ModuleType("fused_layer_norm_cuda"))
    # Old versions have no RMSNorm.
    assert not plugins.has_apex_norm()
    apex.FusedRMSNorm = object
    assert plugins.has_apex_norm()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bucket_size", [1000, 16])
def test_gradients_from_buckets_are_those_of_autograd(gloo_group, stage, bucket_size):
    """Matrices of 16 numbers and norms of 4 alternate, as in backward; a bucket holds all of them or a matrix."""
    from colossalai.nn.optimizer import HybridAdam
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    cpu_device.install()
    matrices, norms = ([torch.nn.Parameter(torch.rand(shape)) for _ in range(3)] for shape in ((4, 4), (4,)))

    def loss():
        hidden = torch.ones(4)
        for matrix, norm in zip(matrices, norms, strict=True):
            hidden = (hidden * norm) @ matrix
        return hidden.sum()

    wanted = [grad.flatten() for grad in torch.autograd.grad(loss(), [*matrices, *norms])]
    for repaired in (False, True):
        adam = HybridAdam([{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}])
        zero = LowLevelZeroOptimizer(adam, partition_grad=stage == 2, reduce_bucket_size=bucket_size)
        if repaired:
            bug_fixes.fill_buckets(zero)
        for _ in range(2):
            zero.backward(loss())
            (store,) = zero.pg_to_grad_store.values()
            for param, grad in zip([*matrices, *norms], wanted, strict=True):
                (found,) = store.get_partitioned_gradients_by_param_id(int(param.dim() == 1), id(param))
                torch.testing.assert_close(found, grad)
            zero.zero_grad()
        for handle in zero.grad_handles:
            handle.remove()


def test_hidden_messages_of_colossalai_cost_nothing(monkeypatch):
    from colossalai.logging import DistributedLogger

    bug_fixes.skip_hidden_messages()
    looked = []
    place = "_DistributedLogger__get_call_info"
    monkeypatch.setattr(DistributedLogger, place, lambda _: looked.append(1) or ("", 1, ""))
    logger = DistributedLogger.get_instance("test_engine")
    logger.set_level("WARNING")
    logger.debug("hidden")
    logger.info("hidden", ranks=[0])
    assert not looked
    logger.warning("shown")
    assert len(looked) == 1


def test_no_clipping_still_measures_the_norm():
    assert Zero2(settings(max_norm=0.0)).arguments(parameters=10**9, on_cpu=True)["max_norm"] == math.inf


def test_gemini_always_shards():
    small = Gemini(settings()).arguments(parameters=2_000_000, on_cpu=True)
    assert 4 * small["min_chunk_size_m"] * 2**20 < 2_000_000
    large = Gemini(settings()).arguments(parameters=7 * 10**9, on_cpu=False)
    assert large["min_chunk_size_m"] == 32 and large["enable_async_reduce"]


def test_an_evaluation_leaves_gemini_where_it_was():
    policy, collector = types.SimpleNamespace(max_prefetch=1), types.SimpleNamespace(_step_idx=5)
    manager = types.SimpleNamespace(placement_policy=policy, _mem_stats_collector=collector, need_warmup=False)
    with Gemini(settings()).evaluating(types.SimpleNamespace(gemini_manager=manager)):
        assert policy.max_prefetch == 0
        collector._step_idx = 9
    assert (policy.max_prefetch, collector._step_idx) == (1, 5)


def test_gemini_places_by_the_least_room_of_all_ranks(monkeypatch):
    """Rank 0 of two. The other one has half the memory, and uses less of it in one operation and more in the other."""
    from colossalai.legacy.utils import memory

    figures = [40.0, 15.0]

    class Collector:
        _memstats = types.SimpleNamespace(non_model_data_list=lambda device: figures)

        def finish_collection(self):
            pass

    collector = Collector()
    manager = types.SimpleNamespace(_mem_stats_collector=collector)
    gemini = types.SimpleNamespace(gemini_manager=manager, chunk_manager=types.SimpleNamespace(device=None))
    monkeypatch.setattr(memory, "colo_device_memory_capacity", lambda device: 100.0)
    others = iter([50.0, [5.0, 20.0]])
    monkeypatch.setattr(collectives, "gather_values", lambda own: [own, next(others)])
    bug_fixes.agree_on_memory(gemini)
    collector.finish_collection()
    assert memory.colo_device_memory_capacity(None) == 50
    # 40 of 100 leave more than 5 of 50, and 15 of 100 more than 20 of 50.
    assert figures == [5.0, 20.0]


def test_buffers_of_a_model_are_not_sent():
    assert Hybrid3D(settings()).arguments(parameters=10**9, on_cpu=True)["broadcast_buffers"] is False


def test_gemini_accumulates_only_on_request():
    def accumulation(steps):
        arguments = Gemini(settings(accumulation_steps=steps)).arguments(parameters=10**6, on_cpu=True)
        return arguments["enable_gradient_accumulation"]

    assert (accumulation(1), accumulation(4)) == (False, True)


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ({"plugin": "gemini", "precision": "fp32"}, 2, ["gemini", "fp32"]),
        ({"plugin": "gemini_auto", "precision": "fp32"}, 2, ["gemini_auto"]),
        ({"plugin": "3d", "precision": "fp32"}, 2, ["--zero 0"]),
        ({"plugin": "zero2", "tp_size": 2}, 2, ["--plugin 3d"]),
        ({"plugin": "3d", "tp_size": 2}, 3, ["--tp 2", "3 processes"]),
        ({"plugin": "3d", "tp_size": 2, "pp_size": 2, "micro_batch_size": 2}, 6, ["--tp 2 x --pp 2", "6 processes"]),
        ({"plugin": "gemini", "pp_size": 2, "micro_batch_size": 2}, 2, ["--pp 2", "--plugin 3d"]),
        ({"plugin": "ddp", "tp_size": 2}, 2, ["--tp 2", "--plugin 3d"]),
        ({"plugin": "zero2", "sp_mode": "all_to_all", "sp_size": 2}, 2, ["--plugin 3d"]),
        ({"plugin": "3d", "pp_size": 2, "micro_batch_size": 4, "microbatch_size": 4}, 2, ["at least 8"]),
        ({"plugin": "3d", "pp_size": 2, "micro_batch_size": 5, "microbatch_size": 2}, 2, ["--micro_batch_size 5"]),
        ({"plugin": "3d", "pp_size": 2, "micro_batch_size": 2, "zero_stage": 2}, 2, ["--zero 0 or 1"]),
        ({"plugin": "3d", "pp_size": 3, "micro_batch_size": 3, "trainable": Embeddings()}, 3, ["--pp 2"]),
        ({"plugin": "3d", "sp_size": 2}, 2, ["--enable_sequence_parallelism"]),
        ({"plugin": "3d", "sp_mode": "all_to_all"}, 2, ["needs --sp"]),
        ({"plugin": "3d", "sp_mode": "ring"}, 2, ["needs --tp"]),
        ({"plugin": "3d", "sp_mode": "ring", "tp_size": 2, "sp_size": 2}, 4, ["leave it out"]),
        (
            {"plugin": "3d", "sp_mode": "ring", "tp_size": 2, "zero_stage": 2, "accumulation_steps": 4},
            2,
            ["--zero 0 or 1"],
        ),
    ],
)
def test_settings_that_cannot_run_are_named(changes, world_size, words):
    (problem,) = settings_problems(settings(**changes), world_size)
    assert all(word in problem for word in words)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_plugin_accepts_the_flags_of_the_readme(plugin):
    assert settings_problems(settings(plugin=plugin, precision="fp16"), world_size=8) == []


def test_every_plugin_name_has_a_builder():
    assert tuple(PLUGINS) == PLUGIN_NAMES


def test_norms_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4))
    matrices, norms = adam.parameter_groups(model, 0.1)
    assert [param.dim() for param in matrices["params"]] == [2] and matrices["weight_decay"] == 0.1
    assert {param.dim() for param in norms["params"]} == {1} and norms["weight_decay"] == 0.0


def test_nothing_to_train_is_an_error():
    with pytest.raises(UserError, match="trainable"):
        adam.parameter_groups(torch.nn.Linear(2, 2).requires_grad_(False), 0.1)


def test_state_files_bring_back_what_was_written(tmp_path):
    value = {
        0: {"step": 3, "exp_avg": torch.randn(4, 5).bfloat16(), "flag": True},
        1: {"step": torch.tensor(3.0), "none": None, "betas": (0.9, 0.95), "names": ["a", "b"]},
    }
    checkpoint_io.write_object(value, str(tmp_path / "state"))
    back = checkpoint_io.read_object(str(tmp_path / "state"))
    assert back[0]["step"] == 3 and back[0]["flag"] is True and torch.equal(back[0]["exp_avg"], value[0]["exp_avg"])
    assert back[1]["betas"] == (0.9, 0.95) and back[1]["names"] == ["a", "b"] and back[1]["none"] is None
    assert torch.equal(back[1]["step"], torch.tensor(3.0))
    with safe_open(tmp_path / "state", framework="pt") as file:
        assert "structure" in file.metadata()


def test_step_comes_as_tensor_for_gemini(tmp_path):
    checkpoint_io.write_object({0: {"step": 3}}, str(tmp_path / "state"))
    assert torch.equal(
        checkpoint_io.read_object(str(tmp_path / "state"), step_as_tensor=True)[0]["step"], torch.tensor(3.0)
    )


def test_unknown_types_are_not_stored(tmp_path):
    with pytest.raises(TypeError, match="set"):
        checkpoint_io.write_object({"a": {1, 2}}, str(tmp_path / "state"))


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


def test_pickled_state_is_refused_and_not_run(tmp_path):
    torch.save({0: Payload(tmp_path / "canary")}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match="not a state file"):
        checkpoint_io.read_object(str(tmp_path / "state.safetensors"))
    assert not (tmp_path / "canary").exists()


def test_colossalai_reads_and_writes_state_files(tmp_path):
    original = torch.save, torch.load
    with checkpoint_io.safetensors_instead_of_pickle():
        torch.save({"a": torch.ones(2)}, str(tmp_path / "file"))
        assert torch.equal(torch.load(str(tmp_path / "file"), map_location="cpu")["a"], torch.ones(2))
        buffer = io.BytesIO()
        torch.save([1], buffer)
        buffer.seek(0)
        assert torch.load(buffer, weights_only=True) == [1]
    assert (torch.save, torch.load) == original


def test_shards_get_the_field_s_names(tmp_path):
    for name in ("model-00001.safetensors", "model-00002.safetensors"):
        (tmp_path / name).write_text(name)
    index = {"metadata": {}, "weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (tmp_path / checkpoint_io.INDEX_FILE).write_text(json.dumps(index))
    checkpoint_io.rename_model_shards(str(tmp_path))
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert list(json.loads((tmp_path / checkpoint_io.INDEX_FILE).read_text())["weight_map"].values()) == names
    assert [(tmp_path / name).read_text() for name in names] == ["model-00001.safetensors", "model-00002.safetensors"]


def test_cpu_attention_equals_softmax_and_gives_blind_rows_zeros():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    causal = cpu_device.host_attention(q, k, v, is_causal=True)
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
    assert torch.allclose(causal, scores.softmax(-1) @ v, atol=1e-6)
    hidden = torch.zeros(2, 1, 6, 6)
    hidden[0, 0, :2] = torch.finfo(torch.float32).min
    out = cpu_device.host_attention(q, k, v, attention_mask=hidden)
    assert (out[0, :, :2] == 0).all() and torch.isfinite(out).all()
    out.sum().backward()
    assert (q.grad[0, :, :2] == 0).all() and torch.isfinite(k.grad).all()


def kept_for_backward(mask):
    """The tensors that two layers of attention with this mask keep, each counted once, without q, k and v."""
    q, k, v = (torch.randn(2, 3, 6, 4, requires_grad=True) for _ in range(3))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outs = [cpu_device.host_attention(q, k, v, attention_mask=mask, q_indices=()) for _ in range(2)]
    places = {tensor.untyped_storage().data_ptr() for tensor in (q, k, v, *outs)}
    return [tensor for place, tensor in kept.items() if place not in places]


def test_cpu_attention_keeps_one_mask_for_all_layers():
    mask = torch.zeros(2, 1, 6, 6)
    is_mask = [tensor.shape[-2:] == (6, 6) for tensor in kept_for_backward(mask)]
    assert sum(is_mask) == 1
    mask[0, 0, 1] = torch.finfo(torch.float32).min
    is_mask = [tensor.shape[-2:] == (6, 6) for tensor in kept_for_backward(mask)]
    assert sum(is_mask) == 2


@pytest.mark.parametrize("size, is_gathered, theirs_is_low", [(32 * 2**20, False, True), (5000, True, False)])
def test_the_norm_of_a_chunk(gloo_group, size, is_gathered, theirs_is_low):
    """Gemini's, whose float32 norm of 32 M numbers is 0.2 % too low; padding in a chunk does not count."""
    from colossalai.zero.gemini.chunk import Chunk

    cpu_device.install()
    bug_fixes.norm_in_blocks()
    used = size - 5
    chunk = Chunk(size, gloo_group, torch.bfloat16)
    chunk.append_tensor(torch.nn.Parameter(torch.empty(used, dtype=torch.bfloat16)))
    torch.manual_seed(0)
    gradient = torch.randn(size).mul_(10.2 / size**0.5).bfloat16()
    exact = sum(float(part.double().square().sum()) for part in gradient[:used].split(2**20)) ** 0.5
    chunk.is_gathered, chunk.valid_end = is_gathered, used
    chunk.cuda_global_chunk, chunk.cuda_shard = (gradient, None) if is_gathered else (None, gradient)
    norms = []
    for set_norm in (Chunk.set_l2_norm, Chunk.set_l2_norm.__wrapped__):
        chunk.l2_norm = None
        set_norm(chunk)
        norms.append(chunk.l2_norm**0.5)
    assert norms[0] == pytest.approx(exact, rel=1e-6)
    assert (norms[1] < 0.999 * exact) == theirs_is_low


def test_master_weights_are_converted_in_their_chunk(gloo_group, monkeypatch):
    """The float32 copy of a parameter is freed before its chunk has one: else Gemini holds both while it loads."""
    import torch.distributed as dist
    from colossalai.zero.gemini.chunk import Chunk, ChunkManager

    cpu_device.install()
    bug_fixes.convert_into_chunks()
    held, append = [], Chunk.append_tensor

    def append_and_record(self, tensor):
        held.append(tensor.data.untyped_storage().nbytes() if self.dtype is torch.float32 else None)
        append(self, tensor)

    monkeypatch.setattr(Chunk, "append_tensor", append_and_record)
    manager = ChunkManager({1: {"chunk_size": 600, "keep_gathered": False}})
    torch.manual_seed(0)
    # The second one begins new chunks, the third one is larger than others.
    given = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((20, 20), (300,), (30, 30))]
    masters, exact = [], [param.detach().float() for param in given]
    for param, values in zip(given, exact, strict=True):
        manager.register_tensor(param, "fp16_param", 1, dist.group.WORLD)
        masters.append(param.clone())
        masters[-1].data = masters[-1].data.float()
        manager.register_tensor(masters[-1], "fp32_param", 1, dist.group.WORLD)
        assert torch.equal(masters[-1], values)
    assert {size for size in held if size is not None} == {4}
    manager.close_all_groups()
    assert [manager.get_chunk(master).chunk_size for master in masters] == [600, 600, 900]
    for master, values in zip(masters, exact, strict=True):
        chunk = manager.get_chunk(master)
        place = chunk.tensors_info[master]
        assert torch.equal(chunk.payload[place.offset : place.end].view(values.shape), values)


def test_clipping_of_the_plain_loop_is_exact():
    from colossal_llama2.train.plain_loop import _clip

    gradients = [torch.full((2**24,), 1e-3), torch.full((3,), 2.0)]
    exact = (2**24 * 1e-6 + 12) ** 0.5
    assert _clip(gradients, math.inf) == pytest.approx(exact, rel=1e-6)
    assert gradients[1][0] == 2
    assert _clip(gradients, 0.5) == pytest.approx(exact, rel=1e-6)
    assert _clip(gradients, 0.5) == pytest.approx(0.5, rel=1e-4)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {"default": {}, "llama3": LLAMA3, **{name: {"factor": 2.0} for name in ("linear", "dynamic", "yarn")}}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rope", ROPES)
def test_buffers_are_not_rounded_with_the_weights(rope, in_place):
    """A plugin casts the module, or like Gemini the tensors directly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_scaling={"rope_type": rope, **ROPES[rope]},
    )
    exact, model = LlamaForCausalLM(config).model.rotary_emb, LlamaForCausalLM(config)
    with bug_fixes.unrounded_buffers(model):
        if in_place:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.bfloat16()
        else:
            model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    # Longer samples than the model was made for change dynamic frequencies, shorter ones change them back.
    for length in (8, 100, 8):
        hidden, positions = torch.ones(1, length, 64), torch.arange(length)[None]
        for found, wanted in zip(model.model.rotary_emb(hidden, positions), exact(hidden, positions), strict=True):
            assert torch.equal(found, wanted)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_bf16_clipping_is_lost_without_its_repair():
    from colossalai.nn.optimizer import HybridAdam

    cpu_device.install()

    def first_moment(repair):
        param = torch.nn.Parameter(torch.zeros(4))
        optimizer = HybridAdam([param], lr=1e-3, betas=(0.9, 0.95))
        if repair:
            bug_fixes.clip_in_bf16(optimizer)
        # As in Gemini: a float32 master parameter with a bf16 gradient.
        param.data, param.grad = torch.zeros(4).bfloat16(), torch.full((4,), 8.0).bfloat16()
        param.data = torch.zeros(4)
        optimizer.step(div_scale=4.0)
        return float(optimizer.state[param]["exp_avg"][0]) / 0.1

    assert first_moment(repair=False) == pytest.approx(8.0, rel=1e-2)
    assert first_moment(repair=True) == pytest.approx(2.0, rel=1e-2)


@pytest.fixture
def gloo_group():
    """A process group with only this process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_gloo_gets_the_collectives_that_it_lacks(gloo_group):
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    cpu_device.install()
    source, target = torch.arange(6.0).view(2, 3), torch.zeros(2, 3)
    for name, arguments in (("reduce_scatter", (target, [source])), ("all_to_all", ([target], [source]))):
        # Later versions have them.
        lacks = torch.__version__ < (2, 6)
        with pytest.raises(RuntimeError, match="does not support") if lacks else contextlib.nullcontext():
            getattr(distributed_c10d, name)(*arguments)
        target.zero_()
        assert getattr(dist, name)(*arguments, async_op=True).wait()
        assert torch.equal(target, source)


@pytest.mark.slow
@pytest.mark.parametrize("environment, keeps", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)])
def test_freed_memory_is_kept_for_the_next_step(environment, keeps):
    code = """
import resource, torch
from colossal_llama2.engine.patches import cpu_device
cpu_device.keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(6, 2**20) for _ in range(3)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del tensors
print(faults)
"""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**others, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=100)
    # Pages of 4 KiB: three tensors of 24 MiB have 18,432 of them.
    assert (int(done.stdout) < 100) == keeps, (done.stdout, done.stderr)


def test_sums_are_scattered_as_gloo_would(gloo_group):
    import torch.distributed as dist

    cpu_device.install()
    source, target = torch.randn(3, 4).to(torch.bfloat16), torch.zeros(12, dtype=torch.bfloat16)
    assert dist.reduce_scatter_tensor(target, source.T, async_op=True).wait()
    assert torch.equal(target, source.T.flatten())
    dist.reduce_scatter_tensor(target, source.flatten(), op=dist.ReduceOp.MAX)
    assert torch.equal(target, source.flatten())


@pytest.mark.slow
def test_three_ranks_scatter_sums_and_gather(tmp_path):
    done = launching.attempt(tmp_path, {"name": "all"}, worker="collectives_worker.py", ranks=3, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_pipeline_may_query_the_backend_of_its_group(gloo_group):
    from colossalai.pipeline import p2p

    cpu_device.install()
    # ColossalAI 0.5.0 compares with this; when PyTorch has it, the patch can be removed.
    assert not hasattr(torch.distributed.Backend, "HCCL")
    assert p2p._check_for_nccl_hccl_backend(gloo_group) is False
