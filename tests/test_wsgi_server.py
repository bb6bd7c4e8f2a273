"""The WSGI server, by raw bytes: in-process with applications of the tests, and as a process.

In-process servers get small limits, so that nobody waits; nothing is asserted about durations:
what a deadline ends, ends, and what must not end, doesn't.
"""

import contextlib
import errno
import os
import pwd
import re
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import wsgiref.validate

import conftest
import harness
import pytest
from harness import SECRET, wait_for

import replicas_engine

KEY = b"X-Replicas-Engine-Secret: " + SECRET.encode() + b"\r\n"
PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n" + KEY + b"\r\n"
BIG = 80 * 1024 * 1024


# Clients

class Client:
    """A connection that reads answers one by one."""

    def __init__(self, port, data=b"", host="127.0.0.1", receive_buffer=None):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(harness.PATIENCE)
        self.sock.connect((host, port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")
        self.sock.sendall(data)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def send(self, data):
        self.sock.sendall(data)

    def close(self):
        self.file.close()
        self.sock.close()

    def reset(self):
        """Close with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def head(self):
        """Status and fields (names in small letters) of the next answer; None at the end."""
        line = self.file.readline()
        if not line:
            return None
        match = re.fullmatch(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+\r\n", line)
        assert match, line
        fields = {}
        for line in iter(self.file.readline, b"\r\n"):
            name, _, value = line[:-2].decode("latin-1").partition(": ")
            assert line.endswith(b"\r\n") and name.lower() not in fields, line
            fields[name.lower()] = value
        return int(match.group(1)), fields

    def answer(self, is_head=False):
        """(status, fields, body) of the next answer; None at the end."""
        status, fields = self.head() or (None, None)
        if status is None:
            return None
        if is_head or status < 200 or status in (204, 304):
            return status, fields, b""
        if fields.get("transfer-encoding") == "chunked":
            return status, fields, b"".join(self.chunks())
        if "content-length" in fields:
            return status, fields, self.file.read(int(fields["content-length"]))
        return status, fields, self.file.read()

    def chunks(self):
        """The chunks to the last; one that breaks off is an EOFError."""
        while True:
            line = self.file.readline()
            if not line:
                raise EOFError
            size = int(line, 16)
            data = self.file.read(size + 2)
            if len(data) < size + 2:
                raise EOFError
            if size == 0:
                return
            yield data[:-2]

    def is_closed(self):
        """Whether the server closed, in whichever way, and sent nothing before."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True


def request(line, *fields, body=b""):
    return b"\r\n".join([line, b"Host: a"] + list(fields)) + b"\r\n\r\n" + body


# Servers

def connection_threads():
    return [thread for thread in threading.enumerate()
            if "process_request_thread" in repr(thread) + repr(getattr(thread, "_target", ""))]


class Application:
    """What the tests serve: the answer is the path's method of this class, /echo is `echo`."""

    def __init__(self):
        self.closed = threading.Event()     # set when a body's iterator was closed
        self.proceed = threading.Event()
        self.environ = None

    def __call__(self, environ, start_response):
        self.environ = environ
        return getattr(self, environ["PATH_INFO"][1:] or "root")(environ, start_response)

    @staticmethod
    def start(start_response, *headers, status="200 OK"):
        return start_response(status, [("Content-Type", "text/plain")] + list(headers))

    def root(self, environ, start_response):
        self.start(start_response)
        return [b"root"]

    def echo(self, environ, start_response):
        try:
            body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 10 ** 7))
        except OSError as error:
            self.start(start_response, status="%d Bad" % error.status)
            return [str(error).encode()]
        self.start(start_response, ("X-Query", environ["QUERY_STRING"]))
        return [body]

    def closing(self, iterator):
        try:
            for data in iterator:
                yield data
        finally:
            self.closed.set()

    def flood(self, environ, start_response):
        self.start(start_response)
        return self.closing(b"x" * 65536 for _ in range(10 ** 9))

    def drip(self, environ, start_response):
        self.start(start_response)
        return self.closing(self.until_proceed())

    def until_proceed(self):
        yield b"begin "
        while not self.proceed.wait(0.01):
            yield b""
        yield b"end"


class Served:
    def __init__(self, server, port):
        self.server = server
        self.port = port

    def get(self, path, *fields):
        with Client(self.port, request(b"GET /%b HTTP/1.1" % path.encode(), *fields)) as client:
            return client.answer()


@pytest.fixture
def serve(monkeypatch):
    """Serve an application in this process; at the end no thread and no descriptor is left."""
    before = len(harness.descriptors_of())
    served = []

    def start(app, max_connections=50, always=(), valid=True, **constants):
        for name, value in constants.items():
            assert hasattr(replicas_engine, name)
            monkeypatch.setattr(replicas_engine, name, value)
        listeners = replicas_engine.listen("127.0.0.1", 0)
        server = replicas_engine.WSGIServer(
            listeners, wsgiref.validate.validator(app) if valid else app, max_connections, always)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        served.append((server, thread))
        return Served(server, listeners[0].getsockname()[1])

    yield start
    for server, thread in served:
        if server.socket.fileno() >= 0:     # else the test has closed it
            server.shut_down(harness.PATIENCE)
        thread.join()
    wait_for(lambda: not connection_threads(), "the connections' threads to end")
    wait_for(lambda: len(harness.descriptors_of()) <= before, "descriptors to be closed")


def resources(engine):
    """How many threads and descriptors the engine has."""
    pid = engine.process.pid
    return harness.status_of(pid, "Threads"), len(harness.descriptors_of(pid))


FEW = 5         # threads or descriptors: what comes and goes in an engine, or late in its start


def are_back(engine, before):
    """Whether it has no more of them than `before`, but for a FEW."""
    return all(now <= then + FEW for now, then in zip(resources(engine), before))


def hold_turn(engine, tmp_path, *steps):
    """Start a turn that waits for a file, after those steps: the file's path."""
    gate = tmp_path / "gate"
    engine.start_turn(harness.script({"thread": "new"}, *steps, {"wait_for": str(gate)},
                                     {"complete": True}))
    return gate


# Pipelining, and bodies that nobody reads

def test_pipelining_in_one_packet(serve):
    port = serve(Application()).port
    data = b"".join(request(b"GET /echo?%d HTTP/1.1" % n) for n in range(500))
    with Client(port, data) as client:
        assert [client.answer()[1]["x-query"] for _ in range(500)] == [str(n) for n in range(500)]


def test_pipelining_cut_at_every_byte(serve):
    port = serve(Application()).port
    data = (request(b"GET /echo HTTP/1.1")
            + request(b"POST /echo HTTP/1.1", b"Content-Length: 5", body=b"hello")
            + request(b"POST /echo HTTP/1.1", b"Transfer-Encoding: chunked",
                      body=b"2\r\nhe\r\n3;a=b\r\nllo\r\n0\r\nX: y\r\n\r\n")
            + request(b"GET /echo HTTP/1.1"))
    with Client(port) as client:
        for cut in range(len(data)):
            client.send(data[:cut])
            client.send(data[cut:])
            assert [client.answer()[2] for _ in range(4)] == [b"", b"hello", b"hello", b""]
        for begin in range(len(data)):
            client.send(data[begin:begin + 1])
        assert [client.answer()[2] for _ in range(4)] == [b"", b"hello", b"hello", b""]


@pytest.mark.parametrize("framing, body", (
    (b"Content-Length: 1500", b" " * 1500),
    (b"Transfer-Encoding: chunked", b"5dc\r\n" + b" " * 1500 + b"\r\n0\r\n\r\n")))
def test_unread_body(make_engine, framing, body):
    engine = make_engine(REPLICAS_ENGINE_MAX_BODY="1000")
    cases = [(request(b"POST /codex/send HTTP/1.1", framing, body=body), 401),
             (request(b"POST /codex/send HTTP/1.1", framing, b"X-Replicas-Engine-Secret: x",
                      body=body), 401),
             (request(b"POST /nothing HTTP/1.1", framing, KEY[:-2], body=body), 404),
             (request(b"PUT /ping HTTP/1.1", framing, KEY[:-2], body=body), 405),
             (request(b"GET /ping HTTP/1.1", framing, KEY[:-2], body=body), 413),
             (request(b"POST /codex/send HTTP/1.1", framing, KEY[:-2], body=body), 413)]
    with Client(engine.port) as client:
        for data, status in cases:
            client.send(data + PING)
            answer = client.answer()
            assert answer[0] == status and "connection" not in answer[1], answer
            assert client.answer()[0] == 200


@pytest.mark.parametrize("framing", (b"Content-Length: %d" % (3 * len(PING)),
                                     b"Transfer-Encoding: chunked"))
def test_unread_body_still_coming(engine, framing):
    """What comes of it later is never taken for a request."""
    size = b"" if framing.startswith(b"Content") else b"%x\r\n" % (3 * len(PING))
    with Client(engine.port, request(b"POST /nothing HTTP/1.1", framing, KEY[:-2])) as client:
        answer = client.answer()
        assert answer[0] == 404 and answer[1]["connection"] == "close"
        client.send(size + PING)
        client.send(PING)
        client.send(PING)
        assert client.is_closed()


@pytest.mark.parametrize("status, fields", ((401, ()), (413, (KEY[:-2],))))
@pytest.mark.parametrize("framing", (b"Content-Length: %d" % BIG, b"Transfer-Encoding: chunked"))
def test_early_answer_to_an_upload(make_engine, framing, status, fields):
    """A client that reads when it has sent everything finds the answer."""
    engine = make_engine(REPLICAS_ENGINE_MAX_BODY="100000")
    chunked = framing.startswith(b"Transfer")
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n" if chunked else b"x" * 65536
    with Client(engine.port, request(b"POST /codex/send HTTP/1.1", framing, *fields)) as client:
        for _ in range(BIG // 65536):
            client.send(piece)
        if chunked:
            client.send(b"0\r\n\r\n")
        answer = client.answer()
        assert answer[0] == status and answer[1]["connection"] == "close"
        assert client.is_closed()
    assert engine.get("/ping").status == 200


# Nobody is let go for his silence: what ends a connection is what the test is about.
LINGERING = {"LINGER_TIMEOUT": 10 * harness.PATIENCE, "LINGER_PAUSE": 10 * harness.PATIENCE}
BEGINNING = {"FIRST_BYTE_TIMEOUT": harness.PATIENCE, "HEAD_TIMEOUT": harness.PATIENCE,
             "BODY_GRACE": harness.PATIENCE}


@pytest.mark.parametrize("spare", (False, True))
@pytest.mark.parametrize("sends", (False, True))
def test_lingering_ends_with_the_server(serve, spare, sends):
    """Its last answer is out: nobody waits for the rest of an upload, nor for the client's end."""
    served = serve(Application(), max_connections=0 if spare else 1, **LINGERING)
    with Client(served.port, request(b"POST / HTTP/1.1", b"Content-Length: 1000000000")) as client:
        assert client.answer()[0] == (503 if spare else 200)
        assert client.is_closed()
        assert connection_threads()
        end = threading.Thread(target=served.server.shut_down, args=[2 * harness.PATIENCE])
        end.start()
        with contextlib.suppress(ConnectionError):
            while sends and connection_threads():
                client.send(b"x" * 1000)
                time.sleep(0.001)
        end.join(harness.PATIENCE)
        assert not end.is_alive()


def test_a_new_connection_still_has_its_request_answered_when_the_server_ends(serve):
    """It is on its way: unlike who has had an answer here, the client may not send it again."""
    served = serve(Application(), FIRST_BYTE_TIMEOUT=harness.PATIENCE)
    with Client(served.port) as new, Client(served.port, request(b"GET / HTTP/1.1")) as used:
        assert used.answer()[2] == b"root"
        wait_for(lambda: len(connection_threads()) == 2)
        end = threading.Thread(target=served.server.shut_down, args=[harness.PATIENCE])
        end.start()
        assert used.is_closed()
        new.send(request(b"GET / HTTP/1.1"))
        status, fields, body = new.answer()
        assert (status, fields["connection"], body) == (200, "close", b"root")
        end.join()


def test_a_new_connection_that_is_silent_does_not_hold_up_the_end(serve):
    served = serve(Application(), FIRST_BYTE_TIMEOUT=0.2)
    with Client(served.port) as new:
        end = threading.Thread(target=served.server.shut_down, args=[harness.PATIENCE])
        end.start()
        assert new.is_closed()
        end.join(harness.PATIENCE / 2)
        assert not end.is_alive()


def is_refused(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


HALVES = (b"POST /ech", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel")
REST = (b"o HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", b"lo")


def begun(server):
    """Whether the one connection that there is has a first request that has begun."""
    return [handler for handler in list(server._connections.values())
            if handler and (handler.connection.buffer or not handler.new_until)]


@pytest.mark.parametrize("half, rest", list(zip(HALVES, REST)))
def test_the_end_lets_nobody_in_and_waits_for_what_is_half_there(serve, half, rest):
    """A connection in the queue of a server that ends would be reset, its request unanswered."""
    served = serve(Application(), **BEGINNING)
    with Client(served.port, half) as client:
        wait_for(lambda: begun(served.server), "its request to begin")
        end = threading.Thread(target=served.server.shut_down, args=[2 * harness.PATIENCE])
        end.start()
        wait_for(lambda: is_refused(served.port))
        client.send(rest)
        assert client.answer()[2] == b"hello"
        end.join()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("when", ("before", "between two requests", "straight after an answer"))
def test_who_is_cut_off_by_the_end_is_told_so(serve, monkeypatch, half, when):
    """It was not him who ended it: what never came in time, or came while the server took the
    connection for one between two requests."""
    served = serve(Application(), **BEGINNING)
    server, late = served.server, when != "before"
    if when == "straight after an answer":      # its thread hasn't looked for the next request yet
        monkeypatch.setattr(replicas_engine, "log_request", lambda *args: wait_for(
            lambda: server.closing, "the end to begin"))
    with Client(served.port, request(b"GET / HTTP/1.1")) as client:
        assert client.answer()[0] == 200
        wake, halves = server._wake, [half]
        if late:
            monkeypatch.setattr(server, "_wake", lambda sock: (
                client.send(halves.pop() if halves else b""), wake(sock)))
        else:
            client.send(half)
            wait_for(lambda: [handler for handler in list(server._connections.values())
                              if handler and not handler.idle], "its request to begin")
        end = threading.Thread(target=server.shut_down, args=[1.0])
        end.start()
        status, fields, body = client.answer()
        assert status == 503 and fields["connection"] == "close" and b"shutting down" in body
        end.join()


def test_a_message_that_is_half_there_at_the_end_is_to_be_sent_again(make_engine):
    """It is refused at once, and has all the time that this may take."""
    engine = make_engine(constants=dict.fromkeys(("CLOSE_TIMEOUT", "REFUSAL_TIME"),
                                                 harness.PATIENCE))
    with Client(engine.port, request(b"POST /codex/send HTTP/1.1", KEY[:-2], b"Content-Length: 16",
                                     body=b'{"mess')) as client:
        engine.process.send_signal(signal.SIGTERM)
        status, fields, _ = client.answer()
        assert (status, fields["retry-after"], fields["connection"]) == (503, "5", "close")


@pytest.mark.parametrize("leave", (Client.close, Client.reset))
def test_lingering_ends_with_the_client(serve, leave):
    served = serve(Application(), **LINGERING)
    client = Client(served.port, request(b"POST / HTTP/1.1", b"Content-Length: 100000"))
    assert client.answer()[0] == 200 and client.is_closed()
    client.send(b"x" * 1000)
    leave(client)
    wait_for(lambda: not connection_threads(), "its thread to end")


def test_spare_connections_that_linger_give_way(serve):
    """One that goes on sending, too: else there would be more threads than spare connections."""
    served = serve(Application(), max_connections=0, MAX_SPARE_CONNECTIONS=2, **LINGERING)
    clients = [Client(served.port, request(b"POST / HTTP/1.1", b"Content-Length: 1000000000"))
               for _ in range(6)]
    for client in clients:
        assert client.answer()[0] == 503

    def send():
        for client in clients:
            with contextlib.suppress(ConnectionError):
                client.send(b"x" * 1000)
        return len(connection_threads()) <= 2

    wait_for(send, "the oldest to give way")
    for client in clients:
        client.close()


# Above the limit

def silent(port, count):
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


def test_who_has_shown_the_secret_is_answered_above_the_limit(make_engine, tmp_path):
    """Whatever the others do: the oldest that has not shown it makes room."""
    engine = make_engine(constants={"SPARE_TIMEOUT": harness.PATIENCE},
                         REPLICAS_ENGINE_MAX_CONNECTIONS="4")
    hold_turn(engine, tmp_path)
    crowd = silent(engine.port, 4)
    for _ in range(20):
        assert engine.get("/ping").status == 200
        crowd += silent(engine.port, 4)
    events = []

    def enter():
        """There is room for whoever shows it, once those of above have left."""
        connection, response = engine.open("GET", "/codex/events")
        events.append((connection, response)) if response.status == 200 else connection.close()
        return len(events) == 4
    wait_for(enter)
    crowd += silent(engine.port, 4)
    assert engine.get("/codex/status").status == 200
    assert engine.request("GET", "/health", secret=None).status == 200
    assert engine.request("GET", "/ping", secret=None).status == 503
    assert engine.request("GET", "/ping", secret="wrong").status == 503
    for path in ("/codex/events", "/codex/turns/1?wait=30"):
        answer = engine.get(path)
        assert answer.status == 503 and "not for streams" in answer.json()["details"]
        assert answer.headers["Retry-After"]
    assert engine.get("/codex/turns/1").status == 200
    assert engine.post("/codex/interrupt").json()["interrupted"] is True
    for _, response in events:
        assert harness.parse_events(response.read())[-1].type == "done"
    for sock in crowd:
        sock.close()
    wait_for(lambda: engine.get("/codex/events").status == 200)


def test_localhost_is_both_its_addresses(serve):
    listeners = replicas_engine.listen("localhost", 0)
    try:
        names = [listener.getsockname() for listener in listeners]
        assert {name[0] for name in names} <= {"127.0.0.1", "::1"} and len(names) >= 1
        assert len({name[1] for name in names}) == 1
        if len(socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM)) == 2:
            assert len(names) == 2
    finally:
        for listener in listeners:
            listener.close()


def test_addresses_that_the_machine_has_not(monkeypatch):
    """A name's other ones do; and no address is listened on twice."""
    def found(*addresses):
        return lambda *args, **keys: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))
                                      for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found("192.0.2.1", "127.0.0.1", "127.0.0.1"))
    listener, = replicas_engine.listen("name", 0)
    assert listener.getsockname()[0] == "127.0.0.1"
    listener.close()
    monkeypatch.setattr(socket, "getaddrinfo", found("127.0.0.1", "192.0.2.1"))
    replicas_engine.listen("name", 0)[0].close()
    monkeypatch.setattr(socket, "getaddrinfo", found("192.0.2.1"))
    with pytest.raises(OSError):
        replicas_engine.listen("name", 0)


def test_a_unix_socket(make_engine, tmp_path):
    """A second start takes the place of a socket on which nobody listens, and of no other."""
    path = str(tmp_path / "engine.sock")
    engine = make_engine(start=False, HOST="unix:" + path, PORT=None)

    def answers():
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(PING.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            with sock.makefile("rb") as file:
                return b"pong" in file.read()
        return False

    for _ in range(2):
        engine.start(wait=False)
        wait_for(answers, "the engine to answer")
        wait_for(lambda: "is listening on unix:" + path in engine.log()
                 and re.search("GET /ping 200 .*, from a Unix socket", engine.log()), "the log")
        assert os.stat(path).st_mode & 0o777 == 0o666       # a proxy is another user
        engine.kill()
    engine.start(wait=False)
    wait_for(answers)
    other = make_engine("other", start=False, HOST="unix:" + path, PORT=None)
    other.start(wait=False)
    assert other.process.wait(timeout=harness.PATIENCE) == 1 and path in other.log()
    assert answers()


def test_a_socket_is_held_for_a_moment_by_a_child_of_an_engine_that_was_killed(make_engine, tmp_path):
    """It was just forked, and has yet to become another program."""
    path = str(tmp_path / "engine.sock")
    engine = make_engine(start=False, constants={"RELEASE_PATIENCE": harness.PATIENCE},
                         HOST="unix:" + path, PORT=None)
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(path)
        held.listen()
        held.settimeout(harness.PATIENCE)
        engine.start(wait=False)
        held.accept()[0].close()            # it has tried
    wait_for(lambda: "is listening on unix:" + path in engine.log()
             or engine.process.poll() is not None)
    assert engine.process.poll() is None


def test_the_kernel_asks_whether_a_client_is_there(serve):
    """tcp(7); what it does then is shown by the next test, where it can run."""
    served = serve(Application())
    with Client(served.port, request(b"GET / HTTP/1.1")) as client:
        assert client.answer()[0] == 200
        sock, = served.server._connections
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, patience = (sock.getsockopt(socket.IPPROTO_TCP, option) for option in (
            socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT))
        assert replicas_engine.SEND_TIMEOUT < patience / 1000 == 45 >= idle + interval


VANISHING = """
import socket, subprocess, sys, threading, time
sys.path.insert(0, sys.argv[1])
import replicas_engine
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
replicas_engine.PROBE_AFTER = replicas_engine.PROBE_INTERVAL = 1
replicas_engine.VANISHED_TIMEOUT = 3.0

def drip(environ, start_response):
    start_response("200 OK", [])
    while environ["PATH_INFO"] == "/drip":
        yield b"x"
        time.sleep(0.1)
    yield b"end"

server = replicas_engine.WSGIServer(replicas_engine.listen("127.0.0.1", 0), drip, 10)
threading.Thread(target=server.serve_forever, daemon=True).start()
clients = []
for path in (b"/", b"/drip"):                   # one gets nothing more, one gets more and more
    sock = socket.create_connection(server.server_address)
    sock.sendall(b"GET %b HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n" % path)
    sock.recv(1)
    clients.append(sock)
assert len(server._connections) == 2
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
deadline = time.monotonic() + float(sys.argv[2])
while server._connections and time.monotonic() < deadline:
    time.sleep(0.05)
print("left:", len(server._connections))
"""


def test_clients_that_vanish_without_a_word():
    """Behind a link that is down nothing comes from them any more, and no reset either."""
    command = ["unshare", "--map-root-user", "--net"]
    if not all(map(shutil.which, ("unshare", "ip"))) or subprocess.run(
            command + ["ip", "link", "set", "lo", "up"], stderr=subprocess.DEVNULL).returncode:
        conftest.unavailable("no unshare, no ip, or no right to make a network namespace")
    output = subprocess.run(command + [sys.executable, "-c", VANISHING, harness.ROOT,
                                       str(harness.PATIENCE)], stdout=subprocess.PIPE, check=True)
    assert output.stdout == b"left: 0\n"


def give_connections_no_thread(monkeypatch):
    start = threading.Thread.start

    def fail(thread):
        if thread.name == "connection":
            raise RuntimeError("can't start new thread")
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", fail)


def test_no_thread_can_be_started(serve, monkeypatch):
    """As when the agent has filled the machine: those that are there already serve."""
    served = serve(Application(), always=("/echo",), SPARE_TIMEOUT=harness.PATIENCE)
    give_connections_no_thread(monkeypatch)
    for _ in range(10):
        assert served.get("echo")[0] == 200
    monkeypatch.undo()
    assert served.get("echo")[0] == 200


def test_without_threads_a_silent_crowd_keeps_nobody_out(serve, monkeypatch):
    """The newest connection is served first, and the oldest make room for it."""
    served = serve(Application(), always=("/echo",), SPARE_TIMEOUT=10 * harness.PATIENCE,
                   LINGER_PAUSE=10 * harness.PATIENCE)
    give_connections_no_thread(monkeypatch)
    crowd = silent(served.port, 40)
    for _ in range(3):
        crowd.append(Client(served.port, request(b"GET /echo HTTP/1.1")))
        assert crowd[-1].answer()[0] == 200             # and it stays, without closing
    for client in crowd:
        client.close()


def test_who_waits_for_a_thread_when_the_server_ends_is_closed(serve, monkeypatch):
    served = serve(Application(), RESERVE_THREADS=0)
    give_connections_no_thread(monkeypatch)
    crowd = silent(served.port, 3)
    wait_for(lambda: served.server._reserve.qsize() == 3)
    served.server.shut_down(0)
    for client in crowd:
        client.close()


def test_who_makes_room_is_told_so(serve):
    served = serve(Application(), max_connections=1)
    for data in (b"GET / HT", b"POST /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel"):
        with Client(served.port, data) as client:
            wait_for(lambda: begun(served.server), "its request to begin")
            assert served.get("")[0] == 200
            status, _, body = client.answer()
            assert status == 503 and (b"too many connections" in body)


def test_who_makes_room_cannot_go_on(serve):
    """However much he has sent already."""
    app = Application()
    served = serve(app, max_connections=1)
    with Client(served.port, request(b"GET /drip HTTP/1.1") * 3000) as client:
        _, fields = client.head()
        assert fields.get("connection") is None         # it was settled before
        assert served.get("echo")[0] == 200
        app.proceed.set()
        assert b"".join(client.chunks()).endswith(b"end")
        assert client.answer()[1]["connection"] == "close"
        assert client.is_closed()


def test_no_descriptor_is_left(make_engine):
    """The oldest silent connection makes room, as above the limit."""
    engine = make_engine(start=False)
    engine.program = ["sh", "-c", 'ulimit -n 60; exec "$@"', "sh", *engine.program]
    engine.start()
    crowd = []
    for _ in range(5):
        crowd += silent(engine.port, 20)
        assert engine.get("/ping").status == 200
    wait_for(lambda: "connections can't be accepted: Too many open files" in engine.log())
    for sock in crowd:
        sock.close()
    # Once the crowd's descriptors are free
    wait_for(lambda: engine.post("/codex/send", {"message": "hi"}).status == 200)
    assert engine.events()[-2].type == "turn.completed"


# Targets

def test_a_query_with_characters_that_browsers_send_raw(serve):
    served = serve(Application())
    for query in (b"a=[1]", b"a|b^c`d", b'{"a":"\\<b>"}', b"a=%5B1]", b"a[]=1&b[c]=2;d", b"a=100%",
                  b"%g0"):
        with Client(served.port, request(b"GET /echo?" + query + b" HTTP/1.1")) as client:
            status, fields, _ = client.answer()
            assert status == 200 and fields["x-query"] == query.decode()
    for target in (b"/echo?a#b", b"/echo?\xc3\xa4", b"/echo?\x7f", b"/echo[1]", b"/ec|ho",
                   b"/echo%"):
        with Client(served.port, request(b"GET " + target + b" HTTP/1.1")) as client:
            assert client.answer()[0] == 400


# Half-closed clients

def test_half_closed_client_gets_its_answer(engine):
    answer = harness.raw(engine.port, PING * 3, half_close=True)
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b"pong") == 3
    assert harness.raw(engine.port, b"", half_close=True) == b""
    assert harness.raw(engine.port, PING[:-2], half_close=True).startswith(b"HTTP/1.1 400 ")
    cut = request(b"POST /codex/send HTTP/1.1", KEY[:-2], b"Content-Length: 9", body=b"{}")
    assert harness.raw(engine.port, cut, half_close=True).startswith(b"HTTP/1.1 400 ")


def test_half_closed_client_gets_its_stream(engine, tmp_path):
    gate = hold_turn(engine, tmp_path)
    with Client(engine.port, request(b"GET /codex/events HTTP/1.1", KEY[:-2])) as client:
        assert client.head()[0] == 200
        chunks = client.chunks()
        pieces = [next(chunks)]
        client.sock.shutdown(socket.SHUT_WR)
        for piece in chunks:
            pieces.append(piece)
            if piece.startswith(b":"):      # it was looked after, and is not taken for gone
                gate.write_text("")
        events = harness.parse_events(b"".join(pieces))
    assert harness.check_stream(events)[-2].type == "turn.completed"


# Expect

def test_continue_only_with_the_secret_and_for_a_body_that_is_wanted(make_engine):
    engine = make_engine(REPLICAS_ENGINE_MAX_BODY="1000")
    expect = b"Expect: 100-continue"
    for data, status in (
            (request(b"POST /codex/send HTTP/1.1", b"Content-Length: 2", expect), 401),
            (request(b"POST /codex/send HTTP/1.1", b"Content-Length: 2", expect,
                     b"X-Replicas-Engine-Secret: wrong"), 401),
            (request(b"POST /codex/send HTTP/1.1", b"Transfer-Encoding: chunked", expect), 401),
            (request(b"POST /nothing HTTP/1.1", b"Content-Length: 2", expect, KEY[:-2]), 404),
            (request(b"GET /ping HTTP/1.1", b"Content-Length: 1001", expect, KEY[:-2]), 413),
            (request(b"POST /codex/send HTTP/1.1", b"Content-Length: 1001", expect, KEY[:-2]), 413),
            (request(b"POST /codex/send HTTP/1.1", b"Content-Length: 2", expect + b"d", KEY[:-2]),
             417)):
        with Client(engine.port, data) as client:
            answer = client.answer()
            assert answer[0] == status and answer[1]["connection"] == "close", data
            assert client.is_closed()


@pytest.mark.parametrize("framing, body", ((b"Content-Length: 2", b"{}"), (
    b"Transfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n")))
def test_continue(engine, framing, body):
    data = request(b"POST /codex/send HTTP/1.1", framing, b"Expect: 100-Continue", KEY[:-2])
    with Client(engine.port, data) as client:
        assert client.head() == (100, {})
        client.send(body + PING)
        status, _, text = client.answer()
        assert status == 400 and b"Message is required" in text
        assert client.answer()[0] == 200
        client.send(data + body)            # it didn't wait for it: then it needs none
        assert client.answer()[0] == 400


# HEAD and HTTP/1.0

@pytest.mark.parametrize("path", (b"/health", b"/ping", b"/codex/status", b"/codex/history",
                                  b"/codex/events", b"/codex/events?turn=99", b"/codex/send",
                                  b"/nothing"))
def test_head_is_get_without_a_body(make_engine, path):
    # Without a sandbox that is tried out, or a problem might come up between the two
    engine = make_engine(REPLICAS_ENGINE_SANDBOX="danger-full-access")
    engine.send("hello")
    with Client(engine.port) as client:
        client.send(request(b"HEAD %b HTTP/1.1" % path, KEY[:-2]) + PING)
        status, fields, _ = client.answer(is_head=True)
        assert client.answer()[0] == 200    # so there was no body
        client.send(request(b"GET %b HTTP/1.1" % path, KEY[:-2]))
        wanted_status, wanted, _ = client.answer()
    assert status == wanted_status
    for name in ("date", "transfer-encoding"):
        fields.pop(name, None)
        wanted.pop(name, None)
    assert fields == wanted


@pytest.mark.parametrize("data, status", (
    (b"HEAD / HTTP/1.1\r\n\r\n", 400),                              # without Host
    (b"HEAD / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n", 400),
    (b"HEAD / HTTP/1.1\r\nHost: a\r\nX: y\n", 400),                  # before the head's end
    (b"\r\nHEAD / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 33000, 431),
    (request(b"HEAD / HTTP/1.1", b"Transfer-Encoding: gzip"), 501),
    (request(b"HEAD / HTTP/1.1", b"Expect: x"), 417),
    (request(b"HEAD /fails HTTP/1.1"), 500)))
def test_refusal_of_head_has_no_body(serve, data, status):
    """RFC 9110, 9.3.2: what stood behind the head would be taken for another answer."""
    with Client(serve(Application(), valid=False).port, data) as client:
        answer = client.answer(is_head=True)
        assert answer[0] == status and answer[1]["connection"] == "close"
        assert client.is_closed()


@pytest.mark.parametrize("fields", ((), (b"Connection: keep-alive",)))
def test_http_1_0_stream_ends_with_the_connection(engine, fields):
    engine.send("hello")
    with Client(engine.port, request(b"GET /codex/events HTTP/1.0", KEY[:-2], *fields)) as client:
        status, fields, body = client.answer()
    assert status == 200 and "transfer-encoding" not in fields and "content-length" not in fields
    assert fields["connection"] == "close"
    harness.check_stream(harness.parse_events(body))


def test_http_1_0_keep_alive(engine):
    data = request(b"GET /ping HTTP/1.0", KEY[:-2], b"Connection: Keep-Alive")
    with Client(engine.port, data * 2) as client:
        for _ in range(2):
            assert client.answer()[1]["connection"] == "keep-alive"
        client.send(request(b"GET /ping HTTP/1.0", KEY[:-2]))
        assert client.answer()[1]["connection"] == "close"
        assert client.is_closed()


# What an application can do wrong

@pytest.mark.parametrize("status, headers", (
    ("200 OK", [("X", "a\r\nInjected: y")]), ("200 OK", [("X", "a\nInjected: y")]),
    ("200 OK", [("X", "a\rInjected: y")]), ("200 OK", [("X", "a\0b")]),
    ("200 OK", [("X", "a\r\n\r\nInjected")]), ("200 OK", [("X\r\nInjected", "a")]),
    ("200 OK", [("X", "\u2028")]), ("200 OK\r\nInjected: y", []), ("200 OK\nInjected: y", []),
    ("200 OK", [("Content-Length", "4\r\nInjected: y")]), ("200 OK", None), (None, [])))
@pytest.mark.parametrize("pieces", ([b"body"], [b"bo", b"dy"]))
def test_response_cannot_be_split(serve, status, headers, pieces):
    def app(environ, start_response):
        if environ["PATH_INFO"] == "/good":
            start_response("200 OK", [])
        else:
            start_response(status, headers and [*headers])
        return list(pieces)

    served = serve(app, valid=False)
    with Client(served.port, request(b"GET / HTTP/1.1") + request(b"GET /good HTTP/1.1")) as client:
        status_code, fields, body = client.answer()
        assert status_code == 500 and "injected" not in fields and b"Injected" not in body
        assert client.is_closed()
    assert served.get("good")[0] == 200


@pytest.mark.parametrize("fields", (
    [("Transfer-Encoding", "chunked")], [("TRANSFER-ENCODING", "identity")],
    [("Connection", "keep-alive")], [("connection", "close")], [("Upgrade", "x")],
    [("Content-Length", "4"), ("content-length", "4")],
    [("Content-Length", "4"), ("Content-Length", "5")]))
@pytest.mark.parametrize("line", (b"GET / HTTP/1.1", b"HEAD / HTTP/1.1", b"GET / HTTP/1.0"))
@pytest.mark.parametrize("pieces", ([b"body"], [b"bo", b"dy"]))
def test_framing_is_not_the_applications(serve, fields, line, pieces):
    """Two framings of one body: the client might choose the other."""
    def app(environ, start_response):
        start_response("200 OK", fields)
        return pieces

    with Client(serve(app, valid=False).port, request(line)) as client:
        status, answered, _ = client.answer(is_head=line.startswith(b"HEAD"))
        assert status == 500 and answered["connection"] == "close"
        assert "transfer-encoding" not in answered and "upgrade" not in answered
        assert client.is_closed()


def test_application_that_fails(serve):
    class Failing(Application):
        def early(self, environ, start_response):
            raise RuntimeError("before start_response")

        def late(self, environ, start_response):
            self.start(start_response)
            raise RuntimeError("behind start_response")

        def first(self, environ, start_response):
            self.start(start_response)
            return self.failing([])

        def middle(self, environ, start_response):
            self.start(start_response)
            return self.failing([b"some"])

        def failing(self, pieces):
            for piece in pieces:
                yield piece
            raise RuntimeError("in the body")

        def caught(self, environ, start_response):
            self.start(start_response)
            try:
                raise RuntimeError("caught")
            except RuntimeError:
                start_response("503 Sorry", [("Content-Type", "text/plain")], sys.exc_info())
            return [b"sorry"]

        def nothing(self, environ, start_response):
            return [b"start_response was not called"]

        def twice(self, environ, start_response):
            self.start(start_response)
            self.start(start_response)
            return [b""]

    served = serve(Failing(), valid=False)
    for path in ("early", "late", "first", "nothing", "twice"):
        status, fields, body = served.get(path)
        assert status == 500 and fields["connection"] == "close" and b"Error" in body, path
        assert b"Traceback" not in body and b"start_response" not in body
    with Client(served.port, request(b"GET /middle HTTP/1.1")) as client:
        assert client.head()[0] == 200
        with pytest.raises(EOFError):       # no last chunk: the client knows that it breaks off
            list(client.chunks())
    assert served.get("caught")[::2] == (503, b"sorry")
    assert served.get("")[0] == 200


@pytest.mark.parametrize("length", (3, 5))
@pytest.mark.parametrize("pieces", ([b"body"], [b"bo", b"dy"]))
def test_content_length_that_is_wrong(serve, length, pieces):
    """Nothing of a body is ever taken for the next response."""
    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(length))])
        return pieces

    served = serve(app, valid=False)
    with Client(served.port, request(b"GET / HTTP/1.1") * 2) as client:
        status, _, body = client.answer()
        if len(pieces) == 1:
            assert status == 500
        else:
            assert status == 200 and body == (b"bo" if length == 3 else b"body")
        assert client.is_closed()


# PEP 3333

def test_environ(serve):
    app = Application()
    served = serve(app)
    served.get("echo?a=%20b", b"X-One: 1", b"x-one:2", b"Content-Type: a/b", b"X_One: 3",
               b"Empty:", b"Proxy: x")
    environ = app.environ
    wanted = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/echo", "QUERY_STRING": "a=%20b",
        "SERVER_PROTOCOL": "HTTP/1.1", "SERVER_NAME": "127.0.0.1", "SERVER_PORT": str(served.port),
        "REMOTE_ADDR": "127.0.0.1", "CONTENT_TYPE": "a/b", "HTTP_HOST": "a", "HTTP_X_ONE": "1,2",
        "HTTP_EMPTY": "", "wsgi.url_scheme": "http", "wsgi.version": (1, 0)}
    assert {key: environ.get(key) for key in wanted} == wanted
    assert "CONTENT_LENGTH" not in environ and "HTTP_CONTENT_TYPE" not in environ


def test_bodies_in_every_form(serve):
    class Bodies(Application):
        def nothing(self, environ, start_response):
            self.start(start_response)
            return []

        def empty(self, environ, start_response):
            self.start(start_response)
            return [b""]

        def pieces(self, environ, start_response):
            self.start(start_response)
            return iter([b"", b"a", b"", b"b", b""])

        def counted(self, environ, start_response):
            self.start(start_response, ("Content-Length", "2"))
            return iter([b"a", b"", b"b"])

        def generator(self, environ, start_response):
            self.start(start_response)
            yield b""
            yield b"ab"

        def no_content(self, environ, start_response):
            start_response("204 No Content", [])
            return []

        def not_modified(self, environ, start_response):
            start_response("304 Not Modified", [("ETag", '"x"')])
            return iter([])

        def write(self, environ, start_response):
            write = self.start(start_response)
            write(b"a")
            write(b"")
            write(b"b")
            return []

        def lines(self, environ, start_response):
            self.start(start_response)
            stream = environ["wsgi.input"]
            return [b"|".join([stream.readline(), stream.read(2)] + list(stream))]

    app = Bodies()
    served = serve(app)
    wanted = {"nothing": b"", "empty": b"", "pieces": b"ab", "counted": b"ab", "generator": b"ab",
              "no_content": b"", "not_modified": b"", "write": b"ab"}
    with Client(served.port) as client:
        for method in (b"GET", b"HEAD"):
            for path, body in wanted.items():
                client.send(request(b"%b /%b HTTP/1.1" % (method, path.encode())))
                answer = client.answer(is_head=method == b"HEAD")
                assert answer[2] == (b"" if method == b"HEAD" else body), path
                assert answer[0] == {"no_content": 204, "not_modified": 304}.get(path, 200)
                assert "connection" not in answer[1]
        for framing, data in ((b"Content-Length: 13", b"one\ntwo\nthree"), (
                b"Transfer-Encoding: chunked", b"5\r\none\nt\r\n8\r\nwo\nthree\r\n0\r\n\r\n")):
            client.send(request(b"POST /lines HTTP/1.1", framing, body=data))
            assert client.answer()[2] == b"one\n|tw|o\n|three"
    assert harness.raw(served.port, request(b"GET /pieces HTTP/1.0")).endswith(b"\r\n\r\nab")
    assert harness.raw(served.port, request(b"GET /write HTTP/1.0")).endswith(b"\r\n\r\nab")


def test_bodiless_answers_stay_bodiless(serve):
    """An application that gives a body to 204 or to HEAD does not bring the connection out of
    step."""
    def app(environ, start_response):
        start_response("204 No Content" if environ["PATH_INFO"] == "/204" else "200 OK", [])
        return [b"body"] if environ["QUERY_STRING"] else iter([b"bo", b"dy"])

    served = serve(app, valid=False)
    with Client(served.port) as client:
        for line in (b"GET /204?1 HTTP/1.1", b"GET /204 HTTP/1.1", b"HEAD /?1 HTTP/1.1",
                     b"HEAD / HTTP/1.1"):
            client.send(request(line) + request(b"GET /?1 HTTP/1.1"))
            assert client.answer(is_head=True)[0] in (200, 204)
            assert client.answer()[2] == b"body"


# Deadlines

def test_silent_connections_are_closed(serve, monkeypatch):
    class Impatient(Application):
        def root(self, environ, start_response):
            monkeypatch.setattr(replicas_engine, "IDLE_TIMEOUT", 0.2)   # from now on
            return super().root(environ, start_response)

    served = serve(Impatient())
    with Client(served.port, request(b"GET / HTTP/1.1")) as used:
        assert used.answer()[2] == b"root"
        with Client(served.port) as fresh:
            assert fresh.is_closed() and used.is_closed()


def test_head_that_drips_is_408(serve):
    data = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 30000
    served = serve(Application(), HEAD_TIMEOUT=0.4, LINGER_TIMEOUT=0.4, LINGER_PAUSE=0.1)
    with Client(served.port) as client:
        with contextlib.suppress(ConnectionError):
            for begin in range(0, len(data), 2):
                client.send(data[begin:begin + 2])
                time.sleep(0.01)
            pytest.fail("nobody ended it")


@pytest.mark.parametrize("size", (1, 2, 60000))
def test_empty_lines_are_no_request(serve, size):
    """However they come they keep nothing open, and get no answer (RFC 9112, 2.2)."""
    served = serve(Application(), IDLE_TIMEOUT=0.4, HEAD_TIMEOUT=0.1, LINGER_PAUSE=0.1)
    data = b"\r\n" * 30000
    with Client(served.port) as client:
        with pytest.raises(ConnectionError):
            for place in range(0, 10 ** 6 * size, size):
                client.send(data[place % 2:place % 2 + size])
                time.sleep(0.01 if size < 10 else 0)
    with Client(served.port) as client:
        client.send(b"\r\n\r")
        assert client.is_closed()           # and no 408


@pytest.mark.parametrize("end", (b"\r\n", b"\r\n\r\n\r\n", b"\r"))
def test_empty_lines_behind_a_body(serve, end):
    served = serve(Application(), HEAD_TIMEOUT=0.05)
    post = request(b"POST /echo HTTP/1.1", b"Content-Length: 2", body=b"{}")
    with Client(served.port, post + end) as client:
        assert client.answer()[2] == b"{}"
        time.sleep(0.2)                     # they began no head: it has no deadline
        client.send((b"\n" if end == b"\r" else b"") + post + end)
        assert client.answer()[2] == b"{}"
        client.sock.shutdown(socket.SHUT_WR)
        assert client.is_closed()


def test_half_a_head_is_408(serve):
    served = serve(Application(), HEAD_TIMEOUT=0.2)
    for data in (b"G", b"GET / HTTP/1.1\r\nHost: a\r\n", b"\r\nG"):
        with Client(served.port, request(b"GET / HTTP/1.1") + data) as client:
            assert client.answer()[0] == 200
            answer = client.answer()
            assert answer[0] == 408 and answer[1]["connection"] == "close"
            assert client.is_closed()


def test_honest_slow_body_passes(serve, monkeypatch):
    """It takes longer than the grace, at far more than the rate asked for."""
    class Impatient(Application):
        def echo(self, environ, start_response):
            begin = environ["wsgi.input"].read(400)     # it has waited for half of that
            monkeypatch.setattr(replicas_engine, "BODY_GRACE", 0.01)
            self.start(start_response)
            return [begin + environ["wsgi.input"].read(10 ** 7)]

    served = serve(Impatient(), BODY_RATE=1)
    for framing, piece, end in ((b"Content-Length: 4000", b"x" * 200, b""), (
            b"Transfer-Encoding: chunked", b"c8\r\n" + b"x" * 200 + b"\r\n", b"0\r\n\r\n")):
        monkeypatch.setattr(replicas_engine, "BODY_GRACE", harness.PATIENCE)
        with Client(served.port, request(b"POST /echo HTTP/1.1", framing, body=piece)) as client:
            for _ in range(19):             # the first came with the head
                time.sleep(0.04)
                client.send(piece)
            client.send(end)
            assert client.answer()[::2] == (200, b"x" * 4000)


@pytest.mark.parametrize("framing, piece", ((b"Content-Length: 400000", b"x"),
                                            (b"Transfer-Encoding: chunked", b"1\r\nx\r\n")))
def test_body_that_is_too_slow_is_408(serve, framing, piece):
    served = serve(Application(), BODY_GRACE=0.3, BODY_RATE=10 ** 6)
    with Client(served.port, request(b"POST /echo HTTP/1.1", framing)) as client:
        client.sock.setblocking(False)
        answer = b""
        while not answer:
            client.send(piece)
            time.sleep(0.02)
            with contextlib.suppress(BlockingIOError):
                answer = client.sock.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"\r\nConnection: close" in answer


def test_write_without_progress_ends(serve):
    app = Application()
    served = serve(app, SEND_TIMEOUT=0.3)
    with Client(served.port, request(b"GET /flood HTTP/1.1"), receive_buffer=4096):
        assert app.closed.wait(harness.PATIENCE)


def test_large_upload_to_a_busy_application_is_kept_back(serve):
    """Nothing is read ahead of the application: a client can't fill the memory."""
    class Waiting(Application):
        def wait(self, environ, start_response):
            self.proceed.wait(harness.PATIENCE)
            self.start(start_response)
            return [b""]

    app = Waiting()
    served = serve(app)
    with Client(served.port, request(b"POST /wait HTTP/1.1", b"Content-Length: 1000000000")) as one:
        one.sock.setblocking(False)
        sent, deadline = 0, time.monotonic() + 0.5
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                sent += one.sock.send(b"x" * 65536)
        assert sent < 200 * 1024 * 1024     # what the kernel takes; loopback would carry much more
        app.proceed.set()


def test_send_on_a_closed_socket():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sock, listener.accept()[0] as peer:
            connection = replicas_engine.Connection(sock)
            connection.send(b"hello")
            assert peer.recv(100) == b"hello"
            sock.close()
            with pytest.raises(replicas_engine.Disconnected):
                connection.send(b"hello")


# Clients that disappear

@pytest.mark.parametrize("leave", (Client.close, Client.reset))
def test_client_that_leaves_is_noticed_while_nothing_is_sent(serve, leave):
    class Commenting(Application):
        """It asks the server, as EventStream does, whether a comment could bring the news."""

        def drip(self, environ, start_response):
            self.start(start_response)
            return self.closing(self.pieces(environ["replicas_engine.may_be_gone"]))

        def pieces(self, may_be_gone):
            for piece in self.until_proceed():
                yield piece or (b": comment\n\n" if may_be_gone() else b"")

    app = Commenting()
    served = serve(app, valid=False)
    client = Client(served.port, request(b"GET /drip HTTP/1.1"))
    assert client.head()[0] == 200
    leave(client)
    assert app.closed.wait(harness.PATIENCE)
    wait_for(lambda: not connection_threads(), "its thread to end")


@pytest.mark.parametrize("leave", (Client.close, Client.reset))
def test_client_that_leaves_a_stream(make_engine, tmp_path, leave):
    engine = make_engine(constants=dict(harness.OPEN_TO_VIEW, KEEP_ALIVE_INTERVAL=3600.0))
    gate = hold_turn(engine, tmp_path)
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    before = resources(engine)
    clients = [Client(engine.port, request(b"GET /codex/events HTTP/1.1", KEY[:-2]))
               for _ in range(20)]
    for client in clients:
        assert client.head()[0] == 200
        next(client.chunks())
    assert resources(engine)[0] >= before[0] + 15
    for client in clients:
        leave(client)
    wait_for(lambda: are_back(engine, before), "threads and descriptors to go")
    gate.write_text("")


def test_a_thousand_connects_and_disconnects(make_engine, tmp_path):
    engine = make_engine(constants=harness.OPEN_TO_VIEW, REPLICAS_ENGINE_MAX_CONNECTIONS="1000")
    gate = hold_turn(engine, tmp_path)
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    before = resources(engine)
    for number in range(1000):
        line = (b"GET /ping HTTP/1.1", b"GET /codex/events HTTP/1.1")[number % 2]
        client = Client(engine.port, request(line, KEY[:-2]))
        assert client.head()[0] == 200, number
        (client.close, client.reset)[number // 2 % 2]()
    wait_for(lambda: are_back(engine, before), "threads and descriptors to go")
    gate.write_text("")
    harness.check_stream(engine.events())
    assert "Traceback" not in engine.log()


# Many clients

def test_too_many_connections(make_engine, tmp_path):
    """Streams have taken everything: one more is refused, /health still answers."""
    engine = make_engine(constants={"SPARE_TIMEOUT": 7.0}, REPLICAS_ENGINE_MAX_CONNECTIONS="4")
    gate = hold_turn(engine, tmp_path)
    streams = []

    def enter():
        """One that is let in: until the connection that began the turn is given up, it has room."""
        stream = Client(engine.port, request(b"GET /codex/events HTTP/1.1", KEY[:-2]))
        if stream.head()[0] == 200:
            streams.append(stream)
        else:
            stream.close()
        return len(streams) == 4
    wait_for(enter)
    with Client(engine.port, request(b"HEAD /ping HTTP/1.1")) as client:
        assert client.answer(is_head=True)[0] == 503
        assert client.is_closed()
    with Client(engine.port, PING * 2) as client:
        status, fields, _ = client.answer()
        assert status == 200 and fields["connection"] == "close"
        assert client.is_closed()
    anonymous = request(b"GET /ping HTTP/1.1")
    for client in [Client(engine.port, data) for data in (
            anonymous, anonymous * 2, b"\r\n" + PING[:9], PING[:50])]:
        with client:
            status, fields, body = client.answer()
            assert status == 503 and fields["connection"] == "close" and fields["retry-after"]
            assert b"REPLICAS_ENGINE_MAX_CONNECTIONS" in body
            assert client.is_closed()
    for _ in range(50):
        with Client(engine.port, request(b"GET /health HTTP/1.1") * 2) as client:
            status, fields, _ = client.answer()
            assert status == 200 and fields["connection"] == "close"
            assert client.is_closed()
    silent = [Client(engine.port) for _ in range(100)]
    assert all(engine.get("/health").status == 200 for _ in range(10))
    for client in silent:                   # the oldest gave way, the others have had their time
        answer = client.answer()
        assert answer is None or answer[0] == 503
        client.close()
    gate.write_text("")
    for stream in streams:
        assert list(stream.chunks())[-1].endswith(b"event: done\ndata: {}\n\n")
        stream.close()
    wait_for(lambda: engine.get("/ping").status == 200)


class Crowd:
    """Clients that send a byte now and then, read nothing, or do nothing, all in one thread."""

    def __init__(self, port, count):
        self.selector = selectors.DefaultSelector()
        self.dripping, self.open = [], 0
        stream = request(b"GET /codex/events?turn=1 HTTP/1.1", KEY[:-2])
        for kind in range(3 * count):
            client = Client(port, (b"", stream, b"")[kind % 3], receive_buffer=4096)
            client.sock.setblocking(False)
            client.reads = kind % 3 != 1
            client.left = iter(request(b"GET /%b HTTP/1.1" % (b"x" * 5000)))
            if kind % 3 == 0:
                self.dripping.append(client)
            self.selector.register(client.sock, selectors.EVENT_READ, client)
            self.open += 1

    def go_on(self):
        """Send a byte each, twenty a second, and see who was shut out."""
        time.sleep(0.05)
        for client in self.dripping:
            with contextlib.suppress(OSError):
                client.sock.send(bytes([next(client.left, 120)]))
        for key, _ in self.selector.select(0.1):
            try:
                if key.data.reads and key.fileobj.recv(65536):
                    continue
                if not key.data.reads and not self.is_reset(key.fileobj):
                    continue
            except ConnectionError:
                pass
            self.selector.unregister(key.fileobj)
            key.data.close()
            self.open -= 1

    @staticmethod
    def is_reset(sock):
        """Whether the server gave it up, found out without reading what it sent."""
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return info[0] != 1                 # TCP_ESTABLISHED

    def close(self):
        for key in list(self.selector.get_map().values()):
            key.data.close()
        self.selector.close()


def test_hostile_crowd(make_engine, tmp_path):
    """600 at once: all are gone after the deadlines, and nobody else noticed them."""
    engine = make_engine(constants=dict(harness.OPEN_TO_VIEW, HEAD_TIMEOUT=3.0, IDLE_TIMEOUT=3.0,
                                        SEND_TIMEOUT=3.0), REPLICAS_ENGINE_MAX_CONNECTIONS="620")
    engine.send(harness.script({"thread": "new"}, *[{"big": {"size": 10 ** 6}}] * 12,
                               {"complete": True}))
    gate = hold_turn(engine, tmp_path, {"count": {"n": 100, "size": 200, "pause": 0.05}})
    wait_for(lambda: engine.status()["turn"]["last_event_id"])
    before = resources(engine)
    events = []
    reader = threading.Thread(target=lambda: events.extend(engine.events(turn=2)))
    reader.start()
    crowd = Crowd(engine.port, 200)
    try:
        while crowd.open:
            crowd.go_on()
            assert engine.request("GET", "/health", secret=None).status == 200
    finally:
        crowd.close()
    gate.write_text("")
    reader.join()
    assert len(harness.check_stream(events)) > 100
    engine.wait_for_turn()
    wait_for(lambda: are_back(engine, before), "threads and descriptors to go")
    assert "Traceback" not in engine.log()


# Listening, and what others can read

def test_listens_on_ipv4_and_ipv6(make_engine):
    if not socket.has_dualstack_ipv6():
        conftest.unavailable("this machine has no dual-stack sockets")
    engine = make_engine(HOST=None)
    for host in ("127.0.0.1", "::1"):
        try:
            client = Client(engine.port, PING, host=host)
        except OSError as error:
            conftest.unavailable("no address %s: %s" % (host, error))
        with client:
            assert client.answer()[0] == 200


def test_port_that_is_taken(serve):
    with pytest.raises(OSError):
        replicas_engine.listen("127.0.0.1", serve(Application()).port)


@pytest.fixture
def nobodys_folder():
    """A folder of the user nobody."""
    conftest.need("root")
    folder = tempfile.mkdtemp()
    os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
    yield folder
    shutil.rmtree(folder)


def run_as_nobody(argv, **options):
    user = pwd.getpwnam("nobody")

    def become():
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)

    return subprocess.Popen(argv, preexec_fn=become, cwd="/", **options)


def python_for_nobody():
    """A Python that the user nobody may run; the one of the tests may sit in root's home."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            if run_as_nobody([python, "-c", "import sys; sys.exit(sys.version_info < (3, 8))"],
                             stderr=subprocess.DEVNULL).wait() == 0:
                return python
        except OSError:
            pass
    return conftest.unavailable("there is no Python that the user nobody may run")


READ_OTHER = """
import sys
for name in ("environ", "mem", "maps"):
    try:
        with open("/proc/%s/%s" % (sys.argv[1], name), "rb") as file:
            if name == "mem":
                print("opened mem")
            elif file.read():
                print("read", name)
    except PermissionError:
        print("denied", name)
"""


def test_secret_is_kept_from_processes_of_the_same_user(nobodys_folder):
    python = python_for_nobody()
    module = shutil.copy(harness.MODULE, nobodys_folder)
    os.chmod(module, 0o644)
    log_path = os.path.join(nobodys_folder, "log")
    env = {"PATH": os.defpath, "HOME": nobodys_folder, "HOST": "127.0.0.1", "PORT": "0",
           "REPLICAS_ENGINE_SECRET": SECRET, "PYTHONDONTWRITEBYTECODE": "1"}
    with open(log_path, "wb") as log:
        engine = run_as_nobody([python, module], env=env, stderr=log)
    other = run_as_nobody([python, "-c", "input()"], env=env, stdin=subprocess.PIPE)
    try:
        def listening():
            assert engine.poll() is None
            with open(log_path) as file:
                return "is listening" in file.read()
        wait_for(listening, "the engine to listen")

        def read(pid):
            reader = run_as_nobody([python, "-c", READ_OTHER, str(pid)], env=env,
                                   stdout=subprocess.PIPE)
            return reader.communicate()[0].split(b"\n")[:-1]

        if b"read environ" not in read(other.pid):
            conftest.unavailable("here nobody can read any other process")
        assert read(engine.pid) == [b"denied environ", b"denied mem", b"denied maps"]
    finally:
        other.communicate(b"\n")
        engine.terminate()
        engine.wait()
