"""A live turn's deltas to many readers: how late they come, and what that takes of a processor."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import harness

READERS = 50
DELTAS = 1000
SIZE = 40                                   # bytes of each
PAUSE = 0.01                                # seconds from one to the next
ROUNDS = 3

# All readers in one process, which takes and keeps what comes and looks at it in the end.  It
# prints what it took of a processor, for how many seconds, and how late each delta was at each
# reader, when the event that it is in was there to its last byte.
READ = r"""
import json, re, selectors, socket, sys, time
port, head, readers = int(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3])
selector, pieces = selectors.DefaultSelector(), [[] for _ in range(readers)]
for mine in pieces:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(head)
    selector.register(sock, selectors.EVENT_READ, mine)
while not all(b"turn.started" in b"".join(piece for _, piece in mine) for mine in pieces):
    for key, _ in selector.select():
        key.data.append((0, key.fileobj.recv(65536)))
print("ready", flush=True)
before, begin = time.process_time(), 0
while selector.get_map():
    for key, _ in selector.select():
        piece = key.fileobj.recv(65536)
        now = time.monotonic()
        begin = begin or now                # with the first delta
        key.data.append((now, piece))
        if not piece:
            selector.unregister(key.fileobj)
took, seconds, late = time.process_time() - before, time.monotonic() - begin, []
for mine in pieces:
    data, delays = b"", []
    for now, piece in mine:
        whole, _, data = (data + piece).rpartition(b"\n\n")
        for texts in re.findall(rb'"text_delta":"([^"]*)"', whole):
            delays += [now - float(stamp) for stamp in re.findall(rb"\d+\.\d+", texts)]
    late.append(delays)
json.dump([took, seconds, late], sys.stdout)
"""


def percentile(values, share):
    return sorted(values)[int(len(values) * share)]


def live_turn(engine, readers):
    """(how late, in ms, each delta was at each reader; the ms of a processor that engine and
    readers had for each second of it; deltas a second)."""
    go = os.path.join(engine.folder, "go")
    turn = engine.start_turn(json.dumps({"app_server": [
        {"wait_for": go}, {"deltas": {"n": DELTAS, "size": SIZE, "pause": PAUSE, "stamp": True}},
        {"complete": True}]}), deltas=True)
    head = ("GET /codex/events?turn=%d HTTP/1.1\r\nHost: x\r\nX-Replicas-Engine-Secret: %s\r\n"
            "Connection: close\r\n\r\n" % (turn, harness.SECRET))
    with subprocess.Popen([sys.executable, "-c", READ, str(engine.port), head, str(readers)],
                          stdout=subprocess.PIPE) as crowd:
        assert crowd.stdout.readline() == b"ready\n"
        before, begin = harness.processor_time(engine.process.pid), time.monotonic()
        with open(go, "w", encoding="ascii"):
            pass
        readers_took, seconds, late = json.load(crowd.stdout)
        engine_took = harness.processor_time(engine.process.pid) - before
    os.unlink(go)
    assert [len(delays) for delays in late] == [DELTAS] * readers
    return ([[1000 * delay for delay in delays] for delays in late], 1000 * engine_took / seconds,
            1000 * readers_took / seconds, DELTAS / seconds)


def run():
    """(what, value, limit, what it is held against) of each measurement."""
    with tempfile.TemporaryDirectory() as folder:
        engine = harness.Engine(folder).start()
        try:
            alone = live_turn(engine, 1)
            rounds = [live_turn(engine, READERS) for _ in range(ROUNDS)]
        finally:
            engine.stop()

    def median(value):
        return statistics.median(map(value, rounds))

    pooled = [[delay for delays in late for delay in delays] for late, _, _, _ in rounds]
    worst = statistics.median(max(percentile(delays, 0.99) for delays in late)
                              for late, _, _, _ in rounds)
    written = "its writing; one reader: %.1f"
    return [
        ("a delta to %d readers, %.0f a second, median ms" % (READERS, median(lambda r: r[3])),
         statistics.median(map(statistics.median, pooled)), None,
         written % statistics.median(alone[0][0])),
        ("a delta to %d readers, p99 ms (worst reader's: %.1f)" % (READERS, worst),
         statistics.median(percentile(delays, 0.99) for delays in pooled), 60,
         written % percentile(alone[0][0], 0.99)),
        ("the engine's processor time for them, ms a second", median(lambda r: r[1]), None,
         "one reader: %.1f" % alone[1]),
        ("the readers' processor time, ms a second", median(lambda r: r[2]), None,
         "one reader: %.1f" % alone[2])]
