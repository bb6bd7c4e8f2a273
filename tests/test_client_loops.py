"""The clients to copy in README, against an engine that is killed in mid-turn.

What npm gives for client_programs/ checks and translates the one in TypeScript.
"""

import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time

import pytest

from harness import PATIENCE, ROOT, SECRET, free_port, script, wait_for
from test_clients import PACKAGES, npm_package

PYTHON = """
import sys
for kind, data in follow(sys.argv[1], sys.argv[2], sys.argv[3]):
    print(json.dumps([kind, data]), flush=True)
    if kind == "item.completed" and len(sys.argv) > 4:
        print(json.dumps(stop(sys.argv[1], sys.argv[2])), flush=True)
"""
TYPESCRIPT = """
const [url, secret, message, stopping] = process.argv.slice(2);
(async () => {
  for await (const event of follow(url, secret, message)) {
    console.log(JSON.stringify([event.type, event.data]));
    if (event.type === "item.completed" && stopping) {
      console.log(JSON.stringify(await stop(url, secret)));
    }
  }
})().catch((error) => { console.error(error.message); process.exit(1); });
"""
# Types are checked, too; what Node has is declared by the library of the web.
COMPILE = """
const ts = require("typescript"), [source, target] = process.argv.slice(1);
const options = { target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.CommonJS, strict: true,
                  lib: ["lib.es2022.d.ts", "lib.dom.d.ts", "lib.dom.asynciterable.d.ts"],
                  types: [], outDir: target };
const program = ts.createProgram([source], options);
const found = ts.getPreEmitDiagnostics(program);
for (const one of found) console.error(ts.flattenDiagnosticMessageText(one.messageText, " "));
program.emit();
process.exit(found.length);
"""


def block(language):
    """README's block in the section of the clients."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        section = re.search(r"(?ms)^## A client to copy$.*?^## ", file.read()).group()
    return re.search(r"(?ms)^```%s\n(.*?)^```$" % language, section).group(1)


@pytest.fixture(scope="module", params=["python", "typescript"])
def client(request, tmp_path_factory):
    """How the client is started."""
    tmp_path = tmp_path_factory.mktemp("client")
    if request.param == "python":
        path = tmp_path / "client.py"
        path.write_text(block("python") + PYTHON, encoding="utf-8")
        return [sys.executable, str(path)]
    npm_package("typescript")
    path = tmp_path / "client.ts"
    path.write_text("declare const process: any;\n" + block("typescript") + TYPESCRIPT,
                    encoding="utf-8")
    done = subprocess.run(["node", "-e", COMPILE, str(path), str(tmp_path)],
                          env=dict(os.environ, NODE_PATH=PACKAGES), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
    return ["node", str(tmp_path / "client.js")]


@pytest.fixture
def engine(make_engine):
    """An engine on a port that no other one gets while it is away."""
    return make_engine(PORT=str(free_port()))


class Loop:
    """A client that runs."""

    def __init__(self, client, engine, message, *more, port=None):
        self.engine = engine
        self.path = os.path.join(engine.folder, "client.out")
        url = "http://127.0.0.1:%d" % (port or engine.port)
        with open(self.path, "wb") as output:
            self.process = subprocess.Popen(
                [*client, url, SECRET, message, *more], stdout=output, stderr=subprocess.STDOUT,
                env={"PATH": os.environ["PATH"], "HOME": engine.folder,
                     "PYTHONIOENCODING": "utf-8"})

    def lines(self):
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def end(self):
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError("the client does not end: %s\n%s" % (
                self.lines(), self.engine.log()[-8000:])) from None
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()


def test_it_gives_every_event_once_over_a_kill(client, engine):
    message = script({"thread": "new"}, {"count": {"n": 5, "size": 20}}, {"sleep": 120})
    loop = Loop(client, engine, message)
    wait_for(lambda: len(loop.lines()) >= 6)
    engine.kill()
    time.sleep(0.5)                         # it is away for a while
    engine.start()
    assert loop.end() == 0, loop.lines()
    assert loop.lines() == [[event.type, event.json()] for event in engine.events(1)]
    assert loop.lines()[-2][1]["error"]["code"] == "engine_restarted"
    assert engine.status()["turn"]["id"] == 1


def test_it_waits_for_an_engine_and_stops_a_turn(client, engine):
    """And whatever it says, in every script and with line ends within."""
    text = "✅ 漢字 \U0001f600 \u2028 \r\n end"
    message = script({"thread": "new"}, {"event": {"type": "item.completed", "item": {
        "id": "item_0", "type": "agent_message", "text": text}}}, {"sleep": 120})
    engine.stop()
    loop = Loop(client, engine, message, "stop")
    time.sleep(0.5)
    engine.start()
    assert loop.end() == 0, loop.lines()
    lines = loop.lines()
    assert {"success": True, "interrupted": True, "turn_id": 1} in lines
    events = [line for line in lines if isinstance(line, list)]
    assert events == [[event.type, event.json()] for event in engine.events(1)]
    assert events[-2][1]["error"]["code"] == "interrupted"
    assert text in [data["item"]["text"] for _, data in events if "item" in data]


@pytest.mark.parametrize("message, answer", [(" ", "Message is required"),
                                             ("Hello", "workspace directory is missing")])
def test_it_stops_where_it_is_refused(client, engine, message, answer):
    os.rename(engine.workspace, engine.workspace + ".away")
    loop = Loop(client, engine, message)
    assert loop.end() == 1
    with open(loop.path, encoding="utf-8") as file:
        assert answer in file.read()


# Killed at any moment

# Bytes of the engine's answers that reach the client before it is killed; None: it has just got the
# request.  The head has some 350, each event 100 or more.
MOMENTS = [None, 0, 1, 200, 340, 341, 350, 370, 400, 401, 480, 600, 900, 1500, 4000]


class Relay(socketserver.ThreadingTCPServer):
    """Hands bytes on to the engine and back, and kills it at a moment; see MOMENTS."""

    daemon_threads = True

    def __init__(self, engine, moment):
        super().__init__(("127.0.0.1", 0), RelayHandler)
        self.engine = engine
        self.moment = moment
        self.killed = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def kill(self):
        os.kill(self.engine.process.pid, signal.SIGKILL)
        self.engine.process.wait()
        self.killed.set()

    def limited(self, data):
        """What of the engine's bytes the client gets; with that the moment may have come."""
        if self.moment is None or self.killed.is_set():
            return data
        data, self.moment = data[:self.moment], self.moment - len(data)
        if self.moment <= 0:
            self.kill()
        return data


class RelayHandler(socketserver.BaseRequestHandler):
    """One connection through a Relay."""

    def handle(self):
        try:
            with socket.create_connection(("127.0.0.1", self.server.engine.port)) as engine:
                threading.Thread(target=self.hand_on, args=(engine,), daemon=True).start()
                for data in iter(lambda: engine.recv(65536), b""):
                    was_killed = self.server.killed.is_set()
                    self.request.sendall(self.server.limited(data))
                    if self.server.killed.is_set() and not was_killed:
                        break               # what it had sent beyond that is lost
        except OSError:                     # there is no engine just now, or no longer
            pass

    def hand_on(self, engine):
        try:
            for data in iter(lambda: self.request.recv(65536), b""):
                engine.sendall(data)
                if self.server.moment is None and not self.server.killed.is_set():
                    self.server.kill()
            engine.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def test_it_gives_every_event_once_whenever_the_engine_is_killed(client, engine, tmp_path):
    for number, moment in enumerate(MOMENTS, 1):
        gate = tmp_path / ("gate-%d" % number)
        message = script({"thread": "resume"}, {"count": {"n": 30, "size": 200, "pause": 0.01}},
                         {"wait_for": str(gate)}, {"complete": True})
        with Relay(engine, moment) as relay:
            loop = Loop(client, engine, message, port=relay.server_address[1])
            try:
                wait_for(lambda: relay.killed.is_set() or loop.process.poll() is not None)
                assert relay.killed.is_set(), loop.lines()
                engine.start()
                gate.touch()                # for a turn that only begins now
            except BaseException:
                loop.process.kill()
                raise
            finally:
                status = loop.end()
            relay.shutdown()
        assert status == 0, (moment, loop.lines())
        events = engine.events(number)
        assert loop.lines() == [[event.type, event.json()] for event in events], moment
        if moment is not None:
            assert events[-2].json()["error"]["code"] == "engine_restarted", moment
        assert engine.prompts().count(message) <= 1
    assert engine.status()["turn"]["id"] == len(MOMENTS)    # a turn for each message
