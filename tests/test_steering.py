"""Messages that cut into the turn in progress: taken or refused, once."""

import os
import random
import threading
import time

import pytest

from harness import STAND_IN_CODEX, check_stream, script, wait_for
from test_live_turns import at_requests, types
from test_real_codex import RealCodex

BEGIN = [{"thread": "resume"}, {"say": "one"}]
WAIT = script(*BEGIN, {"wait_for_steer": True}, {"complete": True})


def steer(engine, message, headers=None, **options):
    return engine.request("POST", "/codex/send", dict(options, message=message, when_busy="steer"),
                          headers)


def start(engine, message, **options):
    """Start a live turn, which has begun: its id."""
    turn = engine.start_turn(message, deltas=True, **options)
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    return turn


def steered(engine, turn):
    return [event.json()["message"] for event in engine.events(turn)
            if event.type == "turn.steered"]


def test_a_message_cuts_in(engine):
    turn = start(engine, WAIT)
    answer = steer(engine, "and ✅ \ud800 this", {"Prefer": "respond-async"})
    assert (answer.status, answer.json()) == (202, {"turn_id": turn, "status": "steered"})
    assert answer.headers["Preference-Applied"] == "respond-async"
    events = check_stream(engine.events(turn))
    assert events[-2].type == "turn.completed"
    cut_in = [event for event in events if event.type == "turn.steered"]
    assert [event.json() for event in cut_in] == [
        {"type": "turn.steered", "message": "and ✅ \ufffd this"}]
    said = [event.json()["item"]["text"] for event in events if event.type == "item.completed"]
    assert said[-1] == "You said: and ✅ \ufffd this"


def test_its_stream_begins_with_it(engine):
    turn = start(engine, WAIT)
    answer = steer(engine, "on", model="gpt-9", sandbox_mode="read-only")
    assert answer.status == 200 and answer.headers["X-Replicas-Turn-Id"] == str(turn)
    assert answer.headers["X-Replicas-Ignored-Keys"] == "model, sandbox_mode"
    events = answer.events()
    assert "turn.steered" in types(events) and events[-1].type == "done"
    assert events == engine.events(turn)[-len(events):] and len(events) < len(engine.events(turn))


def slow_to_start(make_engine):
    """An engine whose next turn starts late, when its Codex has said its version, and the file that
    is there while it starts."""
    engine = make_engine(start=False)
    shim, asked = os.path.join(engine.folder, "slow-codex"), os.path.join(engine.folder, "asked")
    engine.env["CODEX_PATH"] = shim
    for command in (":", "touch %s; sleep 2" % asked):      # the engine asks again of a new program
        with open(shim + ".new", "w") as file:
            file.write('#!/bin/sh\nif [ "$1" = --version ]; then %s; fi\nexec %s "$@"\n'
                       % (command, STAND_IN_CODEX))
        os.chmod(shim + ".new", 0o755)
        os.replace(shim + ".new", shim)
        if engine.process is None:
            engine.start()
            assert engine.status()["codex"]["version"]
    return engine, asked


def test_a_turn_that_is_just_starting(make_engine):
    """It takes the message when it has begun."""
    (engine, asked), answers = slow_to_start(make_engine), []
    thread = threading.Thread(
        target=lambda: answers.append(engine.start_turn(WAIT, deltas=True)))
    thread.start()
    wait_for(lambda: os.path.exists(asked))
    answer = steer(engine, "on", {"Prefer": "respond-async"})
    thread.join()
    assert answers == [1] and answer.json() == {"turn_id": 1, "status": "steered"}
    assert steered(engine, 1) == ["on"]


def test_it_starts_a_turn_where_none_is_in_progress(engine):
    events = check_stream(steer(engine, "Begin").events())
    assert "turn.steered" not in types(events)
    assert engine.prompts() == ["Begin"]


def test_turns_that_take_none(engine, tmp_path):
    gate = str(tmp_path / "gate")
    turn = engine.start_turn(script({"thread": "resume"}, {"wait_for": gate}, {"complete": True}))
    answer = steer(engine, "on")
    assert answer.status == 409 and answer.json()["turn_id"] == turn
    assert "deltas" in answer.json()["details"]
    open(gate, "w").close()
    assert "turn.steered" not in types(engine.events(turn))
    start(engine, script(*BEGIN, {"sleep": 120}))
    pixel = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
    assert "images" in steer(engine, "on", images=[pixel]).json()["details"]
    assert engine.post("/codex/interrupt").json()["interrupted"]


@pytest.mark.parametrize("version", ["0.98.0", "0.161.0"])
def test_a_codex_that_may_lose_a_steer(make_engine, version):
    """0.98 knows none; those between forget one that still waits when they are interrupted."""
    engine = make_engine(STAND_IN_CODEX_VERSION=version)
    start(engine, script(*BEGIN, {"sleep": 120}))
    answer = steer(engine, "on")
    assert answer.status == 409 and "before 0.162" in answer.json()["details"]
    assert not any("turn/steer" in str(line) for line in engine._stand_in_log())
    engine.post("/codex/interrupt")


@pytest.mark.parametrize("what", [
    [{"exit": 3}], [{"answer": {"error": {"code": -32600, "message": "no active turn"}}}], []],
    ids=["death", "refusal", "silence"])
def test_it_is_answered_whatever_codex_does(engine, what):
    at_requests(engine, turn_steer=what)
    turn = start(engine, script(*BEGIN, {"sleep": 120}))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(steer(engine, "on")))
    thread.start()
    if not what:
        wait_for(lambda: any("turn/steer" in str(line) for line in engine._stand_in_log()))
        engine.post("/codex/interrupt")
    thread.join()
    assert answers[0].status == 409 and answers[0].json()["turn_id"] == turn
    engine.post("/codex/interrupt")
    assert steered(engine, turn) == []


def test_an_end_that_waits_for_an_answer_that_never_comes(make_engine, tmp_path):
    """Codex is ended, and so is the turn, as Codex said."""
    engine, asked = make_engine(constants={"EXIT_PATIENCE": 0.5}), str(tmp_path / "asked")
    at_requests(engine, turn_steer=[{"touch": asked}])
    turn = start(engine, script(*BEGIN, {"wait_for": asked}, {"complete": True}))
    answer = steer(engine, "on")
    assert answer.status == 409 and "history" in answer.json()["details"]
    assert engine.events(turn)[-2].type == "turn.completed"


def test_a_key(engine):
    """The message cuts in once, however often it is sent."""
    turn = start(engine, script(*BEGIN, {"wait_for_steer": True}, {"sleep": 120}))
    for _ in range(3):
        answer = steer(engine, "on", {"Prefer": "respond-async", "Idempotency-Key": "k"})
        assert answer.status == 202 and answer.json()["turn_id"] == turn
    assert steer(engine, "off", {"Idempotency-Key": "k"}).status == 422
    engine.post("/codex/interrupt")
    assert steered(engine, turn) == ["on"]
    answer = steer(engine, "on", {"Prefer": "respond-async", "Idempotency-Key": "k"})
    assert answer.json()["turn_id"] == turn


def test_the_same_key_at_once(engine):
    at_requests(engine, turn_steer=[{"sleep": 0.5}, {"answer": True}])
    turn = start(engine, script(*BEGIN, {"wait_for_steer": True}, {"sleep": 120}))
    answers = []

    def one():
        answers.append(steer(engine, "on", {"Prefer": "respond-async", "Idempotency-Key": "k"}))
    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status for answer in answers} == {202}
    engine.post("/codex/interrupt")
    assert steered(engine, turn) == ["on"]


def test_races_with_the_turns_end(engine):
    """Each message is in the turn, or refused, or a turn of its own: one of them."""
    for number in range(25):
        pause = random.Random(number).uniform(0, 0.06)
        turn = start(engine, script(*BEGIN, {"sleep": pause}, {"complete": True}))
        message = "steer %d" % number
        answer = steer(engine, message, {"Prefer": "respond-async"}, deltas=True)
        if answer.status == 202 and answer.json()["turn_id"] != turn:
            assert engine.wait_for_turn()["id"] == turn + 1
        else:
            assert answer.status in (202, 409) and answer.json()["turn_id"] == turn
            assert steered(engine, turn) == ([message] if answer.status == 202 else [])
        check_stream(engine.events(turn))
        assert len(engine.get("/codex/turns").json()["turns"]) == engine.status()["turn"]["id"]


def test_races_with_the_real_codex():
    """A message is in the thread once where it was taken, and nowhere where it was refused.  With
    RACES=100 in the environment, as often."""
    real = RealCodex("0.169.0")
    outcomes = {"steered": 0, "too late": 0, "a turn": 0}
    try:
        engine = real.engine.start()
        for number in range(int(os.environ.get("RACES", 8))):
            turn = engine.start_turn("model: stream 10\nmodel: say one two three", deltas=True)
            wait_for(lambda: engine.status()["turn"]["last_event_id"])
            time.sleep(random.Random(number).uniform(0, 0.2))       # a race
            message = "model: say answer %d." % number
            answer = steer(engine, message, {"Prefer": "respond-async"}, deltas=True)
            status = engine.wait_for_turn()
            assert status["status"] == "completed", status
            history = engine.get("/codex/history").json()["events"]
            found = sum(event["type"] == "response_item" and message in str(event["payload"])
                        for event in history)
            if answer.status == 409:
                assert found == 0 and steered(engine, turn) == []
                outcomes["too late"] += 1
            elif answer.json()["turn_id"] == turn:
                assert found == 1 and steered(engine, turn) == [message]
                outcomes["steered"] += 1
            else:
                assert found == 1 and status["id"] == turn + 1
                outcomes["a turn"] += 1
    finally:
        real.close()
    print(outcomes)
