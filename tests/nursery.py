"""Engines as processes that start at once: forked by a Python that has imported the module.

A program of its own is the half that forks; the tests have it do so by Forked.  What can be seen of
such an engine is what another one has, but for its command line.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import replicas_engine  # noqa: E402

PYTHON = [sys.executable, "-W", "error"]
ROOM = 16384                        # bytes for an environment
PR_GET_CHILD_SUBREAPER = 37         # prctl(2)


def become(args, env, cwd, log, cgroup):
    """Be what `PYTHON + args` would be, with those, at the beginning of its script."""
    if cgroup:
        with open(cgroup + "/cgroup.procs", "w", encoding="ascii") as file:
            file.write("0")
    for target, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND)):
        fd = os.open(path, flags)
        os.dup2(fd, target)
        os.close(fd)
    os.dup2(1, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    # What /proc/PID/environ shows is memory that was laid out at the start, proc(5).
    with open("/proc/self/stat", "rb") as stat, open("/proc/self/mem", "rb+", 0) as memory:
        begin, end = map(int, stat.read().rpartition(b")")[2].split()[47:49])
        memory.seek(begin)
        memory.write(b"".join(b"%s=%s\0" % pair for pair in os.environb.items()).ljust(
            end - begin, b"\0"))
    sys.argv[:] = args if args[0] != "-c" else ["-c"] + args[2:]
    sys.path[0] = "" if args[0] == "-c" else os.path.dirname(args[0])


def serve():
    """Fork for every line that comes; return in the child, with its arguments, at the end None.

    Its parent ends at once, so that it becomes the child of whoever takes orphans: of the tests.
    """
    with contextlib.suppress(replicas_engine.SettingsError):    # what is compiled at the first use
        replicas_engine.Settings.from_process()
    socket.getaddrinfo("127.0.0.1", 0)
    for line in sys.stdin:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            os.write(1, b"\n")
            continue
        pid = os.fork()
        if pid:
            os.write(1, b"%d" % pid)
            os._exit(0)
        what = json.loads(line)
        become(*what)
        return what[0]
    return None


def decisive(env):
    """What Python, the linker and the C library read at the start, before there is a script."""
    return tuple(sorted(item for item in env.items() if item[0].startswith(
        ("PYTHON", "LANG", "LC_", "LD_", "MALLOC_", "GLIBC_"))))


@functools.lru_cache(maxsize=None)
def nursery(env):
    """The process that forks engines in such an environment; it ends with this one."""
    process = subprocess.Popen(
        PYTHON + [os.path.abspath(__file__)], env=dict(env, ROOM="x" * ROOM),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    atexit.register(process.communicate)
    return process


class Forked(subprocess.Popen):
    """PYTHON + args in that control group, if any, with `log` for standard output and error."""

    lock = threading.Lock()         # one at a time

    def __init__(self, args, env, cwd, log, cgroup=None):
        self.what = json.dumps([args, env, cwd, log, cgroup]).encode() + b"\n"
        self.nursery = nursery(decisive(env))
        super().__init__(PYTHON + args)

    def _execute_child(self, *_):
        libc, before = ctypes.CDLL(None), ctypes.c_int()
        with self.lock:
            libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
            replicas_engine.prctl(replicas_engine.PR_SET_CHILD_SUBREAPER, 1)
            try:
                self.nursery.stdin.write(self.what)
                self.nursery.stdin.flush()
                self.pid = int(self.nursery.stdout.readline())
            finally:
                replicas_engine.prctl(replicas_engine.PR_SET_CHILD_SUBREAPER, before.value)
        self._child_created = True


if __name__ == "__main__":
    forked = serve()
    if forked and forked[0] == "-c":
        exec(forked[1], {"__name__": "__main__"})
    elif forked:
        runpy.run_path(forked[0], run_name="__main__")
