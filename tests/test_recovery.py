"""The engine's end and its start after anything: SIGTERM, kill -9, a full disk."""

import contextlib
import errno
import http.client
import json
import os
import shutil
import signal
import socket
import threading
import time

import pytest

import campaign
import conftest
import harness
import replicas_engine
from harness import check_stream, is_alive, read_events, script, wait_for

BEGIN = {"thread": "resume"}
HANG = {"sleep": 120}
IGNORE = {"ignore": ["SIGINT", "SIGTERM"]}


class Reader(threading.Thread):
    """A client that reads a stream as an EventSource does: it comes back until `done`."""

    def __init__(self, engine, turn, reconnects=True):
        super().__init__(daemon=True)
        self.engine, self.turn = engine, turn
        self.reconnects = reconnects
        self.events = []
        self.problem = None
        self.start()

    def run(self):
        try:
            while not (self.events and self.events[-1].type == "done"):
                with contextlib.suppress(OSError, http.client.HTTPException):
                    self.read()
                if not self.reconnects:
                    break
                time.sleep(0.02)
        except BaseException as error:
            self.problem = error

    def read(self):
        headers = {"Last-Event-ID": self.events[-1].id} if self.events else {}
        connection, response = self.engine.open(
            "GET", "/codex/events?turn=%d" % self.turn, headers=headers)
        try:
            assert response.status == 200, (response.status, headers, response.read())
            for event in read_events(response):
                self.events.append(event)
        finally:
            connection.close()

    def result(self):
        self.join(harness.PATIENCE)
        assert not self.is_alive() and self.problem is None, (self.problem, self.events[-3:])
        return check_stream(self.events)


def numbers_in(events):
    """The numbers of the messages that the step `count` printed."""
    return [int(event.json()["item"]["text"].split()[0]) for event in events
            if event.type == "item.completed"]


def code_of(events):
    return events[-2].json().get("error", {}).get("code")


def check_state(engine):
    """The state directory of an engine that runs no turn: whole files and no others."""
    assert set(os.listdir(engine.state)) == {"lock", "turns"}
    names = os.listdir(os.path.join(engine.state, "turns"))
    resets = [name for name in names if name.endswith(".reset")]
    assert len(resets) <= 1
    for name in set(names) - set(resets):
        assert name.endswith(".log") and name[:-4].isdigit(), name
        with open(os.path.join(engine.state, "turns", name), "rb") as file:
            head, _, body = file.read().partition(b"\n\n")
        assert json.loads(head[2:].decode())["turn"] == int(name[:-4])
        # The room for an ending stays behind it where the engine was killed between the two.
        check_stream(harness.parse_events(body.rstrip(b"\0")))


# SIGTERM and SIGINT

def phases(tmp_path):
    """What Codex does, and after how many events the signal comes."""
    gone = str(tmp_path / "never")
    return {"before the first event": ([IGNORE, HANG], 0),
            "between events": ([IGNORE, BEGIN, {"event": {"type": "turn.started"}}, HANG], 2),
            "in a stream of events": ([BEGIN, {"count": {"n": 5000, "pause": 0.01}}], 5),
            "after the end": ([BEGIN, {"complete": True}, IGNORE, {"wait_for": gone}], 2)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("phase", ["before the first event", "between events",
                                   "in a stream of events", "after the end"])
def test_a_signal_in_each_phase_of_a_turn(make_engine, tmp_path, phase, number):
    takes_long = phase == "between events"      # for whoever sends meanwhile
    engine = make_engine(PORT=str(harness.free_port()), constants={
        "CLOSE_TIMEOUT": harness.PATIENCE, "INTERRUPT_PATIENCE": 8.0 if takes_long else 3.0})
    steps, count = phases(tmp_path)[phase]
    turn = engine.start_turn(script(*steps))
    readers = [Reader(engine, turn, reconnects=False) for _ in range(10)]
    codex = wait_for(engine.calls)[-1]["pid"]
    wait_for(lambda: all(len(reader.events) >= count for reader in readers))
    wait_for(lambda: len(engine.log().split("POST /codex/send 202")) > 1)
    begin = time.monotonic()
    engine.process.send_signal(number)
    refused = 0
    while engine.process.poll() is None:        # no new turn meanwhile
        assert time.monotonic() - begin < harness.PATIENCE
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = engine.post("/codex/send", {"message": "Hello"})
            if answer.status != 409:            # the signal may not have been seen yet
                assert answer.status == 503 and answer.headers["Retry-After"].isdigit()
                assert answer.headers["Connection"] == "close"
                refused += 1
        time.sleep(0.02)
    assert engine.process.returncode == 0
    assert refused or not takes_long
    streams = [reader.result() for reader in readers]
    assert all(stream == streams[0] for stream in streams)
    assert code_of(streams[0]) == ("shutdown" if phase != "after the end" else None)
    assert not is_alive(codex)
    check_state(engine)
    thread = streams[0][0].json().get("thread_id") if count else None
    engine.start()
    assert engine.events(turn) == streams[0]
    assert engine.status()["thread_id"] == thread
    assert engine.send("Hello")[0].json()["thread_id"] == thread or thread is None
    assert len(engine.calls()) == 2


def test_a_signal_while_idle(engine):
    assert engine.stop() == 0
    engine.start()
    assert engine.stop(signal.SIGINT) == 0


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM),
                                           (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal(make_engine, first, second):
    engine = make_engine(constants={"INTERRUPT_PATIENCE": harness.PATIENCE})    # it isn't over yet
    turn = engine.start_turn(script(IGNORE, BEGIN, HANG))
    codex = wait_for(engine.calls)[-1]["pid"]
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    engine.process.send_signal(first)
    wait_for(lambda: "stopping" in engine.log())
    engine.process.send_signal(second)
    assert engine.process.wait() == 128 + second
    engine.program = [*engine.program, "INTERRUPT_PATIENCE=3"]
    engine.start()
    assert code_of(Reader(engine, turn).result()) == "engine_restarted"
    assert not is_alive(codex)


def test_a_client_that_reads_nothing_does_not_hold_up_the_end(engine):
    turn = engine.start_turn(script(BEGIN, {"count": {"n": 200, "size": 100000}}, HANG))
    wait_for(lambda: engine.status()["turn"]["last_event_id"] == "%d.201" % turn)
    with socket.create_connection(("127.0.0.1", engine.port)) as sock:
        sock.sendall(("GET /codex/events HTTP/1.1\r\nHost: x\r\n"
                      "X-Replicas-Engine-Secret: %s\r\n\r\n" % harness.SECRET).encode())
        assert sock.recv(10)
        assert engine.stop() == 0


# kill -9

def test_kill_at_thirty_moments_of_a_turn(make_engine, tmp_path):
    """Every event that Codex printed and the engine read is there, once and in order."""
    engine = make_engine(PORT=str(harness.free_port()))     # which is nobody's meanwhile
    thread, n = None, 60
    for moment in [moment for moment in range(50) if moment % 5 in (0, 2, 4)]:
        go_on = str(tmp_path / ("go-on-%d" % moment))
        steps = [BEGIN, {"count": {"n": moment, "size": 100}}, {"wait_for": go_on},
                 {"count": {"n": n - moment, "size": 3000 if moment % 2 else 100}},
                 {"complete": True}]
        if moment % 25 == 9:
            steps.insert(0, IGNORE)
        turn = engine.start_turn(script(*steps))
        reader = Reader(engine, turn)
        if moment:
            wait_for(lambda: len(reader.events) > moment)
        codex = wait_for(lambda: [c for c in engine.calls() if c["argv"]])[-1]["pid"]
        if moment % 25 == 4:
            os.kill(codex, signal.SIGSTOP)
        open(go_on, "w").close()
        time.sleep(moment % 7 * 0.004)
        engine.kill()
        seen = len(reader.events)
        engine.start()
        events = reader.result()
        assert len(events) >= seen
        told = numbers_in(events)
        assert told[:moment] == list(range(moment))
        assert told[moment:] == list(range(len(told) - moment))
        assert code_of(events) == "engine_restarted" or events[-2].type == "turn.completed"
        assert not is_alive(codex)
        if thread:
            assert events[0].json()["thread_id"] == thread
        if moment:
            thread = engine.status()["thread_id"]
            assert events[0].json()["thread_id"] == thread
        else:                               # Codex may have had no rollout of it yet
            assert engine.post("/codex/reset").status == 200
        assert engine.events(turn) == events
        wait_for(lambda: engine.status()["turn"]["status"] != "running")
        check_state(engine)
    assert engine.send("Hello")[0].json()["thread_id"] == thread
    assert len(engine.calls()) == 31


def test_kill_in_the_middle_of_a_start(engine):
    """Before the turn has a log Codex has no prompt, so the message was not begun."""
    for moment in range(12):
        connection = engine.connect()
        connection.request("POST", "/codex/send", json.dumps({"message": script(BEGIN, HANG)}),
                           {"X-Replicas-Engine-Secret": harness.SECRET})
        time.sleep(moment * 0.002)
        engine.kill()
        connection.close()
        engine.start()
        turns = os.listdir(os.path.join(engine.state, "turns"))
        latest = max([int(name[:-4]) for name in turns if name.endswith(".log")], default=0)
        if latest:
            assert code_of(Reader(engine, latest).result()) == "engine_restarted"
        wait_for(lambda: not [call for call in engine.calls() if is_alive(call["pid"])])
        assert engine.post("/codex/interrupt").json()["interrupted"] is False


def test_kill_while_the_earlier_turn_is_still_being_put_in_order(make_engine):
    """No turn may start before what outlived the engine is stopped."""
    engine = make_engine(constants={"INTERRUPT_PATIENCE": harness.PATIENCE})    # so long it lasts
    turn = engine.start_turn(script(IGNORE, BEGIN, HANG))
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    codex = engine.calls()[-1]["pid"]
    for _ in range(3):
        engine.kill()
        engine.start()
        assert is_alive(codex)
    engine.kill()
    engine.program = [*engine.program, "INTERRUPT_PATIENCE=3"]
    engine.start()
    events = engine.send("Hello")
    assert not is_alive(codex)
    assert events[0].id == "%d.1" % (turn + 1)
    assert code_of(engine.events(turn)) == "engine_restarted"


def test_a_signal_while_the_earlier_turn_is_being_put_in_order(engine):
    turn = engine.start_turn(script(IGNORE, BEGIN, HANG))
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    codex = engine.calls()[-1]["pid"]
    engine.kill()
    engine.start()
    assert engine.stop() == 0
    assert not is_alive(codex)
    check_state(engine)
    engine.start()
    assert code_of(engine.events(turn)) == "engine_restarted"


def test_what_a_killed_engines_codex_started(engine):
    number = "4100.%09d" % os.getpid()
    sleeper = {"spawn": {"argv": ["sleep", number], "session": True, "double_fork": True,
                         "stdout": "null", "pidfile": os.path.join(engine.folder, "pids")}}
    engine.start_turn(script(BEGIN, sleeper, HANG))
    wait_for(lambda: os.path.exists(os.path.join(engine.folder, "pids"))
             and os.path.getsize(os.path.join(engine.folder, "pids")))
    with open(os.path.join(engine.folder, "pids"), encoding="ascii") as file:
        pid = int(file.read())
    engine.kill()
    assert is_alive(pid)
    engine.start()
    engine.send("Hello")
    assert not is_alive(pid)


def test_a_log_that_breaks_off_in_its_ending(engine):
    """The ending that Codex gave stays the turn's ending."""
    turn = int(engine.send("Hello")[0].id.partition(".")[0])
    whole = engine.events(turn)
    engine.stop()
    path = os.path.join(engine.state, "turns", "%d.log" % turn)
    with open(path, "rb") as file:
        data = file.read()
    done = data.index(b"\n\nid: %d.%d\n" % (turn, len(whole))) + 2
    before = data.index(b"\n\nid: %d.%d\n" % (turn, len(whole) - 1)) + 2
    head = data.index(b"\n\n") + 2
    for cut in (len(data), len(data) - 1, done + 3, done, done - 1, before + 9, before, head, 0):
        with open(path, "wb") as file:
            file.write(data[:cut])
        engine.start()
        if cut == 0:
            assert engine.get("/codex/events?turn=%d" % turn).status == 404
        else:
            events = Reader(engine, turn).result()
            count = len(whole) if cut >= done else len(whole) - 2 if cut >= before else 0
            assert events[:count] == whole[:count]
            if cut < done:
                assert code_of(events) == "engine_restarted"
            else:
                assert events == whole
        assert engine.send("And on")[-2].type == "turn.completed"
        assert engine.stop() == 0
        for name in os.listdir(os.path.dirname(path)):
            if name != os.path.basename(path):
                os.unlink(os.path.join(os.path.dirname(path), name))


def cut_power(engine, turn, keep):
    """As a power cut in the turn leaves its log: of another boot, and with `keep` events."""
    engine.kill()
    path = os.path.join(engine.state, "turns", "%d.log" % turn)
    with open(path, "rb") as file:
        content = file.read()
    boot = json.loads(content.partition(b"\n")[0][2:].decode())["boot"]
    end = content.index(b"id: %d.%d\n" % (turn, keep + 1))
    with open(path, "wb") as file:
        file.write(content[:end].replace(boot.encode(), b"00000000-0000-4000-8000-000000000000", 1)
                   + b"\0" * 5000)
    engine.start()


@pytest.mark.parametrize("keep", [0, 1, 7])
def test_a_power_cut_in_a_turn(engine, keep):
    """No id that a client may have seen is given to another event."""
    turn = engine.start_turn(script(BEGIN, {"count": {"n": 20}}, HANG))
    wait_for(lambda: engine.status()["turn"]["last_event_id"] == "%d.21" % turn)
    seen = []
    with contextlib.closing(engine.open("GET", "/codex/events")[1]) as response:
        for event in read_events(response):
            seen.append(event)
            if len(seen) == 21:
                break
    cut_power(engine, turn, keep)
    events = engine.events(turn)
    assert events[:keep] == seen[:keep]
    ids = ["%d.%d" % (turn, keep + 1000000 + n) for n in (1, 2, 3)]
    assert [event.id for event in events[keep:]] == ids
    assert code_of(events) == "engine_restarted"
    for number in range(keep, 22):              # wherever a client was, it gets what comes next
        assert engine.events(turn, after="%d.%d" % (turn, number)) == events[keep:]
    assert engine.events(turn, after="%d.2" % turn)[-1].type == "done"
    assert engine.get("/codex/events?after=" + ids[2]).status == 204
    assert engine.get("/codex/events?after=%d.2000000" % turn).status == 400
    assert engine.events(turn, after=ids[0]) == events[keep + 1:]
    status = engine.status()["turn"]
    assert status["last_event_id"] == ids[2] and status["status"] == "failed"
    assert engine.send("Hello")[0].id == "%d.1" % (turn + 1)


def test_an_ending_after_a_power_cut_that_the_disk_does_not_take(tmp_path, monkeypatch):
    """Until it is written nobody sees of its numbers, and whoever waits for it goes on waiting."""
    header = {"turn": 1, "boot": "00000000-0000-4000-8000-000000000000"}
    written = replicas_engine.TurnLog.create(str(tmp_path / "1.log"), header)
    written.append([(b"x", b"{}")] * 3)
    found = replicas_engine.TurnLog.open(written.path)

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        for _ in range(2):
            with pytest.raises(OSError):
                found.finish([], lambda: None)
            assert found.last == 3 and found.offset_after(3) == found.size
    found.finish([(b"turn.failed", b"{}")], lambda: None)
    with open(found.path, "rb") as file:
        events = harness.parse_events(file.read().partition(b"\n\n")[2])
    assert [event.id for event in events] == ["1.1", "1.2", "1.3", "1.1000004", "1.1000005"]
    assert found.last == 1000005 and found.offset_after(4) == found.offset_after(3) < found.size
    written.discard()


def thread_of_0_2(engine, content):
    """As replicas-engine 0.2.0 left the thread."""
    with open(os.path.join(engine.state, "thread.json"), "wb") as file:
        file.write(content)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"thread_id": 7}', b"\xff\xfe", b"null",
                                     b"[" * 5000])
def test_a_malformed_thread_file_of_0_2_0(engine, content):
    thread = engine.send("Hello")[0].json()["thread_id"]
    engine.stop()
    thread_of_0_2(engine, content)
    engine.start()
    assert engine.status()["thread_id"] in (thread, None)
    assert engine.send("Hello")[-2].type == "turn.completed"
    assert set(os.listdir(engine.state)) <= {"lock", "turns", "thread.json.broken"}


@pytest.mark.parametrize("turns", [0, 2])
def test_the_thread_of_0_2_0_is_taken_over_once(engine, turns):
    for _ in range(turns):
        engine.send("Hello")
    engine.stop()
    thread_of_0_2(engine, b'{"thread_id":"0199-of-another-turn"}\n')
    engine.start()
    check_state(engine)
    for _ in range(2):
        assert engine.status()["thread_id"] == "0199-of-another-turn"
        engine.restart()
    assert engine.send("Hello")[0].id == "%d.1" % (turns + 1)
    # which is unknown here, so it goes to another one in the end
    assert engine.calls()[-2]["argv"][-2:] == ["resume", "0199-of-another-turn"]
    thread = engine.status()["thread_id"]
    engine.restart()
    assert engine.status()["thread_id"] == thread
    assert engine.post("/codex/reset").status == 200
    engine.restart()
    assert engine.status()["thread_id"] is None
    check_state(engine)


def test_a_thread_that_status_has_named_is_kept(engine, tmp_path):
    """It was shown before it was written, once."""
    for moment in range(10):
        engine.post("/codex/reset")
        go_on = str(tmp_path / ("go-on-%d" % moment))
        engine.start_turn(script({"wait_for": go_on}, BEGIN, HANG))
        open(go_on, "w").close()
        thread = wait_for(lambda: engine.status()["thread_id"])
        engine.kill()
        engine.start()
        assert engine.status()["thread_id"] == thread


def test_logs_of_anybody(engine):
    """Whatever lies in the folder of the turns, the engine serves."""
    engine.send("Hello")
    engine.stop()
    turns = os.path.join(engine.state, "turns")
    contents = {"2": b"", "3": b": {}\n\n", "4": b": {\n\n", "5": b"\x00" * 5000,
                "6": b': {"turn":6}\n\nid: 6.1\nevent: x\ndata: {}\n\n',
                "7": b': {"turn":7}\n\n\n\n\n\n',
                "8": b': {"turn":8,"mark":"x","codex":{"pid":1,"started":1}}\n\nid: 8\n\n',
                "9": b': {"turn":9,"mark":"x","codex":{"pid":1,"started":1}}\n\n'
                     b'id: 9.1\nevent: thread.started\ndata: {"thread_id":[]}\n\n'}
    for name, content in contents.items():
        with open(os.path.join(turns, name + ".log"), "wb") as file:
            file.write(content)
    engine.start()
    assert code_of(Reader(engine, 9).result()) == "engine_restarted"
    assert engine.status()["turn"] is not None
    assert engine.send("Hello")[-2].type == "turn.completed"
    assert engine.get("/codex/events?turn=1").status == 200


@pytest.mark.parametrize("damage", ["rubbish", "a folder"])
def test_no_id_is_given_twice(engine, damage):
    """Whatever has become of the newest turn's log."""
    engine.send("Hello")
    engine.send("Hello")
    engine.stop()
    log = os.path.join(engine.state, "turns", "2.log")
    os.unlink(log)
    if damage == "rubbish":
        with open(log, "wb") as file:
            file.write(b"rubbish")
    else:
        os.mkdir(log)
    for turn in (3, 4):
        engine.start()
        assert engine.send("Hello")[0].id == "%d.1" % turn
        engine.stop()


def test_a_state_directory_that_is_gone(engine, make_engine):
    """Whoever cleans up takes what was kept, but doesn't stop the next turn; and nothing lets
    another engine work there beside this one."""
    engine.send("Hello")
    shutil.rmtree(engine.state)
    assert engine.send("Hello")[-2].type == "turn.completed"
    assert engine.status()["turn"]["status"] == "completed"
    second = make_engine("second", start=False, REPLICAS_ENGINE_STATE=engine.state)
    second.start(wait=False)
    assert second.process.wait(harness.PATIENCE) == 1
    assert "another engine is running" in second.log()
    assert "STATE" not in str(engine.status()["problems"])


def test_on_a_copy_of_a_state_directory_whose_engine_runs(engine, make_engine, tmp_path):
    """A turn there is that engine's, and goes on; what waits is run by both."""
    gate = tmp_path / "gate"
    engine.start_turn(script({"thread": "new"}, {"wait_for": str(gate)}, {"complete": True}))
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    engine.start_turn("next", when_busy="queue")
    second = make_engine("copy", start=False)
    shutil.copytree(engine.state, second.state)
    second.start()
    assert second.events(1)[-2].json()["error"]["code"] == "engine_restarted"
    wait_for(lambda: "the engine with pid %d runs it" % engine.process.pid in second.log())
    gate.touch()
    assert engine.events(1)[-2].type == "turn.completed"
    for each in (engine, second):
        assert each.events(2)[-2].type == "turn.completed" and each.prompts()[-1] == "next"


def test_a_state_directory_that_another_engine_has_taken(engine, make_engine):
    """Which it could, since it was deleted under the first one."""
    engine.send("Hello")
    shutil.rmtree(engine.state)
    second = make_engine("second", REPLICAS_ENGINE_STATE=engine.state)
    answer = engine.post("/codex/send", {"message": "twice"})
    assert answer.status == 503 and "another engine is running" in answer.json()["details"]
    assert second.send("once")[0].id == "1.1"
    assert engine.prompts() == ["Hello"]
    assert "another engine could start" in str(engine.status()["problems"])


def test_a_turn_whose_codex_could_not_be_looked_at(engine):
    """`started` is unknown where /proc hides what it belongs to."""
    engine.send("Hello")
    engine.stop()
    with open(os.path.join(engine.state, "turns", "2.log"), "wb") as file:
        file.write(b': {"turn":2,"mark":"x","codex":{"pid":%d,"started":null}}\n\n' % os.getpid())
    engine.start()
    assert code_of(Reader(engine, 2).result()) == "engine_restarted"
    assert "Traceback" not in engine.log()


# A full disk

def is_full(engine):
    return "its log can't be written" in engine.log()


def test_full_before_the_turn(small_disk):
    engine, disk = small_disk
    thread = engine.send("Hello")[0].json()["thread_id"]
    disk.fill()
    for _ in range(3):
        answer = engine.post("/codex/send", {"message": "Hello again"}, **{"Idempotency-Key": "k"})
        assert answer.status == 503
        assert "No space left" in answer.json()["details"]
    assert engine.post("/codex/interrupt").json()["interrupted"] is False
    assert engine.prompts() == ["Hello"]
    assert len(engine.events(1)) == 5 and engine.status()["turn"]["id"] == 1
    disk.free()
    events = engine.send("Hello again")
    assert events[0].id == "2.1" and events[0].json()["thread_id"] == thread
    check_state(engine)


@pytest.mark.parametrize("room", [0, 4096, 8192, 12288, 40960])
def test_full_in_the_middle_of_a_turn(small_disk, tmp_path, room):
    """Nothing is lost: Codex waits until there is room, and the turn goes on."""
    engine, disk = small_disk
    go_on = str(tmp_path / "go-on")
    # More than the room, a read and a pipe can take, or Codex would come to its end.
    turn = engine.start_turn(script(BEGIN, {"wait_for": go_on}, {"count": {"n": 800, "size": 300}},
                                    {"complete": True}))
    reader = Reader(engine, turn)
    wait_for(lambda: reader.events)
    disk.fill(but=room)
    open(go_on, "w").close()
    wait_for(lambda: is_full(engine))
    assert engine.status()["turn"]["status"] == "running"
    disk.free()
    events = reader.result()
    assert numbers_in(events) == list(range(800)) and events[-2].type == "turn.completed"
    assert engine.events(turn) == events
    assert engine.log().count("its log can't be written") < 5
    check_state(engine)


@pytest.mark.parametrize("then", ["next", "restart", "shutdown", "kill"])
def test_interrupted_while_the_disk_is_full(small_disk, tmp_path, then):
    engine, disk = small_disk
    go_on = str(tmp_path / "go-on")
    turn = engine.start_turn(script(BEGIN, {"wait_for": go_on}, {"count": {"n": 9000}}))
    reader = Reader(engine, turn, reconnects=False)
    wait_for(lambda: reader.events)
    disk.fill()
    open(go_on, "w").close()
    wait_for(lambda: is_full(engine))
    if then != "shutdown":
        assert engine.post("/codex/interrupt").json()["turn_id"] == turn
        assert engine.status()["turn"]["status"] == "interrupted"
        disk.fill()                         # the turn has left some room
        answer = engine.post("/codex/send", {"message": "Hello"})
        assert answer.status == 503 and "No space left" in answer.json()["details"]
    else:
        assert engine.stop() == 0
    events = reader.result()
    assert code_of(events) == {"shutdown": "shutdown"}.get(then, "interrupted")
    if then == "kill":
        engine.kill()
        engine.start()
        assert engine.events(turn) == events        # the disk is still full
    disk.free()
    if then == "restart":
        engine.restart()
    if then == "shutdown":
        engine.start()
    assert engine.events(turn) == events
    assert engine.send("Hello")[-2].type == "turn.completed"
    assert engine.events(turn) == events
    check_state(engine)


@pytest.mark.parametrize("room", [0, 4096, 16384])
def test_killed_while_the_disk_is_full(small_disk, tmp_path, room):
    """No client has seen an event that the engine does not know after its restart."""
    engine, disk = small_disk
    go_on = str(tmp_path / "go-on")
    turn = engine.start_turn(script(IGNORE, BEGIN, {"wait_for": go_on},
                                    {"count": {"n": 9000, "size": 300}}))
    reader = Reader(engine, turn)
    wait_for(lambda: reader.events)
    disk.fill(but=room)
    open(go_on, "w").close()
    wait_for(lambda: is_full(engine))
    codex = engine.calls()[-1]["pid"]
    engine.kill()
    seen = list(reader.events)
    engine.start()
    disk.free()
    events = reader.result()
    assert events[:len(seen)] == seen
    assert numbers_in(events) == list(range(len(numbers_in(events))))
    assert code_of(events) == "engine_restarted"
    assert not is_alive(codex)
    assert engine.send("Hello")[-2].type == "turn.completed"
    assert engine.events(turn) == events
    check_state(engine)


def test_full_at_a_reset(small_disk):
    engine, disk = small_disk
    thread = engine.send("Hello")[0].json()["thread_id"]
    disk.fill()
    answer = engine.post("/codex/reset")        # a name alone takes no room on some file systems
    assert answer.status == 200 or "make room" in answer.json()["details"]
    assert engine.status()["thread_id"] is None
    assert engine.post("/codex/send", {"message": "Hello"}).status == 503
    disk.free()
    assert engine.post("/codex/reset").status == 200
    engine.restart()
    assert engine.status()["thread_id"] is None
    assert engine.send("Hello")[0].json()["thread_id"] != thread
    check_state(engine)


# At random: see tests/campaign.py, which goes on for as long as one likes

def test_kill_at_random_moments(tmp_path):
    told = campaign.run(str(tmp_path), kills=12, seed=1)
    assert told.kills == 12 and told.rereads


def test_kill_at_random_moments_with_a_full_disk(tmp_path):
    try:
        told = campaign.run(str(tmp_path), kills=8, seed=2, size=20000)
    except OSError as error:
        conftest.unavailable(str(error))
    assert told.fillings == 8
