"""People's own clients, and what stands between them and the engine: the real ones."""

import functools
import http.client
import json
import os
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading

import pytest

from conftest import unavailable
from harness import (PATIENCE, ROOT, SECRET, TESTS, free_port, parse_events, read_events, script,
                     wait_for)

END = b'["end"]'
PROGRAMS = os.path.join(TESTS, "client_programs")
CACHE = os.path.join(ROOT, ".cache")                # what tests/run puts there
PYTHON = os.path.join(CACHE, "venv-clients", "bin", "python")
PACKAGES = os.path.join(CACHE, "npm", "node_modules")
NGINX = shutil.which("nginx") or os.path.join(CACHE, "nginx", "usr", "sbin", "nginx")

POSTING = ["curl", "requests", "requests_text", "httpx_sse", "sseclient_py", "aiohttp", "fetch",
           "java", "go"]
SIMPLE = ["requests_text", "sseclient"]             # break on long lines, or on U+2028 and the like
RECONNECTING = ["eventsource", "fetch_event_source", "sseclient"]   # by themselves


def npm_package(name):
    if not os.path.isdir(os.path.join(PACKAGES, name)) or not shutil.which("node"):
        unavailable("npm's packages are not in .cache/npm, or there is no node: see tests/run")
    version = subprocess.run(["node", "--version"], stdout=subprocess.PIPE).stdout.decode()
    if int(version[1:].partition(".")[0]) < 18:
        pytest.skip("Node %s is older than these clients" % version.strip())


@functools.lru_cache(maxsize=None)
def command(name):
    """How that client's program is started."""
    if name == "curl":
        return ["curl", "-sSN", "-H", "X-Replicas-Engine-Secret: " + SECRET]
    if name == "java":
        if not shutil.which("javac"):
            pytest.skip("there is no JDK on this machine")
        folder = os.path.join(CACHE, "java")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:       # others may run it meanwhile
            subprocess.run(["javac", "-d", made, os.path.join(PROGRAMS, "Stream.java")], check=True)
            for file in os.listdir(made):
                os.replace(os.path.join(made, file), os.path.join(folder, file))
        return ["java", "-XX:TieredStopAtLevel=1", "-cp", folder, "Stream", name]
    if name == "go":
        if not shutil.which("go"):
            pytest.skip("there is no Go on this machine")
        program, cache = os.path.join(CACHE, "go", "stream"), os.path.join(CACHE, "go", "cache")
        subprocess.run(["go", "build", "-o", program, os.path.join(PROGRAMS, "stream.go")],
                       env=dict(os.environ, GOCACHE=cache), check=True)
        return [program, name]
    if name in ("fetch", "eventsource", "fetch_event_source"):
        npm_package("eventsource")
        return ["node", os.path.join(PROGRAMS, "streams.js"), name]
    if not os.path.exists(os.path.join(CACHE, "venv-clients", "ready")):
        unavailable("Python's clients are not in .cache/venv-clients: see tests/run")
    return [PYTHON, os.path.join(PROGRAMS, "streams.py"), name]


class Client:
    """A client's program that reads a stream."""

    def __init__(self, folder, name, url, last_id=None, message=None):
        self.is_curl = name == "curl"
        arguments = command(name) + [url]
        if self.is_curl:
            arguments += ["-H", "Last-Event-ID: %s" % last_id] if last_id else []
            arguments += ["--data-binary", "@-"] if message else []
        elif last_id:
            arguments += [last_id]
        self.output = os.path.join(str(folder), "client.out")
        env = {"PATH": os.environ["PATH"], "HOME": str(folder), "SECRET": SECRET,
               "NODE_PATH": PACKAGES, "PYTHONIOENCODING": "utf-8"}
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(arguments, env=env, cwd=str(folder), stdout=output,
                                            stdin=subprocess.PIPE)
        self.process.stdin.write(json.dumps({"message": message}).encode() if message else b"")
        self.process.stdin.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def events(self):
        """What it has got so far: (id, type, data) each."""
        with open(self.output, "rb") as file:
            output = file.read()
        if self.is_curl:
            return triples(parse_events(output[:output.rfind(b"\n\n") + 2]))
        lines = output[:output.rfind(b"\n") + 1].splitlines()
        return [tuple(json.loads(line)) for line in lines if line[:1] == b"[" and line != END]

    def wait(self):
        """Its events when it has come to its end by itself."""
        wait_for(lambda: self.process.poll() is not None, "the client's end", 2 * PATIENCE)
        assert self.process.returncode == 0
        if not self.is_curl:
            with open(self.output, "rb") as file:
                assert file.read().splitlines()[-1] == END
        return self.events()


def triples(events):
    return [(event.id, event.type, event.data) for event in events]


def gated_turn(gate, name):
    """A message whose turn goes on when the file `gate` is there."""
    text = "✅ ü €"
    if name not in SIMPLE:
        text += "\u2028\u0085\x1c" + "long " * 60000
    return script({"thread": "new"}, {"wait_for": str(gate)},
                  {"line": json.dumps({"type": "item.completed", "item": {
                      "id": "item_0", "type": "agent_message", "text": text}},
                      ensure_ascii=False)},
                  {"complete": True})


@pytest.mark.parametrize("name", POSTING + RECONNECTING)
def test_a_turn_is_read_as_it_happens_and_taken_up_again(name, engine, tmp_path):
    url, gate = "http://127.0.0.1:%d" % engine.port, tmp_path / "gate"
    message = gated_turn(gate, name)
    if name in RECONNECTING:
        engine.start_turn(message)
        arguments = (url + "/codex/events",)
    else:
        arguments = (url + "/codex/send", None, message)
    with Client(tmp_path, name, *arguments) as client:
        wait_for(client.events, "the first event", 2 * PATIENCE)
        assert [event[:2] for event in client.events()] == [("1.1", "thread.started")]
        gate.touch()
        events = client.wait()
    assert events == triples(engine.events(1))
    assert [event[1] for event in events][1:] == ["item.completed", "turn.completed", "done"]
    with Client(tmp_path, name, url + "/codex/events", "1.1") as client:
        assert client.wait() == events[1:]
    assert len(engine.calls()) == 1


@pytest.mark.parametrize("name", [name for name in POSTING + RECONNECTING if name != "sseclient"])
def test_after_done_a_client_comes_to_its_end(name, engine, tmp_path):
    """sseclient asks again for ever, whatever it gets; the others end with the empty answer."""
    events = engine.send("hello")
    with Client(tmp_path, name, "http://127.0.0.1:%d/codex/events" % engine.port,
                events[-1].id) as client:
        assert client.wait() == []


class Relay(socketserver.ThreadingTCPServer):
    """Hands bytes on to the engine, until it is told to cut all connections."""

    daemon_threads = True

    def __init__(self, port):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                with socket.create_connection(("127.0.0.1", port)) as upstream:
                    pair = [self.request, upstream]
                    self.server.pairs.append(pair)
                    back = threading.Thread(target=pump, args=(upstream, self.request))
                    back.start()
                    pump(self.request, upstream, self.server.requests.append)
                    back.join()

        super().__init__(("127.0.0.1", 0), Handler)
        self.pairs = []
        self.requests = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def cut(self):
        for pair in list(self.pairs):                   # not those of who comes back meanwhile
            for sock in pair:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:                         # it is cut already
                    pass


def pump(source, target, note=lambda data: None):
    """Hand on bytes until one side ends."""
    try:
        while True:
            data = source.recv(65536)
            note(data)
            if not data:
                break
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.mark.parametrize("name", RECONNECTING)
def test_a_client_whose_connection_breaks_misses_nothing(name, engine, tmp_path):
    gate = tmp_path / "gate"
    engine.start_turn(gated_turn(gate, name))
    with Relay(engine.port) as relay:
        url = "http://127.0.0.1:%d/codex/events" % relay.server_address[1]
        with Client(tmp_path, name, url) as client:
            wait_for(client.events, "the first event", 2 * PATIENCE)
            relay.cut()
            gate.touch()
            events = client.wait()
        relay.shutdown()
    assert events == triples(engine.events(1))
    taken_up = [request.lower() for request in relay.requests if request][1:]
    assert b"\r\nlast-event-id: 1.1\r\n" in taken_up[0]
    if name == "eventsource":                           # asks once more, and stops at the 204
        assert b"\r\nlast-event-id: 1.4\r\n" in taken_up[-1]
    assert all(b"\r\nlast-event-id: 1." in request for request in taken_up)


# What stands between

@pytest.fixture
def start(tmp_path):
    """Start programs, whose output is kept; they are ended with the test."""
    processes = []

    def start_program(arguments, **options):
        path = tmp_path / ("program-%d.out" % len(processes))
        with open(str(path), "wb") as output:
            processes.append(subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=output,
                                              stderr=output, **options))
        return processes[-1], lambda: path.read_text(encoding="utf-8")

    yield start_program
    for process in processes:
        process.terminate()
        process.wait()


def ask(port, method, path, body=None, **headers):
    """The connection and the response, whose body is still to be read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2 * PATIENCE)
    connection.request(method, path, body and json.dumps(body),
                       {name.replace("_", "-"): value for name, value in headers.items()})
    return connection, connection.getresponse()


def answer(*request, **headers):
    """The status and the body of the answer."""
    connection, response = ask(*request, **headers)
    try:
        return response.status, response.read()
    finally:
        connection.close()


def test_express_with_compression_lets_events_through_at_once(engine, tmp_path, start):
    npm_package("express")
    _, printed = start(["node", os.path.join(PROGRAMS, "proxy.js"),
                        "http://127.0.0.1:%d" % engine.port],
                       env={"PATH": os.environ["PATH"], "NODE_PATH": PACKAGES})
    port = int(wait_for(lambda: printed() if printed().endswith("\n") else None, "its port"))
    gate = tmp_path / "gate"
    headers = {"X_Replicas_Engine_Secret": SECRET, "Accept_Encoding": "gzip"}
    connection, response = ask(port, "POST", "/codex/send",
                               {"message": gated_turn(gate, "express")}, **headers)
    stream = read_events(response)
    assert next(stream).type == "thread.started"        # while the turn waits at the gate
    gate.touch()
    assert list(stream) == engine.events(1)[1:]
    connection.close()
    connection, response = ask(port, "GET", "/codex/history", **headers)
    assert response.headers["Content-Encoding"] == "gzip" and response.read()
    connection.close()


NGINX_CONF = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi; proxy_temp_path {folder}/proxy;
    proxy_cache_path {folder}/cache keys_zone=all:1m;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{engine};
            proxy_cache all;
            proxy_cache_valid any 10m;
        }}
    }}
}}
"""


def test_a_shared_cache_hands_nothing_out_without_the_secret(engine, tmp_path, start):
    """nginx, which is told to keep for 10 minutes whatever doesn't forbid it."""
    if not os.path.exists(NGINX):
        unavailable("there is no nginx: see tests/run")
    port = free_port()
    (tmp_path / "nginx.conf").write_text(NGINX_CONF.format(folder=tmp_path, port=port,
                                                           engine=engine.port))
    nginx, printed = start([NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])

    def listening():
        assert nginx.poll() is None, printed()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0
    wait_for(listening, "nginx to listen")
    done = engine.send("hello")[-1].id
    paths = ["/ping", "/codex/status", "/codex/history", "/codex/events",
             "/codex/events?after=" + done, "/codex/events?turn=9", "/nothing"]
    for _ in range(2):
        for path in paths:
            assert answer(port, "GET", path)[0] == 401, (path, printed())
            status, body = answer(port, "GET", path, X_Replicas_Engine_Secret=SECRET)
            assert status in (200, 204, 404) and SECRET.encode() not in body
    assert not any(files for _, _, files in os.walk(str(tmp_path / "cache"))), "it has kept some"
