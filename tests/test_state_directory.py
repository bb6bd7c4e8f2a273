"""The state directory, broken or hostile: whatever lies in it costs only itself."""

import fcntl
import json
import os
import socket
import subprocess
import threading
import time

import pytest

import harness
import replicas_engine
from harness import check_stream, is_alive

GIGABYTE = 1024 ** 3


def fifo(path):
    os.mkfifo(path)


def folder(path):
    os.makedirs(os.path.join(path, "with", "something"))


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.open(os.path.dirname(path), os.O_RDONLY)     # a socket's path is short: unix(7)
        try:
            sock.bind("/proc/self/fd/%d/%s" % (here, os.path.basename(path)))
        finally:
            os.close(here)


def link_to_itself(path):
    os.symlink(path, path)


def link_to_nowhere(path):
    os.symlink(path + ".that-is-not-there", path)


def endless_device(path):
    os.symlink("/dev/zero", path)


def huge(path):
    with open(path, "wb") as file:
        file.truncate(3 * GIGABYTE)


def huge_with_header(path):
    with open(path, "wb") as file:
        file.write(b': {"turn":3}\n\n')
        file.seek(3 * GIGABYTE)
        file.write(b"\n\n")


def write(content):
    def write(path):
        with open(path, "wb") as file:
            file.write(content)
    return write


ALIENS = [fifo, folder, unix_socket, link_to_itself, link_to_nowhere, endless_device, huge]
BROKEN_LOGS = {
    "an empty file": b"", "nested": b": " + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n\n",
    "nested lists": b": {\"a\":" + b"[" * 5000 + b"]" * 5000 + b"}\n\n",
    "a list as key": b': {"turn":3,"key":["a"],"fingerprint":"b"}\n\n',
    "an object as key": b': {"turn":3,"key":{"a":1},"fingerprint":[]}\n\n',
    "a number as thread": b': {"turn":3,"thread_id":7}\n\n',
    "a header without end": b": {" + b" " * 100000, "zeros": b"\0" * 100000,
    "no event": b': {"turn":3}\n\nid: 3.1\n\n', "no number": b': {"turn":3}\n\nid: x\nevent: e\n'
                                                                 b'data: {}\n\n',
    "a negative number": b': {"turn":3}\n\nid: 3.-5\nevent: e\ndata: {}\n\n',
    "a number of 5000 digits": b': {"turn":3}\n\nid: 3.' + b"9" * 5000 + b"\nevent: e\ndata: {}\n\n"}
BROKEN_ENDINGS = {
    "no JSON": b"{", "nested": b"[" * 5000, "no object": b"[]", "a string as usage":
    b'{"type":"turn.completed","usage":"x"}', "no type": b'{"usage":{"input_tokens":[]}}',
    "nothing": b""}


def whole_engine(make_engine):
    """An engine that has run two turns, is stopped, and what clients have seen of them."""
    engine = make_engine()
    seen = [engine.send("Hello"), engine.send("Hello again")]
    assert engine.stop() == 0
    return engine, seen


def check_whole(engine, seen, newest=2):
    """It starts, knows what clients have seen, and runs the next turns."""
    engine.start()
    for turn in range(1, len(seen) + 1):
        assert engine.events(turn) == seen[turn - 1]
    for path in ("/codex/status", "/codex/turns", "/codex/history"):
        assert engine.get(path).status in (200, 404), path
    assert engine.post("/codex/interrupt").json()["interrupted"] is False
    for _ in range(2):
        events = engine.send("And on")
        assert int(events[0].id.partition(".")[0]) > newest
        newest = int(events[0].id.partition(".")[0])
        seen.append(events) if newest == len(seen) + 1 else None
        assert engine.post("/codex/reset").status == 200
        engine.restart()
        assert engine.events(newest) == events
    assert engine.status()["thread_id"] is None
    assert "Traceback" not in engine.log()


@pytest.mark.parametrize("make", ALIENS, ids=lambda make: make.__name__)
def test_something_else_in_place_of_every_file(make_engine, make):
    engine, seen = whole_engine(make_engine)
    os.unlink(os.path.join(engine.state, "lock"))
    for name in ("turns/3.log", "turns/2.reset", "turns/3.reset", "thread.json", "lock"):
        make(os.path.join(engine.state, name))
    check_whole(engine, seen, newest=3)


@pytest.mark.parametrize("make", ALIENS, ids=lambda make: make.__name__)
def test_something_else_in_place_of_the_turns(make_engine, make):
    engine, _ = whole_engine(make_engine)
    os.rename(os.path.join(engine.state, "turns"), os.path.join(engine.state, "were"))
    make(os.path.join(engine.state, "turns"))
    engine.start()
    assert engine.send("Hello")[0].id == "1.1"


def test_broken_logs(make_engine):
    engine, seen = whole_engine(make_engine)
    turns = os.path.join(engine.state, "turns")
    for turn, content in enumerate(BROKEN_LOGS.values(), 3):
        write(content)(os.path.join(turns, "%d.log" % turn))
    check_whole(engine, seen, newest=turn)
    for turn, name in enumerate(BROKEN_LOGS, 3):
        status = engine.get("/codex/events?turn=%d" % turn).status
        set_aside = os.path.exists(os.path.join(turns, "%d.log.broken" % turn))
        # Python 3.12 and newer read what is nested more deeply.
        assert (status, set_aside) == (404, True) or "nested" in name and status == 200, name


def test_logs_with_broken_endings(make_engine):
    engine, seen = whole_engine(make_engine)
    for turn, ending in enumerate(BROKEN_ENDINGS.values(), 3):
        write(b': {"turn":%d}\n\nid: %d.1\nevent: turn.completed\ndata: %b\n\nid: %d.2\n'
              b'event: done\ndata: {}\n\n' % (turn, turn, ending, turn))(
                  os.path.join(engine.state, "turns", "%d.log" % turn))
    engine.start()
    for turn in range(3, turn + 1):
        for path in ("/codex/turns/%d", "/codex/events?turn=%d"):
            assert engine.get(path % turn).status in (200, 404), path % turn
    engine.stop()
    check_whole(engine, seen, newest=turn)
    harness.CONTRACT.complaints.clear()     # what was forged is answered as it is


def test_a_huge_log_with_a_header(make_engine):
    engine, seen = whole_engine(make_engine)
    huge_with_header(os.path.join(engine.state, "turns", "3.log"))
    check_whole(engine, seen, newest=3)


@pytest.mark.parametrize("number", ["999999999999999999", "999999999999999", "9999999999"])
@pytest.mark.parametrize("kind", ["log", "reset"])
def test_a_number_that_no_engine_gave(make_engine, number, kind):
    engine, seen = whole_engine(make_engine)
    path = os.path.join(engine.state, "turns", "%s.%s" % (number, kind))
    write(b': {"turn":%s}\n\n' % number.encode() if kind == "log" else b"another")(path)
    engine.start()
    assert engine.status()["thread_id"] == seen[0][0].json()["thread_id"]
    assert engine.send("Hello")[0].id == "3.1"
    engine.restart()
    assert engine.send("Hello")[0].id == "4.1"
    assert engine.events(1) == seen[0]


def test_the_number_of_a_turn_whose_log_is_lost_is_not_given_again(make_engine):
    """The reset behind it remembers it."""
    engine, seen = whole_engine(make_engine)
    engine.start()
    engine.post("/codex/reset")
    engine.stop()
    os.unlink(os.path.join(engine.state, "turns", "2.log"))
    engine.start()
    assert engine.send("Hello")[0].id == "3.1"


def test_forged_headers_hit_nobody(make_engine):
    engine, seen = whole_engine(make_engine)
    bystander = subprocess.Popen(["sleep", "300"], env={"PATH": os.environ["PATH"]},
                                 start_new_session=True)
    codexes = [{"pid": bystander.pid, "started": None}, None, [], {"pid": "1"}, {},
               {"pid": 1.5, "started": "x"}, {"pid": -1, "started": -1}, {"pid": 0, "started": 0}]
    try:
        turn = 2
        for mark in (None, "", "x", "*", "0" * 32):
            for codex in codexes:
                turn += 1
                write(b": %b\n\n" % json.dumps({"turn": turn, "mark": mark, "codex": codex}).encode(
                    ))(os.path.join(engine.state, "turns", "%d.log" % turn))
        engine.start()
        for number in range(3, turn + 1):
            events = check_stream(engine.events(number))
            assert events[-2].json()["error"]["code"] == "engine_restarted"
        assert is_alive(bystander.pid)
        assert engine.send("Hello")[0].id == "%d.1" % (turn + 1)
        assert engine.events(1) == seen[0]
    finally:
        bystander.kill()
        bystander.wait()


def test_a_link_in_place_of_a_reset_leads_nowhere(make_engine, tmp_path):
    """What Codex, in its sandbox, can't write to the engine doesn't write to for it."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    engine, seen = whole_engine(make_engine)
    for name in ("2.reset", "3.log", "3.reset"):
        os.symlink(str(precious), os.path.join(engine.state, "turns", name))
    check_whole(engine, seen)
    assert precious.read_text() == "precious"


def test_a_turns_files_in_folders_without_end(make_engine):
    engine, seen = whole_engine(make_engine)
    for number in range(1500):              # deeper than PATH_MAX and than Python recurses
        path = "turns/3.files" if number == 0 else "x"
        os.makedirs(os.path.join(engine.state, path) if number == 0 else path)
        os.chdir(os.path.join(engine.state, path) if number == 0 else path)
    os.chdir("/")
    try:
        check_whole(engine, seen)
    finally:
        subprocess.run(["rm", "-rf", os.path.join(engine.state, "turns", "3.files")], check=True)


# While the engine runs

def test_what_lies_in_the_way_of_the_next_log(engine):
    seen = [engine.send("Hello")]
    for make in ALIENS:
        turn = len(seen) + 1
        for name in ("%d.log", "%d.reset"):
            make(os.path.join(engine.state, "turns", name % turn))
        seen.append(engine.send("Hello"))
        assert seen[-1][0].id == "%d.1" % turn
        assert engine.post("/codex/reset").status == 200
    engine.restart()
    for turn, events in enumerate(seen, 1):
        assert engine.events(turn) == events
    assert engine.status()["thread_id"] is None


def test_a_key_whose_turn_somebody_has_deleted_is_free(engine):
    headers = {"Idempotency-Key": "a"}
    engine.request("POST", "/codex/send", {"message": "Hello"}, headers)
    engine.send("Hello")
    os.unlink(os.path.join(engine.state, "turns", "1.log"))
    answer = engine.request("POST", "/codex/send", {"message": "Hello"}, headers)
    assert check_stream(answer.events())[0].id == "3.1"


def test_a_log_that_somebody_cuts_while_it_is_read(tmp_path):
    """Its reader is let go instead of spinning."""
    turn_log = replicas_engine.TurnLog.create(str(tmp_path / "1.log"), {"turn": 1})
    turn_log.append([(b"thread.started", b'{"type":"thread.started"}')])
    stream = replicas_engine.EventStream(turn_log, turn_log.start)
    os.truncate(str(tmp_path / "1.log"), 0)
    assert list(stream) == []
    stream.close()
    turn_log.discard()
    assert os.listdir(str(tmp_path)) == []


def test_pruned_while_it_is_read(make_engine, tmp_path):
    """404, and never 500, for whoever comes too late by however little."""
    engine = make_engine()
    turns = os.path.join(engine.state, "turns")
    engine.send("Hello")
    with open(os.path.join(turns, "1.log"), "rb") as file:
        content = file.read()
    statuses = set()
    for moment in range(300):
        write(content)(os.path.join(turns, "1.log"))
        connection = engine.connect()
        connection.request("GET", ["/codex/events?turn=1", "/codex/events?after=1.2"][moment % 2],
                           headers={"X-Replicas-Engine-Secret": harness.SECRET})
        time.sleep(moment % 30 * 0.0001)
        os.unlink(os.path.join(turns, "1.log"))
        statuses.add(connection.getresponse().status)
        connection.close()
    assert statuses <= {200, 404} and 404 in statuses
    assert "Traceback" not in engine.log()


def test_the_lock_is_held_for_a_moment_by_a_child_of_an_engine_that_was_killed(
        tmp_path, monkeypatch):
    """It was just forked, and has yet to become another program."""
    monkeypatch.setattr(replicas_engine, "RELEASE_PATIENCE", harness.PATIENCE)
    state, tries = replicas_engine.StateDirectory(str(tmp_path)), threading.Event()
    lock = replicas_engine.try_flock
    monkeypatch.setattr(replicas_engine, "try_flock",
                        lambda file, how: (lock(file, how), tries.set())[0])
    with open(tmp_path / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opener = threading.Thread(target=state.open)
        opener.start()
        assert tries.wait(harness.PATIENCE)
    opener.join()
    assert state.engine() and state.is_ours()
    state.close()
    assert not state.engine()
