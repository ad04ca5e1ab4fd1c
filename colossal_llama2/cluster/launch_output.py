"""What the output of a launcher reveals about its hosts: which of them failed, and why.

torchrun exits with 1 whatever the exit code of a rank was, and `colossalai run` prints an error and waits on. But both
print what they have found out: torchrun a report of each rank that failed, `colossalai run` a line for each host
(torch/distributed/elastic/multiprocessing/errors, colossalai/cli/launcher/multinode_runner.py).
"""

import re
from dataclasses import dataclass, field

# "Error: failed to run COMMAND on HOST, is localhost: False, exception: REASON"
HOST_FAILED = re.compile(r"Error: failed to run .* on (\S+), is localhost: (True|False), exception: (.*)")
# fabric's own reason, when a command has ended; its exit code follows some lines later.
COMMAND_ENDED = "Encountered a bad command exit code!"
COMMAND_CODE = re.compile(r"Exit code: (-?\d+)")
# What commands of this package print when they end, such as "train.py: error: rank 1 on node2 ...".
COMMAND_FAILED = re.compile(r"\S+\.py: error: (.+)")
# Lines of torchrun's report of a rank that failed.
REPORT_LINE = re.compile(r"\s{2}(time|host|rank|exitcode|traceback)\s*: (.*)")
REPORT_ENDS = re.compile(r"[=-]{20,}$")
NOT_AVAILABLE = ("<N/A>", "To enable traceback see:")
# What programs print instead of a reason of their own, and what it means here.
KNOWN = (
    (re.compile(r"EADDRINUSE|address already in use", re.I), "the master port is in use; set another MASTER_PORT"),
    (
        re.compile(r"torchrun: (command )?not found"),
        "no torchrun there; its virtual environment must be at the same path, and be active here",
    ),
    (
        re.compile(r"can't open file '(.*?)'"),
        "no file {0} there; the folder must have the same path and content on every host",
    ),
    (
        re.compile(r"cd: .*No such file or directory|\S+: No such file or directory\.$"),
        "the folder does not exist there",
    ),
    (
        re.compile(r"export: Command not found|Missing name for redirect|Unknown user"),
        "its login shell is not like sh (chsh -s /bin/bash there, or use LAUNCHER=torchrun)",
    ),
)
SIGNALED = 128
MOST_KEPT = 20


@dataclass(frozen=True)
class RankFailure:
    """A rank that failed, as torchrun has reported it."""

    time: str
    host: str
    rank: int
    code: int
    message: str

    @property
    def exit_code(self) -> int:
        """The exit code as a shell gives it: 128 and the signal's number, if a signal ended the rank."""
        return SIGNALED - self.code if self.code < 0 else self.code

    def order(self) -> tuple[str, int]:
        """The root cause is the smallest: the first, and of one second the one that says most."""
        # Ranks end with 1 because of others, and torchrun ends the others of its host with SIGTERM.
        return self.time, {2: 0, 1: 2, -15: 3}.get(self.code, 1)


@dataclass
class HostFailure:
    """A host whose part `colossalai run` has lost.

    Attributes:
        code: the exit code of its command; None if there was no connection.
        reason: the launcher's reason.
    """

    host: str
    reason: str
    code: int | None = None

    @property
    def was_connected(self) -> bool:
        """Whether the command had begun. If so, -1 means that the connection was lost, and the command may continue."""
        return self.reason.startswith(COMMAND_ENDED)


@dataclass
class LaunchOutput:
    """Reads the output of a launcher line by line.

    Attributes:
        ranks: the ranks that failed.
        hosts: the hosts that failed, in the order of the messages.
        errors: the one-line errors of commands of this package.
        hints: what known messages in the output mean.
    """

    ranks: list[RankFailure] = field(default_factory=list)
    hosts: dict[str, HostFailure] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    _report: dict[str, str] = field(default_factory=dict)
    _awaits_code: HostFailure | None = None

    def read(self, line: str) -> None:
        """Take one line of any of the launcher's streams."""
        line = line.rstrip()
        if failed := HOST_FAILED.search(line):
            self._awaits_code = self.hosts.setdefault(failed[1], HostFailure(failed[1], failed[3]))
        elif self._awaits_code is not None and (code := COMMAND_CODE.search(line)):
            self._awaits_code.code, self._awaits_code = int(code[1]), None
        elif found := REPORT_LINE.match(line):
            if found[1] == "time":
                self._finish_report()
            self._report[found[1]] = found[2].strip()
        elif self._report and REPORT_ENDS.match(line):
            self._finish_report()
        if error := COMMAND_FAILED.match(line):
            _keep(self.errors, error[1])
        for pattern, meaning in KNOWN:
            if known := pattern.search(line):
                _keep(self.hints, meaning.format(*known.groups()))

    def _finish_report(self) -> None:
        report, self._report = self._report, {}
        with_numbers = re.match(r"\d+", report.get("rank", "")), re.match(r"-?\d+", report.get("exitcode", ""))
        if not all(with_numbers):
            return
        rank, code = (int(found[0]) for found in with_numbers if found)
        message = report.get("traceback", "")
        if message.startswith(NOT_AVAILABLE) or "Signal" in message[:8]:
            message = ""
        failure = RankFailure(report.get("time", ""), report.get("host", ""), rank, code, message)
        if failure not in self.ranks:
            self.ranks.append(failure)

    def root_cause(self) -> RankFailure | None:
        """The rank whose failure came first."""
        return min(self.ranks, key=RankFailure.order, default=None)


def _keep(texts: list[str], text: str) -> None:
    """Only the first are of use, and a launch may print for weeks."""
    if len(texts) < MOST_KEPT:
        texts.append(text)
