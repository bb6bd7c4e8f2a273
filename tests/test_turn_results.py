"""A turn's result without its stream: GET /codex/turns and GET /codex/turns/N."""

import os
import shutil
import threading

import pytest

from harness import script, wait_for

BEGIN = {"thread": "resume"}


def said(text):
    return {"event": {"type": "item.completed",
                      "item": {"id": "item_0", "type": "agent_message", "text": text}}}


def used(**usage):
    return {"event": {"type": "turn.completed", "usage": usage}}


def test_a_result(engine):
    events = engine.send(script(BEGIN, said("first"), said("last \u2705"), used(input_tokens=5)))
    result = engine.get("/codex/turns/1").json()
    assert list(result) == ["id", "status", "started_at", "finished_at", "last_event_id", "usage",
                            "error", "thread_id", "final_message", "turn_usage"]
    assert result["id"] == 1 and result["status"] == "completed" and result["error"] is None
    assert result["final_message"] == "last \u2705" and result["usage"] == {"input_tokens": 5}
    assert result["thread_id"] == events[0].json()["thread_id"]
    assert result["last_event_id"] == events[-1].id
    assert result["started_at"] <= result["finished_at"]
    for path in ("/codex/turns/2", "/codex/turns/0", "/codex/turns/" + "9" * 30):
        assert engine.get(path).status == 404
    assert engine.request("POST", "/codex/turns/1").status == 405
    assert engine.get("/codex/turns/one").status == 404


def test_a_message_that_is_cut_off(engine):
    engine.send(script(BEGIN, said("\u2705" * 100000), {"complete": True}))
    result = engine.get("/codex/turns/1").json()
    assert result["final_message_truncated"] is True
    assert result["final_message"] == "\u2705" * (256 * 1024 // 3)


def test_the_list(engine):
    assert engine.get("/codex/turns").json() == {"turns": []}
    for number in range(4):
        engine.send(script(BEGIN, said("message %d" % number), {"complete": True}))
    turns = engine.get("/codex/turns").json()["turns"]
    assert [turn["id"] for turn in turns] == [4, 3, 2, 1]
    assert all("final_message" not in turn for turn in turns)
    ids = lambda query: [turn["id"] for turn in engine.get(  # noqa: E731
        "/codex/turns?" + query).json()["turns"]]
    assert ids("limit=2") == [4, 3] and ids("before=3") == [2, 1]
    assert ids("before=4&limit=1") == [3] and ids("before=1") == []
    for query in ("limit=0", "limit=x", "before=0"):
        assert engine.get("/codex/turns?" + query).status == 400


@pytest.mark.parametrize("version, expected", [
    ("0.169.0", [{"n": 5}, {"n": 3}, None, None, {"n": 2}]),
    ("0.50.0", [{"n": 5}, {"n": 8}, None, {"n": 20}, {"n": 22}])])
def test_what_a_turn_used_of_its_own(make_engine, version, expected):
    """From 0.98 on Codex says what the thread has used; a turn that failed says nothing."""
    engine = make_engine(STAND_IN_CODEX_VERSION=version)
    for step in (used(n=5), used(n=8), {"fail": "no"}, used(n=20), used(n=22)):
        engine.send(script(BEGIN, step))
    turns = engine.get("/codex/turns").json()["turns"]
    assert [turn["turn_usage"] for turn in reversed(turns)] == expected
    assert [turn["usage"] for turn in reversed(turns)] == [{"n": 5}, {"n": 8}, None, {"n": 20},
                                                           {"n": 22}]


def test_what_a_turn_used_that_began_another_thread(engine):
    """Since Codex had lost the one that it was to resume; and a usage that isn't only numbers."""
    engine.send(script(BEGIN, used(n=5)))
    shutil.rmtree(os.path.join(engine.codex_home, "sessions"))
    engine.send(script(BEGIN, used(n=3)))
    engine.send(script(BEGIN, used(n=7, plan="pro", more={"n": 1})))
    last, began_another, first = engine.get("/codex/turns").json()["turns"]
    assert began_another["thread_id"] == last["thread_id"] != first["thread_id"]
    assert began_another["turn_usage"] == {"n": 3} and last["turn_usage"] == {"n": 4}


def test_waiting_for_a_result(engine, tmp_path):
    go_on = tmp_path / "go-on"
    turn = engine.start_turn(script(BEGIN, {"wait_for": str(go_on)}, {"complete": True}))
    assert engine.get("/codex/turns/%d?wait=0" % turn).json()["status"] == "running"
    assert engine.get("/codex/turns/%d?wait=1" % turn).json()["status"] == "running"
    assert engine.get("/codex/turns/%d?wait=301" % turn).status == 400
    for number in ("0", "999999999999999", "%015d1" % turn):    # the last has 16 digits
        assert engine.get("/codex/turns/" + number).status == 404
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(
        engine.get("/codex/turns/%d?wait=50" % turn).json()))
    waiting.start()
    go_on.write_text("")
    waiting.join()
    assert answers[0]["status"] == "completed"
    engine.restart()
    assert engine.get("/codex/turns/%d?wait=50" % turn).json()["status"] == "completed"
    wait_for(lambda: engine.get("/codex/turns/%d" % turn).json() == answers[0])
