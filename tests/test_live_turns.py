"""Live turns through the engine: deltas, the way back to exec, interrupts, the key."""

import json
import os
import signal

import pytest

import harness
import replicas_engine
from harness import check_stream, is_alive, read_events, script, wait_for

BEGIN = {"thread": "resume"}
PATIENT = {"ASK_PATIENCE": harness.PATIENCE}    # a slow Codex is one that obeys, too


def at_requests(engine, **steps):
    """What the app-server does at a request; `_` stands for a slash."""
    with open(os.path.join(engine.codex_home, "stand_in_app_server.json"), "w") as file:
        json.dump({method.replace("_", "/"): what for method, what in steps.items()}, file)


def types(events):
    return [event.type for event in events]


def test_deltas_lie_between_the_events_of_exec(engine):
    plain = engine.send("Say something long")
    live = engine.send("Say something long", deltas=True)
    assert "item.delta" in types(live) and "item.delta" not in types(plain)
    rest = [event for event in live if event.type != "item.delta"]
    assert types(rest) == types(plain)
    assert [event.json().get("item") for event in rest] == [
        event.json().get("item") for event in plain]
    item = plain[-3].json()["item"]
    deltas = [event.json()["item"] for event in live if event.type == "item.delta"]
    assert "".join(delta["text_delta"] for delta in deltas) == item["text"]
    assert {delta["id"] for delta in deltas} == {item["id"]}
    assert live[0].json()["thread_id"] == plain[0].json()["thread_id"]


def test_the_same_events_for_who_comes_later_or_after_kill_9(engine):
    turn = engine.start_turn(script(BEGIN, {"say": "some words, one by one"}, {"sleep": 120}),
                             deltas=True)
    wait_for(lambda: engine.status()["turn"]["last_event_id"] not in (None, "%d.1" % turn))
    with_reader, response = engine.open("GET", "/codex/events")
    seen = []
    for event in read_events(response):
        seen.append(event)
        if event.type == "item.completed":
            break
    with_reader.close()
    engine.kill()
    engine.start()
    events = check_stream(engine.events(turn))
    assert events[:len(seen)] == seen and "item.delta" in types(seen)
    assert engine.events(turn, after=seen[2].id) == events[3:]
    assert events[-2].json()["error"]["code"] == "engine_restarted"


@pytest.mark.parametrize("steps", [
    {"initialize": [{"exit": 1}]}, {"initialize": [{"answer": {"error": {
        "code": -32600, "message": "not you"}}}]},
    {"thread_start": [{"answer": {"error": {"code": -32603, "message": "no"}}}]},
    {"thread_start": [{"kill": "SIGKILL"}]}, {"thread_start": [{"line": "hello"}, {"exit": 0}]}],
    ids=["it exits", "it refuses", "no thread", "it is killed", "it speaks otherwise"])
def test_a_message_that_the_app_server_does_not_take_goes_to_exec(engine, steps):
    at_requests(engine, **steps)
    events = engine.send("Hello", deltas=True)
    assert types(events) == ["thread.started", "turn.started", "item.completed", "turn.completed",
                             "done"]
    assert engine.prompts()[-1] == "Hello"
    wait_for(lambda: "warning turn 1: codex app-server doesn't take the turn, so exec does"
             in engine.log())


def test_a_turn_that_is_stopped_before_exec_takes_over(engine, monkeypatch):
    """No other Codex is started."""
    at_requests(engine, initialize=[{"exit": 1}])
    engine.stop()
    runner = engine.runner()

    def stop(stopper, turn_processes):
        runner.stop(runner.current, "interrupted")
        stop_as_ever(stopper, turn_processes)
    stop_as_ever, run_as_ever, ways = replicas_engine.Stopper.stop, replicas_engine.CodexRun, []
    monkeypatch.setattr(replicas_engine, "CodexRun", lambda driver, *others: (
        ways.append(type(driver)), run_as_ever(driver, *others))[1])
    monkeypatch.setattr(replicas_engine.Stopper, "stop", stop)
    runner.open()
    log, _ = runner.send(replicas_engine.TurnOptions({"message": "never", "deltas": True},
                                                     runner.settings))
    log.wait_for_end(harness.PATIENCE)
    assert log.finished
    runner.close()
    engine.start()
    assert engine.events(1)[-2].json()["error"]["code"] == "interrupted"
    assert ways == [replicas_engine.AppServer]


def test_no_exec_takes_over_while_an_app_server_cannot_be_stopped(engine, monkeypatch):
    """It may have taken the message, whatever it says: the turn would run twice."""
    at_requests(engine, thread_start=[{"sleep": 120}])
    engine.stop()
    runner, run_as_ever, runs = engine.runner(), replicas_engine.CodexRun, []

    def stop(stopper, turn_processes):
        stopper.left = [{"pid": turn_processes.pid, "command": "codex"}]
    monkeypatch.setattr(replicas_engine, "CodexRun", lambda *args: (
        runs.append(run_as_ever(*args)), runs[-1])[1])
    monkeypatch.setattr(replicas_engine, "ACCEPT_PATIENCE", 0.5)
    monkeypatch.setattr(replicas_engine, "KILL_PATIENCE", 0.1)
    monkeypatch.setattr(replicas_engine.Stopper, "stop", stop)
    runner.open()
    log, _ = runner.send(replicas_engine.TurnOptions({"message": "once", "deltas": True},
                                                     runner.settings))
    log.wait_for_end(harness.PATIENCE)
    assert len(runs) == 1 and runner.running()      # nor does another turn start
    runs[0].child.kill()
    wait_for(lambda: not runner.running())
    monkeypatch.undo()
    runner.close()
    engine.start()
    error = engine.events(1)[-2].json()["error"]
    assert (error["code"], "could not be stopped" in error["message"]) == ("exited", True)
    assert engine.prompts() == []


def test_an_app_server_that_never_answers(make_engine):
    engine = make_engine(constants={"ACCEPT_PATIENCE": 1.0})
    at_requests(engine, thread_start=[])
    assert engine.send("Hello", deltas=True)[-2].type == "turn.completed"
    wait_for(lambda: "no answer for 1 seconds" in engine.log())


def test_its_end_after_the_turn_was_taken_is_that_of_the_turn(engine):
    events = engine.send(script(BEGIN, {"say": "x"}, {"exit": 3}), deltas=True)
    assert events[-2].json()["error"]["code"] == "exited"
    assert "status 3" in events[-2].json()["error"]["message"]
    assert len(engine.calls()) == 0         # exec was not started


def test_an_interrupt_asks_first_and_leaves_nothing(make_engine, tmp_path):
    engine = make_engine(constants=PATIENT)
    pids = str(tmp_path / "pids")
    turn = engine.start_turn(script(BEGIN, {"say": "x"}, {"spawn": {
        "argv": ["sleep", "120"], "session": True, "pidfile": pids}}, {"sleep": 120}), deltas=True)
    wait_for(lambda: os.path.exists(pids) and os.path.getsize(pids))
    assert engine.post("/codex/interrupt").json() == {
        "success": True, "interrupted": True, "turn_id": turn}
    events = check_stream(engine.events(turn))
    assert events[-2].json()["error"]["code"] == "interrupted"
    with open(pids) as file:
        assert not any(is_alive(int(pid)) for pid in file.read().split())
    assert any("turn/interrupt" in json.dumps(call["read"])
               for call in engine._stand_in_log() if "read" in call)
    assert engine.send("And on", deltas=True)[-2].type == "turn.completed"


def test_a_codex_that_does_not_obey(engine):
    at_requests(engine, turn_interrupt=[])
    turn = engine.start_turn(script({"say": "x"}, {"sleep": 120}), deltas=True)
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    assert engine.post("/codex/interrupt").json()["interrupted"] is True
    error = engine.events(turn)[-2].json()["error"]
    assert error["code"] == "interrupted", error


def test_a_turn_that_ends_by_itself_while_it_is_interrupted(make_engine, tmp_path):
    """And an app-server that then doesn't exit: the interrupt is answered, and it is ended."""
    engine = make_engine(constants=PATIENT)
    asked = str(tmp_path / "asked")
    at_requests(engine, turn_interrupt=[{"touch": asked}, {"sleep": 120}])
    turn = engine.start_turn(script({"say": "x"}, {"wait_for": asked}, {"complete": True}),
                             deltas=True)
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    assert engine.post("/codex/interrupt").json() == {
        "success": True, "interrupted": False, "turn_id": None}
    assert engine.events(turn)[-2].type == "turn.completed"
    assert not any(is_alive(call["pid"]) for call in engine._stand_in_log() if "pid" in call)
    assert engine.send("And on", deltas=True)[-2].type == "turn.completed"


def test_the_key_is_not_in_its_environment(make_engine):
    engine = make_engine(OPENAI_API_KEY="sk-of-the-test")
    engine.send("Hello", deltas=True)
    starts = [call for call in engine._stand_in_log() if "app-server" in call.get("argv", ())]
    assert starts and not any("sk-of-the-test" in json.dumps(call["env"]) for call in starts)
    assert not any("sk-of-the-test" in json.dumps(call["argv"]) for call in starts)
    engine.send("Hello")
    assert engine.calls()[-1]["env"]["CODEX_API_KEY"] == "sk-of-the-test"


def test_a_codex_that_cannot(make_engine):
    engine = make_engine(STAND_IN_CODEX_VERSION="0.50.0")
    answer = engine.post("/codex/send", {"message": "Hello", "deltas": True})
    assert answer.status == 400 and "deltas" in answer.json()["error"]
    assert engine.send("Hello", deltas=False)[-2].type == "turn.completed"


@pytest.mark.parametrize("version", ["0.98.0", "0.140.0", "0.151.0"])
def test_a_thread_is_resumed_by_the_app_server_of_every_version(make_engine, version):
    engine = make_engine(STAND_IN_CODEX_VERSION=version)
    threads = {engine.send("Hello", deltas=True)[0].json()["thread_id"] for _ in range(2)}
    assert len(threads) == 1 and engine.calls() == []       # exec was not started


def test_every_turn_live_where_codex_can(make_engine):
    engine = make_engine(REPLICAS_ENGINE_DELTAS="1")
    assert "item.delta" in types(engine.send("Hello there"))
    assert "item.delta" not in types(engine.send("Hello there", deltas=False))
    old = make_engine("old", REPLICAS_ENGINE_DELTAS="1", STAND_IN_CODEX_VERSION="0.50.0")
    assert "item.delta" not in types(old.send("Hello there"))


def test_sigterm_in_a_live_turn(engine):
    turn = engine.start_turn(script({"say": "x"}, {"sleep": 120}), deltas=True)
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    assert engine.stop(signal.SIGTERM) == 0
    engine.start()
    assert engine.events(turn)[-2].json()["error"]["code"] == "shutdown"
