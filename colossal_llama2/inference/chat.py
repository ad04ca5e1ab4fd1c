"""A chat in the terminal: a conversation in the model's chat template, or prompts that are continued one by one."""

from typing import TYPE_CHECKING

from colossal_llama2.errors import UserError
from colossal_llama2.inference.answer import Answer
from colossal_llama2.inference.chat_commands import ChatState, run_command
from colossal_llama2.inference.console import MessageInput, StopOnInterrupt, Typed, notice
from colossal_llama2.inference.history import History
from colossal_llama2.inference.prompt_batch import KeptStates
from colossal_llama2.inference.prompts import SFT, chat_ids, prompt_ids
from colossal_llama2.inference.settings import GenerationSettings
from colossal_llama2.model.positions import positions_of
from colossal_llama2.plurals import counted
from colossal_llama2.terminal_text import show

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

# Old turns are dropped until an answer has max_new_tokens, or this part of the context if that is less.
ANSWER_PART = 4


class Chat:
    """Reads messages from stdin until its end or /quit, and prints the answers to stdout, as they are generated.

    Without a chat template there is no conversation: each message is continued by itself.
    """

    def __init__(
        self,
        model: "LlamaForCausalLM",
        tokenizer: "PreTrainedTokenizerBase",
        style: str,
        settings: GenerationSettings,
        *,
        streams: bool = True,
    ):
        """
        Args:
            style: a prompt style, `SFT` for a conversation.
            streams: print an answer as it is generated, not when it is complete.
        """
        self._model, self._tokenizer, self._style, self._streams = model, tokenizer, style, streams
        self._state = ChatState(settings, History() if style == SFT else None)
        self._kept = KeptStates()
        self._input = MessageInput()

    def run(self) -> None:
        """The whole session."""
        if self._state.history is None:
            notice("This model has no chat template: each line is continued by itself, without the lines before it.")
        notice("/help lists the commands; Ctrl-C stops an answer, Ctrl-D quits.")
        was_interrupted = False
        while not self._state.is_over:
            try:
                typed = self._input.read()
                was_interrupted = False
                if typed is None:
                    if self._input.is_terminal:
                        show("")
                    return
                with StopOnInterrupt() as stop:
                    self._handle(typed, stop)
            except KeyboardInterrupt:
                if not self._input.is_terminal:
                    raise
                show("")
                if self._input.has_cleared:
                    # It was not meant to end the chat.
                    was_interrupted = self._input.has_cleared = False
                    continue
                if was_interrupted:
                    return
                was_interrupted = True
                notice("Ctrl-C again, or Ctrl-D, quits.")

    def _handle(self, typed: Typed, stop: StopOnInterrupt) -> None:
        if not typed.text.strip():
            return
        if any("\ud800" <= character <= "\udfff" for character in typed.text):
            notice("this line is not valid UTF-8, and is not sent; use a UTF-8 terminal")
        elif typed.is_command:
            run_command(self._state, typed.text)
        else:
            self._answer(typed.text, stop)

    def _answer(self, question: str, stop: StopOnInterrupt) -> None:
        try:
            row = self._row(question)
        except UserError as error:
            notice(f"{error}; the message is not sent")
            return
        answer = Answer(self._model, self._tokenizer, row, self._state.settings, kept=self._kept)
        with stop.may_interrupt():
            for part in answer:
                show(part if self._streams else "", end="")
                if stop.is_requested:
                    break
        show("" if self._streams else answer.text)
        self._report(question, answer, is_stopped=stop.is_requested)

    def _report(self, question: str, answer: Answer, *, is_stopped: bool) -> None:
        """Add the exchange to the history, and print its length, its speed and how it ended."""
        history = self._state.history
        if history is not None and (answer.text or not is_stopped):
            history.add(question, answer.text)
        if is_stopped and not answer.text:
            notice("[stopped before the first character; the question is not kept]")
            return
        end = ""
        if is_stopped:
            end = "; stopped" + (", what there is of the answer is kept" if history is not None else "")
        elif answer.is_cut and answer.tokens >= self._state.settings.max_new_tokens:
            end = f"; cut at max_new_tokens {answer.tokens:,}, /set changes it"
        elif answer.is_cut:
            end = "; cut at the end of the context"
        notice(f"[{answer.speed()}{end}]")

    def _row(self, question: str) -> list[int]:
        """The ids of the prompt. Drops the oldest exchanges if they do not fit, and reports it.

        Raises:
            UserError: the question alone does not fit, or the template refuses it.
        """
        history = self._state.history
        if history is None:
            row = prompt_ids(self._tokenizer, self._style, question)
            self._check_fits(row)
            return row
        context = positions_of(self._model.config)
        room = min(self._state.settings.max_new_tokens, context // ANSWER_PART)
        forgotten = history.forgotten
        while True:
            row = chat_ids(self._tokenizer, history.messages(question, forgotten=forgotten))
            if len(row) + room <= context or forgotten == len(history.exchanges):
                break
            forgotten += 1
        self._check_fits(row)
        if forgotten > history.forgotten:
            history.forgotten = forgotten
            notice(f"[the context of {context:,} tokens is full; dropped: the oldest {counted(forgotten, 'exchange')}]")
        return row

    def _check_fits(self, row: list[int]) -> None:
        context = positions_of(self._model.config)
        if len(row) >= context:
            raise UserError(
                f"the message has {counted(len(row), 'token')} with what precedes it, the model's context {context:,}"
            )
