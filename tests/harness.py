"""What the tests share: engines as processes, clients that read streams, waiting for conditions."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import nursery
import replicas_engine

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
MODULE = os.path.join(ROOT, "replicas_engine.py")
STAND_IN_CODEX = os.path.join(TESTS, "stand_in_codex")
STAND_IN_MODEL = os.path.join(TESTS, "stand_in_model")
RECORDINGS = os.path.join(TESTS, "codex-runs")
SECRET = "correct horse battery staple"
CODEX_VERSIONS = os.environ.get("CODEX_VERSIONS", "0.169.0 0.98.0 0.50.0").split()
PATIENCE = 180.0                    # seconds until a condition that must come has failed to

# The engine from cached bytecode, as the service runs it (a script is compiled at every start), and
# with other values for some of the module's constants: NAME=VALUE ...  A slow machine makes it lose
# neither Codex's version nor the log's last lines.
ENGINE = """\
import sys
sys.path.insert(0, %r)
import replicas_engine
replicas_engine.VERSION_PATIENCE = replicas_engine.FLUSH_TIMEOUT = %r
for name, _, value in (pair.partition("=") for pair in sys.argv[1:]):
    assert hasattr(replicas_engine, name), name
    setattr(replicas_engine, name, type(getattr(replicas_engine, name))(value))
sys.exit(replicas_engine.main([]))
""" % (ROOT, PATIENCE)
FREE_AGAIN = "RELEASE_PATIENCE=%s" % PATIENCE
CONTRACT = None         # the contract.Contract that answers and events are held against, if any
OPEN_TO_VIEW = {"PR_SET_DUMPABLE": 3}   # it asks (prctl(2)) instead of shutting its own user out


def wait_for(condition, what="", patience=PATIENCE):
    """The first true value of `condition()`; fails after `patience` seconds."""
    begin = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - begin
        assert waited < patience, "waited %d s for %s" % (patience, what or condition)
        time.sleep(min(max(0.005, waited / 10), 0.1))       # a tenth longer than needed, at most


def script(*steps):
    """The message that makes tests/stand_in_codex do `steps`."""
    return json.dumps({"stand_in": list(steps)})


def recordings():
    """(version, scenario) of every recorded run."""
    return sorted((version, name[:-len(".stdout.jsonl")])
                  for version in os.listdir(RECORDINGS)
                  if os.path.isdir(os.path.join(RECORDINGS, version))
                  for name in os.listdir(os.path.join(RECORDINGS, version))
                  if name.endswith(".stdout.jsonl"))


def recording(version, scenario, part="stdout.jsonl"):
    with open(os.path.join(RECORDINGS, version, "%s.%s" % (scenario, part)), "rb") as file:
        return file.read()


def codex_program(version):
    """The real Codex of that version as tests/run installed it, or None."""
    program = os.path.join(ROOT, ".cache", "codex", version, "node_modules", ".bin", "codex")
    return program if os.path.exists(program) else None


class Event:
    """One server-sent event, as the HTML standard reads it (9.2.6)."""

    def __init__(self, lines):
        self.lines = lines
        fields = [line.partition(": ") for line in lines]
        self.id = next((value for name, _, value in fields if name == "id"), None)
        self.type = next((value for name, _, value in fields if name == "event"), "message")
        self.data = "\n".join(value for name, _, value in fields if name == "data")
        if CONTRACT:
            CONTRACT.check_event(self)

    def json(self):
        return json.loads(self.data)

    def __repr__(self):
        return "<%s %s %.100s>" % (self.id, self.type, self.data)

    def __eq__(self, other):
        return self.lines == other.lines


def parse_events(body):
    """The events of a whole stream (bytes); comments are passed over."""
    text = body.decode("utf-8")
    assert text == "" or text.endswith("\n\n"), "the stream breaks off: %r" % text[-200:]
    blocks = ([line for line in block.split("\n") if line and not line.startswith(":")]
              for block in text.split("\n\n"))
    return [Event(lines) for lines in blocks if lines]


def read_events(response):
    """The events of a live stream, one by one, as they come."""
    lines = []
    while True:
        line = response.readline()
        if not line:
            return
        line = line.decode("utf-8").rstrip("\n")
        if line and not line.startswith(":"):
            lines.append(line)
        elif not line and lines:
            yield Event(lines)
            lines = []


def check_stream(events):
    """What holds of every whole stream: ids without gaps, one ending, then `done`."""
    turn = events[0].id.partition(".")[0]
    assert [event.id for event in events] == ["%s.%d" % (turn, n + 1) for n in range(len(events))]
    types = [event.type for event in events]
    assert types[-1] == "done" and events[-1].data == "{}"
    assert types.count("done") == 1
    assert sum(kind in ("turn.completed", "turn.failed") for kind in types) == 1
    assert types[-2] in ("turn.completed", "turn.failed")
    return events


class Answer:
    """A whole HTTP answer."""

    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self):
        return json.loads(self.body.decode("utf-8"))

    def events(self):
        return parse_events(self.body)


class Engine:
    """An engine as a process of its own, with a home, a CODEX_HOME and a workspace of its own."""

    program = nursery.PYTHON + ["-c", ENGINE]

    def __init__(self, folder, constants=None, **env):
        if constants:
            self.program = Engine.program + ["%s=%s" % pair for pair in sorted(constants.items())]
        self.folder = str(folder)
        self.home = os.path.join(self.folder, "home")
        self.codex_home = os.path.join(self.home, ".codex")
        self.workspace = os.path.join(self.folder, "workspace")
        self.state = os.path.join(self.folder, "state")
        self.tmp = os.path.join(self.folder, "tmp")
        for path in (self.codex_home, self.workspace, self.tmp):
            os.makedirs(path, exist_ok=True)
        self.env = {
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin",
                                     "/bin"]),
            "HOME": self.home, "TMPDIR": self.tmp, "LANG": "C.UTF-8", "TZ": "UTC",
            "PYTHONFAULTHANDLER": "1",
            "HOST": "127.0.0.1", "PORT": "0", "REPLICAS_ENGINE_SECRET": SECRET,
            "WORKSPACE_HOME": self.workspace, "REPLICAS_ENGINE_STATE": self.state,
            "CODEX_HOME": self.codex_home, "CODEX_PATH": STAND_IN_CODEX}
        self.env.update(env)
        self.env = {name: value for name, value in self.env.items() if value is not None}
        self.log_path = os.path.join(self.folder, "engine.log")
        self.cgroup = None                  # the folder of that which it is to be in
        self.process = None
        self.port = None

    # The process

    def runner(self):
        """A runner in this process that takes the place of the engine, which has ended."""
        return replicas_engine.CodexRunner(replicas_engine.Settings(self.env))

    def start(self, wait=True):
        begin = os.path.getsize(self.log_path) if os.path.exists(self.log_path) else 0
        with open(self.log_path, "ab") as log_file:
            if self.program[:len(nursery.PYTHON)] == nursery.PYTHON:
                self.process = nursery.Forked(self.program[len(nursery.PYTHON):], self.env,
                                              self.folder, self.log_path, self.cgroup)
            else:
                assert not self.cgroup
                self.process = subprocess.Popen(
                    self.program, env=self.env, cwd=self.folder,
                    stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file)
        if wait:
            def listening():
                assert self.process.poll() is None, "the engine ended:\n" + self.log()[begin:]
                return re.search(r"is listening on port (\d+)", self.log()[begin:])
            self.port = int(wait_for(listening, "the engine to listen").group(1))
        return self

    def log(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as file:
            return file.read()

    def stop(self, number=signal.SIGTERM):
        """Stop it; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)    # PYTHONFAULTHANDLER: where is it stuck?
            self.process.wait()
            raise AssertionError("the engine does not stop:\n" + self.log()[-5000:]) from None

    def kill(self):
        """kill -9; the next one waits, for as long as need be, until what this one just forked is
        another program, and lets go of its lock and its port."""
        self.process.kill()
        self.process.wait()
        if ENGINE in self.program and FREE_AGAIN not in self.program:
            self.program = [*self.program, FREE_AGAIN]

    def restart(self):
        self.stop()
        return self.start()

    # HTTP

    def connect(self, timeout=PATIENCE):
        if CONTRACT:
            return CONTRACT.connection("127.0.0.1", self.port, timeout=timeout)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def open(self, method, path, body=None, headers=None, secret=SECRET):
        """The connection and the response, whose body is still to be read."""
        connection = self.connect()
        headers = dict(headers or {})
        if secret is not None:
            headers.setdefault("X-Replicas-Engine-Secret", secret)
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
        connection.request(method, path, body, headers)
        return connection, connection.getresponse()

    def request(self, method, path, body=None, headers=None, secret=SECRET):
        connection, response = self.open(method, path, body, headers, secret)
        try:
            return Answer(response)
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def post(self, path, body=None, **headers):
        return self.request("POST", path, body, headers)

    def send(self, message, **options):
        """A whole turn: its events, checked."""
        answer = self.post("/codex/send", dict(options, message=message))
        assert answer.status == 200, (answer.status, answer.body, self.log()[-2000:])
        return check_stream(answer.events())

    def start_turn(self, message, **options):
        """Start a turn and don't wait for it: its id."""
        answer = self.request("POST", "/codex/send", dict(options, message=message),
                              {"Prefer": "respond-async"})
        assert answer.status == 202, (answer.status, answer.body)
        return answer.json()["turn_id"]

    def events(self, turn=None, after=None):
        """The stream of a turn to its end."""
        query = ["%s=%s" % pair for pair in (("turn", turn), ("after", after)) if pair[1]]
        answer = self.get("/codex/events" + ("?" + "&".join(query) if query else ""))
        assert answer.status == 200, (answer.status, answer.body)
        return answer.events()

    def status(self):
        return self.get("/codex/status").json()

    def wait_for_turn(self):
        """Wait until no turn is in progress; the last one's status."""
        def over():
            turn = self.status()["turn"]
            return turn if turn and turn["status"] != "running" else None
        return wait_for(over, "the turn's end")

    # What the stand-in Codex was started with

    def calls(self):
        """The stand-in's record of its starts by `exec`, oldest first."""
        return [call for call in self._stand_in_log() if call.get("argv", [""])[:1] == ["exec"]]

    def prompts(self):
        return [call["prompt"] for call in self._stand_in_log() if "prompt" in call]

    def _stand_in_log(self):
        try:
            with open(os.path.join(self.codex_home, "stand_in.log"), encoding="utf-8") as file:
                return [json.loads(line) for line in file]
        except FileNotFoundError:
            return []


# Processes, seen from outside: proc(5)

def _proc(pid, name):
    """The bytes of /proc/<pid>/<name>; none where there is no such process or it lets nobody look."""
    try:
        with open("/proc/%s/%s" % (pid, name), "rb") as file:
            return file.read()
    except OSError:
        return b""


def _stat(pid):
    """The fields of /proc/<pid>/stat behind the name, which may have anything in it."""
    return _proc(pid, "stat").rpartition(b")")[2].split()


def every_pid():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_of(pid):
    """The words of its command line; where its first thread has ended, another one tells."""
    line = _proc(pid, "cmdline")
    if not line and _stat(pid)[:1] == [b"Z"]:
        with contextlib.suppress(OSError):
            line = b"".join(_proc(pid, "task/%s/cmdline" % thread)
                            for thread in os.listdir("/proc/%d/task" % pid))
    return line.split(b"\0")


def processes_with(variable, value):
    """The pids of all processes that have `variable=value` in their environment."""
    wanted = ("\0%s=%s\0" % (variable, value)).encode()
    return [pid for pid in every_pid() if wanted in b"\0" + _proc(pid, "environ")]


def is_alive(pid):
    """Whether its first thread runs; a zombie does not."""
    return _stat(pid)[:1] not in ([], [b"Z"], [b"X"])


def running(word):
    """The pids of the living processes that have it in their command line, which a zombie has not.
    """
    return [pid for pid in every_pid() if any(word.encode() in part for part in command_of(pid))]


def children_of(pid, states=b"RSDTtZ"):
    """The pids of its children that are in one of those states."""
    return [child for child in every_pid() for fields in [_stat(child)]
            if fields[1:2] == [b"%d" % pid] and fields[0] in states]


def zombies_of(pid):
    return children_of(pid, b"Z")


def status_of(pid, field):
    """A number in /proc/<pid>/status: `Threads`, or KiB as in `VmHWM`, the most it ever had."""
    return int(re.search(r"(?m)^%s:\s+(\d+)" % field, _proc(pid, "status").decode()).group(1))


def processor_time(pid):
    """The seconds that its threads, not its children, have had of a processor."""
    return sum(map(int, _stat(pid)[11:13])) / os.sysconf("SC_CLK_TCK")


def descriptors_of(pid="self"):
    """The descriptors, and what they are of: see OPEN_TO_VIEW."""
    found, folder = {}, "/proc/%s/fd" % pid
    for number in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):    # such as that of the listing itself
            found[int(number)] = os.readlink(os.path.join(folder, number))
    return found


def free_port():
    """A port of 127.0.0.1 that is free, and below those that the kernel gives to whoever asks for
    any (ip(7)): it stays free until it is used."""
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def raw(port, data, timeout=PATIENCE, half_close=False):
    """Send bytes on a new connection; everything that comes until the server closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as sock:
        sock.sendall(data)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while True:
            piece = sock.recv(65536)
            if not piece:
                return answer
            answer += piece
