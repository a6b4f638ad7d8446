"""
A tiny real guest, for tests that check that a guest was really reverted: Debian's cloud kernel,
busybox, and a shell script.

It boots within seconds without KVM, counts in its RAM, prints each number on its serial line, and
executes commands from there: write a marker to a disk, read one, freeze its file system.
``tools/guest`` fetches the two packages; nothing is installed.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from statepool.errors import NotFound, StatePoolError

MEMORY = 128 << 20
"""RAM of the guest, in bytes. It does not boot with less than 96 MiB."""

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
)
"""
The modules that the kernel needs to see a disk, in the order of loading; ext4 and the serial line
are built in.
"""

KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr random.trust_cpu=on tsc=unstable"
)
"""The command line of the kernel."""

_DIRECTORY = 0o040755
_PROGRAM = 0o100755
_DEVICE = 0o020600

_INIT = r"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in {modules}; do insmod /lib/$module.ko; done
stty -F /dev/ttyS0 raw icanon -echo  # whole lines, so that one that has begun can be waited for

# The agent, on the second serial line: of QEMU's guest agent just what a set needs.
refuse() {{ echo "{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"$1\"}}}}"; }}

agent() {{
    stty -F /dev/ttyS1 raw -echo || return
    while read -r line; do
        id=${{line##*\"id\": }}; id=${{id%%\}}*}}
        case $line in
        *guest-sync*) echo "{{\"return\": $id}}" ;;
        *guest-fsfreeze-freeze*)
            fsfreeze --freeze /mnt && echo '{{"return": 1}}' || refuse "cannot freeze"
            ;;
        *guest-fsfreeze-thaw*) fsfreeze --unfreeze /mnt; echo '{{"return": 1}}' ;;
        *) refuse "unknown command" ;;
        esac
    done
}}
agent </dev/ttyS1 >/dev/ttyS1 2>/dev/null &

run() {{
    case $1 in
    write)
        printf '%-511s\n' "$4" | dd of=/dev/$2 bs=512 seek=$3 conv=notrunc,fsync 2>/dev/null \
            && echo "done $4"
        ;;
    read)
        echo 3 >/proc/sys/vm/drop_caches
        echo "value $(dd if=/dev/$2 bs=512 skip=$3 count=1 2>/dev/null | tr -d '\0')"
        ;;
    fill)
        dd if=/dev/zero bs=1M count=$4 2>/dev/null | tr '\0' x \
            | dd of=/dev/$2 bs=1M seek=$3 conv=notrunc,fsync 2>/dev/null
        echo "done fill"
        ;;
    load) head -c ${{2}}M /dev/urandom >/ballast; echo "done load" ;;
    format) mke2fs /dev/$2 >/dev/null && mount -t ext4 /dev/$2 /mnt && echo "done format" ;;
    save) echo "$3" >/mnt/$2 && echo "done $3" ;;
    off) poweroff -f ;;
    esac
}}

number=0
echo "guest ready"
while :; do
    number=$((number + 1))
    echo "tick $number"
    if read -t 0; then read -r line; set -f; set -- $line; run "$@"; else usleep 10000; fi
done
"""


@frozen
class Guest:
    """
    The kernel and the initramfs that QEMU boots.

    :param kernel: the kernel
    :param initramfs: all files of the guest
    """

    kernel: Path
    initramfs: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        """
        Return the arguments of QEMU to boot it, without its disks, its RAM and its serial lines.
        """
        return (
            "-kernel",
            str(self.kernel),
            "-initrd",
            str(self.initramfs),
            "-append",
            KERNEL_ARGUMENTS,
        )


def make_guest(packages: Path, initramfs: Path) -> Guest:
    """
    :param packages: where ``dpkg-deb -x`` put the contents of a kernel package and of
        busybox-static
    :param initramfs: the file to write
    :raises NotFound: a file is missing
    """
    kernel = _find(packages, "boot/vmlinuz-*")
    busybox = _find(packages, "bin/busybox", "usr/bin/busybox")
    modules = [
        _find(
            packages, f"lib/modules/*/kernel/**/{name}.ko", f"usr/lib/modules/*/kernel/**/{name}.ko"
        )
        for name in MODULES
    ]
    files = [
        *((name, _DIRECTORY, b"") for name in ("bin", "dev", "lib")),
        ("dev/console", _DEVICE, b""),
        ("init", _PROGRAM, _INIT.format(modules=" ".join(MODULES)).encode()),
        ("bin/busybox", _PROGRAM, busybox.read_bytes()),
        *((f"lib/{path.name}", _PROGRAM, path.read_bytes()) for path in modules),
    ]
    initramfs.write_bytes(archive(files))
    return Guest(kernel, initramfs)


def _find(packages: Path, *patterns: str) -> Path:
    for pattern in patterns:
        found = sorted(packages.glob(pattern))
        if found:
            return found[-1]
    raise NotFound(
        f"there is no {patterns[0]} in {packages}",
        path=str(packages),
        hint="tools/guest fetches the packages",
    )


def archive(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """
    :param files: names, modes as in ``stat(2)``, and contents
    :returns: an archive in the format of an initramfs: cpio "newc"
        (``Documentation/driver-api/early-userspace/buffer-format.rst`` of Linux)
    """
    return b"".join(
        piece
        for number, file in enumerate([*files, ("TRAILER!!!", 0, b"")], 1)
        for piece in _entry(number, *file)
    )


def _entry(inode: int, name: str, mode: int, data: bytes) -> Iterator[bytes]:
    # the console; the only device that is needed before /dev is mounted
    major, minor = (5, 1) if mode == _DEVICE else (0, 0)
    label = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(label), 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + label
    yield head + bytes(-len(head) % 4)
    yield data + bytes(-len(data) % 4)


class GuestError(StatePoolError):
    """An error: the guest did not print the awaited line in time."""


class Console:
    """
    The serial line of a guest. All its output is read at once: QEMU cannot revert a guest to a
    moment in which no process read its output.

    :param connection: to QEMU
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unread = bytearray()
        self._is_over = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="guest-console", daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Close the connection; the guest is not affected."""
        with contextlib.suppress(OSError):  # QEMU has closed it already
            self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join()

    def _read(self) -> None:
        while True:
            try:
                data = self._connection.recv(65536)
            except OSError:
                data = b""
            with self._news:
                self._unread += data
                self._is_over = not data
                self._news.notify_all()
            if not data:
                return

    def wait_for(self, pattern: str, *, timeout: float = 60) -> str:
        """
        :param pattern: a regular expression for a whole line
        :param timeout: in seconds
        :returns: what its first group matched, or the whole line
        :raises GuestError: no such line came
        """
        wanted = re.compile(pattern)
        seen: list[str] = []
        end = time.monotonic() + timeout
        while True:
            line = self._line(end, pattern, seen)
            found = wanted.fullmatch(line)
            if found is not None:
                return found[1] if wanted.groups else found[0]
            seen.append(line)

    def _line(self, end: float, pattern: str, seen: list[str]) -> str:
        with self._news:
            while b"\n" not in self._unread:
                if self._is_over:
                    raise GuestError(
                        f"the guest hung up before it said {pattern!r}; its last lines: {seen[-5:]}"
                    )
                if not self._news.wait(end - time.monotonic()):
                    raise GuestError(
                        f"the guest did not say {pattern!r}; its last lines: {seen[-5:]}"
                    )
            line, _, rest = bytes(self._unread).partition(b"\n")
            self._unread[:] = rest
        return line.decode(errors="replace").rstrip("\r")

    def tick(self) -> int:
        """:returns: the present number of the guest's counter"""
        with self._news:
            self._unread.clear()
        # The first line may be incomplete.
        self.wait_for(r".*")
        return int(self.wait_for(r"tick (\d+)"))

    def ask(self, command: str, answer: str) -> str:
        """
        :param command: one line
        :param answer: as for :meth:`wait_for`
        :returns: what the guest answered
        """
        self._connection.sendall(command.encode() + b"\n")
        return self.wait_for(answer)

    def write(self, marker: str, *, disk: str = "vda", sector: int = 0) -> None:
        """Write a marker to a disk, and flush it."""
        self.ask(f"write {disk} {sector} {marker}", f"done {re.escape(marker)}")

    def read(self, *, disk: str = "vda", sector: int = 0) -> str:
        """:returns: the marker on a disk; the guest's cache of the disk is dropped first"""
        return self.ask(f"read {disk} {sector}", r"value (.*)").strip()


@contextmanager
def talking_to(path: Path) -> Iterator[Console]:
    """
    :param path: the socket of QEMU's serial line
    :returns: the console, for the duration of a ``with`` block
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        connection.settimeout(None)
        console = Console(connection)
        try:
            yield console
        finally:
            console.close()
