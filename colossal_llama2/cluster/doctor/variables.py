"""Environment variables that `colossalai run` cannot pass to other hosts, or that it shows to others there.

It writes each one into a command line for the hosts' shells, `export NAME="VALUE"`, with nothing escaped
(cli/launcher/multinode_runner.py of ColossalAI), and leaves out those with a line break.
"""

import re
from collections.abc import Iterator, Mapping

from colossal_llama2.cluster.doctor.finding import Finding

NEEDED = re.compile(
    r"PATH|HOME|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|TMPDIR|MASTER_\w+|"
    r"(NCCL|CUDA|OMP|GLOO|TORCH|PYTORCH|UCX|HF|FI|TRITON|WANDB|MLFLOW|SWANLAB)_\w+"
)
SECRET = re.compile(r"(^|_)(API_?KEYS?|KEYS?|TOKENS?|SECRETS?|PASSW(OR)?D|CREDENTIALS?)($|_)")
# Settings whose names only look like secrets.
NOT_SECRET = re.compile(r"TOKENIZERS_\w+|\w+_(FILE|PATH|DIR)|SSH_AUTH_SOCK")
# bash refuses to set these, and the command after it does not run.
READ_ONLY = ("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID")
BY_HAND = "colossalai run by hand"
EXPANDED = '"$`\\'
PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def findings(variables: Mapping[str, str]) -> Iterator[Finding]:
    """An error for each variable that training needs and the hosts would get changed; warnings for the rest."""
    fatal, secret = [], []
    for name, value in sorted(variables.items()):
        problem = _problem(name, value)
        if problem and NEEDED.fullmatch(name):
            yield Finding(
                "error", f"{name}: its value has {problem}, which colossalai run does not pass on unchanged; unset it"
            )
        elif name in READ_ONLY or not PLAIN_NAME.fullmatch(name):
            fatal.append(name)
        if SECRET.search(name.upper()) and not NOT_SECRET.fullmatch(name.upper()):
            secret.append(name)
    if fatal:
        yield Finding(
            "warning",
            f"{BY_HAND} fails with {', '.join(fatal)} in the environment, which no shell sets; "
            "start it by train.sh, which does not pass them, or unset them",
        )
    if secret:
        yield Finding(
            "warning",
            f"{BY_HAND} writes {', '.join(secret)} into command lines, which all users of all hosts can "
            "read; start it by train.sh, which does not pass them",
        )


def concerns_launch_by_hand(finding: Finding) -> bool:
    """Whether a finding is only for a `colossalai run` that is not started by train.sh."""
    return finding.kind == "warning" and finding.text.startswith(BY_HAND)


def _problem(name: str, value: str) -> str | None:
    """What a double-quoted string of a shell would change in a value; None if nothing."""
    if "\n" in value:
        return "a line break"
    found = [character for character in EXPANDED if character in value]
    return f"the character {found[0]}" if found else None
