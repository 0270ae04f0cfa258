"""Programs and abilities that tests need beyond Python.

A test declares them by ``@pytest.mark.needs("node", "root")``. If one is missing, the test
is skipped. With ``pytest --all`` it fails.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path

PACKAGES = {
    "bash": "bash",
    "busybox": "busybox",
    "caddy": "caddy",
    "cap": "capistrano",
    "chromedriver": "chromium-driver",
    "chromium": "chromium",
    "curl": "curl",
    "dash": "dash",
    "git": "git",
    "mkfs.ext4": "e2fsprogs",
    "nginx": "nginx-light",
    "node": "nodejs",
    "npm": "npm",
    "setpriv": "util-linux",
    "slowhttptest": "slowhttptest",
    "sslscan": "sslscan",
    "systemd-analyze": "systemd",
    "zsh": "zsh",
}
"""The Debian package of each program that a test may need."""

FIXTURES: Mapping[str, tuple[str, ...]] = {
    "cap_repo": ("cap",),
    "chrome": ("chromium", "chromedriver"),
    "npm": ("node", "npm"),
}
"""The needs of each fixture, which are those of the tests that use it."""

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
"""The folders in which programs are searched, including those of root."""


def _capabilities() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))


def _runs(*command: str) -> bool:
    try:
        return not subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        return False


def _root() -> bool:
    return os.geteuid() == 0


def _mounts() -> bool:
    return bool(_capabilities() >> 21 & 1)  # CAP_SYS_ADMIN


def _loop_mounts() -> bool:
    return _mounts() and os.path.exists("/dev/loop-control") and bool(find("mkfs.ext4"))


def _processes() -> bool:
    return _runs("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "true")


def _cgroups() -> bool:
    return _root() and any(
        line.split()[2] == "cgroup2" and "rw" in line.split()[3].split(",")
        for line in Path("/proc/mounts").read_text().splitlines()
    )


def _set_uid() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    gained = "NoNewPrivs:\t0" in lines
    return _root() and gained and not os.statvfs("/tmp").f_flag & os.ST_NOSUID


ABILITIES: Mapping[str, tuple[Callable[[], bool], str]] = {
    "root": (_root, "root"),
    "mounts": (_mounts, "root that may mount"),
    "loop mounts": (_loop_mounts, "root that may mount a file, and e2fsprogs"),
    "a namespace of processes": (_processes, "root that may make a namespace of processes"),
    "cgroups": (_cgroups, "root and a cgroup v2 that can be written"),
    "set-uid programs": (_set_uid, "root, and set-uid programs in /tmp"),
}
"""The other needs: a check for each, and its description."""

everything = False
"""Whether all tests must run, with all trials. ``pytest --all`` sets it."""


def trials(few: int, all: int) -> int:
    """Return the number of trials, which is larger with ``--all``."""
    return all if everything else few


def find(program: str) -> str | None:
    """Return the path of a program, or None if it is missing."""
    return shutil.which(program, path=PATH)


@cache
def _is_there(name: str) -> bool:
    if name in ABILITIES:
        return ABILITIES[name][0]()
    return name in PACKAGES and find(name) is not None


def missing(names: Iterable[str]) -> str | None:
    """Return a sentence that names the missing needs, or None if all are met.

    Raises:
        KeyError: a need is unknown.
    """
    left = [name for name in dict.fromkeys(names) if not _is_there(name)]
    if not left:
        return None
    described = [
        ABILITIES[name][1]
        if name in ABILITIES
        else f"{name} (Debian package {PACKAGES[name]})"
        for name in left
    ]
    return f"needs {', '.join(described)}"
