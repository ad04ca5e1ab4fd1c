"""Which environment variables a launch passes to the other hosts, and which it withholds.

`colossalai run` writes its whole environment into a command line for each host's shell, in double quotes with nothing
escaped (cli/launcher/multinode_runner.py). Everybody on the host can read a command line. So it gets the variables that
training and its libraries read, without keys and passwords, and without values that a shell would change. What is
withheld is reported by name. Other launchers keep variables out of command lines. torchrun's hosts get all but what
belongs to this login or to another launcher.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

# What training, PyTorch, its libraries and the file systems below read.
READ = re.compile(
    r"(PATH|HOME|USER|LOGNAME|LANG|TZ|TMPDIR|TEMP|TMP|SSH_AUTH_SOCK|VIRTUAL_ENV|CONDA_PREFIX|CPATH|CC|CXX|MAX_JOBS|"
    r"LD_LIBRARY_PATH|LD_PRELOAD|LIBRARY_PATH|(no|http|https|all)_proxy|(NO|HTTP|HTTPS|ALL)_PROXY|REQUESTS_CA_BUNDLE|"
    r"CURL_CA_BUNDLE|SSL_CERT_(FILE|DIR)|XDG_(CACHE|CONFIG)_HOME|PYTHON[A-Z]+|"
    r"(ATEN|ACCELERATE|COLOSSAL|COLOSSALAI|CUBLAS|CUDA|CUDNN|DATASETS|EFA|FI|FLASH|GLOO|GOMP|HF|HSA|IB|INDUCTOR|KINETO|"
    r"KMP|LC|LIGER|MALLOC|MKL|MLFLOW|MLX5|NCCL|NUMEXPR|NVIDIA|NVTE|OFI|OMP|OPENBLAS|PSM2|PSM3|PYTORCH|RAY|RDMAV|"
    r"SAFETENSORS|SWANLAB|TENSORBOARD|TOKENIZERS|TORCH|TORCHDYNAMO|TORCHINDUCTOR|TRANSFORMERS|TRITON|UCX|WANDB|"
    r"XFORMERS|COLOSSAL_LLAMA2)_\w+)"
)
# Of this login alone, or set anew for each process by shells and launchers: nobody expects them on other hosts.
LOCAL_NAMES = (
    "_ PWD OLDPWD SHLVL SHELL TERM COLORTERM LS_COLORS LESSOPEN LESSCLOSE LESS PAGER EDITOR VISUAL DISPLAY WINDOWID "
    "HOSTNAME HOSTTYPE MACHTYPE OSTYPE MAIL MANPATH INFOPATH PS1 PS2 PROMPT_COMMAND HISTSIZE HISTFILESIZE HISTCONTROL "
    "COLUMNS LINES STY TMUX TMUX_PANE INVOCATION_ID JOURNAL_STREAM MOTD_SHOWN WHICH_DECLARE DEBIAN_FRONTEND "
    "LANGUAGE container DBUS_SESSION_BUS_ADDRESS SYSTEMD_EXEC_PID MEMORY_PRESSURE_WATCH MEMORY_PRESSURE_WRITE "
    "VIRTUAL_ENV_PROMPT CONDA_PROMPT_MODIFIER RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT "
    "GROUP_RANK ROLE_RANK ROLE_NAME "
    # Of launch.sh and the scripts that use it.
    "LAUNCHER HOSTFILE NPROC_PER_NODE MAX_RESTARTS PASS_ENVIRONMENT RUN_NAME RESUME PROJECT_NAME PARENT_SAVE_DIR "
    "PARENT_TENSORBOARD_DIR PARENT_CONFIG_FILE PRETRAINED_MODEL_PATH STAGE ALIGN_STEPS AFTER MIXTURE DATASET "
    "CHECK_HOSTS LAUNCH_RECORD MAX_REQUEUES SCRIPT"
).split()
LOCAL = re.compile(
    r"(SSH_(CLIENT|CONNECTION|TTY|AGENT_PID|ASKPASS)|XDG_(SESSION|RUNTIME|DATA|CURRENT|SEAT|VTNR|MENU)|BASH_|SLURM|SBATCH|"
    r"SRUN_|PYTEST_|PMI_|PMIX_|OMPI_|TORCHELASTIC_|VSCODE_|TERM_|GNOME_|KDE_|GTK_|QT_|CONDA_|LESS|SUDO_|npm_|NVM_|GIT_|MODULES?_|"
    r"__|LMOD_|LOADEDMODULES|_LMFILES_)"
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_NAME = re.compile(
    r"KEY|PASSWORD|PASSWD|PASSPHRASE|TOKEN(?!IZERS)|SECRET|CREDENTIAL|(^|_)(AUTH|PAT|COOKIE)(_|$)", re.I
)
# As in http://user:password@proxy.
SECRET_VALUE = re.compile(r"://[^/\s@]*:[^/\s@]*@")
# Within double quotes a shell changes these, and colossalai leaves out values of several lines.
CHANGED_BY_SHELLS = re.compile(r"[\"$`\\!\n\r\0]")
# Not secret: where an agent listens.
NO_SECRETS = ("SSH_AUTH_SOCK",)


@dataclass
class Passed:
    """What of an environment a command line may hold.

    Attributes:
        variables: what is passed.
        unknown: names that nothing here is known to read.
        secret: names of keys and passwords.
        unquotable: names of values that a shell would change.
        empty: names of empty values.
    """

    variables: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    secret: list[str] = field(default_factory=list)
    unquotable: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def reports(self) -> list[str]:
        """A line for each reason why variables are withheld."""
        reasons = {
            "they may be keys or passwords, and colossalai run would show them in the process list of each host; "
            "LAUNCHER=torchrun passes them": self.secret,
            'a shell would change their values; leave out quotes, "$", "\\", "!" and line breaks, or use '
            "LAUNCHER=torchrun": self.unquotable,
            "colossalai run leaves out empty values": self.empty,
            'not known to be needed; PASS_ENVIRONMENT="NAME ..." passes more': self.unknown,
        }
        return [f"not passed to the hosts: {', '.join(names)} ({why})" for why, names in reasons.items() if names]


def for_command_line(environment: Mapping[str, str], more: str = "") -> Passed:
    """Split an environment for a launcher that writes it into a command line.

    Args:
        more: names that are passed as well, unless they are secret or unquotable; separated by blanks.
    """
    passed = Passed()
    chosen = more.split()
    for name, value in sorted(environment.items()):
        is_read = name in chosen or READ.fullmatch(name) is not None
        if not NAME.fullmatch(name) or (not is_read and _is_local(name)):
            continue
        if not is_read:
            passed.unknown.append(name)
        elif name not in NO_SECRETS and (SECRET_NAME.search(name) or SECRET_VALUE.search(value)):
            passed.secret.append(name)
        elif CHANGED_BY_SHELLS.search(value):
            passed.unquotable.append(name)
        elif value:
            passed.variables[name] = value
        else:
            passed.empty.append(name)
    return passed


def for_hosts(environment: Mapping[str, str]) -> dict[str, str]:
    """What a launcher passes on that keeps variables out of command lines: everything that is not of this login."""
    return {
        name: value
        for name, value in environment.items()
        if NAME.fullmatch(name) and (READ.fullmatch(name) or not _is_local(name))
    }


def _is_local(name: str) -> bool:
    return name in LOCAL_NAMES or LOCAL.match(name) is not None
