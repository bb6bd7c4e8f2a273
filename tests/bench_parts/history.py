"""Reading a big rollout through `GET /codex/history`, against a bare loop of json.loads."""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from harness import SECRET, Engine, script, status_of

MB = 1024 * 1024
HEADERS = {"X-Replicas-Engine-Secret": SECRET}
BARE_LOOP = """
import json, sys, time
begin = time.perf_counter()
with open(sys.argv[1], "rb") as file:
    for line in file:
        try:
            json.loads(line)
        except ValueError:
            pass
print(time.perf_counter() - begin)
"""


def write_rollout(path, size, long_line=3 * MB):
    """A rollout as Codex writes them: events, messages, outputs of commands, one very long line
    and one that a crash cut off in its middle."""
    random.seed(4)
    words = ["replicas", "engine", "def", "return", "\"quoted\"", "C:\\path", "größe", "\n    ",
             "=>", "0x7f", "\u2028", "\u001b[32m", "test", "ok", "\U0001f600", "=" * 40]

    def text(length):
        return " ".join(random.choices(words, k=length // 7))

    samples = []
    for length in [60, 90, 150, 300, 300, 900, 900, 2500, 6000, 40000]:
        for n in range(3):
            stamp = "2025-10-26T04:00:%02d.%03dZ" % (random.randrange(60), random.randrange(1000))
            payloads = (
                {"type": "agent_message", "message": text(length)},
                {"type": "token_count", "info": {"total_token_usage": {
                    "input_tokens": random.randrange(10 ** 6), "output_tokens": 11},
                    "rate_limits": {"primary": {"used_percent": 12.5, "window_minutes": 299}}}},
                {"type": "function_call_output", "call_id": "call_%d" % n,
                 "output": json.dumps({"output": text(length), "metadata": {"exit_code": 0}})},
                {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAA" * (length // 6)})
            for payload in payloads:
                line = {"timestamp": stamp, "type": "response_item", "payload": payload}
                samples.append(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode()
                               + b"\n")
    with open(path, "wb") as file:
        while file.tell() < size // 2:
            file.write(random.choice(samples))
        file.write(samples[-1][:500] + b"\n")
        file.write(b'{"type":"compacted","payload":"%b"}\n' % (b"x" * long_line))
        while file.tell() < size:
            file.write(random.choice(samples))


def memory(engine):
    """The most memory that the engine ever had, in MB."""
    return status_of(engine.process.pid, "VmHWM") / 1024


def read_history(engine, query=""):
    """Read and discard it: seconds until the first byte and until the end, and the last bytes."""
    begin = time.perf_counter()
    connection, response = engine.open("GET", "/codex/history" + query)
    first, end, buffer = response.read(1), b"", bytearray(256 * 1024)
    to_first = time.perf_counter() - begin
    while True:
        count = response.readinto(buffer)
        if not count:
            connection.close()
            return to_first, time.perf_counter() - begin, (first + end)[-200:]
        end = (end + buffer[max(0, count - 200):count])[-200:]


def small_answers(engine, query, times=50):
    """The median time in ms of a short answer on a connection that is kept."""
    connection = engine.connect()
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        connection.request("GET", "/codex/history" + query, headers=HEADERS)
        connection.getresponse().read()
        took.append(time.perf_counter() - begin)
    connection.close()
    return statistics.median(took) * 1000


def p99_of_pings(engine, condition):
    """The 99th percentile in ms of /ping, asked one after the other while `condition()`."""
    connection, took = engine.connect(), []
    while condition():
        begin = time.perf_counter()
        connection.request("GET", "/ping", headers=HEADERS)
        connection.getresponse().read()
        took.append(time.perf_counter() - begin)
    connection.close()
    return sorted(took)[int(len(took) * 0.99)] * 1000


def write_threads(codex_home, count):
    """The rollouts of so many threads, one every five minutes: some hundred KB each, if sparse."""
    head = json.dumps({"timestamp": "2026-01-01T00:00:00.000Z", "type": "session_meta",
                       "payload": {"instructions": "x" * 8000}}) + "\n"
    for number in range(count):
        began = time.gmtime(1780000000 + number * 300)
        folder = os.path.join(codex_home, time.strftime("sessions/%Y/%m/%d", began))
        os.makedirs(folder, exist_ok=True)
        name = time.strftime("rollout-%Y-%m-%dT%H-%M-%S-", began) + (
            "%08x-bceb-7731-b607-e9d22c190000.jsonl" % number)
        with open(os.path.join(folder, name), "w", encoding="ascii") as file:
            file.write(head + json.dumps({"type": "event_msg", "payload": {
                "type": "user_message", "message": "message %d" % number}}) + "\n")
            file.truncate(100000)


def list_threads(engine, query="", times=7):
    """The median time in ms of GET /codex/threads, and the last thread's id."""
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        threads = engine.get("/codex/threads" + query).json()["threads"]
        took.append(time.perf_counter() - begin)
    assert len(threads) == 50
    return statistics.median(took) * 1000, threads[-1]["thread_id"]


def bare_loop(path):
    """Seconds that a loop of json.loads takes over the file, in this Python."""
    return float(subprocess.run([sys.executable, "-c", BARE_LOOP, path], check=True,
                                stdout=subprocess.PIPE).stdout)


def run(size=100 * MB, rounds=5):
    """[(what, ratio or value, limit or None, what it is measured against)]"""
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(folder).start()
        try:
            return _measure(engine, size, rounds)
        finally:
            engine.stop()


def _measure(engine, size, rounds):
    engine.send(script({"thread": "new"}, {"complete": True}))
    path = engine.status()["session_file"]
    read_history(engine)
    before = memory(engine)
    write_rollout(path, size)
    whole, bare, first = [], [], []
    for _ in range(rounds):
        bare.append(bare_loop(path))
        to_first, to_end, end = read_history(engine)
        first.append(to_first * 1000)
        whole.append(to_end)
    growth = memory(engine) - before
    cursor = json.loads(b"{" + end[end.rindex(b'"cursor"'):])["cursor"]

    until = time.monotonic() + 3
    idle = p99_of_pings(engine, lambda: time.monotonic() < until)
    reader = threading.Thread(target=read_history, args=(engine,))
    reader.start()
    busy = p99_of_pings(engine, reader.is_alive)
    write_threads(engine.codex_home, 20000)
    first_page, last = list_threads(engine)
    next_page, _ = list_threads(engine, "?before=" + last)
    megabytes = os.path.getsize(path) // MB
    return [
        ("history: read %d MB (%.2f s)" % (megabytes, statistics.median(whole)),
         statistics.median(whole) / statistics.median(bare), 1.5,
         "a bare loop of json.loads over the file (%.2f s)" % statistics.median(bare)),
        ("history: p99 of /ping meanwhile (%.1f ms)" % busy, busy / idle, None,
         "p99 of /ping on the idle engine (%.2f ms)" % idle),
        ("history: first byte, ms", statistics.median(first), 20, "absolute"),
        ("history: tail=50, ms", small_answers(engine, "?tail=50"), 5, "absolute"),
        ("history: after=, nothing new, ms", small_answers(engine, "?after=" + cursor), 5,
         "absolute"),
        ("history: 50 of 20,000 threads, ms", first_page, 100, "absolute"),
        ("history: the next 50 of them, ms", next_page, 100, "absolute"),
        ("history: growth of memory (VmHWM), MB", growth, 10, "before the first reading")]
