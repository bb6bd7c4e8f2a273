"""The application under other WSGI servers: it is plain PEP 3333."""

import os
import re
import signal
import subprocess
import sys

import pytest

import conftest
import harness
from harness import read_events, script, wait_for

SERVERS = {
    "gunicorn": ["-m", "gunicorn", "--threads", "8", "--bind", "127.0.0.1:0", "--chdir", ".",
                 "replicas_engine:application"],
    "waitress": ["-m", "waitress", "--threads", "8", "--listen", "127.0.0.1:0",
                 "replicas_engine:application"],
}


@pytest.fixture(params=sorted(SERVERS))
def served(request, make_engine):
    """An engine in which somebody else's server serves the application."""
    conftest.need_module(request.param)
    engine = make_engine(start=False, PYTHONPATH=harness.ROOT)
    with open(engine.log_path, "wb") as log_file:
        engine.process = subprocess.Popen([sys.executable] + SERVERS[request.param],
                                          env=engine.env, cwd=engine.folder, stdout=log_file,
                                          stderr=log_file)
    listening = wait_for(lambda: re.search(r"http://127\.0\.0\.1:(\d+)", engine.log()),
                         "the server to listen")
    engine.port = int(listening.group(1))
    return engine


def test_a_turn_and_its_stream(served, tmp_path):
    gate = tmp_path / "gate"
    assert served.request("GET", "/health", secret=None).status == 200
    assert served.request("GET", "/ping", secret="wrong").status == 401
    connection, response = served.open("POST", "/codex/send", {"message": script(
        {"thread": "new"}, {"wait_for": str(gate)}, {"complete": True})})
    stream = read_events(response)
    assert next(stream).type == "thread.started"        # it came while the turn was running
    assert served.post("/codex/send", {"message": "x"}).status == 409
    gate.touch()
    assert [event.type for event in stream] == ["turn.completed", "done"]
    connection.close()
    assert len(served.events(after="1.1")) == 2
    assert served.status()["turn"]["status"] == "completed"
    assert served.get("/codex/history").json()["thread_id"]
    assert served.post("/codex/interrupt").json()["interrupted"] is False


def test_a_turn_that_outlived_its_server_is_ended_by_the_next(served, make_engine):
    served.start_turn(script({"thread": "new"}, {"sleep": 60}))
    codex = wait_for(served.calls)[0]["pid"]
    server = served.process.pid
    workers = [pid for pid in harness.children_of(server)
               if SERVERS["gunicorn"][-1].encode() in harness.command_of(pid)]    # and not Codex
    for pid in [server] + workers:
        os.kill(pid, signal.SIGKILL)
    served.process.wait(harness.PATIENCE)
    successor = make_engine("successor", REPLICAS_ENGINE_STATE=served.state)
    assert successor.wait_for_turn()["error"]["code"] == "engine_restarted"
    assert not harness.is_alive(codex)
