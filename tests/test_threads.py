"""GET /codex/threads, and going on with an older thread."""

import json
import os
import re
import time

import pytest

import harness
from harness import check_stream
from test_real_codex import RealCodex


def write_rollout(engine, thread_id, when, lines=None, folder=None, suffix=""):
    folder = os.path.join(engine.codex_home, folder or time.strftime("sessions/%Y/%m/%d", when))
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, time.strftime("rollout-%Y-%m-%dT%H-%M-%S-", when) + thread_id
                        + ".jsonl" + suffix)
    if lines is None:
        lines = [{"timestamp": "2026-01-01T00:00:00.000Z", "type": "session_meta", "payload": {}},
                 {"type": "event_msg", "payload": {"type": "user_message",
                                                   "message": "Hi from " + thread_id}}]
    with open(path, "w", encoding="utf-8") as file:
        file.write("".join(line if isinstance(line, str) else json.dumps(line) + "\n"
                           for line in lines))
    return path


def threads(engine, query=""):
    answer = engine.get("/codex/threads" + query)
    assert answer.status == 200, answer.body
    return answer.json()["threads"]


def at(seconds):
    return time.gmtime(1790000000 + seconds)


def test_the_threads_newest_first(engine):
    assert threads(engine) == []
    paths = {"t%d" % n: write_rollout(engine, "t%d" % n, at(n * 40000)) for n in range(5)}
    paths["a1"] = write_rollout(engine, "a1", at(90000), folder="archived_sessions")
    found = threads(engine)
    assert [thread["thread_id"] for thread in found] == ["t4", "t3", "a1", "t2", "t1", "t0"]
    for thread in found:
        assert thread["session_file"] == paths[thread["thread_id"]]
        assert thread["first_message"] == "Hi from " + thread["thread_id"]
        assert thread["created_at"] == "2026-01-01T00:00:00.000Z"
        assert thread["updated_at"].endswith("Z")
    assert [thread["thread_id"] for thread in threads(engine, "?limit=2&before=t3")] == ["a1", "t2"]
    assert threads(engine, "?before=t0") == []
    assert engine.get("/codex/threads?before=gone").status == 404
    for query in ("?limit=0", "?limit=1001", "?limit=x", "?before=", "?before=../x"):
        assert engine.get("/codex/threads" + query).status == 400, query


def test_what_is_broken_costs_no_other(engine):
    write_rollout(engine, "good", at(0))
    write_rollout(engine, "empty", at(1), [])
    write_rollout(engine, "text", at(2), ["no JSON\n"])
    write_rollout(engine, "list", at(3), ["[1]\n"])
    write_rollout(engine, "deep", at(4), ["[" * 100000 + "\n"])
    write_rollout(engine, "other", at(5), [{"type": "event_msg"}])
    path = write_rollout(engine, "folder", at(6))
    os.unlink(path)
    os.mkdir(path)
    os.symlink("/nowhere", path.replace("folder", "link"))
    os.mkfifo(path.replace("folder", "fifo"))
    write_rollout(engine, "019a1caa-bceb-7731-b607-e9d22c1933a5", at(7), ["packed"], suffix=".zst")
    write_rollout(engine, "silent", at(8), [{"type": "session_meta", "timestamp": "x"}, "\n",
                                            '{"a": "user_message"\n'])
    write_rollout(engine, "odd", at(9), [{"type": "session_meta", "timestamp": "x"},
                                         {"payload": {"type": "user_message", "message": 5}}])
    found = {thread["thread_id"]: thread for thread in threads(engine)}
    assert list(found)[:1] == ["odd"] and "good" in found
    assert not {"empty", "text", "list", "deep", "other", "folder", "link", "fifo"} & set(found)
    packed = found["019a1caa-bceb-7731-b607-e9d22c1933a5"]
    assert packed["first_message"] is None and packed["created_at"].startswith("2025-10-25T")
    assert found["odd"]["first_message"] is None


def test_the_first_message_of_every_codex():
    """Which each version writes in its own way, and a live turn as exec."""
    for version in harness.CODEX_VERSIONS:
        real = RealCodex(version)
        try:
            engine = real.engine.start()
            for options in ({}, {"deltas": True})[:1 if version < "0.98" else 2]:
                engine.send("model: say hi", thread_id=None, **options)
            found = threads(engine)
            assert [thread["first_message"] for thread in found] == ["model: say hi"] * len(found)
            assert found[0]["thread_id"] == engine.status()["thread_id"]
            assert all(re.fullmatch(r"[0-9-]{10}T[0-9:.]{12}Z", thread["created_at"])
                       for thread in found)
        finally:
            real.close()


def test_a_long_first_message_is_cut(engine):
    write_rollout(engine, "long", at(0), [
        {"type": "session_meta", "timestamp": "x"}, {"type": "response_item", "x": "y" * 300000},
        {"payload": {"type": "user_message", "message": "✅" * 5000}}])
    assert threads(engine)[0]["first_message"] == "✅" * 2000


def test_an_older_thread_goes_on(engine):
    first = engine.send("one")[0].json()["thread_id"]
    engine.post("/codex/reset")
    second = engine.send("two")[0].json()["thread_id"]
    assert first != second
    assert [thread["thread_id"] for thread in threads(engine)][-1] in (first, second)
    assert {thread["first_message"] for thread in threads(engine)} == {"one", "two"}
    events = check_stream(engine.send("three", thread_id=first))
    assert events[0].json()["thread_id"] == first == engine.status()["thread_id"]
    assert engine.restart().status()["thread_id"] == first
    assert engine.send("four")[0].json()["thread_id"] == first
    third = engine.send("five", thread_id=None)[0].json()["thread_id"]
    assert third not in (first, second) and engine.status()["thread_id"] == third


def test_a_queued_message_has_its_thread(engine, tmp_path):
    from test_queue import gated
    first = engine.send("one")[0].json()["thread_id"]
    gate = tmp_path / "gate"
    engine.start_turn(gated(gate), thread_id=None)
    engine.start_turn("two", thread_id=first, when_busy="queue")
    engine.start_turn("three", thread_id=None, when_busy="queue")
    gate.touch()
    ids = [engine.get("/codex/turns/%d?wait=60" % turn).json()["thread_id"]
           for turn in (1, 2, 3, 4)]
    assert ids[0] == ids[2] == first and len(set(ids)) == 3
    assert engine.status()["thread_id"] == ids[3]


@pytest.mark.parametrize("thread_id, status", [
    ("unknown", 404), ("", 400), (5, 400), ("../../x", 400), ({}, 400)])
def test_threads_that_are_none(engine, thread_id, status):
    answer = engine.post("/codex/send", {"message": "x", "thread_id": thread_id})
    assert answer.status == status and "thread" in answer.json()["error"].lower()
    assert engine.calls() == [] and engine.status()["turn"] is None
