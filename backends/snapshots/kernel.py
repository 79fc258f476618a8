"""The calls of the kernel that a cell is made of, and that Python 3.11 has no names for."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct

CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_SLAVE = 0x2, 0x4, 0x8, 0x4000, 0x80000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
# linux/audit.h and the table of calls: io_uring_setup is 425 on every architecture.
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_IO_URING_SETUP = 425
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

_libc = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Leave namespaces for new ones. Raises `OSError`."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Raises `OSError`."""
    words = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _checked(_libc.mount(*words), f"mount {target}")


def die_with_parent() -> None:
    """Be killed as soon as the parent is gone; one that is gone already is not noticed."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def refuse_io_uring() -> None:
    """Let this process and all that it starts find no io_uring; what uses it has another way.

    CRIU cannot dump a ring ("Unknown shit 600 (anon_inode:[io_uring])"), and libuv, so uvloop,
    opens one even with UV_USE_IO_URING=0. A filter binds one process tree only, where the sysctl
    kernel.io_uring_disabled binds the machine. Raises `OSError`.
    """
    arch = _AUDIT_ARCH.get(platform.machine())
    if arch is None:
        raise OSError(errno.ENOSYS, f"no filter of calls for {platform.machine()}")
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 4),  # load seccomp_data.arch
            (0x15, 0, 3, arch),  # another one (32 bits): allow
            (0x20, 0, 0, 0),  # load seccomp_data.nr
            (0x15, 0, 1, _IO_URING_SETUP),
            (0x06, 0, 0, _ERRNO | errno.ENOSYS),
            (0x06, 0, 0, _ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a count, padding, and a pointer.
    header = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if os.geteuid() != 0:
        _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
