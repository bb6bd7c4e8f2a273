"""The event stream: what Codex printed, byte for byte, whatever Codex did; and taking it up again."""

import base64
import json
import socket
import threading

import pytest

import harness
from harness import check_stream, read_events, script, wait_for

TERMINAL = ("turn.completed", "turn.failed")


def is_event(line):
    try:
        return isinstance(json.loads(line.decode())["type"], str)
    except (ValueError, TypeError, KeyError):
        return False


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One engine for the many runs that only look at their own turn."""
    engine = harness.Engine(tmp_path_factory.mktemp("shared")).start()
    yield engine
    assert engine.stop() == 0


@pytest.mark.parametrize("version, scenario", harness.recordings())
def test_every_recorded_run(shared, version, scenario):
    shared.post("/codex/reset")
    events = shared.send(script({"replay": "%s/%s" % (version, scenario)}))
    lines = [line for line in harness.recording(version, scenario).split(b"\n") if line]
    assert all(map(is_event, lines))
    assert [event.data.encode() for event in events[:len(lines)]] == lines
    assert [event.type for event in events[:len(lines)]] == [json.loads(x.decode())["type"]
                                                             for x in lines]
    added = [event.type for event in events[len(lines):]]
    if lines and json.loads(lines[-1].decode())["type"] in TERMINAL:
        assert added == ["done"]
    else:
        status = json.loads(harness.recording(version, scenario, "run.json"))["exit_status"]
        assert added == ["error", "turn.failed", "done"]
        error = events[-2].json()["error"]
        assert error["code"] == "exited" and error["message"] == events[-3].json()["message"]
        assert ("status %d" % status if status >= 0 else "SIGTERM") in error["message"]


START = {"thread": "resume"}
MESSAGE = {"type": "item.completed", "item": {"id": "item_0", "type": "agent_message", "text": "x"}}
RAW = [("\u2028 \u2029 \u0085 raw").encode(), b"caf\xc3\xa9"]


def raw(data):
    return {"raw_base64": base64.b64encode(data).decode()}


# what Codex does -> the types of the events, and what the message of a failure holds
MISBEHAVIOURS = {
    "exit 0 without an ending": (
        [START, {"exit": 0}], ["thread.started", "error", "turn.failed"], "status 0"),
    "exit 1 without a word": ([{"exit": 1}], ["error", "turn.failed"], "status 1"),
    "exit 1 with stderr": (
        [{"stderr": "no such thing"}, {"exit": 1}], ["error", "turn.failed"], "no such thing"),
    "exit 1 after its ending": (
        [START, {"complete": True}, {"exit": 1}], ["thread.started", "turn.completed"], None),
    "killed": ([START, {"kill": "SIGKILL"}], ["thread.started", "error", "turn.failed"], "SIGKILL"),
    "segmentation fault": (
        [START, {"kill": "SIGSEGV"}], ["thread.started", "error", "turn.failed"], "SIGSEGV"),
    "its own failure": ([START, {"fail": "no"}], ["thread.started", "error", "turn.failed"], "no"),
    "lines that are no events": (
        [START, {"line": "hello"}, {"line": "{}"}, {"line": '{"type":5}'}, {"line": "[1]"},
         {"line": '{"type":"a b"}'}, {"line": '{"type":""}'}, {"line": '{"type":"x\\ny"}'},
         {"line": '"type"'}, {"line": '{"type":"done"}'}, {"line": '{"type":"a","n":NaN}'},
         {"line": "[" * 5000}, {"line": '{"type":"error"'}, {"complete": True}],
        ["thread.started", "turn.completed"], None),
    "empty lines": (
        [START, {"line": ""}, {"line": "  "}, {"line": "\r"}, {"complete": True}],
        ["thread.started", "turn.completed"], None),
    "types that nobody knows": (
        [START, {"event": {"type": "a.B_c/d-9"}}, {"complete": True}],
        ["thread.started", "a.B_c/d-9", "turn.completed"], None),
    "more after its ending": (
        [START, {"complete": True}, {"event": MESSAGE}, {"complete": True}],
        ["thread.started", "turn.completed"], None),
    "stdout closed early": (
        [START, {"complete": True}, {"close_stdout": True}, {"exit": 0}],
        ["thread.started", "turn.completed"], None),
    "a thread id that is none": (
        [{"event": {"type": "thread.started", "thread_id": "--last"}}, {"complete": True}],
        ["thread.started", "turn.completed"], None),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_whatever_codex_does(shared, name):
    steps, types, message = MISBEHAVIOURS[name]
    shared.post("/codex/reset")
    events = shared.send(script(*steps))
    assert [event.type for event in events] == types + ["done"]
    if message:
        assert message in events[-2].json()["error"]["message"]
    else:
        assert events[-2].type == "turn.completed"


def test_the_text_of_a_line_is_not_touched(shared):
    lines = ['{"type":"item.completed","item":{"id":1,"id":"2","n":1.0e+2,"big":%s}}' % ("9" * 5000),
             '{ "type" : "error" , "message" : "\u2028\u2029\u0085\\u2028\\ud800 \u00e9\U0001f600" }',
             '{"message":"type comes last","type":"error"}', '\t{"type":"error"} ']
    events = shared.send(script(START, *([{"line": line} for line in lines] + [{"complete": True}])))
    assert [event.data for event in events[1:5]] == [line.strip() for line in lines]


def test_lines_that_are_not_utf8_get_the_replacement_character(shared):
    events = shared.send(script(START, raw(b'{"type":"error","message":"a\xff\xfeb"}\n'),
                                {"complete": True}))
    assert events[1].json()["message"] == "a\ufffd\ufffdb"


def test_a_carriage_return_within_a_line(shared):
    events = shared.send(script(START, raw(b'{"type":"error",\r"message":"x"}\r\n'),
                                {"complete": True}))
    assert events[1].json() == {"type": "error", "message": "x"}


def test_a_last_line_without_newline(shared):
    events = shared.send(script(START, raw(b'{"type":"turn.completed","usage":{}}')))
    assert events[1].data == '{"type":"turn.completed","usage":{}}'
    events = shared.send(script(START, raw(b'{"type":"turn.comple')))
    assert events[-2].json()["error"]["code"] == "exited"


def test_a_line_of_ten_megabytes(shared):
    events = shared.send(script(START, {"big": {"size": 10000000, "type": "item.completed"}},
                                {"complete": True}))
    assert len(events[1].data) > 10000000 and events[1].json()["type"] == "item.completed"


def test_a_megabyte_of_stderr(shared):
    events = shared.send(script(START, {"stderr_bytes": 1000000}, {"complete": True}))
    assert events[-2].type == "turn.completed"
    events = shared.send(script({"stderr_bytes": 1000000}, {"stderr": "the end"}, {"exit": 3}))
    message = events[-2].json()["error"]["message"]
    assert message.endswith("the end") and len(message) <= 2000


def test_a_grandchild_that_keeps_stdout_open(shared, tmp_path):
    pids = tmp_path / "pids"
    events = shared.send(script(
        START, {"spawn": {"argv": ["sleep", "600"], "stdout": "inherit", "session": True,
                          "pidfile": str(pids)}}, {"complete": True}))
    assert events[-2].type == "turn.completed"
    pid = int(pids.read_text())
    assert harness.is_alive(pid), "what a turn that ended by itself left running stays"
    harness.os.kill(pid, harness.signal.SIGKILL)


def test_stdin_that_is_never_read(make_engine):
    engine = make_engine()
    with open(engine.codex_home + "/stand_in.json", "w") as file:
        file.write(script(START, {"complete": True}))
    events = engine.send("x" * 5000000)
    assert events[-2].type == "turn.completed"


def test_a_message_of_five_megabytes_arrives(engine):
    engine.send("é" * 2500000)
    with open(engine.codex_home + "/stand_in.log") as file:
        read = [json.loads(line) for line in file][-1]
    assert read["prompt_length"] == 2500000


@pytest.mark.parametrize("message", ["-", "--help", "\u2028\x00\ud800 x", " x "])
def test_a_message_is_data(engine, message):
    engine.send(message)
    assert engine.prompts() == [message.replace("\ud800", "\ufffd")]


def test_events_come_as_soon_as_codex_printed_them(engine, tmp_path):
    gate = tmp_path / "gate"
    connection, response = engine.open("POST", "/codex/send", {"message": script(
        START, {"event": MESSAGE}, {"wait_for": str(gate)}, {"complete": True})})
    stream = read_events(response)
    assert [next(stream).type for _ in range(2)] == ["thread.started", "item.completed"]
    assert engine.status()["turn"]["status"] == "running"
    gate.touch()
    assert [event.type for event in stream] == ["turn.completed", "done"]
    connection.close()


# Taking it up again

def numbered(count):
    return script(START, {"count": {"n": count, "size": 100, "pause": 0.001}}, {"complete": True})


def test_a_stream_from_any_event_on(engine):
    whole = engine.send(numbered(20))
    for position, event in enumerate(whole[:-1]):
        assert engine.events(after=event.id) == whole[position + 1:]
        answer = engine.get("/codex/events", **{"Last-Event-ID": event.id})
        assert answer.events() == whole[position + 1:]
    assert engine.events() == engine.events(turn=1) == engine.events(after="1.0") == whole
    assert engine.get("/codex/events?after=" + whole[-1].id).status == 204
    assert engine.get("/codex/events?after=1.%d" % (len(whole) + 1)).status == 400
    # the query wins over the header
    answer = engine.get("/codex/events?after=" + whole[-2].id, **{"Last-Event-ID": "1.1"})
    assert answer.events() == whole[-1:]


def test_an_older_turn_by_its_last_event(engine):
    first, second = engine.send("one"), engine.send("two")
    assert engine.events() == second
    assert engine.events(turn=1) == first
    assert engine.events(after=first[1].id) == first[2:]


def test_a_client_that_goes_away_at_every_event(engine):
    """A client that reads one event a connection gets what one gets that stays."""
    count = 60
    engine.start_turn(numbered(count))
    got, last = [], "1.0"
    while not got or got[-1].type != "done":
        connection, response = engine.open("GET", "/codex/events?after=" + last)
        got.append(next(read_events(response)))
        last = got[-1].id
        connection.close()
    assert got == engine.events() and len(check_stream(got)) == count + 3


def test_ten_clients_and_one_that_stops_reading(make_engine):
    """The stopped one holds back neither Codex nor the others, and misses nothing later."""
    engine = make_engine(constants={"SEND_TIMEOUT": harness.PATIENCE,
                                    "VANISHED_TIMEOUT": 2 * harness.PATIENCE})
    stopped = socket.create_connection(("127.0.0.1", engine.port))
    size, count = 20000, 400
    engine.start_turn(script(START, {"count": {"n": count, "size": size}}, {"complete": True}))
    stopped.sendall(b"GET /codex/events HTTP/1.1\r\nHost: x\r\nX-Replicas-Engine-Secret: %s\r\n"
                    b"Connection: close\r\n\r\n" % harness.SECRET.encode())
    results = []
    threads = [threading.Thread(target=lambda: results.append(engine.events())) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(harness.PATIENCE)
    assert len(results) == 10 and all(events == results[0] for events in results)
    assert len(check_stream(results[0])) == count + 3
    received = b""
    while True:
        piece = stopped.recv(1 << 20)
        if not piece:
            break
        received += piece
    stopped.close()
    assert received.count(b"\nid: 1.") == count + 3 and received.endswith(b"0\r\n\r\n")


def test_a_client_that_goes_away_does_not_stop_the_turn(engine, tmp_path):
    gate = tmp_path / "gate"
    connection, response = engine.open("POST", "/codex/send", {"message": script(
        START, {"wait_for": str(gate)}, {"event": MESSAGE}, {"complete": True})})
    assert next(read_events(response)).type == "thread.started"
    connection.close()
    gate.touch()
    assert engine.wait_for_turn()["status"] == "completed"
    assert len(check_stream(engine.events())) == 4


# One turn at a time

def test_two_sends_at_once_forty_times(engine):
    for _ in range(40):
        barrier, answers = threading.Barrier(2), []

        def send():
            connection = engine.connect()
            connection.connect()
            barrier.wait()
            headers = {"X-Replicas-Engine-Secret": harness.SECRET, "Prefer": "respond-async"}
            body = json.dumps({"message": script(START, {"sleep": 30})})
            connection.request("POST", "/codex/send", body, headers)
            answers.append(harness.Answer(connection.getresponse()))
            connection.close()

        threads = [threading.Thread(target=send) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(harness.PATIENCE)
        assert sorted(answer.status for answer in answers) == [202, 409]
        accepted, refused = sorted(answers, key=lambda answer: answer.status)
        assert refused.json()["error"] == "A turn is already in progress"
        assert refused.json()["turn_id"] == accepted.json()["turn_id"]
        assert engine.post("/codex/interrupt").json()["turn_id"] == accepted.json()["turn_id"]
    assert len(engine.calls()) <= 40


def test_the_next_message_may_follow_done_at_once(engine):
    connection = engine.connect()
    headers = {"X-Replicas-Engine-Secret": harness.SECRET}
    for turn in range(1, 21):
        connection.request("POST", "/codex/send", json.dumps({"message": "hi"}), headers)
        answer = harness.Answer(connection.getresponse())
        assert answer.status == 200 and answer.headers["X-Replicas-Turn-Id"] == str(turn)
        check_stream(answer.events())
    connection.close()


def test_the_thread_goes_on_and_reset_begins_another(engine):
    first = engine.send("one")[0].json()["thread_id"]
    assert engine.send("two")[0].json()["thread_id"] == first
    assert engine.restart().status()["thread_id"] == first
    assert engine.send("three")[0].json()["thread_id"] == first
    assert engine.post("/codex/reset").json() == {"message": "Thread reset successfully",
                                                  "success": True}
    assert engine.status()["thread_id"] is None and not engine.status()["has_active_thread"]
    assert engine.get("/codex/history").json() == {"message": "No active thread",
                                                   "thread_id": None, "events": []}
    events = engine.send("four")
    assert events[0].json()["thread_id"] != first and events[0].id == "4.1"


def test_a_comment_comes_while_nothing_happens(make_engine, tmp_path):
    gate = tmp_path / "gate"
    engine = make_engine()
    connection, response = engine.open("POST", "/codex/send", {"message": script(
        {"wait_for": str(gate)}, START, {"complete": True})})
    assert response.readline() == b": keep-alive\n"
    gate.touch()
    assert [event.type for event in read_events(response)][-1] == "done"
    connection.close()


def test_no_thread_stays_for_a_reader_that_left(engine, tmp_path):
    gate = tmp_path / "gate"
    engine.start_turn(script(START, {"wait_for": str(gate)}, {"complete": True}))

    def threads():
        return harness.status_of(engine.process.pid, "Threads")

    idle = threads()
    for _ in range(10):
        connection, response = engine.open("GET", "/codex/events")
        assert next(read_events(response)).type == "thread.started"
        connection.close()
    wait_for(lambda: threads() <= idle + 5, "the readers' threads to end")    # or an engine's own
    gate.touch()
    engine.wait_for_turn()


# The largest events

SIZE = 32 * 1024 * 1024


def fill(begin, unit, end, size=SIZE):
    """A line with as many of `unit` as fit into it."""
    begin, end = b'{"type":"x.large","value":' + begin, end + b"}"
    return begin + unit * ((size - len(begin) - len(end)) // len(unit)) + end


@pytest.mark.parametrize("parts", [
    (b'"', b"[,{", b'"'), (b'"', "\u2705".encode(), b'"'), (b"[", b'"%b",' % (b"x" * 140), b"0]"),
    (b'"', b"x", b'"', SIZE + 1)], ids=["text", "what is not ASCII", "many texts", "too long"])
def test_an_event_of_32_mib(make_engine, tmp_path, parts):
    """It takes four times its memory, and reaches the client whole; a longer one is skipped."""
    large = fill(*parts)
    codex, lines = tmp_path / "codex", tmp_path / "lines"
    codex.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo codex-cli 0.169.0; exit; fi\n'
                     'cat >/dev/null; cat %s\n' % lines)
    codex.chmod(0o755)
    engine = make_engine(CODEX_PATH=str(codex))
    for line in (b'{"type":"x.small"}', large):
        lines.write_bytes(line + b'\n{"type":"turn.completed","usage":{}}\n')
        before = harness.status_of(engine.process.pid, "VmHWM")
        turn = engine.start_turn("Hello")
        wait_for(lambda: "turn %d ended: turn.completed" % turn in engine.log())
    growth = (harness.status_of(engine.process.pid, "VmHWM") - before) * 1024
    assert growth < 4.1 * SIZE
    events = engine.events(turn)
    if len(large) > SIZE:
        wait_for(lambda: "skipped a line: longer than 33554432 bytes" in engine.log())
        assert len(events) == 2
    else:
        assert len(events) == 3 and events[0].data.encode() == large
