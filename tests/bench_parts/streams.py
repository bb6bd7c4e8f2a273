"""Events from Codex to the readers: how late, how many, how soon the first, and in what memory."""

import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import harness

READERS = 100
LATENCY_EVENTS = 300
REPEATS = 3
STARTS = 40
STREAMS = 50
IMPORTS = "import http.server, json, subprocess, threading"

# A Codex in which nothing takes time but what is measured.  $CODEX_HOME/plan says what it prints.
CODEX = """\
#!%s -IS
import os, sys, time
if "--version" in sys.argv:
    sys.exit(print("codex-cli 0.169.0"))
with open(os.environ["CODEX_HOME"] + "/plan") as file:
    count, size, pause, hold = map(float, file.read().split())
out = sys.stdout.buffer
out.write(b'{"type":"thread.started","thread_id":"019a1caa-bceb-7731-b607-e9d22c1933a5"}\\n')
out.flush()
sys.stdin.buffer.read()
time.sleep(hold)
event = (b'{"type":"item.completed","item":{"id":"item_%%d","type":"agent_message","at":%%.6f,'
         b'"text":"%%s"}}\\n')
padding = b"x" * (int(size) - len(event %% (1000, time.monotonic(), b"")))
block = []
for number in range(int(count)):
    block.append(event %% (number, time.monotonic(), padding))
    if pause or len(block) == 200:
        out.write(b"".join(block))
        out.flush()
        block = []
        time.sleep(pause)
out.write(b"".join(block) + b'{"type":"turn.completed","usage":{}}\\n')
out.flush()
"""

# The loop that a relay is held against: it reads the same pipe and knows what every event is.
BARE_LOOP = """
import json, subprocess, sys, time
begin = time.perf_counter()
process = subprocess.Popen([sys.argv[1]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
for line in process.stdout:
    json.loads(line)
print(time.perf_counter() - begin)
"""

# Clients that read to the end, and others that come and go meanwhile.
CROWD = """
import selectors, socket, sys, time
port, head, readers = int(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])
def client():
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(head)
    return sock
selector = selectors.DefaultSelector()
for _ in range(readers):
    selector.register(client(), selectors.EVENT_READ)
print("ready", flush=True)
next_visit, visitor = 0, None
while selector.get_map():
    for key, _ in selector.select(0.02):
        if not key.fileobj.recv(65536):
            selector.unregister(key.fileobj)
    if time.monotonic() > next_visit:
        if visitor:
            visitor.close()
        visitor, next_visit = client(), time.monotonic() + 0.05
"""


class Bench:
    """An engine whose Codex prints what `plan` says."""

    def __init__(self, folder):
        self.codex = os.path.join(folder, "codex")
        with open(self.codex, "w", encoding="utf-8") as file:
            file.write(CODEX % sys.executable)
        os.chmod(self.codex, 0o755)
        self.engine = harness.Engine(folder, CODEX_PATH=self.codex)
        self.engine.start()

    def plan(self, count, size=200, pause=0.0, hold=0.0):
        with open(os.path.join(self.engine.codex_home, "plan"), "w", encoding="ascii") as file:
            file.write("%d %d %f %f" % (count, size, pause, hold))

    def env(self):
        return dict(os.environ, CODEX_HOME=self.engine.codex_home)

    def request(self, head, body=b""):
        """A connection to the engine on which a request was sent."""
        sock = socket.create_connection(("127.0.0.1", self.engine.port))
        sock.sendall(self.head(head, len(body)) + body)
        return sock

    @staticmethod
    def head(line, length=0):
        return ("%s HTTP/1.1\r\nHost: x\r\nX-Replicas-Engine-Secret: %s\r\nConnection: close\r\n"
                "Content-Length: %d\r\n\r\n" % (line, harness.SECRET, length)).encode()

    def memory(self):
        return resident(self.engine.process.pid)


def resident(pid):
    return harness.status_of(pid, "VmRSS") / 1024


def latency(bench):
    """Milliseconds from Codex's printing an event to a reader's having it, in a crowd; median."""
    bench.plan(LATENCY_EVENTS, pause=0.02, hold=4.0)
    turn = bench.engine.start_turn("x")
    path = "GET /codex/events?turn=%d" % turn
    with bench.request(path) as sock, subprocess.Popen(
            [sys.executable, "-c", CROWD, str(bench.engine.port), bench.head(path).decode(),
             str(READERS - 1)], stdout=subprocess.PIPE) as crowd:
        assert crowd.stdout.readline() == b"ready\n"
        delays, data = [], b""
        while True:
            piece = sock.recv(65536)
            now = time.monotonic()
            if not piece:
                break
            head, _, data = (data + piece).rpartition(b"\n")
            delays += [now - float(at) for at in re.findall(rb'"at":([0-9.]+)', head)]
    assert len(delays) == LATENCY_EVENTS
    return 1000 * statistics.median(delays)


def relay(bench, count, size):
    """(engine's, bare loop's) seconds for so many events to one client, medians."""
    bench.plan(count, size)
    mine, bare = [], []
    for _ in range(REPEATS):
        bare.append(float(subprocess.run([sys.executable, "-c", BARE_LOOP, bench.codex],
                                         env=bench.env(), stdout=subprocess.PIPE,
                                         check=True).stdout))
        begin = time.perf_counter()
        with bench.request("POST /codex/send", b'{"message":"x"}') as sock:
            received, tail = 0, b""
            while True:
                piece = sock.recv(1024 * 1024)
                if not piece:
                    break
                received, tail = received + len(piece), (tail + piece)[-100:]
        mine.append(time.perf_counter() - begin)
        assert b"event: done" in tail and received > count * size
    return statistics.median(mine), statistics.median(bare)


def start(bench):
    """Milliseconds that the engine adds to the first event of a turn, median."""
    bench.plan(0)
    added = []
    for _ in range(STARTS):
        begin = time.perf_counter()
        with subprocess.Popen([bench.codex], env=bench.env(), stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            bare = time.perf_counter() - begin
            process.communicate()
        begin = time.perf_counter()
        with bench.request("POST /codex/send", b'{"message":"x"}') as sock:
            data = b""
            while b"thread.started" not in data:
                data += sock.recv(65536)
            added.append(time.perf_counter() - begin - bare)
            while sock.recv(65536):
                pass
    return 1000 * statistics.median(added)


def bare_memory():
    with subprocess.Popen([sys.executable, "-c", IMPORTS + "; print(flush=True); open(0).read()"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        size = resident(process.pid)
        process.stdin.close()
    return size


def memory_of_streams(bench):
    """MB that so many open streams take."""
    bench.plan(0, hold=3.0)
    turn = bench.engine.start_turn("x")
    before = bench.memory()
    socks = [bench.request("GET /codex/events?turn=%d" % turn) for _ in range(STREAMS)]
    for sock in socks:
        sock.recv(65536)
    size = bench.memory() - before
    for sock in socks:
        while sock.recv(65536):
            pass
        sock.close()
    return size


def run():
    """(what, value, limit, what it is held against) of each measurement."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder)
        try:
            idle = bench.memory() - bare_memory()
            streams = memory_of_streams(bench)
            first = start(bench)            # before the disk is busy with what the others wrote
            late = latency(bench)
            short, long = relay(bench, 200000, 200), relay(bench, 20000, 5000)
        finally:
            bench.engine.stop()
    loop = "a loop of json.loads over the same pipe: %.2f s"
    return [
        ("an event to a reader among %d and visitors, ms" % READERS, late, 5.0, "its printing"),
        ("200,000 events of 200 bytes, ratio", short[0] / short[1], 2.0, loop % short[1]),
        ("20,000 events of 5,000 bytes, ratio", long[0] / long[1], 2.0, loop % long[1]),
        ("POST /codex/send to the first event, ms more", first, 3.0,
         "starting the same process and reading its first line"),
        ("memory of an idle engine, MB more", idle, 5.0, "python3 -c '%s'" % IMPORTS),
        ("memory of %d open streams, MB more" % STREAMS, streams, 5.0, "a turn without readers"),
    ]
