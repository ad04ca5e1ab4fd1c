"""A process of its own in which a chat template is rendered. It imports nothing but the standard library and Jinja.

`renderer` starts it by its path, and talks to it in lines of JSON. The first line has the template:

    {"template": "{% for message in messages %}...", "names": {"bos_token": "<s>", "eos_token": "</s>"}}

and is answered with {"has_markers": true}, or with an error. Each further line is one conversation:

    {"messages": [{"role": "user", "content": "Hi"}, ...], "add_generation_prompt": false, "answers": true}

and is answered with {"text": "...", "spans": [[17, 24]]}, or with {"error": "..."}. A template may come from anyone:
Jinja's sandbox keeps it from Python's objects, and this process has little memory, cannot write files, and is killed by
its parent if it takes too long.

The environment is that of transformers' `apply_chat_template`: `raise_exception`, `tojson`, loop controls, and
`{% generation %}`. `strftime_now` is left out, since a template must give the same text on every day.
"""

import json
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30
# Of one request. The parent waits as long; this limit also ends a process whose parent was killed.
CPU_SECONDS = 20
# A text that is this much longer than its messages is not a rendering of them.
MOST_GROWTH = 50
MOST_OVERHEAD = 2**20
# Code points that Unicode reserves for use inside a program. Two that occur in no message mark what is generated.
RESERVED = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: writes a mark before and after its content."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """The node of the block; the marks are variables, so that each rendering chooses its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line) for name in ("_begin", "_end")
        )
        # As in transformers, variables that are set inside stay inside.
        return jinja2.nodes.Scope([begin, *body, end], lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    """The environment in which templates are compiled."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    return made


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class Conversations:
    """Renders conversations with one template."""

    def __init__(self, template: str, names: Mapping[str, str]):
        compiler = environment()
        parsed = compiler.parse(template)
        self._template, self._names = compiler.from_string(template), names
        loaded = {node.name for node in parsed.find_all(jinja2.nodes.Name) if node.ctx == "load"}
        self.has_markers = "_begin" in loaded

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of messages, and the spans of characters inside `{% generation %}`."""
        size = sum(len(message["content"]) for message in messages)
        begin, end = _unused_marks(messages)
        parts: list[str] = []
        length = 0
        for part in self._template.generate(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            _begin=begin,
            _end=end,
            **self._names,
        ):
            parts.append(part)
            length += len(part)
            if length > MOST_GROWTH * size + MOST_OVERHEAD:
                raise jinja2.TemplateError(f"it makes over {length:,} characters of messages with {size:,}")
        return _without_marks("".join(parts), begin, end)

    def answers(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The same; without markers, the spans are found by rendering the messages before and up to each answer.

        Answers before the first message of another role than system have the span (0, 0) if they cannot be found: many
        templates refuse a conversation that ends with them, and usually they are masked.

        Raises:
            NotAPrefix: the text before an answer does not begin the whole text.
        """
        text, spans = self.render(messages, add_generation_prompt=False)
        if self.has_markers:
            return text, spans
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            is_opening = all(earlier["role"] in ("system", "assistant") for earlier in messages[:number])
            try:
                spans.append(self._span(text, messages, number))
            except (NotAPrefix, jinja2.TemplateError):
                if not is_opening:
                    raise
                spans.append((0, 0))
        return text, spans

    def _span(self, text: str, messages: Sequence[Mapping[str, str]], number: int) -> tuple[int, int]:
        """The span of answer `number` of messages that are rendered as `text`."""
        before, _ = self.render(messages[:number], add_generation_prompt=True)
        after, _ = self.render(messages[: number + 1], add_generation_prompt=False)
        if not text.startswith(before) or not text.startswith(after) or len(after) < len(before):
            raise NotAPrefix(number + 1)
        return len(before), len(after)


class NotAPrefix(Exception):
    """Message `args[0]`, an answer, is rendered differently with what follows it, or with the generation prompt."""


def _unused_marks(messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
    """Two reserved characters that are in no message."""
    unused = [mark for mark in RESERVED if not any(mark in message["content"] for message in messages)]
    if len(unused) < 2:
        raise jinja2.TemplateError("the messages have all of Unicode's reserved characters U+FDD0 to U+FDEF")
    return unused[0], unused[1]


def _without_marks(text: str, begin: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks, and the spans that were between them."""
    kept: list[str] = []
    spans = []
    length, opened = 0, None
    for number, piece in enumerate(text.replace(end, begin + end).split(begin)):
        if piece.startswith(end):
            if opened is None:
                raise jinja2.TemplateError("{% generation %} is used where its place is lost")
            spans.append((opened, length))
            piece, opened = piece[1:], None
        elif number > 0:
            if opened is not None:
                raise jinja2.TemplateError("{% generation %} is used inside another one")
            opened = length
        kept.append(piece)
        length += len(piece)
    if opened is not None:
        raise jinja2.TemplateError("{% generation %} is used where its place is lost")
    return "".join(kept), spans


def limit_resources() -> None:
    """Bound the memory of this process, and keep it from writing files."""
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (OSError, ValueError):
            pass  # not on this system; the parent's limit of time remains


def limit_next_request() -> None:
    """End this process if its next request takes more than CPU_SECONDS."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    except (OSError, ValueError):
        pass


def answered(action: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """What an action returns for a request, or what went wrong in it."""
    try:
        return action(request)
    except NotAPrefix as error:
        return {"error": "", "not_a_prefix": error.args[0]}
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message or "", "line": error.lineno}
    except MemoryError:
        return {"error": f"it needs over {MEMORY >> 20} MiB of memory", "limit": True}
    except RecursionError:
        return {"error": "it calls itself without end", "limit": True}
    except jinja2.UndefinedError as error:
        cure = "; write a date in its place, so that the text is the same on every day"
        return {"error": f"{error}{cure if 'strftime_now' in str(error) else ''}"}
    except Exception as error:  # a template can raise anything
        return {"error": str(error) or type(error).__name__}


def main() -> None:
    """Answer one line after the other until the input ends."""
    limit_resources()
    out = sys.stdout
    conversations: Conversations | None = None

    def begin(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal conversations
        conversations = Conversations(request["template"], request["names"])
        return {"has_markers": conversations.has_markers}

    def render(request: dict[str, Any]) -> dict[str, Any]:
        assert conversations is not None, "the first request has the template"
        messages = request["messages"]
        if request["answers"]:
            text, spans = conversations.answers(messages)
        else:
            text, spans = conversations.render(messages, add_generation_prompt=request["add_generation_prompt"])
        return {"text": text, "spans": spans}

    for line in sys.stdin:
        limit_next_request()
        request = json.loads(line)
        action = render if "messages" in request else begin
        out.write(json.dumps(answered(action, request)) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
