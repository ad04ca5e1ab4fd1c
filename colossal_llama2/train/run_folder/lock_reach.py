"""Whether flock on a folder locks out other hosts: by its file system, or by trying it on two hosts of a job.

A local file system has no other hosts, but its server may export it: locks of NFS clients do not meet the server's own.
So only the file systems listed here are trusted without a test.
"""

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
ESCAPE = re.compile(rb"\\([0-7]{3})")
# By file system: a mount option that shows that flock reaches all hosts, None if it always does.
REACHING = {"nfs": "local_lock=none", "nfs4": "local_lock=none", "lustre": "flock", "ceph": None, "gfs2": None}
# File systems whose writes need no fsync to be read on another host, since only this host has them.
LOCAL = ("btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")

HOSTS, HOST, UNTESTED = "hosts", "host", "untested"


@dataclass(frozen=True)
class Mount:
    """The file system of a folder.

    Attributes:
        kind: its type, such as nfs4; None if it is unknown.
        reaches_hosts: flock on it locks out other hosts, by its type and options.
    """

    kind: str | None = None
    reaches_hosts: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is on a disk of this host."""
        return self.kind in LOCAL


def mount_of(folder: Path) -> Mount:
    """The mount of an existing folder."""
    target = os.fsencode(folder.resolve())
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:
        return Mount()
    best, found = b"", Mount()
    for line in lines:
        place, _, rest = line.partition(b" - ")
        words, types = place.split(), rest.split()
        if len(words) < 6 or len(types) < 1:
            continue
        point = ESCAPE.sub(lambda octal: bytes([int(octal[1], 8)]), words[4])
        # Of mounts on the same point, the last one covers the others.
        if len(point) >= len(best) and (target + b"/").startswith(point.rstrip(b"/") + b"/"):
            options = {*words[5].decode(errors="replace").split(",")}
            options.update(types[2].decode(errors="replace").split(",") if len(types) > 2 else ())
            best, found = point, _mount(types[0].decode(errors="replace"), options)
    return found


def _mount(kind: str, options: set[str]) -> Mount:
    needed = REACHING.get(kind)
    return Mount(kind, kind in REACHING and (needed is None or needed in options))


def locks_out(path: Path) -> bool | None:
    """Whether the lock that another host holds on this file locks out this host. None if the file is not there.

    The attempt takes the lock only if it does not reach this host, and gives it back at once.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
