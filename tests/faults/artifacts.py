"""Files that would run foreign code if they were unpickled, imported, rendered or followed, by name.

Each function adds one to a folder. The payload creates the file `Payload.canary`.
"""

import io
import itertools
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Plant = Callable[[Path, "Payload"], None]
WEIGHTS, OPTIMIZER_INDEX = "model-00001-of-00001.safetensors", "optimizer/pytorch_optim.bin.index.json"


@dataclass(frozen=True)
class Payload:
    """The effect that must never happen: `canary` is created."""

    canary: Path

    def __reduce__(self):
        return open, (str(self.canary), "w")

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self)

    @property
    def code(self) -> str:
        return f"open({str(self.canary)!r}, 'w').close()\n"

    @property
    def bin_index(self) -> str:
        """The index of weights that names pytorch_model.bin."""
        return json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})

    @property
    def torch_file(self) -> bytes:
        """As written by torch.save."""
        import torch

        content = io.BytesIO()
        torch.save({"weight": self}, content)
        return content.getvalue()

    @property
    def torchscript(self) -> bytes:
        """An archive whose __setstate__ writes the canary when torch.jit.load reads it.

        torch.load(weights_only=True) of PyTorch 2.5 hands such an archive to torch.jit.load (CVE-2025-32434).
        """
        import torch

        from tests.faults.torchscript import Evil

        content = io.BytesIO()
        torch.jit.save(torch.jit.script(Evil(str(self.canary))), content)
        return content.getvalue()


def put(name: str, kind: str = "pickled") -> Plant:
    """A file of this name that contains the payload in a form of `Payload`."""

    def plant(folder: Path, payload: Payload) -> None:
        content = getattr(payload, kind)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return plant


def only(name: str, kind: str) -> Plant:
    """The same, without safetensors weights beside it."""

    def plant(folder: Path, payload: Payload) -> None:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        put(name, kind)(folder, payload)

    return plant


def change(name: str, **entries) -> Plant:
    """Set entries of a JSON file; {canary} and {code} in a text become the payload's, and code.py is put beside it."""

    def plant(folder: Path, payload: Payload) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        filled = json.dumps(entries).replace("{canary}", str(payload.canary))
        path.write_text(json.dumps({**content, **json.loads(filled)}))
        (path.parent / "code.py").write_text(payload.code + "class Evil:\n    pass\n")

    return plant


def optimizer_names(name: str) -> Plant:
    """Make the optimizer's index name this file, which is a pickle."""

    def plant(folder: Path, payload: Payload) -> None:
        path = folder / OPTIMIZER_INDEX
        index = json.loads(path.read_text())
        index["metadata"]["param_groups"] = name
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)
        path.write_text(json.dumps(index))
        put(f"optimizer/{name}", "torch_file")(folder, payload)

    return plant


def weights_name(name: str, kind: str = "torch_file", *, index: str = "model.safetensors.index.json") -> Plant:
    """Make the index of the weights name this file."""

    def plant(folder: Path, payload: Payload) -> None:
        for path in folder.glob("model.safetensors"):
            path.unlink()
        place = (folder / name).resolve()
        (folder / index).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        put(str(place), kind)(folder, payload)

    return plant


def embedded(name: str) -> Plant:
    """A safetensors file whose metadata contains a pickle, as ColossalAI's asynchronous writer embeds it."""

    def plant(folder: Path, payload: Payload) -> None:
        import torch
        from safetensors.torch import save_file

        metadata = {"non_tensor_keys": "state", "structure": payload.pickled.decode("latin-1")}
        save_file({"state": torch.frombuffer(bytearray(payload.pickled), dtype=torch.uint8)}, folder / name, metadata)

    return plant


def together(*plants: Plant) -> Plant:
    """All of these in one folder."""

    def plant(folder: Path, payload: Payload) -> None:
        for one in plants:
            one(folder, payload)

    return plant


def within(name: str, plant: Plant) -> Plant:
    """The same in a folder inside."""
    return lambda folder, payload: plant(folder / name, payload)


def link(name: str, target: str) -> Plant:
    """A link of this name, replacing the existing file."""

    def plant(folder: Path, payload: Payload) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return plant


def fifo(name: str) -> Plant:
    """A FIFO of this name, which no process writes to."""

    def plant(folder: Path, payload: Payload) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return plant


def manifest_escapes(folder: Path, payload: Payload) -> None:
    """A manifest that lists a file outside."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"].append({"path": "../../outside", "bytes": 1, "sha256": "0"})
    path.write_text(json.dumps(manifest))


def random_states(folder: Path, payload: Payload) -> None:
    """Random states given as the text of a pickle."""
    path = folder / "running_states.json"
    states = json.loads(path.read_text())
    states["ranks"] = [dict.fromkeys(states["ranks"][0], payload.pickled.decode("latin-1"))]
    path.write_text(json.dumps(states))


TEMPLATE = "{{ cycler.__init__.__globals__.os.system('touch {canary}') }}{{ self.__init__.__globals__ }}"
AUTO_MAP = {name: "code.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
EVIL_PAIR = ["code.Evil", None]

CHECKPOINT: dict[str, Plant] = {
    "pytorch_optim_group.bin": put("optimizer/pytorch_optim_group.bin", "torch_file"),
    "pytorch_optim-00001.bin": put("optimizer/pytorch_optim-00001.bin", "torch_file"),
    "pytorch_optim.bin": put("optimizer/pytorch_optim.bin", "torch_file"),
    "pickle as pytorch_optim-00001.safetensors": put("optimizer/pytorch_optim-00001.safetensors"),
    "torch file as pytorch_optim_group.safetensors": put("optimizer/pytorch_optim_group.safetensors", "torch_file"),
    "pickle inside pytorch_optim_group.safetensors": embedded("optimizer/pytorch_optim_group.safetensors"),
    "optimizer index names a pickle": optimizer_names("pytorch_optim-00001.bin"),
    "optimizer index names a file outside": optimizer_names("../../../outside.bin"),
    "optimizer index is a pickle": put(OPTIMIZER_INDEX),
    "pickle as lr_scheduler": put("lr_scheduler"),
    "torch file as lr_scheduler": put("lr_scheduler", "torch_file"),
    "pickle as running_states.json": put("running_states.json"),
    "pickle in running_states.json": random_states,
    "pickle as manifest.json": put("manifest.json"),
    "manifest lists a file outside": manifest_escapes,
    "torch file as master weights": put("master_weights/rank-00000.safetensors", "torch_file"),
    "TorchScript as master weights": put("master_weights/rank-00000.safetensors", "torchscript"),
    "pickle as weights of a checkpoint": put(f"modeling/{WEIGHTS}"),
    "pytorch_model.bin in a checkpoint": put("modeling/pytorch_model.bin", "torch_file"),
    "auto_map in a checkpoint": change("modeling/config.json", auto_map=AUTO_MAP),
    "names of transformers' Trainer": put("rng_state.pth", "torch_file"),
    "names of torch.distributed.checkpoint": put(".metadata"),
}
MODEL: dict[str, Plant] = {
    "pytorch_model.bin beside safetensors": put("pytorch_model.bin", "torch_file"),
    "pytorch_model.bin alone": only("pytorch_model.bin", "torch_file"),
    "TorchScript as pytorch_model.bin": only("pytorch_model.bin", "torchscript"),
    "TorchScript as model.safetensors": put("model.safetensors", "torchscript"),
    "pickle as model.safetensors": put("model.safetensors"),
    "consolidated.00.pth alone": only("consolidated.00.pth", "torch_file"),
    "weight index names a pickle": weights_name("pytorch_model-00001-of-00001.bin"),
    "weight index names a file outside": weights_name("../outside.safetensors"),
    "weight index names an absolute path": weights_name("/tmp/../tmp/nothing/outside.safetensors"),
    "auto_map in config.json": change("config.json", auto_map=AUTO_MAP),
    "auto_map and another model_type": change("config.json", auto_map=AUTO_MAP, model_type="evil"),
    "attention named in config.json": change("config.json", _attn_implementation_internal="evil/kernel"),
    "adapter_model.bin": put("adapter_model.bin", "torch_file"),
    "adapter_config.json": change("adapter_config.json", peft_type="LORA", base_model_name_or_path="../evil"),
    "custom_generate": put("custom_generate/generate.py", "code"),
    "generation_config.json is a pickle": put("generation_config.json"),
    "tf_model.h5 and flax_model.msgpack": put("flax_model.msgpack"),
    "auto_map in tokenizer_config.json": change("tokenizer_config.json", auto_map={"AutoTokenizer": EVIL_PAIR}),
    "tokenizer class that is code": change("tokenizer_config.json", tokenizer_class="code.Evil"),
    "chat template with code": change("tokenizer_config.json", chat_template=TEMPLATE),
    "chat_template.json with code": change("chat_template.json", chat_template=TEMPLATE),
    "tokenizer.json of a strange type": change("tokenizer.json", model={"type": "code.Evil", "vocab": "{canary}"}),
    "pickle as tokenizer.json": put("tokenizer.json"),
    "pickle as tokenizer.model": put("tokenizer.model"),
    "torch file as added_tokens.json": put("added_tokens.json", "torch_file"),
    "special tokens with auto_map": change("special_tokens_map.json", auto_map={"AutoTokenizer": "code.Evil"}),
    "tokenizer.pkl": put("tokenizer.pkl"),
    "sitecustomize.py in the model's folder": put("sitecustomize.py", "code"),
}
# Several artifacts in one folder: each alone may be harmless, or refused for another reason.
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "no-such-owner/no-such-model", "target_modules": ["q_proj"]}
INGREDIENTS: dict[str, Plant] = {
    "adapter_config": change("adapter_config.json", **ADAPTER),
    "adapter bin": put("adapter_model.bin", "torchscript"),
    "adapter pickle": put("adapter_model.safetensors", "pickled"),
    "bin": put("pytorch_model.bin", "torchscript"),
    "bin index": put("pytorch_model.bin.index.json", "bin_index"),
    "pth": put("consolidated.00.pth", "torch_file"),
    "auto_map": change("config.json", auto_map=AUTO_MAP),
    "tokenizer auto_map": change("tokenizer_config.json", auto_map={"AutoTokenizer": EVIL_PAIR}),
    "modeling_llama.py": put("modeling_llama.py", "code"),
    "training_args.bin": put("training_args.bin", "torch_file"),
}
PAIRS = list(itertools.combinations(INGREDIENTS, 2))
TRIPLES = [
    ("adapter_config", "adapter bin", "auto_map"),
    ("adapter_config", "adapter bin", "bin"),
    ("adapter_config", "adapter pickle", "bin index"),
    ("adapter_config", "bin", "bin index"),
    ("auto_map", "tokenizer auto_map", "modeling_llama.py"),
    ("bin", "bin index", "pth"),
]
COMBINATIONS = {" + ".join(names): together(*map(INGREDIENTS.get, names)) for names in [*PAIRS, *TRIPLES]}
MODEL.update(COMBINATIONS)
MODEL.update(
    {
        "adapter of the folder itself": together(
            change("adapter_config.json", **{**ADAPTER, "base_model_name_or_path": "."}), INGREDIENTS["adapter bin"]
        ),
        "configuration in another file": together(
            change("config.json", configuration_files=["config.4.0.0.json"]),
            change("config.4.0.0.json", auto_map=AUTO_MAP, model_type="evil"),
        ),
        "tokenizer in another file": change("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.json"]),
        "vocabulary named outside": change("tokenizer_config.json", vocab_file="/dev/zero"),
        "tokenizer named outside": change("tokenizer_config.json", tokenizer_file="/dev/zero"),
        "SentencePiece model named outside": change(
            "tokenizer_config.json", sp_model_kwargs={"model_file": "/dev/zero"}
        ),
        "templates in a folder elsewhere": link("additional_chat_templates", "../samples"),
        **{
            f"{name} -> {target}": link(name, target)
            for name, target in (
                ("config.json", "/dev/zero"),
                ("generation_config.json", "/dev/full"),
                ("tokenizer.json", "/dev/full"),
                ("tokenizer.model", "/dev/zero"),
                ("tokenizer_config.json", "/dev/tty"),
                ("model.safetensors", "/dev/zero"),
                ("README.md", "/dev/zero"),
                ("chat_template.jinja", "/dev/null"),
            )
        },
        **{
            f"{name} is a FIFO": fifo(name)
            for name in (
                "config.json",
                "generation_config.json",
                "tokenizer.json",
                "tokenizer.model",
                "tokenizer_config.json",
                "special_tokens_map.json",
                "added_tokens.json",
                "model.safetensors",
                "model.safetensors.index.json",
                "README.md",
                "adapter_config.json",
                "pytorch_model.bin",
                "vocab.json",
            )
        },
    }
)
CHECKPOINT.update(
    {
        f"modeling: {name}": within("modeling", COMBINATIONS[name])
        for name in (
            "adapter_config + adapter bin",
            "adapter bin + bin",
            "adapter_config + adapter bin + auto_map",
            "bin + bin index",
            "auto_map + modeling_llama.py",
        )
    }
)
SAMPLES: dict[str, Plant] = {
    "pickle as arrow data": put("data-00000-of-00001.arrow"),
    "torch file as dataset_info.json": put("dataset_info.json", "torch_file"),
    "samples named outside": change("state.json", _data_files=[{"filename": "../outside.arrow"}]),
    "loading script in the samples": put("samples.py", "code"),
    "feature type that is code": change("dataset_info.json", features={"input_ids": {"_type": "code.Evil"}}),
    "pickled indices": change("state.json", _indices_data_files=[{"filename": "indices.pkl"}]),
}
