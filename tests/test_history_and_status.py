"""GET /codex/history and GET /codex/status, as clients see them."""

import gzip
import json
import os
import re
import stat
import time

import pytest

import conftest
from harness import MODULE, STAND_IN_CODEX, script, wait_for
from test_rollouts import CONTENT, LINES, THREAD, answer, append, take_thread, write

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
OTHER_THREAD = THREAD[:-1] + "6"
END = len(CONTENT)
CURSOR = "%s.%d" % (THREAD, END)
NO_THREAD = {"message": "No active thread", "thread_id": None, "events": []}


def history(engine, query="", **headers):
    got = engine.request("GET", "/codex/history" + query,
                         headers={name.replace("_", "-"): value
                                  for name, value in headers.items()})
    assert got.headers.get("Content-Type") == (None if got.status == 304 else "application/json")
    return got


# History: what there is

@pytest.mark.parametrize("query", ["", "?tail=5", "?limit=5"])
def test_no_thread(engine, query):
    assert history(engine, query).json() == NO_THREAD


def test_a_thread_without_a_file(engine):
    take_thread(engine, place=None)
    for query in ("", "?tail=5", "?limit=1", "?after=%s.0" % THREAD):
        assert history(engine, query).body == answer([], 0)
    assert history(engine, "?after=%s.1" % THREAD).status == 410


def test_the_thread_of_a_turn(engine):
    engine.send("hello")
    events = history(engine).json()["events"]
    assert events[0]["type"] == "session_meta"
    assert events[0]["payload"]["id"] == engine.status()["thread_id"]
    with open(engine.status()["session_file"], "rb") as file:
        lines = file.read().splitlines()
    assert history(engine).body == answer(lines, sum(map(len, lines)) + len(lines),
                                          engine.status()["thread_id"])
    engine.post("/codex/reset")
    assert history(engine).json() == NO_THREAD
    assert engine.status()["session_file"] is None


PARTS = [                   # the query, the lines that it gives, the cursor, has_more
    ("tail=0", LINES[10:], END, False),
    ("tail=3", LINES[7:], END, False),
    ("tail=10", LINES, END, False),
    ("tail=999999999999999", LINES, END, False),
    ("limit=10", LINES, END, False),
    ("limit=999999999999999", LINES, END, False),
    ("limit=4", LINES[:4], 32, True),
    ("tail=5&limit=2", LINES[5:7], 56, True),
    ("limit=2&tail=2", LINES[8:], END, False),
    ("after=%s.32" % THREAD, LINES[4:], END, False),
    ("after=%s.32&limit=1" % THREAD, LINES[4:5], 40, True),
    ("after=%s.72&limit=1" % THREAD, LINES[9:], END, False),
    ("after=%s&limit=1" % CURSOR, [], END, False),
    ("after=%s&unknown=1" % CURSOR, [], END, False)]


def test_parts_of_it(engine):
    take_thread(engine)
    for query, lines, cursor, more in PARTS:
        assert history(engine, "?" + query).body == answer(lines, cursor, more=more), query


BAD_QUERIES = [
    "tail=", "tail=-1", "tail=x", "tail=1.5", "tail=%D9%A1", "tail=1e3", "tail=" + "9" * 16,
    "limit=0", "limit=", "limit=-5", "limit=all", "after=", "after=x", "after=7",
    "after=" + THREAD, "after=%s." % THREAD, "after=%s.-8" % THREAD, "after=%s.8.8" % THREAD,
    "after=%s.8x" % THREAD, "after=%s.%%D9%%A8" % THREAD, "after=.8", "after=../etc.8",
    "after=%s.%s" % (THREAD, "9" * 16), "tail=1&after=" + CURSOR, "tail=1&tail=2",
    "after=%s&after=%s" % (CURSOR, CURSOR)]


@pytest.mark.parametrize("has_thread", [False, True])
def test_a_parameter_that_cannot_be_used(engine, has_thread):
    if has_thread:
        take_thread(engine)
    for query in BAD_QUERIES:
        got = history(engine, "?" + query)
        assert got.status == 400 and set(got.json()) == {"error", "details"}, query
        assert query.partition("=")[0] in got.json()["error"] or "query" in got.json()["error"]


def test_a_cursor_that_is_gone(engine):
    assert history(engine, "?after=" + CURSOR).status == 410            # no thread any more
    path = take_thread(engine, data=CONTENT + b'{"half"')
    for cursor in ["%s.%d" % (THREAD, n) for n in (1, 7, 9, END - 1, END + 1, END + 7, END + 8,
                                                   10 ** 15 - 1)] + [
            OTHER_THREAD + ".8", THREAD.upper() + ".8", THREAD[1:] + ".8", "x" + THREAD + ".8"]:
        got = history(engine, "?after=" + cursor)
        assert got.status == 410, cursor
        assert set(got.json()) == {"error", "details"}
    assert history(engine, "?after=" + CURSOR).status == 200
    os.truncate(path, 40)
    assert history(engine, "?after=" + CURSOR).status == 410
    take_thread(engine, OTHER_THREAD)
    assert history(engine, "?after=" + CURSOR).status == 410


def test_polling_while_a_turn_runs_gives_each_line_once(engine):
    """A rollout that grows by lines and by halves of lines."""
    steps = [{"thread": "new"}, {"touch": os.path.join(engine.folder, "begun")}]
    go = os.path.join(engine.folder, "go")
    for n in range(120):
        steps += [{"wait_for": go}] if n == 60 else []
        steps += [{"rollout_line": json.dumps({"n": n, "text": "x" * (n * 37 % 3000)})}]
        steps += [{"rollout_line": "broken %d" % n}, {"sleep": 0.002}] if n % 3 == 0 else []
    engine.start_turn(script(*steps, {"complete": True}))
    wait_for(lambda: os.path.exists(os.path.join(engine.folder, "begun")))
    wait_for(lambda: engine.status()["thread_id"])
    events, cursor, polls, is_over = [], None, 0, False
    while True:
        limit = ("", "limit=3")[polls % 2]
        page = history(engine, "?%s&%s" % ("after=" + cursor if cursor else "", limit)).json()
        if cursor is None:
            thread_id = page["thread_id"]
        assert page["thread_id"] == thread_id
        events += page["events"]
        polls, cursor = polls + 1, page["cursor"]
        if polls == 3:
            open(go, "w").close()
        if is_over and not page.get("has_more"):
            break
        is_over = is_over or engine.status()["turn"]["status"] != "running"
    assert [event["n"] for event in events if "n" in event] == list(range(120))
    assert events == history(engine).json()["events"]
    assert polls > 3


def test_halves_of_lines_while_polling(engine):
    path = take_thread(engine, data=b"")
    events, cursor = [], "%s.0" % THREAD
    for n in range(40):
        text = b'{"n":%d,"text":"%b"}\r\n' % (n, "ö".encode() * n)
        for piece in (text[:n % 9], text[n % 9:-1], text[-1:]):
            append(path, piece)
            page = history(engine, "?after=" + cursor).json()
            events, cursor = events + page["events"], page["cursor"]
    assert events == [{"n": n, "text": "ö" * n} for n in range(40)]


# History: conditions and codings

def test_etag(engine):
    path = take_thread(engine)
    got = history(engine)
    tag = got.headers["ETag"]
    assert re.fullmatch(r'W/"[0-9a-f]+"', tag)
    assert history(engine).headers["ETag"] == tag
    assert history(engine, Accept_Encoding="gzip").headers["ETag"] == tag
    for condition in (tag, tag[2:], "*", '"x", %s' % tag, '"a,b",%s , W/"y"' % tag):
        same = history(engine, If_None_Match=condition)
        assert (same.status, same.body) == (304, b""), condition
        assert same.headers["ETag"] == tag and "Accept-Encoding" in same.headers["Vary"]
    for condition in ('"x"', tag[:-2] + '"', tag.strip('W/"'), "", '""', "W/*"):
        assert history(engine, If_None_Match=condition).status == 200, condition
    other = history(engine, "?tail=3", If_None_Match=tag)
    assert other.status == 200 and other.headers["ETag"] != tag
    append(path, b"{}\n")
    changed = history(engine, If_None_Match=tag)
    assert changed.status == 200 and changed.headers["ETag"] != tag
    assert changed.json()["events"][-1] == {}
    tag = changed.headers["ETag"]
    status = os.stat(path)
    write(path + ".new", CONTENT + b"[]\n")                 # the same size and time, another file
    os.utime(path + ".new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.rename(path + ".new", path)
    assert history(engine, If_None_Match=tag).json()["events"][-1] == []


GZIP = ["gzip", "GZIP", "x-gzip", "*", "br, gzip", "gzip;q=0.001",
        "gzip; q=1.000", "br;q=1.0, gzip;q=0.8, *;q=0.1", "*;q=0, gzip", "identity;q=0.5, *"]
NO_GZIP = ["", "identity", "br", "gzip;q=0", "gzip;q=0.000", "*;q=0", "gzip;q=0, *", "gzipped",
           "deflate, br;q=0.5"]


def test_gzip(engine):
    take_thread(engine, data=CONTENT * 1000)
    for accepted in GZIP + NO_GZIP:
        got = history(engine, Accept_Encoding=accepted)
        decode, coding = (gzip.decompress, "gzip") if accepted in GZIP else (bytes, None)
        assert got.headers.get("Content-Encoding") == coding, accepted
        assert got.headers["Vary"] == "Accept-Encoding"
        assert decode(got.body) == answer(LINES * 1000, END * 1000)
        assert (len(got.body) < 10000) == (accepted in GZIP)


def test_gzip_of_a_big_one_in_pieces(engine):
    lines = [b'{"n":%d,"text":"%b"}' % (n, os.urandom(200).hex().encode()) for n in range(20000)]
    data = b"\n".join(lines) + b"\n"
    take_thread(engine, data=data)
    got = history(engine, "?limit=19000", Accept_Encoding="gzip")
    end = sum(map(len, lines[:19000])) + 19000
    assert gzip.decompress(got.body) == answer(lines[:19000], end, more=True)


def test_head(engine):
    assert engine.request("HEAD", "/codex/history").status == 200
    take_thread(engine)
    for headers in ({}, {"Accept-Encoding": "gzip"}):
        got = engine.request("GET", "/codex/history", headers=headers).headers
        head = engine.request("HEAD", "/codex/history", headers=headers)
        assert (head.status, head.body) == (200, b"")
        for name in ("ETag", "Vary", "Content-Type", "Content-Encoding"):
            assert head.headers[name] == got[name]
        head = engine.request("HEAD", "/codex/history", headers=dict(
            headers, **{"If-None-Match": got["ETag"]}))
        assert (head.status, head.body) == (304, b"")
    assert engine.request("HEAD", "/codex/history?after=x").status == 400
    assert engine.request("HEAD", "/codex/history?after=%s.7" % THREAD).status == 410


def test_one_connection_for_many(engine):
    """What is answered in pieces leaves the connection usable."""
    take_thread(engine)
    connection = engine.connect()
    secret = {"X-Replicas-Engine-Secret": engine.env["REPLICAS_ENGINE_SECRET"]}
    for query, status in (("", 200), ("?after=x", 400), ("?tail=1", 200),
                          ("?after=%s.7" % THREAD, 410), ("", 200)):
        connection.request("GET", "/codex/history" + query, headers=secret)
        response = connection.getresponse()
        assert response.status == status and json.loads(response.read().decode())
    connection.close()


# Status

def check_status(engine):
    """What holds of every status; the status."""
    status = engine.status()
    assert list(status) == ["has_active_thread", "thread_id", "session_file", "working_directory",
                            "turn", "codex", "engine", "problems"]
    assert status["has_active_thread"] is (status["thread_id"] is not None)
    assert status["working_directory"] == engine.workspace
    assert set(status["engine"]) == {"version", "started_at"}
    assert TIME.fullmatch(status["engine"]["started_at"])
    turn = status["turn"]
    if turn:
        assert list(turn) == ["id", "status", "started_at", "finished_at", "last_event_at",
                              "last_event_id", "usage", "error"]
        assert TIME.fullmatch(turn["started_at"])
        assert (turn["finished_at"] is None) == (turn["status"] == "running")
        assert (turn["last_event_at"] is None) == (turn["last_event_id"] is None)
        times = [moment for moment in (turn["started_at"], turn["last_event_at"],
                                       turn["finished_at"]) if moment]
        assert times == sorted(times)
    return status


def test_before_any_turn(engine):
    status = check_status(engine)
    assert status["turn"] is None and status["thread_id"] is None
    assert status["session_file"] is None and status["has_active_thread"] is False
    assert status["codex"] == {"path": STAND_IN_CODEX, "version": "0.169.0"}
    with open(MODULE, encoding="utf-8") as file:
        assert '__version__ = "%s"' % status["engine"]["version"] in file.read()


def test_a_completed_turn(engine):
    events = engine.send("hello")
    status = check_status(engine)
    turn = status["turn"]
    assert turn["id"] == 1 and turn["status"] == "completed" and turn["error"] is None
    assert turn["usage"] == events[-2].json()["usage"]
    assert turn["last_event_id"] == events[-1].id
    assert status["thread_id"] == events[0].json()["thread_id"]
    assert status["session_file"].endswith("-%s.jsonl" % status["thread_id"])
    assert os.path.isfile(status["session_file"])
    engine.send("again")
    assert check_status(engine)["turn"]["id"] == 2
    assert check_status(engine)["thread_id"] == status["thread_id"]


def test_during_a_turn(engine):
    gates = [os.path.join(engine.folder, "gate%d" % n) for n in range(3)]
    message = {"type": "item.completed", "item": {"id": "item_0", "type": "agent_message",
                                                  "text": "one"}}
    turn_id = engine.start_turn(script(
        {"wait_for": gates[0]}, {"thread": "new"}, {"wait_for": gates[1]}, {"event": message},
        {"wait_for": gates[2]}, {"complete": True}))
    status = check_status(engine)
    assert status["thread_id"] is None and status["session_file"] is None
    assert status["turn"]["id"] == turn_id and status["turn"]["status"] == "running"
    assert status["turn"]["last_event_id"] is status["turn"]["last_event_at"] is None

    seen = []
    for number, gate in enumerate(gates[:2], 1):
        write(gate, b"")
        seen.append(wait_for(lambda: check_status(engine)["turn"]["last_event_id"]
                             == "%d.%d" % (turn_id, number) and check_status(engine)))
        time.sleep(0.01)                                    # the times have milliseconds
    assert seen[0]["thread_id"] == seen[1]["thread_id"] is not None
    first, second = (status["turn"] for status in seen)
    assert first["status"] == second["status"] == "running"
    assert first["last_event_at"] < second["last_event_at"]
    assert first["started_at"] == second["started_at"]
    assert second["usage"] is second["error"] is None
    write(gates[2], b"")
    turn = engine.wait_for_turn()
    assert turn["status"] == "completed" and turn["started_at"] == first["started_at"]
    assert turn["last_event_at"] > second["last_event_at"]


@pytest.mark.parametrize("steps, message, code", [
    ([{"thread": "new"}, {"fail": "no model"}], "no model", None),
    ([{"thread": "new"}, {"stderr": "a reason"}, {"exit": 3}], "a reason", "exited"),
    ([{"thread": "new"}, {"kill": "SIGKILL"}], "SIGKILL", "exited"),
    ([{"stderr": "a reason"}, {"exit": 1}], "a reason", "exited")])
def test_a_failed_turn(engine, steps, message, code):
    events = engine.send(script(*steps))
    status = check_status(engine)
    turn = status["turn"]
    assert turn["status"] == "failed" and turn["usage"] is None
    assert turn["error"] == events[-2].json()["error"]
    assert message in turn["error"]["message"] and turn["error"].get("code") == code
    assert turn["last_event_id"] == events[-1].id
    assert status["has_active_thread"] is ("thread" in steps[0])


def test_an_interrupted_turn(engine):
    turn_id = engine.start_turn(script({"thread": "new"}, {"sleep": 100}))
    wait_for(lambda: engine.status()["session_file"])
    assert engine.post("/codex/interrupt").json()["turn_id"] == turn_id
    status = check_status(engine)
    assert status["turn"]["status"] == "interrupted"
    assert status["turn"]["error"]["code"] == "interrupted"
    assert status["has_active_thread"] and os.path.isfile(status["session_file"])


def test_after_a_restart(engine):
    engine.send("hello")
    before = check_status(engine)
    path = before["session_file"]
    history_before = history(engine).body
    time.sleep(0.01)
    engine.restart()
    after = check_status(engine)
    assert after["engine"].pop("started_at") > before["engine"].pop("started_at")
    assert after == before
    assert history(engine).body == history_before
    assert after["session_file"] == path


def test_after_the_engine_was_killed_in_a_turn(engine):
    turn_id = engine.start_turn(script({"thread": "new"}, {"sleep": 100}))
    before = wait_for(lambda: engine.status()["session_file"] and check_status(engine))
    engine.kill()
    engine.start()
    turn = engine.wait_for_turn()
    after = check_status(engine)
    assert turn["id"] == turn_id and turn["status"] == "failed"
    assert turn["error"]["code"] == "engine_restarted"
    assert turn["started_at"] == before["turn"]["started_at"]
    assert after["thread_id"] == before["thread_id"]
    assert after["session_file"] == before["session_file"]


def test_after_a_reset(engine):
    engine.send("hello")
    path = engine.status()["session_file"]
    engine.post("/codex/reset")
    status = check_status(engine)
    assert (status["has_active_thread"], status["thread_id"], status["session_file"]) == (
        False, None, None)
    assert status["turn"]["status"] == "completed"
    assert os.path.isfile(path)
    engine.restart()
    assert check_status(engine)["thread_id"] is None
    engine.send("a new one")
    assert check_status(engine)["session_file"] not in (None, path)


def test_after_a_reset_in_a_turn(engine):
    engine.start_turn(script({"thread": "new"}, {"sleep": 100}))
    wait_for(lambda: engine.status()["thread_id"])
    engine.post("/codex/reset")
    status = check_status(engine)
    assert status["thread_id"] is None and status["turn"]["status"] == "interrupted"


# Status: Codex

def codex_of_version(path, version):
    """Install, as an upgrade does, a Codex that is another file than the one before."""
    write(path + ".new", b"#!/bin/sh\nSTAND_IN_CODEX_VERSION=%b exec %b \"$@\"\n"
          % (version.encode(), STAND_IN_CODEX.encode()))
    os.chmod(path + ".new", 0o755)
    os.rename(path + ".new", path)


def test_an_upgrade_of_codex_under_a_running_engine(make_engine, tmp_path):
    path = str(tmp_path / "bin" / "codex")
    codex_of_version(path, "0.98.0")
    engine = make_engine(CODEX_PATH=path)
    for version in ("0.98.0", "0.169.0", "0.170.0-alpha.1", "0.98.0"):
        codex_of_version(path, version)
        for _ in range(2):
            assert check_status(engine)["codex"] == {"path": path, "version": version}
    os.unlink(path)
    assert check_status(engine)["codex"] is None
    codex_of_version(path, "0.50.0")
    assert check_status(engine)["codex"]["version"] == "0.50.0"


def test_an_upgrade_in_a_turn(make_engine, tmp_path):
    path = str(tmp_path / "bin" / "codex")
    codex_of_version(path, "0.98.0")
    engine = make_engine(CODEX_PATH=path)
    gate = os.path.join(engine.folder, "gate")
    engine.start_turn(script({"thread": "new"}, {"wait_for": gate}, {"complete": True}))
    assert check_status(engine)["codex"]["version"] == "0.98.0"
    codex_of_version(path, "0.169.0")
    status = check_status(engine)
    assert status["codex"]["version"] == "0.169.0" and status["turn"]["status"] == "running"
    write(gate, b"")
    assert engine.wait_for_turn()["status"] == "completed"


def test_problems_are_in_the_status(make_engine):
    """What keeps turns from starting or ending well, and what to do; /health stays as it is."""
    conftest.need("user namespaces")        # or there is another problem
    engine = make_engine(OPENAI_API_KEY="sk-x")
    assert engine.status()["problems"] == []
    os.rename(engine.workspace, engine.workspace + ".moved")
    problem, = engine.status()["problems"]
    assert "WORKSPACE_HOME=" + engine.workspace in problem["problem"] and problem["details"]
    assert engine.get("/health").status == 200
    os.rename(engine.workspace + ".moved", engine.workspace)
    assert engine.status()["problems"] == []


def test_the_version_is_asked_for_once(engine):
    for _ in range(5):
        engine.status()
    asked = [call for call in engine._stand_in_log() if call.get("argv") == ["--version"]]
    assert len(asked) == 1


def test_a_codex_on_the_path(make_engine, tmp_path):
    path = str(tmp_path / "bin" / "codex")
    engine = make_engine(CODEX_PATH=None, start=False)
    engine.env["PATH"] = os.path.dirname(path) + os.pathsep + engine.env["PATH"]
    engine.start()
    codex_of_version(path, "0.99.1")                        # installed when the engine ran already
    assert check_status(engine)["codex"] == {"path": path, "version": "0.99.1"}


@pytest.mark.parametrize("program", [b"#!/bin/sh\nexit 1\n", b"#!/bin/sh\necho hello\n",
                                     b"#!/nonexistent\n", b"\x7fELF"])
def test_a_codex_that_does_not_say_its_version(make_engine, tmp_path, program):
    path = write(str(tmp_path / "bin" / "codex"), program)
    os.chmod(path, stat.S_IRWXU)
    engine = make_engine(CODEX_PATH=path)
    assert check_status(engine)["codex"] == {"path": path, "version": None}
