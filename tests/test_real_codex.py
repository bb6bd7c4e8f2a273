"""The real Codex, driven over HTTP, with the stand-in model behind it.

What an option does is looked for in the request that the model gets, or in what a command could
do: a sandbox that refuses, or that is broken, says nothing.
"""

import base64
import glob
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import zlib

import pytest

import harness
import replicas_engine
from conftest import need, real_codex
from harness import wait_for

VERSIONS = harness.CODEX_VERSIONS
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"},
                                           "certain": {"type": "boolean"}},
          "required": ["answer", "certain"], "additionalProperties": False}
# What keeps 0.169 from looking up hosts of the internet
QUIET = "[features]\nplugins = false\n\n[analytics]\nenabled = false\n"


def png(red):
    """A true PNG of one pixel."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes([0, red, 0, 0]))) + chunk(b"IEND", b""))


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


class RealCodex:
    """An engine with a real Codex and a model, in a folder of its own.

    The folder is not below /tmp, where the sandbox lets Codex write.
    """

    def __init__(self, version, provider=True, **env):
        program = real_codex(version)
        self.version = tuple(map(int, version.split(".")))
        self.folder = tempfile.mkdtemp(prefix="replicas-engine-test-", dir="/var/tmp")
        self.log_path = os.path.join(self.folder, "model.jsonl")
        self.engine = harness.Engine(self.folder, CODEX_PATH=program, **env)
        self.workspace = self.engine.workspace
        self.outside = os.path.join(self.folder, "outside")
        os.mkdir(self.outside)
        config = ["--codex-home", self.engine.codex_home, "--few-retries"] if provider else []
        self.model = subprocess.Popen(
            [sys.executable, harness.STAND_IN_MODEL, "--log", self.log_path, "--exit-with-stdin",
             *config], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.url = self.model.stdout.readline().decode().strip()

    def close(self):
        """Stop it all and remove the folder; nothing of it may be left."""
        if self.engine.process:
            self.engine.stop()
        self.model.stdin.close()
        self.model.wait()
        self.model.stdout.close()
        left = harness.processes_with("CODEX_HOME", self.engine.codex_home)
        shutil.rmtree(self.folder)
        assert left == []

    def requests(self):
        """All requests that the model has got: their headers and bodies."""
        if not os.path.exists(self.log_path):
            return []
        with open(self.log_path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def turn(self, *directives, new=True, **options):
        """A turn, on a new thread or on the same one: its events and the bodies of its requests."""
        if new:
            self.engine.post("/codex/reset")
        before = len(self.requests())
        message = "\n".join("model: " + directive for directive in directives)
        events = self.engine.send(message, **options)
        return events, [request["body"] for request in self.requests()[before:]]

    def completed(self, *directives, **options):
        events, requests = self.turn(*directives, **options)
        assert events[-2].type == "turn.completed", events
        assert requests
        return events, requests

    def path(self, *names):
        return os.path.join(self.workspace, *names)


def need_sandbox(codex):
    """Skip the test where its commands can't run: older ones confine them in another way."""
    if codex.version >= (0, 100):
        need("user namespaces")


@pytest.fixture(scope="module", params=VERSIONS)
def real(request):
    """Shared by the tests of one version: each begins a new thread."""
    codex = RealCodex(request.param, CODEX_API_KEY="sk-stand-in", A_TEST="seen")
    try:
        codex.engine.start()
        yield codex
    finally:
        codex.close()


def texts(events):
    """The texts of the agent's messages."""
    return [event.json()["item"]["text"] for event in events if event.type == "item.completed"
            and event.json()["item"]["type"] == "agent_message"]


def tool_types(body):
    """The types of the tools that a request offers the model."""
    pending = list(body.get("tools") or [])
    for item in body["input"]:
        pending += item.get("tools") or []
    found = set()
    while pending:
        tool = pending.pop()
        pending += tool.get("tools") or []
        found.add(tool["type"])
    return found


def offers_web_search(body):
    """By a tool of the API's, or, 0.169 with its newest models, by one of Codex's own.

    The latter's declarations stay in the thread: the last one counts.
    """
    declared = [item for item in body["input"] if item.get("type") == "additional_tools"]
    return "web_search" in tool_types(body) or "{ web__run(" in json.dumps(declared[-1:])


def images_of(body):
    """The images of the last message of the user."""
    users = [item for item in body["input"] if item.get("role") == "user"]
    return [part["image_url"] for part in users[-1]["content"] if part["type"] == "input_image"]


# A conversation

def test_a_conversation(real):
    need_sandbox(real)
    events, _ = real.completed("run echo out-$((6*7)); pwd", "say first")
    types = [event.type for event in events]
    assert types[:2] == ["thread.started", "turn.started"]
    thread_id = events[0].json()["thread_id"]
    command = [event.json()["item"] for event in events if event.type == "item.completed"][0]
    assert command["type"] == "command_execution" and command["exit_code"] == 0
    assert command["aggregated_output"] == "out-42\n%s\n" % real.workspace
    assert texts(events) == ["first"]

    real.completed("write from-codex.txt one\\ntwo", "say written", new=False)
    with open(real.path("from-codex.txt"), encoding="utf-8") as file:
        assert file.read() == "one\ntwo\n"

    events, requests = real.completed("say third", new=False)
    assert events[0].json() == {"type": "thread.started", "thread_id": thread_id}
    assert texts(events) == ["third"]
    said = json.dumps(requests[-1]["input"])
    assert "out-42" in said and "say written" in said and "say third" in said

    status = real.engine.status()
    assert status["thread_id"] == thread_id and status["has_active_thread"]
    assert status["turn"]["status"] == "completed" and status["turn"]["usage"]
    assert status["codex"]["version"] == "%d.%d.%d" % real.version
    assert status["session_file"].endswith("-%s.jsonl" % thread_id)
    history = real.engine.get("/codex/history").json()
    assert history["thread_id"] == thread_id
    lines = [json.dumps(event) for event in history["events"]]
    places = [next(number for number, line in enumerate(lines) if word in line)
              for word in ("say first", "out-42", "say written", "say third")]
    assert places == sorted(places)
    with open(status["session_file"], encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == history["events"]


def test_what_each_turn_of_a_thread_used(real):
    """From 0.98 on Codex says what the whole thread used, be the turns live or not."""
    for number in range(3):
        options = {"deltas": True} if number == 1 and real.version >= (0, 98) else {}
        real.completed("say %s" % "word " * (number + 1), new=not number, **options)
    turns = real.engine.get("/codex/turns?limit=3").json()["turns"]
    own = [turn["turn_usage"] for turn in turns]
    if real.version < (0, 98):
        assert own == [turn["usage"] for turn in turns]
        return
    whole = turns[0]["usage"]
    assert whole["input_tokens"] > max(usage["input_tokens"] for usage in own) > 0
    assert {key: sum(usage[key] for usage in own) for key in whole} == whole


def test_model_and_effort_hold_for_one_turn(real):
    """Whichever way it and the next one go."""
    def asked(**options):
        body = real.completed("say x", **options)[1][-1]
        return body["model"], (body["reasoning"] or {}).get("effort")

    ways = [{}, {"deltas": True}] if real.version >= (0, 98) else [{}]
    own = asked()
    for way in ways:
        assert asked(new=False, model="gpt-5.2", reasoning_effort="high", **way) == (
            "gpt-5.2", "high") != own
        for next_way in ways[::-1]:
            assert asked(new=False, **next_way) == own, (way, next_way)


@pytest.mark.parametrize("status", ["401", "500"])
def test_a_model_that_answers_with_an_error(real, status):
    events, _ = real.turn("status " + status)
    assert [event.type for event in events[-3:]] == ["error", "turn.failed", "done"]
    message = events[-2].json()["error"]["message"]
    assert message == events[-3].json()["message"]
    assert ("401" if status == "401" else "high demand") in message
    assert real.engine.status()["turn"]["status"] == "failed"
    events, _ = real.completed("say again", new=False)
    assert texts(events) == ["again"]


def test_an_interrupt_and_the_thread_goes_on(real):
    need_sandbox(real)
    real.engine.post("/codex/reset")
    before, started = os.listdir(real.workspace), real.path("started")
    # 0.50 ends the command first, and may tell the model, and be done, before it ends itself.
    real.engine.start_turn("model: run touch started; sleep 300\nmodel: hang")
    wait_for(lambda: os.path.exists(started), "the command to start")
    answer = real.engine.post("/codex/interrupt").json()
    assert answer["interrupted"] is True
    os.unlink(started)
    left = set(harness.processes_with("CODEX_HOME", real.engine.codex_home))
    assert left <= {real.engine.process.pid}        # which only root can see
    thread_id = real.engine.status()["thread_id"]
    events, _ = real.completed("say on", new=False)
    assert events[0].json()["thread_id"] == thread_id and texts(events) == ["on"]
    # 0.169's sandbox, killed, leaves the directories that it had made to mount something over them
    left = set(os.listdir(real.workspace)) - set(before)
    assert left == set()


def test_the_engines_secret_is_not_in_codexs_environment(real):
    need_sandbox(real)
    real.completed("run env >env.txt")
    with open(real.path("env.txt"), encoding="utf-8") as file:
        env = dict(line.rstrip("\n").partition("=")[::2] for line in file)
    assert env["A_TEST"] == "seen" and env["HOME"] == real.engine.home
    assert not [name for name in env if name.startswith("REPLICAS_ENGINE_")]
    assert harness.SECRET not in str(env)
    assert "PORT" not in env and "HOST" not in env


# What the model is asked

def test_the_model(real):
    _, requests = real.completed("say hello", model="gpt-5-nano")
    assert requests[0]["model"] == "gpt-5-nano"
    _, requests = real.completed("say hello", model='-a "model", too', new=False)
    assert requests[0]["model"] == '-a "model", too'
    _, requests = real.completed("say hello", new=False)
    assert requests[0]["model"] not in ("gpt-5-nano", '-a "model", too')


def test_the_reasoning_effort(real):
    for new, effort in ((True, "high"), (False, "low"), (False, "medium")):
        _, requests = real.completed("say hello", reasoning_effort=effort, new=new)
        assert requests[0]["reasoning"]["effort"] == effort


@pytest.mark.parametrize("effort", sorted(replicas_engine.FIRST_WITH_EFFORT))
def test_an_effort_that_not_every_version_knows(real, effort):
    if real.version < replicas_engine.FIRST_WITH_EFFORT[effort]:
        answer = real.engine.post("/codex/send", {"message": "x", "reasoning_effort": effort})
        assert answer.status == 400 and answer.json()["error"] == "Invalid reasoning_effort"
        return
    _, requests = real.completed("say hello", reasoning_effort=effort)
    # What the model is told of those two is Codex's business: 0.169 says xhigh and disabled.
    wanted = {"ultra": ("max", "xhigh"), "persistent": ("disabled",)}.get(effort, (effort,))
    assert requests[0]["reasoning"]["effort"] in wanted


def test_which_efforts_codex_itself_knows(real):
    """That a version below FIRST_WITH_EFFORT would fail the turn."""
    for effort, first in replicas_engine.FIRST_WITH_EFFORT.items():
        if real.version < first and real.version < (0, 138):
            codex = os.path.realpath(real.engine.env["CODEX_PATH"])
            run = subprocess.run(
                [replicas_engine.native_codex(codex).program, "exec", "--json",
                 "--skip-git-repo-check",
                 *replicas_engine.config_argument("model_reasoning_effort", effort)],
                env=real.engine.env, cwd=real.workspace, input=b"x", stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, timeout=harness.PATIENCE)
            assert run.returncode == 1 and run.stdout == b""
            assert b"unknown variant `%b`" % effort.encode() in run.stderr


def test_images(real):
    with open(real.path("a, b.png"), "wb") as file:
        file.write(png(1))
    images = ["a, b.png", data_url(png(2)), data_url(png(3))]
    if real.version < (0, 98):
        answer = real.engine.post("/codex/send", {"message": "x", "images": images})
        assert answer.status == 400 and answer.json()["error"] == "Invalid images"
        assert "Codex 0.50.0" in answer.json()["details"]
        return
    wanted = [data_url(png(number)) for number in (1, 2, 3)]
    events, requests = real.completed("say seen", images=images)
    assert images_of(requests[0]) == wanted
    assert "model: say seen" in json.dumps(requests[0]["input"])
    thread_id = events[0].json()["thread_id"]
    events, requests = real.completed("say more", images=[data_url(png(4))], new=False)
    assert events[0].json()["thread_id"] == thread_id
    assert images_of(requests[0]) == [data_url(png(4))]
    _, requests = real.completed("say none", new=False)
    assert images_of(requests[0]) == []


def test_the_output_schema(real):
    for new in (True, False):
        events, requests = real.completed("say yes", output_schema=SCHEMA, new=new)
        form = requests[0]["text"]["format"]
        assert form["type"] == "json_schema" and form["schema"] == SCHEMA
        assert json.loads(texts(events)[-1]) == {"answer": "yes", "certain": True}
    events, requests = real.completed("say plain", new=False)
    assert "format" not in requests[0].get("text", {}) and texts(events) == ["plain"]


def test_web_search(real):
    # 0.169 gives its own newest models a tool of its own, which it has for OpenAI's API only: below
    for new, on in ((True, True), (False, False), (False, True)):
        _, requests = real.completed("say x", web_search=on, model="gpt-5-nano", new=new)
        assert offers_web_search(requests[0]) is on


# What a command can do

def writes(real, **options):
    """Whether a turn makes a file in the workspace, and outside; they are gone afterwards."""
    paths = real.path("inside"), os.path.join(real.outside, "file")
    real.completed("run echo x >'%s'; echo x >'%s'" % paths, **options)
    made = tuple(map(os.path.exists, paths))
    for path in filter(os.path.exists, paths):
        os.unlink(path)
    return made


def test_by_default_a_turn_writes_in_the_workspace_and_not_outside(real):
    need_sandbox(real)
    for new in (True, False):
        assert writes(real, new=new) == (True, False)


def test_the_sandbox_goes_with_every_turn_of_a_thread(real):
    need_sandbox(real)
    may_write = {"read-only": (False, False), "workspace-write": (True, False),
                 "danger-full-access": (True, True)}
    new = True
    for mode in ("danger-full-access", "read-only", "workspace-write", "danger-full-access",
                 "workspace-write", "read-only"):
        assert writes(real, new=new, sandbox_mode=mode) == may_write[mode], mode
        new = False
    assert writes(real, new=False) == (True, False)     # and the default is what it was


def test_the_network(real):
    need_sandbox(real)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        listener.settimeout(0)
        command = "run bash -c 'exec 3<>/dev/tcp/127.0.0.1/%d'" % listener.getsockname()[1]

        def reached():
            try:
                listener.accept()[0].close()
                return True
            except BlockingIOError:
                return False
        new = True
        for options, wanted in (({}, False), ({"network_access": True}, True),
                                ({"network_access": False}, False), ({}, False),
                                ({"network_access": True}, True),
                                ({"network_access": True, "sandbox_mode": "read-only"}, False),
                                ({"sandbox_mode": "danger-full-access"}, True)):
            real.completed(command, new=new, **options)
            assert reached() is wanted, options
            new = False


# Keys and URLs

@pytest.mark.parametrize("version", VERSIONS)
def test_a_key_and_a_url_reach_codexs_own_provider(version):
    real = RealCodex(version, provider=False, OPENAI_API_KEY="sk-the only one")
    try:
        with open(os.path.join(real.engine.codex_home, "config.toml"), "w") as file:
            file.write(QUIET)
        real.engine.env["OPENAI_BASE_URL"] = real.url
        real.engine.start()
        for new, search in ((True, True), (False, False)):
            events, requests = real.completed("say hello", new=new, web_search=search)
            assert texts(events) == ["hello"]
            assert offers_web_search(requests[-1]) is search
        if real.version >= (0, 98):             # a live turn names it
            events, _ = real.completed("say live", new=False, deltas=True)
            assert texts(events) == ["live"]
            assert "so exec does" not in real.engine.log(), real.engine.log()
        for request in real.requests():
            assert request["path"] == "/v1/responses"
            assert request["headers"]["authorization"] == "Bearer sk-the only one"
    finally:
        real.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_codexs_own_key_wins_over_openais(version):
    real = RealCodex(version, OPENAI_API_KEY="sk-openai", CODEX_API_KEY="sk-codex")
    try:
        real.engine.start()
        real.completed("say hello")
        assert [request["headers"]["authorization"] for request in real.requests()] == [
            "Bearer sk-codex"]
    finally:
        real.close()


def test_a_thread_that_was_archived_goes_on_when_it_is_unarchived(real):
    if real.version < (0, 169):
        pytest.skip("an older Codex")

    def codex(command):
        status = real.engine.status()
        thread_id = status["thread_id"]
        subprocess.run([status["codex"]["path"], command, thread_id], env=real.engine.env,
                       stdin=subprocess.DEVNULL, check=True)
        return thread_id

    real.completed("say hello")
    thread_id = codex("archive")
    events, _ = real.turn("say more", new=False)
    assert "Run `codex unarchive %s`" % thread_id in events[-2].json()["error"]["message"]
    assert codex("unarchive") == thread_id
    assert texts(real.completed("say more", new=False)[0]) == ["more"]
    assert real.engine.status()["thread_id"] == thread_id


def test_what_a_broken_database_of_codexs_does_is_mended_by_moving_it_away(real, tmp_path):
    if real.version < (0, 169):
        pytest.skip("an older Codex")
    real.completed("say hello")
    home = real.engine.codex_home
    for path in glob.glob(os.path.join(home, "*.sqlite-*")):
        os.unlink(path)
    for path in glob.glob(os.path.join(home, "*.sqlite")):
        with open(path, "wb") as file:
            file.write(b"this is no database " * 500)
    real.completed("say hello")                         # a new thread
    thread_id = real.engine.status()["thread_id"]
    events, _ = real.turn("say more", new=False)
    assert "thread/resume failed: list_turns is not supported" in events[-2].data
    for path in glob.glob(os.path.join(home, "*.sqlite*")):
        os.rename(path, str(tmp_path / os.path.basename(path)))
    assert texts(real.completed("say more", new=False)[0]) == ["more"]
    assert real.engine.status()["thread_id"] == thread_id
