"""Chat templates by the names of --chat_template.

    colossal     that of Colossal-LLaMA-2, `corpus.conversation`: Human: <s>...</s>Assistant: <s>...</s>
    model        the template in the tokenizer's folder
    llama2       that of Llama-2-chat: <s>[INST] ... [/INST] ... </s>, with the system text in <<SYS>>
    chatml       <|im_start|>user, a new line, ... <|im_end|>
    FILE.jinja   the template in a file

colossal is written without Jinja (`tokenization.tokenize_sft`); the others are rendered (`renderer`).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama2.encoding.file_names import CONFIG_FILE, TEMPLATE_FILE, TEMPLATE_JSON_FILE
from colossal_llama2.errors import UserError
from colossal_llama2.storage.input_files import MIB, check_regular, is_regular, read_settings

COLOSSAL, MODEL, LLAMA2, CHATML = "colossal", "model", "llama2", "chatml"
NAMES = (COLOSSAL, MODEL, LLAMA2, CHATML)
FLAG = "--chat_template"
FILE_ENDING = ".jinja"
# A folder may hold several templates by name. This is the one for conversations.
DEFAULT = "default"

LLAMA2_TEMPLATE = """\
{%- set first = 0 -%}
{%- set system = '' -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set first = 1 -%}
  {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- endif -%}
{%- for message in messages[first:] -%}
  {%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('messages of user and assistant must alternate, and begin with the user') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}
  {%- else -%}
    {%- generation -%}
      {{- ' ' + message['content'] + ' ' + eos_token -}}
    {%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
"""
CHATML_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
      {{- message['content'] + '<|im_end|>' -}}
    {%- endgeneration -%}
  {%- else -%}
    {{- message['content'] + '<|im_end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
BUILT_IN = {LLAMA2: LLAMA2_TEMPLATE, CHATML: CHATML_TEMPLATE}


@dataclass(frozen=True)
class ChatTemplate:
    """A template that is rendered.

    Attributes:
        name: "model", "llama2", "chatml", or the name of the file without its folder.
        text: in Jinja.
        origin: where the text is from, for messages.
    """

    name: str
    text: str
    origin: str

    @property
    def sha256(self) -> str:
        """Of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def find_template(given: str, tokenizer_dir: str | Path) -> ChatTemplate | None:
    """The template of --chat_template; None for colossal.

    Raises:
        UserError: there is no such template, or its file cannot be read.
    """
    if given == COLOSSAL:
        return None
    if given in BUILT_IN:
        return ChatTemplate(given, BUILT_IN[given], f"{FLAG} {given}")
    if given == MODEL:
        found = template_of_folder(tokenizer_dir)
        if found is None:
            raise UserError(
                f"{FLAG} model: {tokenizer_dir} has no chat template, neither {TEMPLATE_FILE} nor an entry of "
                f"{CONFIG_FILE}; give {COLOSSAL}, {LLAMA2}, {CHATML} or the path of a *{FILE_ENDING}"
            )
        return ChatTemplate(MODEL, *found)
    if not given.endswith(FILE_ENDING):
        raise UserError(f"{FLAG} {given}: {', '.join(NAMES)} or the path of a *{FILE_ENDING} is allowed")
    path = Path(given)
    return ChatTemplate(path.name, read_template(path), given)


def template_of_folder(folder: str | Path) -> tuple[str, str] | None:
    """The chat template that transformers would use for a tokenizer's folder, and the file it is from; or None.

    chat_template.jinja comes first, and then the entry of tokenizer_config.json. Of several templates by name, the one
    named "default" is used. chat_template.json, which only processors of images read, comes last.

    Raises:
        UserError: a file cannot be read.
    """
    path = Path(folder, TEMPLATE_FILE)
    if path.exists():
        return read_template(path), str(path)
    for name in (CONFIG_FILE, TEMPLATE_JSON_FILE):
        path = Path(folder, name)
        text = _default_of(read_settings(path).get("chat_template")) if is_regular(path) else None
        if text is None:
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{path}: its chat template is not valid Unicode at character {error.start}; correct it")
        return text, str(path)
    return None


def _default_of(entry: Any) -> str | None:
    """The text of an entry, which is a text, or lists or maps several by name."""
    if isinstance(entry, list):
        named = [item for item in entry if isinstance(item, dict) and isinstance(item.get("name"), str)]
        entry = {item["name"]: item.get("template") for item in named}
    if isinstance(entry, dict):
        entry = entry.get(DEFAULT)
    return entry if isinstance(entry, str) else None


def read_template(path: Path) -> str:
    """The text of a template's file. Raises UserError if it cannot be read."""
    check_regular(path, max_bytes=MIB, allows_empty=True)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give another file")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 from byte {error.start} on; save it as UTF-8")
