"""One stream for whoever watches a machine: GET /codex/events?follow=1."""

import contextlib
import os
import random
import threading

from harness import PATIENCE, read_events, script, wait_for
from test_steering import slow_to_start

START = {"thread": "resume"}


def follow(engine, after=None, query=""):
    """The connection and the response."""
    headers = {"Last-Event-ID": after} if after else {}
    return engine.open("GET", "/codex/events?follow=1" + query, headers=headers)


def test_turn_after_turn(engine):
    connection, response = follow(engine)
    with contextlib.closing(connection):
        assert response.status == 200 and "X-Replicas-Turn-Id" not in response.headers
        assert response.readline() == b": keep-alive\n"         # there is no turn yet
        stream, seen = read_events(response), []
        for number in range(3):
            events = engine.send("message %d" % number)
            seen += [next(stream) for _ in events]
            assert seen[-len(events):] == events
    for number, event in enumerate(seen[:-1]):
        connection, response = follow(engine, event.id)
        with contextlib.closing(connection):
            assert next(read_events(response)) == seen[number + 1]


def test_it_waits_behind_the_newest_done(engine):
    last = engine.send("one")[-1].id
    assert engine.get("/codex/events", **{"Last-Event-ID": last}).status == 204
    connection, response = follow(engine, last)
    with contextlib.closing(connection):
        assert response.status == 200 and response.readline() == b": keep-alive\n"
        events = engine.send("two")
        stream = read_events(response)
        assert [next(stream) for _ in events] == events


def test_a_turn_that_waits_and_one_that_was_cancelled(engine, tmp_path):
    gate = str(tmp_path / "gate")
    engine.start_turn(script(START, {"wait_for": gate}, {"complete": True}))
    for name in ("never", "on"):
        engine.start_turn(name, when_busy="queue")
    engine.request("DELETE", "/codex/queue/2")
    connection, response = follow(engine)
    with contextlib.closing(connection):
        open(gate, "w").close()
        stream, done = read_events(response), []
        while done[-1:] != ["3"]:
            event = next(stream)
            if event.type == "done":
                done.append(event.id.partition(".")[0])
        assert done == ["1", "2", "3"]


def test_what_it_refuses(engine):
    assert engine.get("/codex/events?follow=2").status == 400
    assert engine.get("/codex/events?follow=1&turn=1").status == 404
    assert engine.get("/codex/events?follow=1&after=9.1").status == 404
    assert engine.get("/codex/events?follow=0").status == 404


def test_the_engines_end(make_engine):
    """It ends too, whole, and goes on after the restart."""
    engine = make_engine(constants={"CLOSE_TIMEOUT": PATIENCE})
    turn = engine.start_turn(script(START, {"sleep": 120}))
    connection, response = follow(engine)
    with contextlib.closing(connection):
        stream = read_events(response)
        first = next(stream)
        engine.restart()
        rest = list(stream)
    assert [first] + rest == engine.events(turn) and rest[-1].type == "done"
    connection, response = follow(engine, rest[-1].id)
    with contextlib.closing(connection):
        events = engine.send("on")
        assert [next(read_events(response)).id for _ in "1"] == [events[0].id]


def test_many_followers_that_come_and_go(engine):
    """Each has every event once, in order."""
    turns, seen = 12, [[] for _ in range(8)]

    def watch(number):
        chance, mine = random.Random(number), seen[number]
        while not (mine and mine[-1].id.startswith("%d." % turns) and mine[-1].type == "done"):
            connection, response = follow(engine, mine[-1].id if mine else None)
            with contextlib.closing(connection):
                for event in read_events(response):
                    mine.append(event)
                    if chance.random() < 0.05 or (
                            event.type == "done" and event.id.startswith("%d." % turns)):
                        break
    connection, response = follow(engine)
    connection.close()
    threads = [threading.Thread(target=watch, args=(number,)) for number in range(len(seen))]
    for thread in threads:
        thread.start()
    for number in range(turns):
        engine.send(script(START, {"count": {"n": 10, "size": 50}}, {"complete": True}))
    for thread in threads:
        thread.join()
    whole = [event for turn in range(1, turns + 1) for event in engine.events(turn)]
    for mine in seen:
        first = whole.index(mine[0])        # it may have come when the first turn was over
        assert mine == whole[first:]
    wait_for(lambda: engine.status()["turn"]["status"] == "completed")


def test_a_turn_that_starts_while_another_waits_behind_it(make_engine):
    """The one that waits has its log earlier, and is followed later."""
    engine, asked = slow_to_start(make_engine)
    connection, response = follow(engine)
    with contextlib.closing(connection):
        response.readline()
        threads = [threading.Thread(target=engine.start_turn, args=(str(number),),
                                    kwargs={"when_busy": "queue"}) for number in range(3)]
        for thread in threads:
            thread.start()
            wait_for(lambda: os.path.exists(asked))
        stream, done = read_events(response), []
        while len(done) < 3:
            event = next(stream)
            if event.type == "done":
                done.append(event.id.partition(".")[0])
        for thread in threads:
            thread.join()
    assert done == ["1", "2", "3"]
