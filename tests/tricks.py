"""What a command of the agent's can do to get away from who wants to stop it."""

import os

FORK_CHAIN = """\
import os, sys, time
open(sys.argv[1] + ".chain", "w").close()
end = time.monotonic() + 20
for _ in range(50000):
    if time.monotonic() > end or os.fork():
        os._exit(0)
    if "sessions" in sys.argv:
        os.setsid()
"""

# Its first thread ends: it looks like a zombie, and is none.
PARTLY_DEAD = """\
import ctypes, os, sys, threading, time
threading.Thread(target=time.sleep, args=(120,)).start()
open(sys.argv[1], "w").write(str(os.getpid()))
os.rename(sys.argv[1], sys.argv[1] + ".dead")
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
"""

# The command, and how many processes sleep when it is well under way.
COMMANDS = {
    "under a shell": ("bash -c 'sleep {n}; true'; true", 1),
    "in the background": ("sleep {n} & (sleep {n} &) ; sleep {n}", 3),
    "with setsid": ("setsid sleep {n} & setsid -f sleep {n}; sleep {n}", 3),
    "with nohup": ("nohup sleep {n} >/dev/null 2>&1 & nohup sleep {n} >/dev/null 2>&1", 2),
    "ignoring signals": ("trap '' TERM INT HUP; setsid sleep {n} & sleep {n}; sleep {n}", 2),
    "a chain of forks": ("sleep {n} & {python} {folder}/chain.py {n}; wait", 1),
    "many forks": ("for i in $(seq 50); do sleep {n} & done; wait", 50),
    "many orphans": ("for i in $(seq 100); do (setsid sleep {n} &); done; sleep {n}", 101),
    # The first is stopped before it is a sleep, or after.
    "stopped": ("sleep {n} & kill -STOP $!; setsid -f sh -c 'sleep {n} & kill -STOP $$';"
                " sleep {n}", 2),
    "without an environment": ("env -i setsid -f sleep {n}; (env -i setsid sleep {n} &); sleep {n}",
                               3),
    "with another mark": ("REPLICAS_TURN= setsid -f sleep {n}; (REPLICAS_TURN=another setsid"
                          " sleep {n} &); sleep {n}", 3),
    "partly dead": ("(env -i setsid {python} {folder}/partly_dead.py {n} &); sleep {n}", 1),
    "in a PID namespace": ("unshare --user --map-root-user --pid --fork setsid sleep {n} &"
                           " sleep {n}", 2),
}
# By what it has made one sees that a command that doesn't sleep is under way.
MAKES = {"a chain of forks": ".chain", "partly dead": ".dead"}


def prepare(folder):
    """Write there the programs that the commands run."""
    for name, program in (("chain.py", FORK_CHAIN), ("partly_dead.py", PARTLY_DEAD)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(program)


def command(names, number, folder, python="python3"):
    """A shell command that does all of these at once, in which every process has the number in its
    command line; how many sleep when it is well under way, and the files that it has made then."""
    lines = [COMMANDS[name][0].format(n=number, folder=folder, python=python) for name in names]
    return (lines[0] if len(lines) == 1 else " ".join("(%s) &" % line for line in lines) + " wait",
            sum(COMMANDS[name][1] for name in names),
            [number + MAKES[name] for name in names if name in MAKES])
