"""Messages that wait for their turn: in order, once, and over every restart."""

import contextlib
import errno
import os
import random
import signal
import socket
import threading
import time

import harness
import pytest

import replicas_engine
from harness import check_stream, read_events, script, wait_for

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
ASYNC = {"Prefer": "respond-async"}


def queue(engine, message, headers=ASYNC, **options):
    return engine.request("POST", "/codex/send", dict(options, message=message, when_busy="queue"),
                          headers)


def put(engine, message, **options):
    """Queue a message: its turn's id."""
    answer = queue(engine, message, **options)
    assert answer.status == 202, answer.body
    return answer.json()["turn_id"]


def gated(gate, name="new"):
    """A message whose turn ends when the file `gate` is there."""
    return script({"thread": name}, {"wait_for": str(gate)}, {"complete": True})


def waiting(engine):
    return [turn["turn_id"] for turn in engine.get("/codex/queue").json()["turns"]]


def result(engine, turn, wait=60):
    return engine.get("/codex/turns/%d?wait=%d" % (turn, wait)).json()


def code_of(engine, turn):
    return check_stream(engine.events(turn))[-2].json()["error"]["code"]


@pytest.fixture
def busy(engine, tmp_path):
    """An engine with a turn in progress, 1, and the file that ends it."""
    engine.gate = tmp_path / "gate"
    engine.start_turn(gated(engine.gate))
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    return engine


def test_messages_run_in_their_order(busy):
    answers = [queue(busy, "message %d" % number).json() for number in range(3)]
    thread_id = busy.status()["thread_id"]
    assert answers == [{"turn_id": 2 + n, "thread_id": thread_id, "status": "queued",
                        "position": 1 + n} for n in range(3)]
    listed = busy.get("/codex/queue").json()["turns"]
    assert [(turn["turn_id"], turn["position"], turn["message"]) for turn in listed] == [
        (2, 1, "message 0"), (3, 2, "message 1"), (4, 3, "message 2")]
    assert all(turn["queued_at"].endswith("Z") for turn in listed)
    assert result(busy, 3, wait=0)["status"] == "queued"
    assert busy.status()["turn"]["id"] == 1
    busy.gate.touch()
    for turn in (2, 3, 4):
        assert result(busy, turn)["status"] == "completed"
    assert busy.prompts()[1:] == ["message 0", "message 1", "message 2"]
    assert waiting(busy) == []
    assert all(event.json()["thread_id"] == thread_id for turn in (1, 2, 3, 4)
               for event in busy.events(turn)[:1])         # each on the thread that is current then
    assert sorted(os.listdir(os.path.join(busy.state, "turns"))) == [
        "1.log", "2.log", "3.log", "4.log"]


def test_the_stream_begins_when_the_turn_does(busy):
    connection, response = busy.open("POST", "/codex/send",
                                     {"message": "Say this", "when_busy": "queue"})
    with contextlib.closing(connection):
        assert response.status == 200 and response.headers["X-Replicas-Turn-Id"] == "2"
        assert response.readline() == b": keep-alive\n"
        busy.gate.touch()
        events = check_stream(list(read_events(response)))
    assert events == busy.events(2) and events[-2].type == "turn.completed"


def test_a_stream_for_who_accepts_one(busy):
    """Whatever it prefers elsewhere; and as well where nothing has to wait."""
    both = dict(ASYNC, Accept="text/event-stream")
    connection, response = busy.open("POST", "/codex/send",
                                     {"message": "Say this", "when_busy": "queue"}, both)
    with contextlib.closing(connection):
        assert response.status == 200 and response.headers["X-Replicas-Turn-Id"] == "2"
        busy.gate.touch()
        assert check_stream(list(read_events(response)))[0].id == "2.1"
    assert queue(busy, "And this", both).events()[0].id == "3.1"
    assert busy.request("POST", "/codex/send", {"message": "x"}, both).status == 202


def test_where_nothing_is_in_progress_it_starts_at_once(engine):
    answer = queue(engine, "Go").json()
    assert answer["status"] == "running" and "position" not in answer


def test_none_overtakes(busy):
    put(busy, "first")
    assert busy.post("/codex/send", {"message": "no"}).status == 409
    busy.gate.touch()
    assert result(busy, 2)["status"] == "completed"


def test_it_may_be_full(busy):
    for number in range(32):
        put(busy, "message")
    answer = queue(busy, "one more")
    assert answer.status == 429 and "32" in answer.json()["details"]
    assert len(waiting(busy)) == 32
    assert busy.request("DELETE", "/codex/queue").json() == {"success": True, "cancelled": 32}
    assert put(busy, "one more") == 34


def test_a_message_is_taken_out(busy):
    for number in range(3):
        put(busy, "message %d" % number)
    with contextlib.closing(busy.connect()) as connection:
        connection.request("GET", "/codex/events?turn=3",
                           headers={"X-Replicas-Engine-Secret": busy.env["REPLICAS_ENGINE_SECRET"]})
        response = connection.getresponse()
        assert busy.request("DELETE", "/codex/queue/3").json() == {"success": True, "cancelled": 1}
        events = check_stream(list(read_events(response)))
    assert [event.type for event in events] == ["error", "turn.failed", "done"]
    assert events[1].json()["error"]["code"] == "cancelled"
    for path in ("/codex/queue/3", "/codex/queue/1", "/codex/queue/77"):
        answer = busy.request("DELETE", path)
        assert answer.status == 404 and "doesn't wait" in answer.json()["details"]
    failed = result(busy, 3, wait=0)
    assert failed["status"] == "failed" and failed["started_at"] is None
    busy.gate.touch()
    assert result(busy, 4)["status"] == "completed"
    assert busy.prompts()[1:] == ["message 0", "message 2"]
    thread_id = busy.status()["thread_id"]
    assert waiting(busy.restart()) == [] and busy.status()["thread_id"] == thread_id
    assert busy.request("GET", "/codex/queue/4").status == 405
    assert busy.request("DELETE", "/codex/turns/4").status == 405


@pytest.mark.parametrize("path", ["DELETE /codex/queue", "POST /codex/reset"])
def test_one_is_taken_out_while_it_is_written(busy, path):
    """It is answered, and ends as cancelled; what comes later waits as ever."""
    answers, over = [], threading.Event()
    message = script({"wait_for": str(busy.gate)}, {"line": "x" * 3000000})     # it never ends

    def send():
        answers.append(queue(busy, message))

    def take_out():
        while not over.is_set():
            busy.request(*path.split())
    taker = threading.Thread(target=take_out)
    senders = [threading.Thread(target=send) for _ in range(12)]
    taker.start()
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    over.set()
    taker.join()
    busy.request(*path.split())
    assert {answer.status for answer in answers} == {202}
    for answer in answers:
        turn = answer.json()["turn_id"]
        assert result(busy, turn)["error"]["code"] in ("cancelled", "interrupted")
    assert waiting(busy) == []
    assert not [name for name in os.listdir(os.path.join(busy.state, "turns"))
                if name.endswith(".message")]


def test_a_cancelled_one_is_not_the_thread(engine, tmp_path):
    """Nor after a restart, when its log is the newest."""
    engine.start_turn(gated(tmp_path / "gate"))
    put(engine, "never")
    wait_for(lambda: engine.status()["thread_id"])
    thread_id = engine.status()["thread_id"]
    engine.request("DELETE", "/codex/queue/2")
    (tmp_path / "gate").touch()
    assert result(engine, 1)["status"] == "completed"
    assert engine.status()["turn"]["id"] == 1
    engine.restart()
    assert engine.status()["thread_id"] == thread_id and engine.status()["turn"]["id"] == 1
    assert engine.send("on")[0].id == "3.1"


def test_cancelled_ones_push_no_turn_out(make_engine, tmp_path):
    """Nor its thread, which is read from the newest that was started."""
    engine = make_engine(constants={"MAX_KEPT_TURNS": 4})
    gate = tmp_path / "gate"
    engine.start_turn(gated(gate))
    for _ in range(8):
        put(engine, "never")
    engine.request("DELETE", "/codex/queue")
    wait_for(lambda: engine.status()["thread_id"])
    thread_id = engine.status()["thread_id"]
    gate.touch()
    assert result(engine, 1)["status"] == "completed"
    wait_for(lambda: "5.log" not in os.listdir(os.path.join(engine.state, "turns")))
    assert engine.status()["turn"]["id"] == 1
    assert engine.restart().status()["thread_id"] == thread_id


def test_an_interrupt_leaves_the_queue_and_a_reset_empties_it(busy, tmp_path):
    put(busy, gated(tmp_path / "second"))
    put(busy, "third")
    assert busy.post("/codex/interrupt").json() == {
        "success": True, "interrupted": True, "turn_id": 1, "queued": 2}
    wait_for(lambda: busy.status()["turn"]["id"] == 2)
    wait_for(lambda: busy.status()["turn"]["last_event_id"])
    assert waiting(busy) == [3]
    assert busy.post("/codex/reset").status == 200
    assert code_of(busy, 2) == "interrupted" and code_of(busy, 3) == "cancelled"
    assert busy.status()["thread_id"] is None and waiting(busy) == []
    first = busy.send("anew")[0]
    assert first.id == "4.1" and busy.status()["thread_id"] == first.json()["thread_id"]


def test_options_images_and_key_outlive_a_restart(busy):
    image = os.path.join(busy.workspace, "pixel.gif")
    with open(image, "wb") as file:
        file.write(b"GIF89a image")
    answer = queue(busy, "look ✅ \ud800", {"Prefer": "respond-async", "Idempotency-Key": "k"},
                   model="gpt-9", images=["pixel.gif", PIXEL])
    again = queue(busy, "look ✅ \ud800", {"Prefer": "respond-async", "Idempotency-Key": "k"},
                  model="gpt-9", images=["pixel.gif", PIXEL])
    assert answer.json()["turn_id"] == again.json()["turn_id"] == 2
    assert again.json()["position"] == 1
    os.unlink(image)
    mark = busy.open("GET", "/codex/events?turn=2")
    mark[0].close()
    busy.kill()
    busy.start()
    assert result(busy, 2)["status"] == "completed"
    call = busy.calls()[-1]
    assert busy.prompts()[-1] == "look ✅ \ufffd" and "--model=gpt-9" in call["argv"]
    assert call["argv"].count("--image") == 2
    after = queue(busy, "look ✅ \ud800", {"Idempotency-Key": "k"}, model="gpt-9",
                  images=["pixel.gif", PIXEL])
    assert after.headers["X-Replicas-Turn-Id"] == "2"
    assert after.headers["X-Replicas-Turn-Mark"] == mark[1].headers["X-Replicas-Turn-Mark"]
    assert code_of(busy, 1) == "engine_restarted"


def test_a_shutdown_keeps_them(busy):
    put(busy, "wait")
    connection, response = busy.open("GET", "/codex/events?turn=2")
    with contextlib.closing(connection):
        response.readline()
        assert busy.stop() == 0
        assert list(read_events(response)) == []
    busy.start()
    assert code_of(busy, 1) == "shutdown"
    assert result(busy, 2)["status"] == "completed"


def test_an_engine_that_cannot_listen_begins_none(make_engine, tmp_path):
    """It would end what it has begun, a message at every start."""
    engine = make_engine(PORT=str(harness.free_port()))
    engine.start_turn(gated(tmp_path / "gate"))
    for number in range(3):
        put(engine, "message %d" % number)
    engine.stop()
    with socket.create_server(("127.0.0.1", engine.port)):
        for _ in range(3):
            assert engine.start(wait=False).process.wait(harness.PATIENCE) == 1
    engine.start()
    assert [result(engine, turn)["status"] for turn in (2, 3, 4)] == ["completed"] * 3


@pytest.mark.parametrize("patience", [0, 600])
def test_one_that_cannot_be_started_waits_on_and_then_fails(make_engine, tmp_path, patience):
    """It is next until it can be; one that can't be for too long says why."""
    engine, gate = make_engine(constants={"START_PATIENCE": patience}), tmp_path / "gate"
    engine.start_turn(gated(gate))
    for number in range(2):
        put(engine, "message %d" % number)
    os.rename(engine.workspace, engine.workspace + ".away")
    gate.touch()
    if patience:
        wait_for(lambda: "turn 2 can't be started; for 600 s it is tried again: The workspace "
                 "directory is missing" in engine.log())
        wait_for(lambda: waiting(engine) == [2, 3])     # but for the moments in which it is tried
        assert result(engine, 2, 0)["status"] == "queued"
        engine.restart()
    else:
        for turn in (2, 3):
            failed = result(engine, turn)
            assert failed["error"]["code"] == "not_started" and failed["status"] == "failed"
            assert "workspace directory is missing" in failed["error"]["message"]
        wait_for(lambda: "turn 3 could not be started: The workspace directory is missing"
                 in engine.log())
    os.rename(engine.workspace + ".away", engine.workspace)
    if patience:
        assert [result(engine, turn)["status"] for turn in (2, 3)] == ["completed"] * 2
        assert engine.prompts()[-2:] == ["message 0", "message 1"]
    assert engine.send("on")[0].id == "4.1"
    assert len(engine.calls()) == (4 if patience else 2)


def test_one_that_waits_on_can_be_taken_out(make_engine, tmp_path):
    engine, gate = make_engine(constants={"START_PATIENCE": 600}), tmp_path / "gate"
    engine.start_turn(gated(gate))
    put(engine, "never")
    os.rename(engine.workspace, engine.workspace + ".away")
    gate.touch()
    wait_for(lambda: "turn 2 can't be started" in engine.log())
    assert engine.request("DELETE", "/codex/queue/2").status == 200
    assert code_of(engine, 2) == "cancelled"
    os.rename(engine.workspace + ".away", engine.workspace)
    assert engine.send("on")[0].id == "3.1"
    assert "never" not in engine.prompts()


@pytest.mark.parametrize("what, code", [("cancel", "cancelled"), ("interrupt", "interrupted")])
@pytest.mark.parametrize("fails", [False, True], ids=["it starts", "it doesn't start"])
def test_one_that_is_stopped_while_it_starts(busy, monkeypatch, what, code, fails):
    """Codex doesn't get it, and the turn's ending says what stopped it."""
    write, written = replicas_engine.CodexRun._write_input, []
    monkeypatch.setattr(replicas_engine.CodexRun, "_write_input", lambda run: (
        written.append(bytes(run._input)), write(run))[1])
    put(busy, "never")
    busy.kill()
    busy.gate.touch()
    runner, stopped, waiting = busy.runner(), [], []

    def stop():
        stopped.append((getattr(runner, what)(), runner.turn_log(2).finished))
    stoppers = [threading.Thread(target=stop) for _ in range(2)]    # a client may try again

    def prepare(options):
        wait = runner.current.over.wait
        runner.current.over.wait = lambda *args: (waiting.append(1), wait(*args))
        for stopper in stoppers:
            stopper.start()
            wait_for(lambda: runner.current.stop_code)
        wait_for(lambda: len(waiting) == 2 or stopped)
        if fails:
            raise replicas_engine.unavailable("No Codex", "wait")
        return replicas_engine.CodexRunner.prepare(runner, options)
    runner.prepare = prepare
    runner.open()
    wait_for(lambda: len(stopped) == 2)
    wait_for(lambda: not runner.running())
    # The turn has its ending when one of them is answered, or kill -9 could undo it.
    assert sorted(stopped) == ([(0, True), (1, True)] if what == "cancel" else [(2, True)] * 2)
    assert "turn 2" not in runner.last_failure      # it was wanted
    assert not fails or "turn 1" in runner.last_failure
    runner.close()
    busy.start()
    assert code_of(busy, 2) == code and not any(written)


def test_one_that_was_cancelled_is_no_failure_after_a_restart(busy):
    put(busy, "never")
    assert busy.request("DELETE", "/codex/queue/2").status == 200
    busy.gate.touch()
    busy.wait_for_turn()
    wait_for(lambda: not busy.status()["turn"]["status"] == "running")
    busy.stop()
    runner = busy.runner()
    runner.open()
    runner.recovered.wait()
    assert runner.last_failure is None
    runner.close()


@pytest.fixture
def begins(busy):
    """What an engine is in this process that has the message "on" to begin with, since the one that
    had a turn in progress was killed; and a thread that ends it."""
    put(busy, "on")
    busy.kill()
    busy.gate.touch()
    runner = busy.runner()
    return runner, threading.Thread(target=runner.close)


def check_that_the_next_one_runs_it(busy):
    busy.start()
    assert result(busy, 2)["status"] == "completed" and busy.prompts().count("on") == 1


def test_an_engine_that_ends_while_it_tries(busy, begins):
    """The next one has the message; one that was to cut into the turn is answered."""
    (runner, closer), steers = begins, []

    def prepare(options):
        with runner.lock:
            steers.append(runner._steer(replicas_engine.TurnOptions(
                {"message": "x"}, runner.settings), None))
        closer.start()
        wait_for(lambda: runner.closing and runner.current.stop_code)
        raise replicas_engine.unavailable("No Codex", "wait")
    runner.prepare = prepare
    runner.open()
    wait_for(lambda: steers and steers[0].answered.is_set())
    assert steers[0].refusal
    closer.join()
    check_that_the_next_one_runs_it(busy)


@pytest.mark.parametrize("moment", ["Codex is asked for", "Codex is there", "it is written down",
                                    "and the disk fails"])
def test_an_engine_that_ends_while_it_starts_one(busy, begins, monkeypatch, moment):
    """Codex has not got it yet: it is the next one's."""
    (runner, closer), fsync, on_disk = begins, os.fsync, []

    def sync(fd):
        if os.readlink("/proc/self/fd/%d" % fd).endswith("/2.log"):
            on_disk.append(os.pread(fd, 4096, 0))
        fsync(fd)

    def end(*args):
        closer.start()
        wait_for(lambda: runner.closing and runner.current.stop_code)
        return "0.169.0"

    def written_down(turn):
        turn_log = type(runner).create_log(runner, turn)
        end()
        if moment == "and the disk fails":
            monkeypatch.setattr(turn_log, "begin", lambda header: os.open("/", os.O_WRONLY))
        return turn_log
    if moment == "Codex is asked for":
        runner.finder.version = end
    elif moment == "Codex is there":
        header = replicas_engine.Turn.header
        monkeypatch.setattr(replicas_engine.Turn, "header", lambda turn: (end(), header(turn))[1])
    else:
        runner.create_log = written_down
    monkeypatch.setattr(os, "fsync", sync)
    runner.open()
    wait_for(lambda: runner.closing)
    closer.join()
    assert not [pid for pid in harness.processes_with("CODEX_HOME", busy.codex_home)
                if b"exec" in harness.command_of(pid)]      # else the first one looked with it
    if moment == "and the disk fails":      # as far as anybody can see it had been started
        busy.start()
        assert code_of(busy, 2) == "shutdown" and "on" not in busy.prompts()
        return
    check_that_the_next_one_runs_it(busy)
    assert "tried again" not in busy.log()
    # As it would after a power cut
    assert [b"queued_at" in header for header in on_disk] == (
        [] if moment == "Codex is asked for" else [False, True])


def test_one_that_is_tried_again_just_when_the_engine_ends(busy, begins, monkeypatch):
    """Who puts it back has nothing to do with it any more."""
    (runner, closer), close = begins, replicas_engine.Steers.close
    tries, go = [], threading.Event()

    def prepare(options):
        tries.append(threading.current_thread())
        if len(tries) == 1:
            raise replicas_engine.unavailable("No Codex", "wait")
        go.wait(harness.PATIENCE)
        return replicas_engine.CodexRunner.prepare(runner, options)

    def close_steers(steers, run):
        if len(tries) == 1 and not closer.ident:
            runner.start_next()
            wait_for(lambda: len(tries) == 2)
            closer.start()
            wait_for(lambda: runner.closing)
        close(steers, run)
    monkeypatch.setattr(replicas_engine.Steers, "close", close_steers)
    runner.prepare = prepare
    runner.open()
    wait_for(lambda: runner.closing)
    tries[0].join()
    assert not runner.current.over.is_set()
    go.set()
    closer.join()
    check_that_the_next_one_runs_it(busy)


@pytest.mark.parametrize("ends", [False, True], ids=["it passes", "the engine ends"])
def test_one_whose_log_cannot_be_written_now(busy, begins, monkeypatch, ends):
    """Nothing of it has changed: it waits on."""
    (runner, closer), tries = begins, []
    reopen = replicas_engine.TurnLog._reopen

    def fail(turn_log):
        if turn_log.turn_id == 2 and len(tries) < 4:
            tries.append(1)
            if ends and not closer.ident:
                closer.start()
                wait_for(lambda: runner.closing and runner.current.stop_code)
            raise OSError(errno.EMFILE, "no")
        reopen(turn_log)
    with monkeypatch.context() as patch:
        patch.setattr(replicas_engine.TurnLog, "_reopen", fail)
        runner.open()
        wait_for(lambda: tries)
        wait_for(lambda: runner.closing or not (runner.queue or runner.current))
        if not ends:
            closer.start()
        closer.join()
    assert not harness.processes_with("CODEX_HOME", busy.codex_home)
    check_that_the_next_one_runs_it(busy)


def test_who_interrupts_one_that_is_left_to_the_next_engine_is_told(busy, begins):
    """It isn't stopped: it runs there."""
    (runner, closer), answers = begins, []

    def interrupt():
        with pytest.raises(replicas_engine.HTTPError) as refused:
            runner.interrupt()
        answers.append(refused.value.status)
    interrupter = threading.Thread(target=interrupt)

    def prepare(options):
        wait = runner.current.over.wait
        waiting, runner.current.over.wait = [], lambda *args: (waiting.append(1), wait(*args))
        closer.start()
        wait_for(lambda: runner.closing and waiting)
        interrupter.start()
        wait_for(lambda: len(waiting) == 2)
        return replicas_engine.CodexRunner.prepare(runner, options)
    runner.prepare = prepare
    runner.open()
    wait_for(lambda: runner.closing)
    closer.join()
    interrupter.join()
    assert answers == [503]
    check_that_the_next_one_runs_it(busy)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_fails_at_the_start_nobody_waits_for_it(engine, monkeypatch):
    """Neither can the log be made, nor can all be closed that Codex had."""
    engine.stop()
    runner, close, failed = engine.runner(), replicas_engine.CodexRun.close, []

    def fail(*args):
        raise OSError(errno.EIO, "no")
    runner.open()
    runner.create_log = fail
    monkeypatch.setattr(replicas_engine.CodexRun, "close", lambda run: (close(run), fail()))

    def send():
        with pytest.raises(replicas_engine.HTTPError) as error:
            runner.send(replicas_engine.TurnOptions({"message": "never"}, runner.settings))
        failed.append(error.value.status)
    replicas_engine.start_thread("sender", send)
    wait_for(lambda: failed == [503])
    del runner.create_log
    monkeypatch.undo()
    runner.send(replicas_engine.TurnOptions({"message": "on"}, runner.settings))
    runner.close()
    assert not harness.processes_with("CODEX_HOME", engine.codex_home)


@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_nobody_waits_for_a_codex_that_cannot_be_stopped(make_engine, monkeypatch, tmp_path,
                                                         ends_by_itself):
    """Which has got nothing: without its pipes it has no reason to stay."""
    codex = tmp_path / "codex"
    codex.write_text("#!/bin/sh\n[ $1 = --version ] && echo codex-cli 0.169.0 && exit\n"
                     + ("exec cat" if ends_by_itself else "exec sleep 1000"))
    codex.chmod(0o755)
    engine = make_engine(CODEX_PATH=str(codex))
    engine.stop()
    runner, failed = engine.runner(), []
    runner.open()
    monkeypatch.setattr(replicas_engine, "KILL_PATIENCE", 60 if ends_by_itself else 0.1)
    monkeypatch.setattr(replicas_engine.TurnProcesses, "stop", lambda turn: 1 / 0)

    def create_log(turn):
        raise OSError(errno.EIO, "no")
    runner.create_log = create_log

    def send():
        with pytest.raises(replicas_engine.HTTPError) as error:
            runner.send(replicas_engine.TurnOptions({"message": "never"}, runner.settings))
        failed.append(error.value.status)
    replicas_engine.start_thread("sender", send)
    try:
        wait_for(lambda: failed == [503])
        left = harness.processes_with("CODEX_HOME", engine.codex_home)
        assert bool(left) != ends_by_itself
    finally:
        for pid in harness.processes_with("CODEX_HOME", engine.codex_home):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not harness.processes_with("CODEX_HOME", engine.codex_home))
    wait_for(lambda: not runner.running())
    runner.close()


def test_a_send_while_the_engine_ends_may_be_sent_again(engine, monkeypatch):
    """Codex has been started, and has not got it."""
    engine.stop()
    runner, closers = engine.runner(), []
    runner.open()

    def create_log(turn):
        turn_log = type(runner).create_log(runner, turn)
        closers.append(replicas_engine.start_thread("closer", runner.close))
        wait_for(lambda: runner.closing and turn.stop_code)
        return turn_log
    runner.create_log = create_log
    options = replicas_engine.TurnOptions({"message": "once"}, runner.settings)
    with pytest.raises(replicas_engine.HTTPError) as failed:
        runner.send(options, "key", "fingerprint")
    assert failed.value.status == 503 and ("Retry-After", "5") in failed.value.headers
    closers[0].join()
    engine.start()
    answer = engine.request("POST", "/codex/send", {"message": "once"}, {"Idempotency-Key": "key"})
    assert answer.status == 200 and check_stream(answer.events())[0].id == "1.1"
    assert engine.prompts() == ["once"]


@pytest.mark.parametrize("order, writes", [("reset", "write_reset"), ("cancel", "delete_message")])
def test_an_engine_that_ends_while_an_order_is_written_down(busy, order, writes):
    """No other engine has the directory before that."""
    put(busy, "never")
    busy.kill()
    runner = busy.runner()
    runner.start_next = lambda: None
    runner.open()
    runner.recovered.wait()
    closer, write = threading.Thread(target=runner.close), getattr(runner.state, writes)

    def write_slowly(turn_id):
        if not closer.ident:
            closer.start()
            closer.join(1.0)                # it would be over by then, did it not wait
            assert closer.is_alive()
        write(turn_id)
    setattr(runner.state, writes, write_slowly)
    getattr(runner, order)()
    closer.join()
    busy.start()
    assert waiting(busy) == [] and (order == "cancel") == bool(busy.status()["thread_id"])
    assert code_of(busy, 2) in ("cancelled", "interrupted") and "never" not in busy.prompts()


def test_a_turn_that_cannot_be_started_before_one_that_waits(make_engine, tmp_path):
    """Its id isn't given to another."""
    engine = make_engine(constants={"START_PATIENCE": 0})
    os.rename(engine.workspace, engine.workspace + ".away")
    answers = []

    def send():
        answers.append(queue(engine, "x"))
    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [answer.json()["turn_id"] for answer in answers if answer.status == 202]
    assert len(set(started)) == len(started)
    assert all(answer.status in (202, 503) for answer in answers)
    for turn in started:
        assert result(engine, turn)["error"]["code"] == "not_started"
    assert engine.calls() == []
    os.rename(engine.workspace + ".away", engine.workspace)
    assert int(engine.send("on")[0].id.partition(".")[0]) > max(started, default=0)


def test_an_engine_that_ends_leaves_them_to_the_next(engine):
    engine.stop()
    runner = engine.runner()
    runner.open()
    runner.close()
    for what in (runner.cancel, runner.reset):
        with pytest.raises(replicas_engine.HTTPError, match="shutting down"):
            what()
    assert not [name for name in os.listdir(os.path.join(engine.state, "turns"))
                if name.endswith(".reset")]


def test_what_an_engine_left_while_it_wrote(engine):
    """A message without a log was never answered; a log without a message says that it is gone."""
    engine.stop()
    turns = os.path.join(engine.state, "turns")
    with open(os.path.join(turns, "5.message"), "w") as file:
        file.write("{")
    with open(os.path.join(turns, "6.log"), "wb") as file:
        file.write((b': {"turn":6,"queued_at":"2026-01-01T00:00:00.000Z","mark":"ab"}'
                    .ljust(4094)) + b"\n\n" + bytes(1000))
    engine.start()
    failed = result(engine, 6)
    assert failed["error"]["code"] == "not_started"
    assert "can't be read" in failed["error"]["message"]
    assert sorted(os.listdir(turns)) == ["6.log"]
    assert engine.send("on")[0].id == "7.1"


def test_a_full_disk_queues_nothing(small_disk, tmp_path):
    engine, disk = small_disk
    gate = str(tmp_path / "gate")
    engine.start_turn(gated(gate))
    answer = queue(engine, "x" * 500000)
    assert answer.status == 503 and "can't be queued" in answer.json()["error"]
    assert waiting(engine) == []
    assert os.listdir(os.path.join(engine.state, "turns")) == ["1.log"]
    assert put(engine, "small") == 3
    open(gate, "w").close()
    assert result(engine, 3)["status"] == "completed"


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_any_moment(engine, seed):
    """Each of the messages runs once, in order, and the cancelled one never."""
    chance = random.Random(seed)
    for number in range(5):
        first = put(engine, script({"thread": "resume"}, {"sleep": 0.02}, {"complete": True}))
        turns = [put(engine, "round %d message %d" % (number, n)) for n in range(4)]
        cancelled = engine.request("DELETE", "/codex/queue/%d" % turns[2]).status == 200
        time.sleep(chance.uniform(0, 0.25))     # when it is killed, which no test waits for
        engine.kill()
        engine.start()
        for turn in turns:
            assert result(engine, turn)["status"] != "queued"
        for n, turn in enumerate(turns):
            begun = engine.prompts().count("round %d message %d" % (number, n))
            events = check_stream(engine.events(turn))
            if n == 2 and cancelled:
                assert begun == 0 and events[-2].json()["error"]["code"] == "cancelled"
            else:                           # it may have been killed before Codex read it
                code = (events[-2].json().get("error") or {}).get("code")
                assert begun == 1 or begun == 0 and code == "engine_restarted", (turn, begun)
        assert result(engine, first)["status"] in ("completed", "failed")
    order = [prompt for prompt in engine.prompts() if prompt.startswith("round")]
    assert order == sorted(order) and len(order) == len(set(order))


def test_a_log_that_cannot_be_read_at_one_start(busy, monkeypatch):
    """What an engine passes over, with its message, is there for the next one."""
    turn = put(busy, "precious")
    assert busy.stop() == 0
    unbroken = replicas_engine.TurnLog.open

    def broken(path):
        if path == busy.runner().state.path_of(turn, "log"):
            raise OSError(errno.EIO, "Input/output error", path)
        return unbroken(path)
    with monkeypatch.context() as patch:
        patch.setattr(replicas_engine.TurnLog, "open", broken)
        runner = busy.runner()
        runner.open()
        assert runner.recovered.wait(harness.PATIENCE) and not runner.queue
        runner.close()
    busy.start()
    assert result(busy, turn)["final_message"] == "You said: precious"


@pytest.mark.parametrize("error", ["EACCES", "EIO"])
def test_logs_that_cannot_be_read_at_a_start(busy, monkeypatch, error):
    """Where the engine has but to be let in, it doesn't start, or a message could run twice; else
    nobody waits for what nobody writes."""
    busy.kill()
    runner, number = busy.runner(), getattr(errno, error)

    def broken(path):
        raise OSError(number, os.strerror(number), path)
    with monkeypatch.context() as patch:
        patch.setattr(replicas_engine.TurnLog, "open", broken)
        if error == "EACCES":
            with pytest.raises(PermissionError):
                runner.open()
        else:
            runner.open()
            runner.recovered.wait()
    if error == "EIO":
        with pytest.raises(replicas_engine.HTTPError) as caught:
            runner.turn_log(1)
        assert caught.value.status == 503 and "restart the engine" in str(caught.value)
        runner.close()
    busy.start()                            # which can read them, and stops what ran on


def test_the_message_of_a_broken_log_is_set_aside(busy):
    turn = put(busy, "precious")
    busy.kill()
    folder = os.path.join(busy.state, "turns")
    with open(os.path.join(folder, "%d.log" % turn), "r+b") as file:
        file.write(bytes(os.path.getsize(file.name)))
    busy.gate.touch()
    busy.start()
    assert "%d.message is set aside" % turn in busy.log()
    with open(os.path.join(folder, "%d.message.broken" % turn), "rb") as file:
        assert b"precious" in file.read()


def test_the_message_of_a_whole_log_beside_a_broken_one_stays(busy):
    """A file that lay where the log belongs was set aside when the message was put there."""
    turn = put(busy, "on")
    with open(os.path.join(busy.state, "turns", "%d.log.broken" % turn), "w"):
        busy.kill()
    busy.gate.touch()
    busy.start()
    assert result(busy, turn)["final_message"] == "You said: on"


def test_messages_that_were_set_aside_go_with_their_turns(make_engine):
    engine = make_engine(constants={"MAX_KEPT_TURNS": 2})
    engine.send("one")
    aside = os.path.join(engine.state, "turns", "1.message.broken")
    open(aside, "w").close()
    engine.send("two")
    engine.send("three")
    wait_for(lambda: not os.path.exists(aside))


def test_a_clock_that_is_set_back_holds_nobody_up(busy, monkeypatch):
    """The oldest Pythons would wait for as much longer."""
    turn = put(busy, "on")
    busy.kill()
    runner = busy.runner()
    runner.start_next = lambda: None
    runner.open()
    turn_log, clock = runner.logs[turn], time.time
    waits = threading.Thread(target=turn_log.wait, args=(turn_log.size, 10 ** 6), daemon=True)
    waits.start()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() - 7200)
        waits.join(harness.PATIENCE)
    assert not waits.is_alive()
    runner.close()
