"""``python -m tests.vm``: tests the shipped unit under systemd, in a virtual machine.

It makes a small Debian 12 once, installs the program in it from the working tree, and boots
it without network. The machine is User-Mode Linux, whose kernel is a process and needs no
hardware virtualisation, or qemu. ``guest.py`` runs inside. This needs root and the Debian
packages mmdebstrap, e2fsprogs, and user-mode-linux or qemu-system-x86.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.vm.guest import ACCOUNT, CHECKS, COMMAND, RUN_AS_CONF, SETTINGS, name

REPOSITORY = Path(__file__).parents[2]
PACKAGES = "systemd,systemd-sysv,passwd,procps,python3-venv"
KERNEL = "linux-image-cloud-amd64"
"""For qemu. User-Mode Linux brings its own kernel."""

LEFT_OUT = "/usr/share/doc/* /usr/share/man/* /usr/share/locale/* /usr/share/info/*"
SIZE = "900M"
PYTHON = "3.11"
"""The version in Debian 12."""

MASKED = "systemd-udevd systemd-udev-trigger systemd-logind getty@tty1 e2scrub_reap"
"""Services that take seconds to start under qemu, and that the checks do not need."""

WORDS = "rw panic=-1 systemd.unit=vm.target systemd.journald.forward_to_console=1".split()
"""The kernel's command line, without the options of the kind of machine."""

GUEST_UNIT = """
[Unit]
After=multi-user.target
SuccessAction=poweroff-force
FailureAction=poweroff-force

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 /opt/vm/guest.py
StandardOutput=file:/dev/{line}
"""


@contextmanager
def phase(what: str) -> Iterator[None]:
    """Print the time that the block takes."""
    begin = time.monotonic()
    yield
    print(f"{time.monotonic() - begin:6.1f} s  {what}", flush=True)


def call(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Run a program, and print its output if it fails."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, env=env
    )
    if done.returncode:
        sys.stderr.buffer.write(done.stdout)
        raise SystemExit(f"{command[0]} ended with {done.returncode}")


def inside(root: Path, *command: str) -> None:
    """Run a program in the root, without the environment of this process."""
    call("chroot", root, *command, env={"PATH": "/usr/sbin:/usr/bin", "LANG": "C.UTF-8"})


def make_debian(root: Path, packages: str) -> None:
    """Make the root, with the accounts and a venv for the program, but without it."""
    new = root.with_name("new")
    shutil.rmtree(new, ignore_errors=True)
    options = [
        "--mode=root",
        "--variant=essential",
        f"--include={packages}",
    ]
    options += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT.split()]
    options.append('--aptopt=Apt::Install-Recommends "false"')
    # Debian's kernel has NVMe and ext4 built in, so it needs no initial ramdisk.
    call("mmdebstrap", *options, "bookworm", new, env={**os.environ, "INITRD": "No"})
    # Without this file systemd treats each boot as the first and applies all presets.
    (new / "etc/machine-id").write_text(f"{0xFEED:032x}\n")
    # Generators cost seconds without hardware virtualisation, and have no work here.
    masks = new / "etc/systemd/system-generators"
    masks.mkdir(parents=True)
    for generator in (new / "lib/systemd/system-generators").iterdir():
        (masks / generator.name).symlink_to("/dev/null")
    shell = "--shell=/usr/sbin/nologin"
    for user in ("pulsar-api", ACCOUNT):
        inside(new, "useradd", "--system", "--create-home", shell, user)
    inside(new, "python3", "-m", "venv", "/opt/pulsar-api")
    new.rename(root)


def install(root: Path, wheels: Path) -> None:
    """Install the program from the working tree, and its dependencies."""
    with tempfile.TemporaryDirectory() as folder:
        pip = (sys.executable, "-m", "pip")
        call(*pip, "wheel", "--no-deps", "--wheel-dir", folder, REPOSITORY)
        (wheel,) = Path(folder).iterdir()
        wanted = f"{PYTHON} {wheel.name} {dependencies()}"
        stamp = wheels / "stamp"
        if not stamp.is_file() or stamp.read_text() != wanted:
            only = ("--only-binary=:all:", "--python-version", PYTHON)
            call(*pip, "download", *only, "--dest", wheels, wheel)
            stamp.write_text(wanted)
        shutil.copy(wheel, wheels)
        there = root / "opt/wheels"
        shutil.rmtree(there, ignore_errors=True)
        shutil.copytree(wheels, there)
        its_pip = ("/opt/pulsar-api/bin/pip", "--disable-pip-version-check")
        inside(root, *its_pip, "uninstall", "--yes", "pulsar-api")
        offline = ("--no-index", "--find-links=/opt/wheels")
        inside(root, *its_pip, "install", *offline, f"/opt/wheels/{wheel.name}")
        shutil.rmtree(there)
        # As root, so that the cache of plugins is written here and not at each start.
        inside(root, "/opt/pulsar-api/bin/twistd", "--help")


def dependencies() -> str:
    """Return the metadata of the project, which name its dependencies."""
    return (REPOSITORY / "pyproject.toml").read_text()


def set_up(root: Path, line: str) -> None:
    """Install the unit as its comments say. The checks print on this serial line."""
    units = root / "etc/systemd/system"
    shutil.copy(REPOSITORY / "systemd/pulsar-api.service", units)
    settings = root / str(SETTINGS).lstrip("/")
    settings.write_text(COMMAND)
    inside(root, "systemctl", "enable", "pulsar-api")
    inside(root, "systemctl", "mask", *MASKED.split())
    place = root / str(RUN_AS_CONF.parent).lstrip("/")
    place.mkdir(exist_ok=True)
    shutil.copy(REPOSITORY / "systemd/run-as.conf", place)
    shutil.copy(Path(__file__).with_name("guest.py"), place)
    (units / "vm.service").write_text(GUEST_UNIT.format(line=line))
    (units / "vm.target").write_text("[Unit]\nRequires=multi-user.target vm.service\n")


def uml(disk: Path, words: Sequence[str], output: int) -> list[str]:
    """Return the command of a machine whose first serial line is this descriptor."""
    lines = ["con=null", "con0=null,fd:1", "ssl=null", f"ssl0=null,fd:{output}"]
    return ["linux.uml", "mem=1024M", f"ubd0={disk}", "root=/dev/ubda", *lines, *words]


def qemu(kernel: Path, disk: Path, words: Sequence[str], output: int) -> list[str]:
    """Return the command of a machine whose second serial line is this descriptor."""
    # A KVM that is emulated in software, without these modules, boots no Debian kernel.
    can = any(Path("/sys/module", it).exists() for it in ("kvm_intel", "kvm_amd"))
    machine = (
        ("kvm", "host") if can and os.access("/dev/kvm", os.W_OK) else ("tcg", "Nehalem")
    )
    words = ["root=/dev/nvme0n1", "console=ttyS0", "mitigations=off", "nokaslr", *words]
    return [
        *("qemu-system-x86_64", "-M", "q35", "-accel", machine[0], "-cpu", machine[1]),
        *("-m", "1024", "-nodefaults", "-no-reboot", "-display", "none"),
        *("-kernel", str(kernel), "-append", " ".join(words)),
        *("-drive", f"id=disk,if=none,format=raw,file={disk}"),
        *("-device", "nvme,serial=vm,drive=disk"),
        *("-serial", "stdio", "-serial", f"file:/dev/fd/{output}"),
    ]


def boot(
    command: Sequence[str], output: tuple[int, int], console: Path, patience: float
) -> Iterator[dict[str, Any]]:
    """Yield the line of each check as it arrives, and end the machine after that."""
    with console.open("wb") as log:
        machine = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=output[1:],
            start_new_session=True,
        )
    os.close(output[1])

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(machine.pid, signal.SIGKILL)

    limit = threading.Timer(patience, end)
    limit.start()
    try:
        with open(output[0], encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("{"):
                    yield json.loads(line)
    finally:
        limit.cancel()
        end()
        machine.wait()


def main() -> int:
    """Return 0 if all chosen checks ran and passed."""
    names = [name(check) for check in CHECKS]
    parser = argparse.ArgumentParser(prog="python -m tests.vm", description=__doc__)
    parser.add_argument(
        "checks", nargs="*", help=f"checks to run [all]: {', '.join(names)}"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="keep the machine in DIR")
    parser.add_argument("--qemu", action="store_true", help="use qemu and Debian's kernel")
    parser.add_argument(
        "--patience",
        type=float,
        default=900,
        metavar="SECONDS",
        help="seconds for all checks [900]",
    )
    options = parser.parse_args()
    if unknown := set(options.checks) - set(names):
        parser.error(f"unknown checks: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = (options.root or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        root = folder / ("qemu" if options.qemu else "uml")
        prepare(root, folder, for_qemu=options.qemu)
        words = [*WORDS, *(f"vm_check={it}" for it in options.checks)]
        output, disk = os.pipe(), folder / "disk.img"
        command = uml(disk, words, output[1])
        if options.qemu:
            (kernel,) = (root / "boot").glob("vmlinuz-*")
            command = qemu(kernel, disk, words, output[1])
        console = folder / "console.log"
        with phase("machine"):
            lines = boot(command, output, console, options.patience)
            fine = table(lines, options.checks or names)
        if not fine:
            print(f"console, at its end:\n{console.read_text(errors='replace')[-3000:]}")
    return 0 if fine else 1


def prepare(root: Path, folder: Path, *, for_qemu: bool) -> None:
    """Make the disk of a machine. Make its root only if it is missing."""
    if not root.exists():
        with phase("Debian"):
            make_debian(root, f"{PACKAGES},{KERNEL}" if for_qemu else PACKAGES)
    with phase("program"):
        install(root, folder / "wheels")
    with phase("disk"):
        set_up(root, "ttyS1" if for_qemu else "ttyS0")
        disk = folder / "disk.img"
        disk.unlink(missing_ok=True)
        call("mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", root, disk, SIZE)


def table(lines: Iterable[dict[str, Any]], expected: Iterable[str]) -> bool:
    """Print a line for each check; return whether all of them ran and passed."""
    left = dict.fromkeys(expected)
    fine = True
    for line in lines:
        left.pop(line["check"], None)
        fine &= not line["error"]
        word, said = ("wrong", line["error"]) if line["error"] else ("ok", line["found"])
        print(f"{line['seconds']:6.1f} s    {word:5}  {line['check']}: {said}", flush=True)
    for missing in left:
        print(f"            missing  {missing}")
    return fine and not left


if __name__ == "__main__":
    sys.exit(main())
