"""What Linux itself enforces on a process of the sandbox: a seccomp filter and a Landlock domain, through libc alone.

Both need no privilege, no namespace and no container; root is held by them as anybody is. Both are called in the
child, after which it has no way back. The filter lets through the system calls that a Python program of one process
needs (threads included) and no others: no fork, no exec, no socket, no signal to anybody else, no ptrace, no change of
limits. Landlock (Linux 5.13 and later) leaves of the file
system what is listed. Imported by the sandbox's server, which has nothing of this package: the standard library only.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable, Iterator

# Calls let through whatever their arguments, by architecture (include/uapi/asm-generic/unistd.h, asm/unistd_64.h).
_X86 = """0 1 3 4 5 6 7 8 9 10 11 12 13 14 15 17 18 19 20 21 22 23 24 25 26 27 28 32 33 34 35 36 37 38 39 40 45 48 51 52
54 55 60 61 63 72 73 74 75 77 79 80 81 82 83 84 85 86 87 88 89 95 96 97 98 99 100 102 104 107 108 110 111 115 118 120
121 124 127 128 130 131 137 138 140 186 201 202 204 213 217 218 219 221 228 229 230 231 232 233 247 258 262 263 264 265
266 267 269 270 271 273 274 281 283 285 286 287 290 291 292 293 309 316 318 324 326 332 334 436 439"""
_ARM = """17 19 20 21 22 23 24 25 32 34 35 36 37 38 43 44 46 47 48 49 50 57 59 61 62 63 64 65 66 67 68 71 72 73 78 79 80
82 83 85 86 87 93 94 95 96 98 99 100 101 102 103 113 114 115 123 124 128 132 133 134 135 136 137 139 141 148 150 153
155 156 158 160 163 165 166 168 169 172 173 174 175 176 177 178 179 204 205 207 208 209 210 214 215 216 222 223 226 227
232 233 260 276 278 283 285 291 293 436 439"""
_NAMES = "seccomp audit open openat ioctl prlimit64 kill tgkill clone clone3 prctl socketpair sendto"
_TABLES = {
    "x86_64": (_X86, (317, 0xC000003E, 2, 257, 16, 302, 62, 234, 56, 435, 157, 53, 44)),
    "aarch64": (_ARM, (277, 0xC00000B7, None, 56, 29, 261, 129, 131, 220, 435, 167, 199, 206)),
}
# chmod, chown and utime, in all their forms: Landlock does not govern them, so they succeed and do nothing.
_IDLE = {
    "x86_64": (90, 91, 92, 93, 94, 132, 235, 260, 261, 268, 280, 452),
    "aarch64": (52, 53, 54, 55, 88, 452),
}
_TERMINAL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_ALLOW, _DENY, _NO_SUCH, _IDLY = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x50000

Instruction = tuple[int, int, int, int]


def _load(offset: int) -> Instruction:
    return 0x20, 0, 0, offset  # BPF_LD | BPF_W | BPF_ABS


def _equal(value: int, yes: int, no: int) -> Instruction:
    return 0x15, yes, no, value  # BPF_JMP | BPF_JEQ | BPF_K


def _return(value: int) -> Instruction:
    return 0x06, 0, 0, value


def _argument(place: int) -> int:
    """Offset of an argument's low half; the high half is 4 further (both architectures are little-endian)."""
    return 16 + 8 * place


def _when(number: int | None, checks: list[Instruction]) -> list[Instruction]:
    """`checks`, which end in a return, for one call alone."""
    return [] if number is None else [_equal(number, 0, len(checks)), *checks]


def _one_of(place: int, values: Iterable[int], mask: int | None = None) -> list[Instruction]:
    """Lets a call through whose argument (its low half, masked) is one of `values`."""
    program = [_load(_argument(place))]
    if mask is not None:
        program.append((0x54, 0, 0, mask))  # BPF_ALU | BPF_AND | BPF_K
    for value in values:
        program += [_equal(value, 0, 1), _return(_ALLOW)]
    return [*program, _return(_DENY)]


def _null(place: int) -> list[Instruction]:
    """Lets a call through whose pointer is null."""
    low, high = _argument(place), _argument(place) + 4
    return [_load(low), _equal(0, 0, 3), _load(high), _equal(0, 0, 1), _return(_ALLOW), _return(_DENY)]


def _not_truncating(place: int) -> list[Instruction]:
    """Opening for reading alone with O_TRUNC writes, and Landlock before Linux 6.2 does not see it."""
    mask = os.O_ACCMODE | os.O_TRUNC
    return [_load(_argument(place)), (0x54, 0, 0, mask), _equal(os.O_TRUNC, 0, 1), _return(_DENY), _return(_ALLOW)]


def _filter(machine: str, process: int) -> list[Instruction]:
    plain, numbers = _TABLES[machine]
    call = dict(zip(_NAMES.split(), numbers, strict=True))
    program = [_load(4), _equal(call["audit"] or 0, 1, 0), _return(_DENY), _load(0)]
    for number in map(int, plain.split()):
        program += [_equal(number, 0, 1), _return(_ALLOW)]
    for number in _IDLE[machine]:
        program += [_equal(number, 0, 1), _return(_IDLY)]
    thread = 0x10000  # CLONE_THREAD
    pair = [_load(_argument(0)), _equal(1, 1, 0), _return(_DENY), *_one_of(1, [1], 0xF)]  # AF_UNIX, SOCK_STREAM
    program += _when(call["clone3"], [_return(_NO_SUCH)])  # its flags lie in memory; libc then uses clone
    program += _when(call["clone"], _one_of(0, [thread], thread))
    program += _when(call["open"], _not_truncating(1)) + _when(call["openat"], _not_truncating(2))
    program += _when(call["ioctl"], _one_of(1, _TERMINAL)) + _when(call["prctl"], _one_of(0, [15, 16]))  # thread's name
    program += _when(call["kill"], _one_of(0, [process])) + _when(call["tgkill"], _one_of(0, [process]))
    program += _when(call["prlimit64"], _null(2))  # reading limits, not setting them
    program += _when(call["socketpair"], pair) + _when(call["sendto"], _null(4))
    return [*program, _return(_DENY)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


_READ = 1 << 2 | 1 << 3  # files, folders
_FILES = 1 << 1 | 1 << 2 | 1 << 14  # what a rule on a single file may hold: write, read, truncate
_WRITE = sum(1 << bit for bit in (1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14))  # all but execute and devices
_RIGHTS = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 4: 1 << 15, 5: 1 << 16}  # ABI -> all its file rights and one
_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    found: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return found


def landlock_version() -> int:
    """Landlock's ABI version, 0 where the kernel has none or it is off."""
    if sys.platform != "linux":
        return 0
    try:
        return _call(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def has_seccomp() -> bool:
    """Whether a filter of system calls is written for this machine and its kernel takes filters."""
    if sys.platform != "linux" or platform.machine() not in _TABLES or sys.maxsize < 2**32:
        return False
    return bool(_libc.prctl(22, 2, None, 0, 0) == -1 and ctypes.get_errno() == errno.EFAULT)  # a filter at address 0


def _rules(readable: Iterable[str], writable: Iterable[str], version: int) -> Iterator[tuple[str, int]]:
    known = _RIGHTS[min(version, 5)] - 1
    for rights, paths in ((_READ, readable), (_WRITE, writable)):
        for path in paths:
            yield path, rights & known & (-1 if os.path.isdir(path) else _FILES)


def confine_files(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Leaves this process and its threads these folders and files. Others cannot be opened, whoever runs it."""
    version = landlock_version()
    handled = [
        _RIGHTS[min(version, 5)] - 1,
        3 if version >= 4 else 0,
        3 if version >= 6 else 0,
    ]  # TCP; signals, sockets
    size = 8 if version < 4 else 16 if version < 6 else 24
    attributes = ctypes.create_string_buffer(struct.pack("QQQ", *handled))
    rules = _call(444, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    for path, rights in _rules(readable, writable, version):
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _call(445, ctypes.c_int(rules), ctypes.c_int(1), struct.pack("=Qi", rights, opened), ctypes.c_uint32(0))
            os.close(opened)
    no_new_privileges()
    _call(446, ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def no_new_privileges() -> None:
    """No set-uid program gives this process more rights; both layers ask for it."""
    if _libc.prctl(38, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


def confine_calls() -> None:
    """Installs the filter; every refused call fails with EPERM, so that the program sees an exception."""
    program = b"".join(struct.pack("HBBI", *one) for one in _filter(platform.machine(), os.getpid()))
    held = ctypes.create_string_buffer(program, len(program))
    what = _Program(len(program) // 8, ctypes.cast(held, ctypes.c_void_p).value)
    no_new_privileges()
    if _libc.prctl(22, 2, ctypes.byref(what), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")


def die_with_parent() -> None:
    """SIGKILL for this process when the one that forked it is gone."""
    if sys.platform == "linux":
        _libc.prctl(1, 9, 0, 0, 0)
