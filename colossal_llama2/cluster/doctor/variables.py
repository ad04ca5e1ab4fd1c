"""What is wrong with the environment for `colossalai run`, which writes it into command lines for the hosts' shells."""

from collections.abc import Iterator, Mapping

from colossal_llama2.cluster import environment
from colossal_llama2.cluster.doctor.finding import Finding

# bash refuses to set these, and the command after it does not run.
READ_ONLY = ("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID")


def findings(variables: Mapping[str, str]) -> Iterator[Finding]:
    """An error for variables that training reads and no command line can pass; warnings of what is shown or fails."""
    passed = environment.for_command_line(variables)
    if passed.unquotable:
        yield Finding(
            "error",
            f"{', '.join(passed.unquotable)}: a shell would change the value, so colossalai run cannot pass it on; "
            'leave out quotes, "$", "\\", "!" and line breaks, unset it, or launch with LAUNCHER=torchrun',
        )
    if passed.secret:
        yield Finding(
            "warning",
            f"{', '.join(passed.secret)}: colossalai run by hand shows it in the process list of each host; start it "
            "by train.sh, which does not pass it",
        )
    fatal = [name for name in sorted(variables) if name in READ_ONLY or not environment.NAME.fullmatch(name)]
    if fatal:
        yield Finding(
            "warning",
            f"{', '.join(fatal)}: no shell sets it, so colossalai run by hand fails; start it by train.sh, which does "
            "not pass it, or unset it",
        )
