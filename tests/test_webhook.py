"""A call when a turn is over: at least once, in order, and no turn's concern."""

import contextlib
import hashlib
import hmac
import http.client
import http.server
import json
import os
import socket
import threading
import time
import types

import pytest

import harness
import replicas_engine
from harness import script, wait_for

SECRET = "a secret for the webhook"
FAST = {"WEBHOOK_PAUSE": 0.02, "MAX_WEBHOOK_PAUSE": 0.2}


class Receiver:
    """A server that notes what it gets; `answers` says what it does, first come, first served."""

    def __init__(self, sock=None):
        self.got, self.answers, self.tries = [], [], []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler(),
                                                      bind_and_activate=not sock)
        if sock:
            self.server.socket.close()
            self.server.socket = sock
            self.server.server_address = sock.getsockname()
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        self.url = "http://127.0.0.1:%d/hook?a=b" % self.server.server_address[1]

    def handler(receiver):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.tries.append(self.path)
                what = receiver.answers.pop(0) if receiver.answers else 200
                if what == "close":
                    return
                if what == "half":
                    self.wfile.write(b"HTTP/1.1 20")
                    return
                if what == "hang":
                    time.sleep(2)           # longer than the engine's patience here
                    return
                if what == "dribble":
                    with contextlib.suppress(OSError):
                        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                        while True:
                            self.wfile.write(b"X: y\r\n")
                            time.sleep(0.1)
                    return
                if 200 <= what < 300:
                    receiver.got.append((self.headers, body))
                self.send_response(what)
                self.send_header("Location", receiver.url)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

            do_GET = do_POST
        return Handler

    def turns(self):
        return [json.loads(body.decode())["turn"]["id"] for _, body in self.got]

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def hooked(make_engine, receiver):
    return make_engine(constants=FAST, REPLICAS_ENGINE_WEBHOOK_URL=receiver.url,
                       REPLICAS_ENGINE_WEBHOOK_SECRET=SECRET)


def test_what_it_tells(hooked, receiver):
    hooked.send("Hello")
    wait_for(lambda: receiver.turns() == [1])
    headers, body = receiver.got[0]
    harness.CONTRACT.check_webhook(headers, body)
    assert json.loads(body.decode()) == {"event": "turn.finished",
                                         "turn": hooked.get("/codex/turns/1").json()}
    assert headers["X-Replicas-Signature"] == "sha256=" + hmac.new(
        SECRET.encode(), body, hashlib.sha256).hexdigest()
    mark = hooked.get("/codex/events").headers["X-Replicas-Turn-Mark"]
    assert headers["Idempotency-Key"] == mark + ".1"
    assert headers["User-Agent"] == "replicas-engine/" + replicas_engine.__version__
    assert headers["Content-Type"] == "application/json" and receiver.tries == ["/hook?a=b"]
    wait_for(lambda: hooked.status()["webhook"] == {"pending": 0, "last_error": None})


@pytest.mark.parametrize("what", [500, 302, 404, 100, "close", "half", "hang", "dribble"])
def test_it_is_told_again_and_in_order(make_engine, receiver, what):
    receiver.answers = [what] * 3
    engine = make_engine(constants=dict(FAST, WEBHOOK_PATIENCE=0.5),
                         REPLICAS_ENGINE_WEBHOOK_URL=receiver.url,
                         REPLICAS_ENGINE_WEBHOOK_SECRET=SECRET)
    for _ in range(3):
        engine.send("Hello")                # whatever the receiver does
    wait_for(lambda: set(receiver.turns()) == {1, 2, 3})
    # Where the machine is busy it is not patient enough, and says again what was heard.
    assert receiver.turns() == sorted(receiver.turns())
    assert set(receiver.tries) == {"/hook?a=b"} and len(receiver.tries) >= 6
    wait_for(lambda: "the webhook could not be told of a turn: " in engine.log())


def webhook_of(receiver):
    settings = replicas_engine.Settings({"REPLICAS_ENGINE_WEBHOOK_URL": receiver.url,
                                         "REPLICAS_ENGINE_WEBHOOK_SECRET": SECRET})
    return replicas_engine.Webhook(types.SimpleNamespace(settings=settings))


def test_a_try_that_was_given_up_has_told_nothing(receiver, monkeypatch):
    """Even if the thread that gives up goes on after the answer's beginning was taken for all."""
    def give_up(*args):
        replicas_engine.Webhook._give_up(*args)
        time.sleep(0.5)                     # as on a busy machine

    monkeypatch.setattr(replicas_engine, "WEBHOOK_PATIENCE", 0.5)
    receiver.answers = ["dribble"]
    webhook = webhook_of(receiver)
    monkeypatch.setattr(webhook, "_give_up", give_up)
    with pytest.raises((OSError, http.client.HTTPException)):
        webhook._post(b"{}", "a key")


def test_a_connection_that_comes_too_late(receiver, monkeypatch):
    """The try is over by then: nothing is sent on it."""
    monkeypatch.setattr(replicas_engine, "WEBHOOK_PATIENCE", 0.2)
    webhook, given_up = webhook_of(receiver), threading.Event()
    monkeypatch.setattr(webhook, "_give_up", lambda connection, too_late: (
        replicas_engine.Webhook._give_up(connection, too_late), given_up.set()))
    connect = http.client.HTTPConnection.connect
    monkeypatch.setattr(http.client.HTTPConnection, "connect",
                        lambda connection: (given_up.wait(), connect(connection)))
    with pytest.raises(TimeoutError, match="longer than 0.2 s"):
        webhook._post(b"{}", "key")
    assert receiver.tries == []


def test_a_receiver_that_is_down(make_engine):
    """None is lost over restarts, and none is told again that was taken."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))             # and doesn't listen: a connection is refused
    engine = make_engine(constants=FAST, REPLICAS_ENGINE_WEBHOOK_SECRET=SECRET,
                         REPLICAS_ENGINE_WEBHOOK_URL="http://127.0.0.1:%d" % sock.getsockname()[1])
    engine.send("one")
    wait_for(lambda: engine.status()["webhook"]["last_error"])
    assert engine.status()["webhook"]["pending"] == 1
    engine.kill()
    engine.start()
    engine.start_turn(script({"thread": "resume"}, {"sleep": 120}))
    engine.restart()
    wait_for(lambda: engine.status()["webhook"]["pending"] == 2)
    sock.listen(5)
    receiver = Receiver(sock)
    try:
        wait_for(lambda: receiver.turns() == [1, 2])
        told = [json.loads(body.decode())["turn"] for _, body in receiver.got]
        assert told[1]["error"]["code"] == "shutdown" and told[0]["status"] == "completed"
        wait_for(lambda: engine.status()["webhook"] == {"pending": 0, "last_error": None})
        engine.restart().send("three")
        wait_for(lambda: receiver.turns() == [1, 2, 3])
        assert receiver.tries == ["/"] * 3
    finally:
        receiver.close()


class Hour:
    """The event that a webhook's pauses wait for, on a clock that goes only while it waits."""

    def __init__(self):
        self.now, self.pauses = 0.0, []

    def is_set(self):
        return self.now > 2 * 3600

    def wait(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


def test_a_receiver_that_is_down_for_an_hour(receiver):
    """It is tried again at ever longer intervals, of a quarter of an hour at most, and then told
    everything in order."""
    webhook, told = webhook_of(receiver), []
    webhook._closed = hour = Hour()

    def tell_next():
        if hour.now < 3600:
            raise ConnectionRefusedError("Connection refused")
        told.append(len(told) + 1)
        if len(told) == 3:
            hour.now = 3 * 3600
        return True

    webhook._tell_next = tell_next
    webhook._run()
    assert told == [1, 2, 3] and webhook.last_error is None
    assert hour.pauses == [1, 5, 25, 125, 625, 900, 900, 900, 900]


def test_only_turns_from_now_on(make_engine, receiver):
    """Those before it was set, or while it wasn't, are no news."""
    engine = make_engine()
    engine.send("before")
    hook = {"REPLICAS_ENGINE_WEBHOOK_URL": receiver.url, "REPLICAS_ENGINE_WEBHOOK_SECRET": SECRET}
    assert "webhook" not in engine.status()
    for number in range(2):
        engine.env.update(hook)
        engine.restart().send("now")
        wait_for(lambda: receiver.turns()[number:] == [2 + 2 * number])
        wait_for(lambda: engine.status()["webhook"]["pending"] == 0)
        for name in hook:
            del engine.env[name]
        engine.restart().send("without")
        assert [name for name in os.listdir(os.path.join(engine.state, "turns"))
                if name.endswith(".told")] == []


def test_a_cancelled_one_waits_for_those_before_it(hooked, receiver, tmp_path):
    gate = str(tmp_path / "gate")
    hooked.start_turn(script({"thread": "new"}, {"wait_for": gate}, {"complete": True}))
    for name in ("never", "on"):
        hooked.start_turn(name, when_busy="queue")
    hooked.request("DELETE", "/codex/queue/2")
    assert hooked.status()["webhook"]["pending"] == 0
    open(gate, "w").close()
    wait_for(lambda: receiver.turns() == [1, 2, 3])


def test_a_mark_of_turns_that_are_gone(hooked, receiver):
    """Somebody has emptied the folder, but for the mark; or it is forged."""
    hooked.stop()
    turns = os.path.join(hooked.state, "turns")
    for name in os.listdir(turns):
        os.unlink(os.path.join(turns, name))
    for number in (50, 10 ** 14):
        open(os.path.join(turns, "%d.told" % number), "w").close()
    hooked.start().send("Hello")
    wait_for(lambda: receiver.turns() == [1])


def test_a_log_that_cannot_be_read_holds_nothing_up(hooked, receiver):
    hooked.send("one")
    wait_for(lambda: receiver.turns() == [1])
    path = os.path.join(hooked.state, "turns", "1.log")
    os.unlink(path)
    os.symlink(path, path)                  # whoever opens it gets ELOOP
    hooked.send("two")
    wait_for(lambda: receiver.turns() == [1, 2])
    assert [turn["id"] for turn in hooked.get("/codex/turns").json()["turns"]] == [2]
    assert hooked.get("/codex/turns/1").status == 503
    os.unlink(path)


def test_a_body_within_bounds():
    for message in ("\x01" * 200000, "✅" * 80000, "a" * 262144):
        body = replicas_engine.webhook_body({"final_message": message, "error": None})
        turn = json.loads(body.decode())["turn"]
        assert len(body) <= replicas_engine.MAX_WEBHOOK
        assert message.startswith(turn["final_message"]) and turn["final_message"]
        assert turn.get("final_message_truncated", False) == (turn["final_message"] != message)
    body = replicas_engine.webhook_body({"final_message": None, "usage": {"x": "y" * 10 ** 6},
                                         "turn_usage": None, "error": {"message": "z" * 10 ** 6}})
    assert json.loads(body.decode())["turn"]["error"]["message"] == "z" * 2000


@pytest.mark.parametrize("url, secret, word", [
    ("http://x/", None, "go together"), (None, "s", "go together"), ("ftp://x/", "s", "http"),
    ("http://", "s", "http"), ("http://user:pass@x/", "s", "without user"),
    ("http://x:99999/", "s", "http"), ("http://x/a b", "s", "blanks"), ("x", "s", "http"),
    ("http://x/", "a\tb\x01", "control character")])
def test_settings_that_cannot_be_used(url, secret, word):
    env = {"REPLICAS_ENGINE_WEBHOOK_URL": url, "REPLICAS_ENGINE_WEBHOOK_SECRET": secret}
    with pytest.raises(replicas_engine.SettingsError, match=word) as caught:
        replicas_engine.Settings({name: value for name, value in env.items() if value})
    assert "WEBHOOK" in str(caught.value) and "pass" not in str(caught.value)


def test_codex_and_the_log_have_none_of_it(hooked, receiver):
    hooked.send("Hello")
    wait_for(lambda: receiver.turns() == [1])
    assert not any("WEBHOOK" in name for call in hooked.calls() for name in call["env"])
    assert SECRET not in hooked.log()
    assert harness.is_alive(hooked.process.pid)
