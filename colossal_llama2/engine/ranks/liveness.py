"""Whether the other ranks live: a connection of each rank to rank 0, which the system closes when a process dies.

What the launcher or the network library tells of a dead rank comes late, or without its number. This needs no pulse,
so a rank that is busy for long is never taken for dead; one that hangs is found by the time limit of the network.

Ranks connect before PyTorch's own rendezvous, in which a rank would wait for a dead one until the time limit
(meeting.py says how). Started by hand, they do so before anything else; under torchrun, which ends all ranks of a host
by itself when one of them dies, as soon as PyTorch is imported.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from colossal_llama2 import logs
from colossal_llama2.engine.ranks import collectives, meeting
from colossal_llama2.engine.ranks.meeting import HELLO, REFUSED, WELCOME, Line
from colossal_llama2.errors import LaunchError, RankError, RunError, Stopped
from colossal_llama2.launcher import Place, place
from colossal_llama2.terminal_text import show_line

CONNECT_SECONDS = 30.0
# How long a rank whose network failed waits to hear which rank is dead, and one that hears of an error to meet it too.
VERDICT_SECONDS = 5.0
# How long a rank that fails at once keeps looking for rank 0, to say so.
FAREWELL_SECONDS = 1.0
# When a rank says that it waits for others, first and then again.
SILENT_SECONDS, REMIND_SECONDS = 5.0, 30.0
LOOK_SECONDS = 0.2
GOODBYE, FAILED, STOPPED = "bye", "failed", "stopped"
MET, LOST = "met", "lost"
MAX_REASON = 400
# gloo's words for a rank that did not answer in time, and for each exchange after that; NCCL ends the process itself.
TIMED_OUT = ("Timed out waiting", "Application timeout caused pair closure")


@contextmanager
def watching(
    command: str, *, timeout_seconds: float, before_end: Callable[[], None] = lambda: None
) -> Iterator["Watch"]:
    """End this process with one line when another rank's process dies inside the `with`. Called on all ranks.

    Args:
        timeout_seconds: how long to wait for ranks that start later.
        before_end: called before this process ends so.

    Raises:
        LaunchError: the ranks cannot meet.
        RunError: another rank did not answer for `timeout_seconds`.
    """
    watch = Watch(command, place(), timeout_seconds, before_end)
    farewell = FAILED
    try:
        watch.begin()
        yield watch
        farewell = GOODBYE
    except Stopped:
        farewell = GOODBYE if watch.is_settled else STOPPED
        raise
    except RuntimeError as error:
        if place().world_size == 1:
            raise
        if is_timeout(error):
            # Rank 0 may be the one that hangs.
            raise (RankError if place().rank == 1 else RunError)(
                f"another rank did not answer {socket.gethostname()} for --dist_timeout {timeout_seconds:g} s, so it "
                f"hangs, or needs more time; earlier checkpoints are whole, go on with --resume auto"
            )
        # Most likely the network's complaint about a rank that died, whose number comes by the other way.
        time.sleep(VERDICT_SECONDS)
        raise
    except Exception as error:
        farewell = f"{FAILED} {' '.join(str(error).split())[:MAX_REASON]}"
        raise
    finally:
        watch.leave(farewell)


def is_timeout(error: BaseException | None) -> bool:
    """Whether gloo gave up waiting for a rank: in this error, or in one that this error followed."""
    while error is not None:
        if any(words in str(error) for words in TIMED_OUT):
            return True
        error = error.__cause__ or error.__context__
    return False


class Watch:
    """One end or, on rank 0, all ends of the connections. Nothing happens where there is one rank."""

    def __init__(self, command: str, here: Place, timeout_seconds: float, before_end: Callable[[], None]):
        self._command, self._here, self._timeout, self._before_end = command, here, timeout_seconds, before_end
        self._lines: dict[int, Line] = {}
        self._hosts: dict[int, str] = {here.rank: socket.gethostname()}
        self._problem: Exception | None = None
        self._all_are_here, self._is_linked = threading.Event(), threading.Event()
        self._is_calling = self._is_leaving = self._gives_up = self.is_settled = False
        self._own_word = f"{socket.gethostname()}/{secrets.token_hex(8)}"
        self._next_reminder = time.monotonic() + SILENT_SECONDS

    def begin(self) -> None:
        """Started by hand, look for the others from now on. Raises LaunchError if rank 0 can never be found."""
        if self._here.world_size == 1 or self._here.uses_agent_store:
            return
        if self._here.rank > 0:
            self._is_calling = True
            self._start(self._call)
            return
        listener = meeting.listen_as_given(backlog=self._here.world_size)
        self._start(self._run, listener, meeting.KNOWN_SECRET)
        self._find_oneself()

    def reach_out(self) -> None:
        """Under torchrun, look for the others from now on; PyTorch is imported for that."""
        if self._here.world_size == 1 or not self._here.uses_agent_store:
            return
        import torch.distributed  # noqa: F401

        self._start(self._meet_through_torchrun)

    def wait(self) -> None:
        """Started by hand, wait until all ranks have come. Rank 0 then listens on MASTER_PORT no more.

        Raises:
            LaunchError: they have not come in time, or do not belong together.
        """
        if self._here.world_size == 1 or self._here.uses_agent_store:
            return
        # Rank 0 gives up first, and says for whom it waited.
        deadline = time.monotonic() + self._timeout + (VERDICT_SECONDS if self._here.rank else 0)
        while not self._all_are_here.wait(LOOK_SECONDS):
            if self._problem is None and time.monotonic() > deadline:
                address = meeting.given_address()
                self._problem = LaunchError(
                    f"{self._missing()} did not come to MASTER_ADDR={address.host} MASTER_PORT={address.port} within "
                    f"--dist_timeout {self._timeout:g} s; start all ranks, or unset RANK, WORLD_SIZE, MASTER_ADDR and "
                    f"MASTER_PORT if no launcher is meant to start this"
                )
            if self._problem is not None:
                raise self._problem
            if self._here.rank == 0:
                self._remind(f"waiting for {self._missing()}")

    def settle(self) -> None:
        """Called on all ranks when they have met: from now on there may be checkpoints of this run."""
        if self._here.world_size == 1:
            return
        if self._here.uses_agent_store:
            self._all_are_here.wait(CONNECT_SECONDS)
        self._gives_up = True
        everywhere = all(collectives.gather_values(self._all_are_here.is_set()))
        self.is_settled = True
        if not everywhere:
            # If there is no way between two hosts, it is said and left at that.
            logs.get_logger().warning(
                "Ranks cannot watch each other: %s did not connect with rank 0; a dead one is noticed by "
                "--dist_timeout",
                self._missing(),
            )

    def leave(self, farewell: str) -> None:
        """Tell the others that this rank ends, and how."""
        self._is_leaving = True
        if farewell != GOODBYE and self._is_calling:
            self._is_linked.wait(FAREWELL_SECONDS)
        self._tell(farewell)

    def _start(self, work: Callable, *args) -> None:
        threading.Thread(target=work, args=args, daemon=True).start()

    def _missing(self) -> str:
        missing = [str(rank) for rank in range(self._here.world_size) if rank not in self._hosts]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        if not missing or self._here.rank > 0:
            return "other ranks"
        return f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:8])}{more} of {self._here.world_size}"

    def _remind(self, text: str) -> None:
        if time.monotonic() > self._next_reminder:
            self._next_reminder = time.monotonic() + REMIND_SECONDS
            show_line(f"{self._command}: rank {self._here.rank}: {text}", file=sys.stderr)

    # Of ranks that connect.

    def _call(self) -> None:
        """Connect with rank 0 at MASTER_PORT."""
        address = meeting.given_address()

        def tell(reason: str) -> None:
            self._remind(f"waiting for rank 0 at {address.host}:{address.port} ({reason})")

        try:
            self._follow(address, seconds=self._timeout, tell=tell)
        except Exception as error:  # `wait` raises it where it is seen
            self._problem = error
            self._is_linked.set()

    def _meet_through_torchrun(self) -> None:
        listener = meeting.listen(0, backlog=self._here.world_size) if self._here.rank == 0 else None
        own_port = listener.getsockname()[1] if listener else None
        # What goes wrong here is said when the ranks have met.
        with suppress(RuntimeError, ValueError, LaunchError, OSError):
            address = meeting.address_through_torchrun(self._here, own_port, timeout_seconds=self._timeout)
            if listener:
                self._run(listener, address.secret)
            else:
                # It listens there already.
                self._follow(address, seconds=CONNECT_SECONDS, tell=lambda reason: None)

    def _follow(self, address: meeting.Address, *, seconds: float, tell: Callable[[str], None]) -> None:
        """Connect with rank 0, and stay on the line. Raises LaunchError if that is not to be had in time."""
        until = time.monotonic() + seconds
        line, answer = meeting.introduce(address, self._here, socket.gethostname(), until=until, tell=tell)
        word, _, rest = answer.partition(" ")
        if word == REFUSED:
            raise LaunchError(rest)
        self._hosts[0], line.rank, self._lines[0] = rest, 0, line
        meeting.lasting(line.connection)
        self._is_linked.set()
        self._run(None, address.secret)

    # Of rank 0.

    def _find_oneself(self) -> None:
        """Check that MASTER_ADDR leads the others to this process. Raises LaunchError."""
        address = meeting.given_address()
        # The name of a service, as Kubernetes has it, may resolve seconds after its process has started.
        until = time.monotonic() + meeting.UNREACHABLE_SECONDS
        line, answer = meeting.introduce(address, self._here, self._own_word, until=until, tell=lambda reason: None)
        line.connection.close()
        if not answer.startswith(WELCOME):
            raise LaunchError(answer.partition(" ")[2])

    def _greet(self, line: Line, text: str, secret: str) -> bool:
        """Hear who calls. False for a stranger, who is hung up on."""
        words = text.split()
        is_rank = len(words) == 5 and words[:2] == [HELLO, secret] and words[2].isdecimal() and words[3].isdecimal()
        if not is_rank:
            return False
        rank, size, host = int(words[2]), int(words[3]), words[4].partition("/")[0]
        if words[4] == self._own_word:
            line.say(f"{WELCOME} {socket.gethostname()}")
        elif size != self._here.world_size:
            self._refuse(line, f"rank {rank} on {host} has WORLD_SIZE={size}, rank 0 has {self._here.world_size}")
        elif rank in self._hosts:
            self._refuse(line, f"two processes have RANK={rank}, on {self._hosts[rank]} and on {host}")
        else:
            meeting.lasting(line.connection)
            line.rank, self._hosts[rank], self._lines[rank] = rank, host, line
            line.say(f"{WELCOME} {socket.gethostname()}")
        return True

    def _refuse(self, line: Line, reason: str) -> None:
        self._problem = LaunchError(f"{reason}; set these variables anew in all processes, or start with torchrun")
        line.say(f"{REFUSED} {self._problem}")

    # Of all ranks.

    def _run(self, listener: socket.socket | None, secret: str) -> None:
        """Hear all that is said, and notice the end of a connection that nobody announced."""
        with selectors.DefaultSelector() as selector:
            if listener:
                selector.register(listener, selectors.EVENT_READ)
            for line in self._lines.values():
                selector.register(line.connection, selectors.EVENT_READ, line)
                for text in line.waiting:
                    self._obey(line, text)
            while selector.get_map():
                for key, _ in selector.select(LOOK_SECONDS if listener else None):
                    if key.fileobj is listener:
                        with suppress(OSError):
                            caller = listener.accept()[0]
                            selector.register(caller, selectors.EVENT_READ, Line(caller))
                    else:
                        self._hear(selector, key.data, secret)
                if listener and (self._gives_up or len(self._lines) == self._here.world_size - 1):
                    self._stop_listening(selector, listener)
                    listener = None

    def _stop_listening(self, selector: selectors.BaseSelector, listener: socket.socket) -> None:
        strangers = [key.fileobj for key in selector.get_map().values() if key.data and key.data.rank is None]
        for connection in (listener, *strangers):
            selector.unregister(connection)
            connection.close()
        if not self._gives_up:
            self._tell(MET)
            self._all_are_here.set()

    def _hear(self, selector: selectors.BaseSelector, line: Line, secret: str) -> None:
        texts = line.read()
        is_over = texts is None
        for text in texts or ():
            if line.rank is not None:
                self._obey(line, text)
            elif not self._greet(line, text, secret):
                is_over = True
                break
        if is_over:
            selector.unregister(line.connection)
            line.connection.close()
            if line.rank is not None and not line.has_left:
                self._end(line.rank, "died")

    def _obey(self, line: Line, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == MET:
            self._all_are_here.set()
        elif word == LOST:
            lost, _, what = rest.partition(" ")
            self._end(int(lost), what)
        else:
            # It ends by itself, and has said why, unless it thought that all know.
            line.has_left = True
            if word == STOPPED or word == FAILED:
                what = f"{word}: {rest}" if rest else word
                threading.Timer(VERDICT_SECONDS, self._end, (line.rank, what)).start()

    def _end(self, lost: int, what: str) -> None:
        if self._is_leaving:
            return
        self._tell(f"{LOST} {lost} {what}")
        # Rank 0 tells it, or if that is lost, rank 1.
        if self._here.rank == (0 if lost else 1):
            what = what.partition(":")[0] if self.is_settled else what
            then = "earlier checkpoints are whole, go on with --resume auto"
            then = then if self.is_settled else "no step was taken, start again"
            show_line(f"{self._command}: error: rank {lost} on {self._hosts.get(lost)} {what}; {then}", file=sys.stderr)
        self._before_end()
        os._exit(1)

    def _tell(self, text: str) -> None:
        for line in tuple(self._lines.values()):
            line.say(text)
