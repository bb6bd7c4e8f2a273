"""A system whose calls fail: each failure costs one thing, and what a client has seen stays so."""

import collections
import contextlib
import http.client
import json
import os
import re
import sys
import time

import pytest

import harness
from harness import read_events, script, wait_for

BEGIN = {"thread": "resume"}
TURN = [BEGIN, {"count": {"n": 5, "size": 100}}, {"complete": True}]
ALL = ("turn .*|stop turn .*|codex .*|sync|recovery|Thread-.*|process_request_thread.*"
       "|connection.*")
BROKEN = (OSError, http.client.HTTPException)
# What an engine has open that does nothing: standard input and the spare one, its log, its inbox,
# and what listens.
AT_REST = collections.Counter({"null": 2, "engine.log": 2, "lock": 1, "pipe": 2, "socket": 1,
                               "anon_inode:[eventpoll]": 1})


class FaultyEngine(harness.Engine):
    """An engine whose calls of the kernel fail as `fail` says."""

    program = [sys.executable, "-W", "error", os.path.join(harness.TESTS, "faulty_engine")]

    def __init__(self, folder, **env):
        self.plan = os.path.join(str(folder), "plan")
        super().__init__(folder, FAULTS=self.plan, **env)

    def connect(self, timeout=30.0):        # what is lost on the way is asked for again
        return super().connect(timeout)

    def fail(self, **plan):
        with open(self.plan + ".new", "w", encoding="ascii") as file:
            json.dump(plan, file)
        os.replace(self.plan + ".new", self.plan)

    def heal(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.plan)

    def too_many(self):
        """What it has open beyond AT_REST, a line of text for each; none is ''."""
        found = harness.descriptors_of(self.process.pid)
        kinds = collections.Counter(re.sub(r"(socket|pipe):.*", r"\1", os.path.basename(path))
                                    for path in found.values())
        beyond = kinds - AT_REST
        return beyond and "\n".join(["too many: %r" % dict(beyond)] + [
            "%d: %s" % descriptor for descriptor in sorted(found.items())])

    def settle(self):
        """Wait until it has nothing open but what it always has; and it closed that by itself."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not self.too_many(), patience=60)
        assert not self.too_many(), self.too_many()
        assert "ResourceWarning: unclosed" not in self.log(), self.log()


class Client:
    """Sends one message until it is answered, and reads on until `done`, whatever comes between."""

    def __init__(self, engine, seen, key, message):
        self.engine, self.seen, self.key, self.message = engine, seen, key, message
        self.turn = None
        self.last = None                # the id of the last event that came
        self.done = False
        self.answers = []

    def run(self, patience=harness.PATIENCE):
        """Whether it was `done` in time."""
        deadline = time.monotonic() + patience
        while not self.done and time.monotonic() < deadline:
            try:
                self.step()
            except BROKEN as error:
                self.answers.append(repr(error))
            if not self.done:
                time.sleep(0.01)
        return self.done

    def step(self):
        if self.turn is None:
            connection, response = self.engine.open(
                "POST", "/codex/send", {"message": self.message}, {"Idempotency-Key": self.key})
        else:
            connection, response = self.engine.open(
                "GET", "/codex/events?turn=%d" % self.turn,
                headers={"Last-Event-ID": self.last} if self.last else {})
        with contextlib.closing(connection):
            self.answers.append(response.status)
            if response.status != 200:
                body = json.loads(response.read().decode())
                assert body["error"] and body["details"], body
                assert response.status == 503 or "body could not be read" in body["error"], body
                return
            self.turn = int(response.headers["X-Replicas-Turn-Id"])
            self.follow(response)

    def follow(self, response):
        number = int(self.last.partition(".")[2]) if self.last else 0
        for event in read_events(response):
            turn, _, text = event.id.partition(".")
            assert int(turn) == self.turn and int(text) == number + 1, (event, self.last)
            number += 1
            known = self.seen.setdefault(event.id, event)
            assert known == event, "%r was %r" % (event, known)
            self.last = event.id
            self.done = event.type == "done"


def check_seen(engine, seen):
    """Every turn of which something was seen is as it was seen, and has its ending."""
    turns = sorted({int(number.partition(".")[0]) for number in seen})
    for turn in turns[-90:]:
        events = harness.check_stream(engine.events(turn))
        for event in events:
            assert seen.setdefault(event.id, event) == event
        assert len([number for number in seen if number.startswith("%d." % turn)]) == len(events)


def check_alive(engine, seen, number):
    """After the faults: nothing hangs, nothing leaks, the next turn starts, one and the same."""
    assert engine.request("GET", "/health", secret=None).status == 200
    # What a turn could not see while it was stopped it says once.
    wait_for(lambda: engine.post("/codex/interrupt").status == 200)
    turn = engine.status()["turn"]
    assert turn is None or turn["status"] != "running", turn
    client = Client(engine, seen, "check %d" % number, "Check %d" % number)
    assert client.run(), (client.answers, client.last)
    assert engine.events(client.turn)[-2].type == "turn.completed"
    assert engine.status()["turn"]["status"] == "completed"
    engine.settle()


def live(engine, seen, number, steps=TURN):
    """A turn's life under the faults: sent, followed, looked at, and another one interrupted."""
    message = script(*steps, {"touch": os.path.join(engine.folder, "ran-%d" % number)})
    client = Client(engine, seen, "key %d" % number, message)
    done = client.run(2.0)
    for method, path in (("GET", "/codex/status"), ("GET", "/codex/history"),
                         ("POST", "/codex/interrupt"), ("GET", "/health")):
        with contextlib.suppress(*BROKEN):
            answer = engine.request(method, path)
            assert answer.status == 200 or answer.status >= 500, (path, answer.status, answer.body)
            assert b"Internal server error" not in answer.body, path    # it says what it is
    engine.heal()
    assert done or client.run(), (client.answers, client.last)
    return client


@pytest.fixture
def faulty(tmp_path):
    engines = []

    def make(**env):
        engine = FaultyEngine(tmp_path, **env)
        engines.append(engine)
        return engine.start()
    yield make
    for engine in engines:
        engine.heal()
        engine.stop()


KINDS = ["open", "os.open", "os.close", "os.pwrite", "os.posix_fallocate", "os.pipe", "fork",
         "thread", "epoll"]


@pytest.mark.parametrize("seed", [1, 2])
def test_faults_at_random(faulty, seed):
    """Whatever fails, and however much at once."""
    engine, seen = faulty(), {}
    live(engine, seen, 0)
    for number, probability in enumerate((0.3, 0.1, 0.03, 0.1, 0.03), 1):
        engine.fail(seed=100 * seed + number, probability=probability, threads=ALL)
        live(engine, seen, number)
        check_alive(engine, seen, number)
    check_seen(engine, seen)
    assert engine.stop() == 0
    engine.start()
    check_seen(engine, seen)
    prompts = [prompt for prompt in engine.prompts() if prompt]     # a failed start gives none
    assert len(prompts) == len(set(prompts)), "a message was begun twice"


def test_one_fault_of_each_kind(faulty):
    engine, seen = faulty(), {}
    live(engine, seen, 0)
    plans = [{"calls": [kind], "nth": 1 + number % 3} for number, kind in enumerate(KINDS)]
    plans += [{"calls": ["os.write"], "errors": ["MemoryError"], "nth": nth, "threads": "turn .*"}
              for nth in (2, 3)]            # the main thread is told of the turn's start and end
    for number, plan in enumerate(plans, 1):
        engine.fail(**dict({"seed": number, "threads": ALL}, **plan))
        live(engine, seen, number)
        check_alive(engine, seen, number)
    check_seen(engine, seen)
    engine.kill()
    engine.start()
    check_seen(engine, seen)


@pytest.mark.parametrize("path", ["/codex/history", "/codex/events?turn=1"])
def test_what_cannot_be_looked_at_is_closed(faulty, path):
    engine = faulty()
    live(engine, {}, 0)
    engine.settle()
    for nth in (1, 2, 3):
        engine.fail(calls=["os.fstat"], nth=nth, threads="connection.*", errors=["EIO"])
        with contextlib.suppress(*BROKEN):
            engine.request("GET", path)
        engine.heal()
        engine.settle()


def test_a_failure_whose_traceback_cannot_be_shown(faulty):
    engine = faulty()
    for calls in (["os.listdir"], ["os.listdir", "os.stat"]):   # a known source is looked at again
        engine.fail(calls=calls, probability=1, threads="connection.*", errors=["MemoryError"])
        assert engine.request("GET", "/codex/turns").status == 503
        engine.heal()
    wait_for(lambda: "GET /codex/turns failed (the rest can't be shown: Mem" in engine.log())


def test_a_body_that_cannot_be_begun_is_503(faulty, tmp_path):
    """Its pieces are read after the application has answered."""
    engine = faulty()
    gate = str(tmp_path / "gate")
    engine.start_turn(script(BEGIN, {"wait_for": gate}, {"complete": True}))
    engine.start_turn("Hello", when_busy="queue")
    engine.fail(calls=["os.fstat"], probability=1, threads="connection.*", errors=["MemoryError"])
    assert engine.request("GET", "/codex/queue").status == 503
    engine.heal()
    assert engine.request("GET", "/codex/queue").status == 200
    open(gate, "w").close()


def test_a_stream_that_cannot_read_the_next_log_ends(faulty, tmp_path):
    """Without a failure of the server, and its client comes back."""
    engine, gate = faulty(), str(tmp_path / "gate")
    engine.start_turn(script(BEGIN, {"wait_for": gate}, {"complete": True}))
    engine.start_turn("two", when_busy="queue")
    connection, response = engine.open("GET", "/codex/events?follow=1")
    with contextlib.closing(connection):
        stream = read_events(response)
        seen = [next(stream)]
        engine.fail(calls=["os.fstat"], probability=1, threads="connection.*",
                    errors=["MemoryError"])
        open(gate, "w").close()
        seen += stream
    engine.heal()
    assert seen == engine.events(1) and engine.events(2)[-2].type == "turn.completed"
    assert "the application failed" not in engine.log()


def test_a_disk_that_loses_a_running_turns_log_is_named(faulty):
    engine = faulty()
    engine.fail(calls=["os.fdatasync"], probability=1, threads="sync", errors=["EIO"])
    turn = engine.start_turn(script(BEGIN, {"sleep": 120}))
    wait_for(lambda: "turn %d: its log may not outlive a power cut: Input/output error" % turn
             in engine.log())


def test_a_log_that_can_be_neither_written_nor_deleted(faulty):
    """Its turn never was, and it is not left open."""
    engine = faulty()
    for errors in (["MemoryError"], ["EIO"]):
        engine.fail(calls=["os.pwrite", "os.unlink"], probability=1, threads="turn .*",
                    errors=errors)
        assert engine.post("/codex/send", {"message": "Hello"}).status == 503
        engine.heal()
        engine.settle()
    assert engine.send("Hello")[0].id == "1.1"


def test_a_disk_that_keeps_a_message_that_was_taken_out_is_told(faulty, tmp_path):
    """The next engine would run it."""
    engine, gate = faulty(), tmp_path / "gate"
    engine.start_turn(script(BEGIN, {"wait_for": str(gate)}, {"complete": True}))
    engine.start_turn("Hello", when_busy="queue")
    engine.fail(calls=["os.pwrite", "os.unlink"], probability=1, threads="connection.*|sync",
                errors=["EIO"])
    for path in ("/codex/queue/2", "/codex/queue", "/codex/queue/2"):
        answer = engine.request("DELETE", path)
        assert answer.status == 503 and "restarts" in answer.json()["details"], engine.log()
    assert engine.get("/codex/queue").json() == {"turns": []}
    assert [found["details"] for found in engine.status()["problems"]
            if found["problem"] == "the ending of turn 2 can't be written"] == [
        "Input/output error: see the disk of REPLICAS_ENGINE_STATE"]
    engine.heal()
    wait_for(lambda: engine.request("DELETE", "/codex/queue").status == 200)
    engine.kill()
    engine.start()
    assert engine.events(2)[-2].json()["error"]["code"] == "cancelled"
    assert engine.send("on")[-2].type == "turn.completed" and "Hello" not in engine.prompts()


@pytest.mark.parametrize("call, error, most", [
    ("os.open", "MemoryError", 3), ("os.fsync", "EIO", 2), ("os.write", "MemoryError", 3),
    ("os.read", "MemoryError", 4)])
def test_a_message_is_begun_once(faulty, call, error, most):
    """Once Codex may have read it, no failure says that it was not begun."""
    engine, seen = faulty(), {}
    for nth in range(1, most + 1):
        engine.fail(calls=[call], nth=nth, threads="turn .*", errors=[error], delay=1.0)
        client = Client(engine, seen, "key %d" % nth, script(
            *TURN, {"touch": os.path.join(engine.folder, "ran-%d" % nth)}))
        client.run(5.0)
        engine.heal()
        assert client.run(), (client.answers, client.last)
        prompts = [prompt for prompt in engine.prompts() if prompt]
        assert len(prompts) == len(set(prompts)), (nth, client.answers)


def start_under_faults(engine, **plan):
    """Whether it started in spite of them; if not it said why."""
    begin = len(engine.log())
    engine.fail(**plan)
    engine.start(wait=False)

    def outcome():
        return engine.process.poll() is not None or "is listening" in engine.log()[begin:]
    wait_for(outcome)
    if engine.process.poll() is None:
        engine.heal()
        assert engine.stop() == 0
        return True
    engine.heal()
    assert engine.process.returncode in (1, 2), engine.log()[begin:]
    assert re.search("error|MemoryError", engine.log()[begin:])
    return False


@pytest.mark.parametrize("kind, most", [("open", 6), ("os.open", 6), ("os.listdir", 3),
                                        ("os.stat", 4), ("os.lstat", 3), ("os.fstat", 3)])
def test_faults_at_the_start(faulty, kind, most):
    """Nothing is forgotten and nothing set aside because it couldn't be seen."""
    engine, seen = faulty(), {}
    for number in range(3):
        live(engine, seen, number)
    status = engine.status()
    assert engine.stop() == 0
    for nth in range(1, most):
        start_under_faults(engine, calls=[kind], nth=nth, seed=nth)
        assert not [name for name in os.listdir(os.path.join(engine.state, "turns"))
                    if not name.endswith(".log")]
    engine.start()
    check_seen(engine, seen)
    assert engine.status()["thread_id"] == status["thread_id"]
    assert engine.send("Hello")[0].id == "%d.1" % (status["turn"]["id"] + 1)
