"""A seccomp filter as classic BPF, made without a library: which system calls a program in a sandbox may not use.

It is a list of refusals, the second line behind namespaces and dropped capabilities: calls that open kernel surface no
judged program needs, sockets other than AF_UNIX (which asyncio needs), new namespaces, and memory that no limit on
address space counts. A refused call fails with an errno, so that programs meet an error they can report.
"""

import errno
import platform
import struct
from collections.abc import Iterator

# name: (x86_64, aarch64); None where the architecture lacks the call.
REFUSED_SYSCALLS: dict[str, tuple[int, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "fanotify_init": (300, 262),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "vhangup": (153, 58),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "personality": (135, 92),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    # A program that lets itself be starved would look as if the machine were too busy to judge it.
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    # Memory outside of RLIMIT_AS and of the sized folder.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "mq_open": (240, 180),
}
SOCKET, SOCKETPAIR, CLONE, CLONE3, IOCTL = (41, 198), (53, 199), (56, 220), (435, 435), (16, 29)
AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32_BIT = 0x40000000  # the x32 twin of every x86_64 call
NEW_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
TIOCSTI, TIOCLINUX = 0x5412, 0x541C
AF_UNIX = 1

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCHITECTURE, ARGUMENT_0, ARGUMENT_1 = 0, 4, 16, 24  # offsets into struct seccomp_data, low words


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """The filter for `machine` (by default this one's) as an array of struct sock_filter; None where it is unknown.

    Both architectures are little endian, so an argument's low 32 bits stand first; all arguments looked at are ints.
    """
    machine = machine or platform.machine()
    if machine not in AUDIT_ARCHITECTURE:
        return None
    return b"".join(struct.pack("<HBBI", *step) for step in _steps(machine, list(AUDIT_ARCHITECTURE).index(machine)))


def _steps(machine: str, column: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (operation, steps to skip if true, steps to skip if false, operand)."""
    yield LOAD, 0, 0, ARCHITECTURE
    yield EQUAL, 1, 0, AUDIT_ARCHITECTURE[machine]
    yield RETURN, 0, 0, KILL_PROCESS
    yield LOAD, 0, 0, NUMBER
    if machine == "x86_64":
        yield AT_LEAST, 0, 1, X32_BIT
        yield RETURN, 0, 0, ERRNO | errno.ENOSYS
    for pair in REFUSED_SYSCALLS.values():
        number = pair[column]
        if number is not None:
            yield EQUAL, 0, 1, number
            yield RETURN, 0, 0, ERRNO | errno.EPERM
    # glibc falls back to clone, whose flags a filter can read.
    yield EQUAL, 0, 1, CLONE3[column]
    yield RETURN, 0, 0, ERRNO | errno.ENOSYS
    for numbers in (SOCKET, SOCKETPAIR):
        yield EQUAL, 0, 4, numbers[column]
        yield LOAD, 0, 0, ARGUMENT_0
        yield EQUAL, 1, 0, AF_UNIX
        yield RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT
        yield RETURN, 0, 0, ALLOW
    yield EQUAL, 0, 4, CLONE[column]
    yield LOAD, 0, 0, ARGUMENT_0
    yield ANY_BIT, 0, 1, NEW_NAMESPACE_FLAGS
    yield RETURN, 0, 0, ERRNO | errno.EPERM
    yield RETURN, 0, 0, ALLOW
    yield EQUAL, 0, 4, IOCTL[column]
    yield LOAD, 0, 0, ARGUMENT_1
    yield EQUAL, 1, 0, TIOCSTI
    yield EQUAL, 0, 1, TIOCLINUX
    yield RETURN, 0, 0, ERRNO | errno.EPERM
    yield RETURN, 0, 0, ALLOW
