"""Turns: started once, stopped, given up, found again and forgotten."""

import glob
import json
import os
import signal
import socket
import threading
import time
import types

import pytest

import conftest
import harness
import replicas_engine
from harness import check_stream, is_alive, read_events, script, wait_for

BEGIN = {"thread": "resume"}
HANG = {"sleep": 120}


def at_once(count, function):
    """What `count` threads get that call `function` at the same moment, with their number."""
    results, barrier = [None] * count, threading.Barrier(count)

    def work(number):
        barrier.wait()
        results[number] = function(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_turn_that_is_stopped_while_it_starts(engine, monkeypatch):
    """At once, not at the next look at the deadlines."""
    engine.stop()
    monkeypatch.setattr(replicas_engine, "LOOK_INTERVAL", 600.0)
    runner = engine.runner()

    def prepare(options):
        runner.stop(runner.current, "interrupted")
        return replicas_engine.CodexRunner.prepare(runner, options)
    runner.prepare = prepare
    runner.open()
    log, _ = runner.send(replicas_engine.TurnOptions({"message": "never"}, runner.settings))
    log.wait_for_end(harness.PATIENCE)
    assert log.finished
    runner.close()
    engine.start()
    assert engine.events(1)[-2].json()["error"]["code"] == "interrupted"


def test_an_ending_is_written_once_though_what_is_left_cannot_be_seen(engine, monkeypatch):
    engine.stop()

    def fail(processes):
        raise OSError(24, "Too many open files")
    monkeypatch.setattr(replicas_engine.TurnProcesses, "discard", fail)
    runner = engine.runner()
    runner.open()
    log, _ = runner.send(replicas_engine.TurnOptions({"message": "Hello"}, runner.settings))
    log.wait_for_end(harness.PATIENCE)
    wait_for(lambda: not runner.running())
    assert not runner.unfinished
    runner.close()
    engine.start()
    check_stream(engine.events(1))


def keyed(engine, key, message, prefer=None, **options):
    headers = {"Idempotency-Key": key}
    if prefer:
        headers["Prefer"] = prefer
    return engine.request("POST", "/codex/send", dict(options, message=message), headers)


# Idempotency-Key

def test_the_same_key_twenty_times_at_once(engine):
    message = script(BEGIN, {"count": {"n": 20, "pause": 0.01}}, {"complete": True})
    for turn in range(1, 6):
        answers = at_once(20, lambda number: keyed(engine, "key %d" % turn, message))
        assert [answer.status for answer in answers] == [200] * 20
        streams = [check_stream(answer.events()) for answer in answers]
        assert all(stream == streams[0] for stream in streams)
        assert len(engine.calls()) == turn


@pytest.mark.parametrize("stop", ["restart", "kill"])
def test_a_key_after_its_turn_and_across_a_restart(engine, stop):
    message = script(BEGIN, {"count": {"n": 3}}, {"complete": True})
    first = check_stream(keyed(engine, "a", message).events())
    assert keyed(engine, "a", message).events() == first
    engine.send("Another one")
    hanging = engine.request("POST", "/codex/send", {"message": script(BEGIN, HANG)},
                             {"Idempotency-Key": "b", "Prefer": "respond-async"}).json()["turn_id"]
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    engine.kill() if stop == "kill" else engine.stop()
    engine.start()
    answers = at_once(20, lambda number: keyed(engine, "a", message))
    assert all(answer.status == 200 and answer.events() == first for answer in answers)
    ended = check_stream(keyed(engine, "b", script(BEGIN, HANG)).events())
    assert ended == engine.events(hanging)
    assert ended[-2].json()["error"]["code"] == (
        "engine_restarted" if stop == "kill" else "shutdown")
    assert len(engine.calls()) == 3


def test_a_key_with_another_body(engine):
    first = keyed(engine, "a", "Hello")
    for answer in (keyed(engine, "a", "Hello!"), keyed(engine, "a", "Hello", model="x")):
        assert answer.status == 422 and "turn 1" in answer.json()["details"]
    assert keyed(engine, "a", "Hello").events() == first.events()
    engine.restart()
    assert keyed(engine, "a", "Hello!").status == 422
    assert len(engine.calls()) == 1


def test_a_key_while_another_turn_runs(engine):
    keyed(engine, "a", "Hello")
    engine.start_turn(script(BEGIN, HANG))
    assert keyed(engine, "a", "Hello").status == 200
    assert keyed(engine, "b", "Hello").status == 409
    engine.post("/codex/interrupt")
    assert keyed(engine, "b", "Hello").status == 200


def test_the_key_of_a_turn_that_could_not_start_is_free(make_engine, tmp_path):
    codex = tmp_path / "codex"
    engine = make_engine(CODEX_PATH=str(codex))
    answers = at_once(10, lambda number: keyed(engine, "a", "Hello"))
    assert [answer.status for answer in answers] == [503] * 10
    codex.write_text("#!/no/such/interpreter\n")
    codex.chmod(0o755)
    answers = at_once(10, lambda number: keyed(engine, "a", "Hello"))
    assert {answer.status for answer in answers} <= {409, 503}
    codex.unlink()
    codex.symlink_to(harness.STAND_IN_CODEX)
    answer = keyed(engine, "a", "Another body")
    assert answer.status == 200 and check_stream(answer.events())[0].id == "1.1"


def test_the_key_of_a_turn_that_is_no_longer_kept_is_free(few_turns):
    engine = few_turns(turns=2)
    keyed(engine, "a", "Hello")
    for _ in range(3):
        engine.send("Hello")
    answer = keyed(engine, "a", "Another body")
    assert check_stream(answer.events())[0].id == "5.1"


def test_respond_async(engine, tmp_path):
    go_on = str(tmp_path / "go-on")
    message = script(BEGIN, {"wait_for": go_on}, {"complete": True})
    answer = keyed(engine, "a", message, prefer="respond-async")
    assert answer.status == 202 and answer.headers["Preference-Applied"] == "respond-async"
    early = answer.json()
    assert (early["turn_id"], early["status"]) == (1, "running")
    assert keyed(engine, "a", message, prefer="wait=5, Respond-Async").status == 202
    open(go_on, "w").close()
    thread = check_stream(engine.events(1))[0].json()["thread_id"]
    assert early["thread_id"] in (None, thread)     # Codex may have said it by then
    assert keyed(engine, "a", message, prefer="respond-async").json() == {
        "turn_id": 1, "thread_id": thread, "status": "completed"}
    assert engine.request("POST", "/codex/send", {"message": "Hello"},
                          {"Prefer": "respond-async"}).json()["thread_id"] == thread
    assert engine.wait_for_turn()["id"] == 2


# Interrupt and reset

def test_an_interrupt_while_idle(engine):
    nothing = {"success": True, "interrupted": False, "turn_id": None}
    assert engine.post("/codex/interrupt").json() == nothing
    engine.send("Hello")
    assert engine.post("/codex/interrupt").json() == nothing


def test_ten_interrupts_at_once(engine):
    for _ in range(3):
        turn = engine.start_turn(script(BEGIN, HANG))
        wait_for(lambda: engine.status()["turn"]["last_event_id"])
        codex = engine.calls()[-1]["pid"]
        answers = at_once(10, lambda number: (engine.post("/codex/interrupt").json(),
                                              is_alive(codex)))
        assert {answer["interrupted"] for answer, _ in answers} <= {True, False}
        assert (True, turn) in [(a["interrupted"], a["turn_id"]) for a, _ in answers]
        assert not any(alive for _, alive in answers)
        check_stream(engine.events(turn))


def test_an_interrupt_while_a_turn_starts(engine):
    """At any moment: the turn is interrupted, or was not there yet."""
    for moment in range(30):
        sender = threading.Thread(target=engine.post, args=(
            "/codex/send", {"message": script(BEGIN, HANG)}))
        sender.start()
        time.sleep(moment * 0.001)
        wait_for(lambda: engine.post("/codex/interrupt").json()["interrupted"])
        sender.join()
        events = check_stream(engine.events())
        assert events[-2].json()["error"]["code"] == "interrupted"
    assert engine.send("Hello")[-2].type == "turn.completed"
    assert len(glob.glob(os.path.join(engine.state, "turns", "*"))) == 31


def test_a_reset_racing_with_the_thread(engine, tmp_path):
    """Whatever the old turn still prints, its thread does not come back."""
    threads = set()
    for moment in range(20):
        go_on = str(tmp_path / ("go-on-%d" % moment))
        turn = engine.start_turn(script({"wait_for": go_on}, BEGIN, {"count": {"n": 30}}, HANG))
        open(go_on, "w").close()
        time.sleep(moment % 10 * 0.001)
        assert engine.post("/codex/reset").status == 200
        assert engine.status()["thread_id"] is None
        events = check_stream(engine.events(turn))
        assert events[-2].json()["error"]["code"] == "interrupted"
        threads |= {event.json()["thread_id"] for event in events if event.type == "thread.started"}
    engine.restart()
    assert engine.status()["thread_id"] is None
    assert engine.send("Hello")[0].json()["thread_id"] not in threads
    assert all("resume" not in call["argv"] for call in engine.calls())


def test_sends_resets_and_interrupts_at_once(engine):
    """Nothing hangs, no stream is without its ending, and no Codex stays."""
    message = script(BEGIN, {"count": {"n": 30, "pause": 0.005}}, {"complete": True})

    def work(number):
        for _ in range(10):
            if number < 4:
                answer = engine.post("/codex/send", {"message": message})
                assert answer.status in (200, 409)
                if answer.status == 200:
                    check_stream(answer.events())
            else:
                time.sleep(0.02 * number)
                path = "/codex/reset" if number % 2 else "/codex/interrupt"
                assert engine.post(path).status == 200
        return True

    assert all(at_once(7, work))
    engine.post("/codex/interrupt")
    assert not any(is_alive(call["pid"]) for call in engine.calls())
    check_stream(engine.send("Hello"))


# A thread that is lost

@pytest.mark.parametrize("version", ["0.169.0", "0.50.0"])
def test_a_lost_thread(make_engine, version):
    engine = make_engine(STAND_IN_CODEX_VERSION=version)
    lost = engine.send("Hello")[0].json()["thread_id"]
    os.unlink(engine.status()["session_file"])
    events = engine.send("Are you there?")
    assert [event.type for event in events].count("thread.started") == 1
    assert events[-2].type == "turn.completed"
    thread = events[0].json()["thread_id"]
    assert thread != lost and engine.status()["thread_id"] == thread
    assert "Are you there?" in events[2].json()["item"]["text"]
    assert engine.send("And again")[0].json()["thread_id"] == thread


@pytest.mark.parametrize("version, rollout", [
    ("0.169.0", None), ("0.169.0", b""), ("0.169.0", b"{}\n"), ("0.98.0", b""), ("0.98.0", b"{}\n"),
    ("0.50.0", b""), ("0.50.0", b"{}\n")])
def test_a_lost_thread_of_the_real_codex(make_engine, model, version, rollout):
    codex = conftest.real_codex(version)
    engine = make_engine(start=False, CODEX_PATH=codex, CODEX_API_KEY="a key")
    model(engine.codex_home)
    engine.start()
    lost = engine.send("model: say Hello.")[0].json()["thread_id"]
    wait_for(lambda: engine.status()["session_file"])
    engine.restart()
    for path in glob.glob(os.path.join(engine.codex_home, "**", "rollout-*"), recursive=True):
        os.unlink(path)
        if rollout is not None:
            with open(path, "wb") as file:
                file.write(rollout)
    events = engine.send("model: say I am here.")
    assert [event.type for event in events].count("thread.started") == 1
    assert events[0].json()["thread_id"] != lost
    assert "I am here." in [event.json()["item"].get("text") for event in events
                            if event.type == "item.completed"]
    assert events[-2].type == "turn.completed"


def test_an_interrupt_while_a_lost_thread_is_replaced(make_engine):
    engine = make_engine()
    engine.send("Hello")
    os.unlink(engine.status()["session_file"])
    for moment in range(15):
        turn = engine.start_turn(script(BEGIN, HANG))
        time.sleep(moment * 0.01)
        assert engine.post("/codex/interrupt").json()["turn_id"] == turn
        assert check_stream(engine.events(turn))[-2].json()["error"]["code"] == "interrupted"
        assert not any(is_alive(call["pid"]) for call in engine.calls())


# Turns that take too long

ITEM = {"id": "item_0", "type": "command_execution", "command": "make", "status": "in_progress"}


IDLE = 8        # seconds: more than a machine may stand still between what Codex does at once


def test_a_turn_that_stalls(make_engine):
    engine = make_engine(REPLICAS_ENGINE_IDLE_TIMEOUT=str(IDLE))
    events = engine.send(script(BEGIN, HANG))
    assert [event.type for event in events] == ["thread.started", "error", "turn.failed", "done"]
    assert events[2].json()["error"]["code"] == "stalled"
    assert "%d seconds" % IDLE in events[2].json()["error"]["message"]
    assert engine.status()["turn"]["status"] == "failed"
    assert not is_alive(engine.calls()[-1]["pid"])
    events = engine.send(script(BEGIN, {"count": {"n": 12, "pause": IDLE / 10}},
                                {"complete": True}))
    assert events[-2].type == "turn.completed"


def test_an_item_in_progress_holds_off_the_stall(make_engine):
    engine = make_engine(REPLICAS_ENGINE_IDLE_TIMEOUT=str(IDLE))
    events = engine.send(script(
        BEGIN, {"event": {"type": "item.started", "item": ITEM}}, {"sleep": IDLE + 2},
        {"event": {"type": "item.completed", "item": ITEM}}, {"complete": True}))
    assert events[-2].type == "turn.completed"
    events = engine.send(script(
        BEGIN, {"event": {"type": "item.started", "item": ITEM}},
        {"event": {"type": "item.completed", "item": ITEM}}, HANG))
    assert events[-2].json()["error"]["code"] == "stalled"
    todo = dict(ITEM, type="todo_list")
    events = engine.send(script(BEGIN, {"event": {"type": "item.started", "item": todo}}, HANG))
    assert events[-2].json()["error"]["code"] == "stalled"


def test_trying_again_is_no_progress(make_engine):
    """With its API out of reach Codex 0.169 says so every minute, and for ever."""
    engine = make_engine(REPLICAS_ENGINE_IDLE_TIMEOUT=str(IDLE))
    again = {"event": {"type": "error", "message": "Reconnecting… waiting for the network"}}
    events = engine.send(script(BEGIN, *[again, {"sleep": 0.3}] * 200))
    error = events[-2].json()["error"]
    assert error["code"] == "stalled"
    assert error["message"].endswith(": Reconnecting… waiting for the network")
    wait_for(lambda: "warning turn 1 ended: stalled" in engine.log())
    assert engine.log().count(error["message"]) == 1
    events = engine.send(script(BEGIN, *[
        again, {"sleep": IDLE / 4}, {"event": {"type": "item.completed"}}] * 5, {"complete": True}))
    assert events[-2].type == "turn.completed"


def test_a_failed_turn_is_one_warning(engine):
    failed = engine.send(script(BEGIN, {"fail": "quota exceeded…"}))[-2].json()["error"]["message"]
    line = wait_for(lambda: [line for line in engine.log().split("\n") if "turn 1 ended" in line])
    assert " warning turn 1 ended: turn.failed, " in line[0] and line[0].endswith(": " + failed)
    engine.start_turn(script(BEGIN, HANG))
    engine.post("/codex/interrupt")
    assert wait_for(lambda: " info turn 2 ended: interrupted" in engine.log())


def test_a_pause_of_the_machine_is_no_stall(make_engine, tmp_path):
    """As when a VM is frozen: the engine and Codex stand still, and the clock goes on."""
    engine = make_engine(constants={"LOOK_INTERVAL": 0.2, "PAUSE": 1.0},
                         REPLICAS_ENGINE_IDLE_TIMEOUT=str(IDLE), REPLICAS_ENGINE_TURN_TIMEOUT="60")
    go_on = str(tmp_path / "go-on")
    turn = engine.start_turn(script(BEGIN, {"wait_for": go_on}, {"complete": True}))
    wait_for(lambda: engine.status()["thread_id"])
    for _ in range(2):                      # and twice, since one pause may follow another
        engine.process.send_signal(signal.SIGSTOP)
        time.sleep(IDLE + 1)
        engine.process.send_signal(signal.SIGCONT)
        assert engine.status()["turn"]["status"] == "running"
    open(go_on, "w").close()
    assert engine.events(turn)[-2].type == "turn.completed"
    wait_for(lambda: "stood still" in engine.log())


def test_a_pause_of_the_machine_between_two_looks_is_no_stall(engine, monkeypatch, tmp_path):
    """Wherever it catches the turn's thread, and not only while that waits."""
    engine.stop()
    gate, looks, pass_on = tmp_path / "gate", [], replicas_engine.Steers.pass_on
    monkeypatch.setattr(replicas_engine, "LOOK_INTERVAL", 0.05)
    monkeypatch.setattr(replicas_engine, "time", types.SimpleNamespace(**dict(
        vars(time), monotonic=lambda: time.monotonic() + (10 ** 6 if looks else 0))))
    monkeypatch.setattr(replicas_engine.Steers, "pass_on", lambda *args: (
        looks.append(1), pass_on(*args)))
    runner = engine.runner()
    runner.open()
    log, _ = runner.send(replicas_engine.TurnOptions({"message": script(
        BEGIN, {"wait_for": str(gate)}, {"complete": True})}, runner.settings))
    wait_for(lambda: len(looks) > 5 or log.finished)
    gate.touch()
    log.wait_for_end(harness.PATIENCE)
    runner.close()
    engine.start()
    assert engine.events(1)[-2].type == "turn.completed"


def test_no_stall_where_none_is_wanted(make_engine):
    engine = make_engine(REPLICAS_ENGINE_IDLE_TIMEOUT="0")
    assert engine.send(script({"sleep": 1.5}, BEGIN, {"complete": True}))[-2].type == (
        "turn.completed")


def test_a_turn_that_takes_too_long(make_engine):
    engine = make_engine(REPLICAS_ENGINE_TURN_TIMEOUT="8")
    events = engine.send(script(BEGIN, {"event": {"type": "item.started", "item": ITEM}},
                                {"count": {"n": 5000, "pause": 0.01}}))
    assert events[-2].json()["error"]["code"] == "timeout"
    assert not is_alive(engine.calls()[-1]["pid"])
    assert engine.send("Hello")[-2].type == "turn.completed"


@pytest.mark.parametrize("steps", [
    [{"sleep": 120}], [{"ignore": ["SIGINT", "SIGTERM"]}, {"sleep": 120}],
    [{"close_stdout": True}, {"sleep": 120}],
    [{"spawn": {"argv": ["sleep", "0.1"]}}, {"sleep": 120}]])
def test_codex_that_does_not_exit(make_engine, steps):
    engine = make_engine(constants={"EXIT_PATIENCE": 0.5})
    events = engine.send(script(BEGIN, {"complete": True}, *steps))
    assert [event.type for event in events] == ["thread.started", "turn.completed", "done"]
    assert not is_alive(engine.calls()[-1]["pid"])
    engine.stop()
    wait_for(lambda: not harness.processes_with("CODEX_HOME", engine.codex_home))   # the sleep 0.1


def test_codex_that_closes_its_stdout(make_engine, tmp_path):
    engine = make_engine(REPLICAS_ENGINE_IDLE_TIMEOUT="1")
    events = engine.send(script(BEGIN, {"close_stdout": True}, HANG))
    assert events[-2].json()["error"]["code"] == "stalled"


def test_a_process_that_holds_codexs_stdout(engine):
    """The turn ends with Codex, whoever still has its pipe."""
    server = {"spawn": {"argv": ["sleep", "100"], "stdout": "inherit",
                        "pidfile": os.path.join(engine.folder, "pids")}}
    events = engine.send(script(BEGIN, server, {"complete": True}))
    assert events[-2].type == "turn.completed"
    with open(os.path.join(engine.folder, "pids"), encoding="ascii") as file:
        pid = int(file.read())
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)


# Kept turns

@pytest.fixture
def few_turns(make_engine):
    return lambda turns=10 ** 6, size=10 ** 12: make_engine(
        constants={"MAX_KEPT_TURNS": turns, "MAX_KEPT_BYTES": size,
                   "SEND_TIMEOUT": harness.PATIENCE, "VANISHED_TIMEOUT": 2 * harness.PATIENCE})


def kept(engine):
    return sorted(int(name[:-4]) for name in os.listdir(os.path.join(engine.state, "turns")))


def test_the_constants():
    assert replicas_engine.MAX_KEPT_TURNS == 100
    assert replicas_engine.MAX_KEPT_BYTES == 256 * 1024 * 1024


def test_kept_turns_by_number(few_turns, tmp_path):
    engine = few_turns(turns=5)
    for turn in range(1, 9):
        engine.send("Hello")
        wait_for(lambda: kept(engine) == list(range(max(1, turn - 4), turn + 1)))
    for turn in range(1, 9):
        answer = engine.get("/codex/events?turn=%d" % turn)
        assert answer.status == (200 if turn > 3 else 404)
    go_on = str(tmp_path / "go-on")
    running = engine.start_turn(script(BEGIN, {"wait_for": go_on}, {"complete": True}))
    assert engine.get("/codex/events?turn=4").status == 200     # until the turn has ended
    open(go_on, "w").close()
    check_stream(engine.events(running))
    wait_for(lambda: kept(engine) == [5, 6, 7, 8, 9])
    engine.restart()
    assert kept(engine) == [5, 6, 7, 8, 9]
    assert engine.send("Hello")[0].id == "10.1"


def test_kept_turns_by_size(few_turns):
    """Whole turns, the oldest first; the newest stays however large it is."""
    engine = few_turns(size=100000)
    large = script(BEGIN, {"big": {"size": 30000}}, {"complete": True})
    for turn in range(1, 6):
        engine.send(large)
        wait_for(lambda: kept(engine) == list(range(max(1, turn - 2), turn + 1)))
        assert all(check_stream(engine.events(known)) for known in kept(engine))
    engine.send(script(BEGIN, {"big": {"size": 200000}}, {"complete": True}))
    wait_for(lambda: kept(engine) == [6])
    engine.send("Hello")
    wait_for(lambda: kept(engine) == [7])


def test_kept_turns_at_the_start(make_engine):
    engine = make_engine()
    for _ in range(6):
        engine.send("Hello")
    engine.stop()
    engine = make_engine(constants={"MAX_KEPT_TURNS": 2})
    wait_for(lambda: kept(engine) == [5, 6])


def test_the_reader_of_a_turn_that_is_no_longer_kept(few_turns):
    engine = few_turns(turns=1)
    turn = engine.start_turn(script(BEGIN, {"count": {"n": 400, "size": 50000}},
                                    {"complete": True}))
    connection, response = engine.open("GET", "/codex/events?turn=%d" % turn)
    events = read_events(response)
    assert next(events).type == "thread.started"
    engine.wait_for_turn()
    engine.send("Hello")
    wait_for(lambda: kept(engine) == [turn + 1])
    assert engine.get("/codex/events?turn=%d" % turn).status == 404
    rest = list(events)
    assert len(rest) == 402 and rest[-1].type == "done"
    connection.close()


# Nothing grows

def resources(engine):
    """Threads, descriptors, zombies and KiB of memory of the engine."""
    pid = engine.process.pid
    return (harness.status_of(pid, "Threads"), len(harness.descriptors_of(pid)),
            len(harness.zombies_of(pid)), harness.status_of(pid, "RssAnon"))


FEW = 5         # threads or descriptors: what comes and goes in an engine, or late in its start


def settled(engine, threads, descriptors):
    """The memory once there are but a FEW more threads and descriptors than there were."""
    def look():
        now = resources(engine)
        return (now if now[0] <= threads + FEW and now[1] <= descriptors + FEW and not now[2]
                else None)
    return wait_for(look, "threads and descriptors to go")[3]


def test_turns_that_cannot_start_leave_nothing(make_engine, tmp_path):
    engine = make_engine(constants=harness.OPEN_TO_VIEW)
    engine.send("Hello")
    os.rename(engine.state, engine.state + ".away")
    with open(engine.state, "wb"):
        pass                                # where the folder should be
    threads, descriptors = resources(engine)[:2]
    for _ in range(50):
        answer = engine.post("/codex/send", {"message": "Hello"})
        assert answer.status == 503 and "REPLICAS_ENGINE_STATE" in answer.json()["details"]
    settled(engine, threads, descriptors)
    assert "ResourceWarning" not in engine.log()
    os.unlink(engine.state)
    os.rename(engine.state + ".away", engine.state)
    assert engine.send("Hello")[0].id == "2.1"


def stream_head(engine, turn):
    return ("GET /codex/events?turn=%d HTTP/1.1\r\nHost: x\r\nX-Replicas-Engine-Secret: %s\r\n\r\n"
            % (turn, harness.SECRET)).encode()


def test_a_thousand_clients_come_and_go(make_engine, tmp_path):
    engine = make_engine(constants=harness.OPEN_TO_VIEW)
    go_on = str(tmp_path / "go-on")
    turn = engine.start_turn(script(BEGIN, {"count": {"n": 50}}, {"wait_for": go_on},
                                    {"complete": True}))
    wait_for(lambda: engine.status()["turn"]["last_event_id"] == "%d.51" % turn)

    def cycles(count):
        for _ in range(count):
            with socket.create_connection(("127.0.0.1", engine.port)) as sock:
                sock.sendall(stream_head(engine, turn))
                assert sock.recv(65536)

    idle = resources(engine)[0]
    cycles(500)                     # until the memory for as many threads at once is there
    wait_for(lambda: resources(engine)[0] <= idle + FEW)
    threads, descriptors, _, memory = resources(engine)
    cycles(1000)
    assert settled(engine, threads, descriptors) < memory + 3000
    open(go_on, "w").close()
    check_stream(engine.events(turn))


def test_a_hundred_clients_and_one_that_is_dead(make_engine, tmp_path):
    engine = make_engine(constants=harness.OPEN_TO_VIEW)
    go_on = str(tmp_path / "go-on")
    idle = resources(engine)[0]
    engine.send("Hello")
    wait_for(lambda: resources(engine)[0] <= idle + FEW)
    threads, descriptors, _, memory = resources(engine)
    turn = engine.start_turn(script(BEGIN, {"wait_for": go_on},
                                    {"count": {"n": 100, "size": 20000}}, {"complete": True}))
    dead = socket.create_connection(("127.0.0.1", engine.port))
    dead.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    dead.sendall(stream_head(engine, turn))
    clients = [engine.open("GET", "/codex/events?turn=%d" % turn) for _ in range(100)]
    open(go_on, "w").close()
    streams = at_once(100, lambda number: harness.parse_events(clients[number][1].read()))
    assert all(len(check_stream(stream)) == 103 for stream in streams)
    for connection, _ in clients:
        connection.close()
    assert engine.status()["turn"]["status"] == "completed"
    dead.close()
    del streams
    assert settled(engine, threads, descriptors) < memory + 16000


SMALL_CODEX = """\
#!/bin/sh
cat > /dev/null
[ "$1" = --version ] && echo codex-cli 0.169.0 && exit
echo '{"type":"thread.started","thread_id":"019a1caa-bceb-7731-b607-e9d22c1933a5"}'
echo '{"type":"item.completed","item":{"id":"item_0","type":"agent_message","text":"Hello"}}'
(sleep 0.01 &)
[ $(($$ % 5)) = 0 ] && exit 3
echo '{"type":"turn.completed","usage":{}}'
"""


def test_many_turns_in_a_row(make_engine, tmp_path):
    """REPLICAS_TEST_TURNS says how many; what must not grow is measured after half of them."""
    codex = tmp_path / "codex"
    codex.write_text(SMALL_CODEX)
    codex.chmod(0o755)
    engine = make_engine(constants=harness.OPEN_TO_VIEW, CODEX_PATH=str(codex))
    count = int(os.environ.get("REPLICAS_TEST_TURNS", 200))
    connection = engine.connect()

    def turns(first, last):
        for turn in range(first, last + 1):
            connection.request("POST", "/codex/send", json.dumps({"message": "x"}), {
                "X-Replicas-Engine-Secret": harness.SECRET, "Idempotency-Key": "key %d" % turn})
            response = connection.getresponse()
            events = check_stream(harness.parse_events(response.read()))
            assert events[0].id == "%d.1" % turn

    turns(1, count // 2)
    threads, descriptors, _, memory = resources(engine)
    turns(count // 2 + 1, count)
    after = settled(engine, threads, descriptors)
    print("%d turns: %d KiB, then %d KiB" % (count, memory, after))
    assert after < memory + 2000
    connection.close()
    wait_for(lambda: len(kept(engine)) == min(count, 100))
    assert not glob.glob(os.path.join(engine.state, "turns", "*.files"))
