"""What other programs read of a saved model, by their published rules. `python -m tests.clients` asks the programs.

The rules of vLLM are those of version 0.32: vllm/renderers/hf.py (the template), vllm/sampling_params.py and
vllm/config/model.py (the tokens that end an answer, the longest text), vllm/model_executor/models/llama.py.
"""

import json
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import chat_template_utils

from colossal_llama2.chat.folder_chat import chat_of_folder
from colossal_llama2.corpus.conversation import chat_template
from colossal_llama2.dataset.layout.chat_data import ChatData
from colossal_llama2.encoding.registry import load_encoder
from colossal_llama2.train.checkpointing.small_files import model_files
from tests import tiny
from tests.byte_level import make_byte_level
from tests.clients.models import OWN_TEMPLATE

ASKED = [{"role": "user", "content": "你好, who are you?"}]
TALK = [*ASKED, {"role": "assistant", "content": "A model. 模型。"}, {"role": "user", "content": "Thanks"}]
# What transformers and the programs here give to a template, besides the messages.
GIVEN = {"messages", "bos_token", "eos_token", "add_generation_prompt", "raise_exception", "namespace", "range", "loop"}


class Export:
    """A saved model, with the ids of the tokens that end an answer."""

    def __init__(self, folder: Path, ends: tuple[int, ...]):
        self.folder, self.ends = folder, ends
        self.template = (folder / "chat_template.jinja").read_text()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def read(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def export(request, tokenizer_dir, tmp_path_factory) -> Export:
    """With a SentencePiece model and colossal, and with a byte-level BPE and a template of its own."""
    home = tmp_path_factory.mktemp("export")
    if request.param == "sentencepiece":
        folder, name = tokenizer_dir, "colossal"
        text, ends = chat_template(prefix_after_marks=False), (load_encoder(folder).eos_id,)
    else:
        folder, name = make_byte_level(home / "tokenizer"), "model"
        text, ends = OWN_TEMPLATE, (AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|eot_id|>"),)
    model = tiny.make_model(home / "model", folder)
    files = model_files(str(model), str(folder), "fp32", stage="sft", chat=ChatData(name, text, ends))
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(home / "modeling")
    for path, content in files.items():
        (home / "modeling" / path).write_bytes(content)
    return Export(home / "modeling", ends)


def test_the_pipeline_of_transformers_answers_messages(export):
    """From the prompt of training, which no setting describes."""
    from transformers import pipeline

    ask = pipeline("text-generation", model=str(export.folder))
    (output,) = ask(ASKED, max_new_tokens=4)
    assert [message["role"] for message in output["generated_text"]] == ["user", "assistant"]
    chat = chat_of_folder(export.folder)
    prompt = torch.tensor([chat.prompt(ASKED)])
    chat.close()
    expected = ask.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4)[0, len(prompt[0]) :]
    decoded = ask.tokenizer.decode(expected, skip_special_tokens=True)
    # SentencePiece leaves out a space where a text begins.
    assert output["generated_text"][-1]["content"].removeprefix(" ") == decoded.removeprefix(" ")


def test_vllm_reads_the_architecture_and_all_lengths(export):
    config = export.read("config.json")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert not [name for name in config if name == "auto_map" or name.startswith("quantization")]
    # The shorter of both is the longest text.
    assert export.read("tokenizer_config.json")["model_max_length"] >= config["max_position_embeddings"]
    # Rows of embeddings without a token would be sampled.
    assert config["vocab_size"] == len(export.tokenizer)


def test_vllm_gets_the_prompt_of_training(export):
    """The tokenizer's template, rendered and encoded without special tokens around it."""
    template = export.tokenizer.get_chat_template(None, tools=None)
    assert template == export.template
    text = export.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)
    chat = chat_of_folder(export.folder)
    assert export.tokenizer.encode(text, add_special_tokens=False) == chat.prompt(ASKED)
    chat.close()


def test_vllm_gives_messages_as_texts(export):
    """A template that loops over the content of a message would get a list of parts."""
    tree = chat_template_utils._compile_jinja_template(export.template).environment.parse(export.template)
    loops = [loop.iter for loop in tree.find_all(jinja2.nodes.For)]
    assert loops and not any(getattr(getattr(one, "arg", None), "value", None) == "content" for one in loops)
    # What it does not know of, it does not pass on.
    assert jinja2.meta.find_undeclared_variables(tree) <= GIVEN


def test_generation_ends_where_an_answer_does(export):
    """vLLM and users of CTranslate2 read generation_config.json besides the tokenizer's eos_token."""
    ends = GenerationConfig.from_pretrained(export.folder).eos_token_id
    found = {export.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    assert set(export.ends) <= found
    # llama.cpp reads neither file for it, and knows these by their texts.
    known = {"</s>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>"}
    assert set(export.tokenizer.convert_ids_to_tokens(export.ends)) <= known


def test_a_template_without_the_markers_is_the_same_prompt(export):
    """As docs/inference.md advises for programs whose Jinja has no {% generation %}, such as minijinja."""
    plain = export.template.replace("{%- generation -%}", "{%- if true -%}")
    plain = plain.replace("{%- endgeneration -%}", "{%- endif -%}")
    names = {"bos_token": export.tokenizer.bos_token, "eos_token": export.tokenizer.eos_token}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    rendered = environment.from_string(plain).render(messages=TALK, add_generation_prompt=True, **names)
    assert rendered == export.tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    with pytest.raises(jinja2.TemplateSyntaxError, match="generation"):
        environment.from_string(export.template)
