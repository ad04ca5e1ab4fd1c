"""How this package calls OpenSSH: without questions, and without waiting long for a host that does not answer."""

CONNECT_SECONDS = 5
# A connection counts as lost after four answers that are missing, 20 seconds.
OPTIONS = (
    "-T",
    "-oBatchMode=yes",
    f"-oConnectTimeout={CONNECT_SECONDS}",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=4",
    "-oLogLevel=ERROR",
)
# ssh's own exit code; a command's may be the same, but a shell's is 127 at most.
FAILED = 255


def command(destination: str, *words: str) -> list[str]:
    """The command line that runs words on a host in its login shell."""
    return ["ssh", *OPTIONS, "--", destination, *words]
