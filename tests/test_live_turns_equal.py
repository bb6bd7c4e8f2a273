"""A live turn's events without its deltas are exec's: both by the real Codex, with the same model.

`EXEC` names the exceptions. Of the recorded scenarios an empty prompt and a missing directory never
come to Codex, and how turns are stopped is for the tests of the engine.
"""

import json
import os
import re
import selectors
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

import harness
import replicas_engine
from conftest import need, real_codex
from replicas_engine import Codex, Settings, TurnOptions, codex_arguments, codex_environment
from test_real_codex import QUIET, SCHEMA, data_url, images_of, png

driver = replicas_engine if hasattr(replicas_engine, "AppServer") else pytest.importorskip(
    "app_server_driver")
VERSIONS = ("0.98.0", "0.169.0")
UNKNOWN = "01a2021d-0000-7000-8000-000000000000"
KEY = "sk-stand-in"

# name: directives, options
SCENARIOS = {
    "words": (["stream 3", "think so it is", "say Hello there, you", "run true", "say on"], {}),
    "shells": (["say a", "run echo bad; exit 3", "say b", "run sleep 0.4; echo 1; sleep 0.2; echo 2",
                r"run sleep 0.3; printf '\377\376 x\303'; sleep 0.2; printf '\251\200 y'", "say c"],
               {}),
    "shell_danger-full-access": (["run echo x >f; cat f"], {"sandbox_mode": "danger-full-access"}),
    # Of a command that its sandbox refuses at once 0.169 tells nothing now and then, either way.
    "shell_default": (["run sleep 0.5; echo x >f"], {"sandbox_mode": "read-only"}),
    "shell_workspace-write": (["run echo x >f; cat f"], {"sandbox_mode": "workspace-write"}),
    "patch_update": (["write f.txt one\\ntwo", "write f.txt three", "say a"],
                     {"sandbox_mode": "danger-full-access"}),
    "reasoning": (["think **Thinking** hard", "say a"], {}),
    "plan": (["plan one; two", "plan two; three", "say a"], {}),
    "plan_then_failure": (["plan one; two", "fail no luck"], {}),
    "web_search": (["search what is codex", "say a"], {"web_search": True}),
    "prompt_unicode": (["say a\u2028b\u2029c\u0085d \U0001f600 \x01"], {}),
    "http_401": (["status 401"], {}),
    "http_500": (["status 500"], {}),
    "http_429": (["status 429"], {}),
    "die_once": (["drop", "say a"], {}),
    "die_once_in_a_message": (["stream 3", "begin half a", "drop", "say whole"], {}),
    "response_failed": (["say a", "fail no luck"], {}),
    "output_schema": (["say yes"], {"output_schema": SCHEMA}),
    "model_and_effort": (["say a"], {"model": "gpt-5-nano", "reasoning_effort": "high"}),
    "an_unknown_model": (["say a"], {"model": '-a "model", too'}),
    "network": (["run true"], {"network_access": True, "web_search": False}),
    "image": (["say seen"], {"images": [data_url(png(1)), data_url(png(2))]}),
    "big": (["big 300000"], {}),
}


class World:
    """A home for Codex and a model; a workspace for each turn, of which one is like the other."""

    def __init__(self, version):
        program = real_codex(version)
        self.version = version
        self.codex = replicas_engine.native_codex(os.path.realpath(program)) or Codex(program)
        self.codex.version = version
        self.folder = tempfile.mkdtemp(prefix="replicas-engine-test-", dir="/var/tmp")
        self.log_path = os.path.join(self.folder, "model.jsonl")
        env = {"HOME": os.path.join(self.folder, "home"), "PATH": os.environ["PATH"],
               "TMPDIR": os.path.join(self.folder, "tmp"), "LANG": "C.UTF-8",
               "WORKSPACE_HOME": os.path.join(self.folder, "workspace"), "CODEX_API_KEY": KEY,
               "REPLICAS_ENGINE_SANDBOX": "config"}
        self.settings = Settings(env)
        for path in (env["HOME"], env["TMPDIR"]):
            os.mkdir(path)
        self.model = subprocess.Popen(
            [sys.executable, harness.STAND_IN_MODEL, "--log", self.log_path, "--exit-with-stdin",
             "--few-retries", "--codex-home", self.settings.codex_home],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.url = self.model.stdout.readline().decode().strip()

    def close(self):
        self.model.stdin.close()
        self.model.stdout.close()
        self.model.wait()
        left = harness.processes_with("CODEX_HOME", self.settings.codex_home)
        shutil.rmtree(self.folder)
        assert left == []

    def options(self, **options):
        made = TurnOptions(options, self.settings)
        made.write_files(os.path.join(self.folder, "files"))
        return made

    def new_workspace(self):
        shutil.rmtree(self.settings.workspace, ignore_errors=True)
        os.mkdir(self.settings.workspace)

    def environment(self, live):
        env = codex_environment(self.settings, self.codex, "a test")
        if live:
            env.pop("CODEX_API_KEY", None)
        return env

    def start(self, arguments, live):
        return subprocess.Popen(
            arguments, env=self.environment(live), cwd=self.settings.workspace,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)

    def exec(self, message, thread_id=None, **options):
        """The events of a turn by way of exec; of a key that is there twice the first counts."""
        with self.start(codex_arguments(self.settings, self.codex, self.options(**options),
                                        thread_id), live=False) as process:
            out, _ = process.communicate(message.encode(), timeout=harness.PATIENCE)
        return [json.loads(line, object_pairs_hook=lambda pairs: dict(pairs[::-1]))
                for line in out.split(b"\n")[:-1]]

    def live(self, message, thread_id=None, **options):
        """The events of a turn by way of the app-server."""
        return LiveTurn(self, message, thread_id, options).run()

    def requests(self):
        if not os.path.exists(self.log_path):
            return []
        with open(self.log_path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class LiveTurn:
    """A turn that the driver drives, as its caller will."""

    def __init__(self, world, message, thread_id=None, options=None):
        self.driver = driver.AppServer(world.settings, world.codex,
                                       world.options(**(options or {})), thread_id, message)
        self.events = []
        self.process = world.start(self.driver.arguments, live=True)
        self.write(self.driver.input())

    def write(self, data):
        if data:
            self.process.stdin.write(data)

    def take(self, events):
        self.events += [value for _, _, value in events]
        for kind, data, value in events:
            assert json.loads(data.decode()) == value and kind.decode() == value["type"]
            assert data.startswith(b'{"type":"%s"' % kind)

    def run(self, on_event=lambda turn, event: None):
        """Drive it to the process's end, and return the events."""
        pieces, seen = [], 0                # of a line that isn't whole yet
        deadline = time.monotonic() + harness.PATIENCE
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                while True:
                    assert time.monotonic() < deadline
                    since = self.driver.pending_since
                    wait = 1 if since is None else since + driver.DELTA_PAUSE - time.monotonic()
                    ready = selector.select(max(0, wait))
                    if not ready and since is not None:
                        self.take(self.driver.flush())
                    if ready:
                        data = os.read(self.process.stdout.fileno(), 65536)
                        if not data:
                            break
                        pieces.append(data)
                        *lines, rest = b"".join(pieces).split(b"\n") if b"\n" in data else [None]
                        pieces = pieces if rest is None else [rest]
                        for line in lines:
                            events, answer = self.driver.lines(line)
                            self.take(events)
                            self.write(answer)
                    for event in self.events[seen:]:
                        seen += 1
                        on_event(self, event)
                    if self.driver.over:
                        self.process.stdin.close()
            self.take(self.driver.finish())
            self.status = self.process.wait(harness.PATIENCE)
        finally:
            self.process.stdin.close()
            self.process.stdout.close()
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        return self.events


@pytest.fixture(scope="module", params=VERSIONS)
def world(request):
    made = World(request.param)
    yield made
    made.close()


def without_deltas(events):
    return [event for event in events if event["type"] != "item.delta"]


def comparable(events):
    """The events but for what every turn has of its own: its thread's id, and numbers of tokens."""
    found = []
    for event in without_deltas(events):
        if event["type"] == "thread.started":
            assert re.fullmatch(r"[0-9a-f-]{36}", event["thread_id"])
            event = dict(event, thread_id="a thread")
        elif event["type"] == "turn.completed":
            event = dict(event, usage=sorted(event["usage"]))
        found.append(event)
    return found


# The differences, each a function that takes it out of a live turn's events. One more is taken out
# when exec's are read: of a web search's two keys `id` a live turn has the first.

def has_no_number_for_what_was_not_completed(events):
    """exec gives an item its number when it is over; deltas need one before, and what was begun and
    never completed, before a reconnect or a steer, keeps its own."""
    numbers = {}
    for event in events:
        if event["type"].startswith("item."):
            number = numbers.setdefault(event["item"]["id"], "item_%d" % len(numbers))
            event = dict(event, item=dict(event["item"], id=number))
        yield event


def tells_no_reasoning_tokens(events):
    for event in events:
        if event["type"] == "turn.completed":
            event = dict(event, usage=[key for key in event["usage"]
                                       if key != "reasoning_output_tokens"])
        yield event


def tells_no_start_of_a_file_change(events):
    return (event for event in events
            if (event["type"], event.get("item", {}).get("type")) != ("item.started",
                                                                      "file_change"))


def knows_no_query_at_the_start_of_a_web_search(events):
    for event in events:
        if (event["type"], event.get("item", {}).get("type")) == ("item.started", "web_search"):
            event = dict(event, item=dict(event["item"], query="", action={"type": "other"}))
        yield event


# What exec of this version does otherwise than the app-server of the same one.
EXEC = {"0.98.0": [has_no_number_for_what_was_not_completed, tells_no_reasoning_tokens,
                   tells_no_start_of_a_file_change, knows_no_query_at_the_start_of_a_web_search],
        "0.169.0": [has_no_number_for_what_was_not_completed]}


def check_equal(world, live, wanted):
    events = comparable(live)
    for difference in EXEC[world.version]:
        events = list(difference(events))
    assert events == comparable(wanted)


def asked(requests):
    """What the model was asked but for the names of things: of the thread, the turn, the items."""
    own = ("prompt_cache_key", "client_metadata")
    bodies = [{key: value for key, value in request["body"].items() if key not in own}
              for request in requests]
    for body in bodies:
        for item in body["input"]:
            item.pop("id", None)
            item.pop("internal_chat_message_metadata_passthrough", None)
    names = r"\b(call|rs|msg|ws|fc|ctc)_[0-9a-f-]{32,36}\b|Wall time:? [0-9.]+|Chunk ID: \w+"
    text = re.sub(names, r"\1", json.dumps(bodies))
    return json.loads(text), [request["headers"].get("authorization") for request in requests]


def both(world, message, ways=("exec", "live"), threads=(None, None), **options):
    """The turn by both ways: its events, and what the model was asked meanwhile."""
    found = []
    for way, thread_id in zip(ways, threads):
        world.new_workspace()
        before = len(world.requests())
        events = getattr(world, way)(message, thread_id, **options)
        found.append((events, asked(world.requests()[before:])))
    return found


def directives(*lines):
    return "\n".join("model: " + line for line in lines)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_a_live_turn_is_execs(world, name):
    lines, options = SCENARIOS[name]
    (wanted, exec_asked), (live, live_asked) = both(world, directives(*lines), **options)
    assert wanted[-1]["type"] in ("turn.completed", "turn.failed")
    check_equal(world, live, wanted)
    assert live_asked == exec_asked and live_asked[1][0] == "Bearer " + KEY


@pytest.mark.parametrize("ways", [("exec", "live"), ("live", "exec")])
def test_a_thread_goes_from_one_way_to_the_other(world, ways):
    threads = []
    for way in ways:
        world.new_workspace()
        threads.append(getattr(world, way)(directives("say first"))[0]["thread_id"])
    images = [data_url(png(4))]
    (wanted, exec_asked), (live, live_asked) = both(
        world, directives("say seen"), threads=threads[::-1], images=images)
    assert [wanted[0]["thread_id"], live[0]["thread_id"]] == threads[::-1]
    check_equal(world, live, wanted)
    assert live_asked == exec_asked
    assert images_of(live_asked[0][0]) == images and "say first" in json.dumps(live_asked)


def test_an_unknown_thread_is_refused(world):
    world.new_workspace()
    before = len(world.requests())
    with pytest.raises(driver.Refused, match="no rollout found for thread id " + UNKNOWN):
        world.live(directives("say a"), UNKNOWN)
    assert len(world.requests()) == before


# `read` does no harm, and `act` might: 0.169 wants approval for it, which nobody gives
MCP_SERVER = """\
import json, sys
tools = [{"name": name, "inputSchema": {"type": "object"},
          "annotations": {"readOnlyHint": harmless}}
         for name, harmless in (("read", True), ("act", False))]
for line in sys.stdin:
    request = json.loads(line)
    params = request.get("params", {})
    result = {"initialize": {"protocolVersion": params.get("protocolVersion"),
                             "capabilities": {"tools": {}},
                             "serverInfo": {"name": "test", "version": "1"}},
              "tools/list": {"tools": tools},
              "tools/call": {"content": [{"type": "text", "text": "done"}],
                             "structuredContent": {"aKey": 1},
                             "isError": "bad" in params.get("arguments", {})}}
    if "id" in request:
        print(json.dumps({"jsonrpc": "2.0", "id": request["id"],
                          "result": result.get(request["method"], {})}), flush=True)
"""


def test_mcp_servers(world):
    path = os.path.join(world.settings.codex_home, "config.toml")
    with open(path, encoding="utf-8") as file:
        config = file.read()
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write('\n[mcp_servers.bad]\ncommand = "/nonexistent/mcp"\n'
                       '\n[mcp_servers.srv]\ncommand = %s\nargs = ["-c", %s]\n'
                       % (json.dumps(sys.executable), json.dumps(MCP_SERVER)))
        lines = ['call mcp__srv__read {"someKey": {"anotherKey": 1.50}}',
                 'call mcp__srv__read {"bad": true}', 'call mcp__srv__act {}', "say a"]
        (wanted, _), (live, _) = both(world, directives(*lines))
        check_equal(world, live, wanted)
        assert json.dumps(wanted).count('"mcp_tool_call"') == 6
    finally:
        with open(path, "w", encoding="utf-8") as file:
            file.write(config)


@pytest.fixture(params=VERSIONS)
def new_world(request):
    """One that no turn of exec's was in, as 0.169's may leave its environment in Codex's home: with
    the key, in shell_snapshots/, where a short turn ends before the file has its name."""
    made = World(request.param)
    yield made
    made.close()


def test_the_key_is_for_the_model_and_nobody_else(new_world):
    new_world.new_workspace()
    new_world.live(directives("run env >env.txt"), sandbox_mode="danger-full-access")
    with open(os.path.join(new_world.settings.workspace, "env.txt"), encoding="utf-8") as file:
        assert KEY not in file.read()
    assert {request["headers"]["authorization"] for request in new_world.requests()} == {
        "Bearer " + KEY}
    found = subprocess.run(["grep", "-rl", KEY, new_world.settings.home], stdout=subprocess.PIPE)
    assert found.returncode == 1, found.stdout


def test_a_key_and_a_url_reach_codexs_own_provider(new_world):
    world = new_world
    world.settings.env["OPENAI_BASE_URL"] = world.settings.inherited["OPENAI_BASE_URL"] = world.url
    with open(os.path.join(world.settings.codex_home, "config.toml"), "w") as file:
        file.write(QUIET)
    world.new_workspace()
    events = world.live(directives("stream 1", "say hello there"))
    assert events[-1]["type"] == "turn.completed" and "hello there" in json.dumps(events)
    assert {request["headers"]["authorization"] for request in world.requests()} == {
        "Bearer " + KEY}


def test_deltas_are_a_preview_of_their_items(world):
    need("user namespaces")                 # for a command in its sandbox
    world.new_workspace()
    events = world.live(directives("stream 30", "think so it is", "say Hello there, you",
                                   "run sleep 0.5; echo 1; sleep 0.2; echo 2", "say on"))
    ends = {event["item"]["id"]: event["item"] for event in events
            if event["type"] == "item.completed"}
    deltas = {}
    for place, event in enumerate(events):
        if event["type"] == "item.delta":
            item = event["item"]
            key, = set(item) - {"id", "type"}
            assert item["type"] == ends[item["id"]]["type"] and ends[item["id"]] not in [
                earlier.get("item") for earlier in events[:place]]
            deltas[item["id"]] = deltas.get(item["id"], "") + item[key]
    assert deltas == {"item_0": "so it is", "item_1": "Hello there, you", "item_2": "1\n2\n",
                      "item_3": "on"}
    assert sum(event["type"] == "item.delta" for event in events) > 5


def said(number, text):
    return {"id": "item_%d" % number, "type": "agent_message", "text": text}


def test_a_message_cuts_in(world):
    world.new_workspace()
    turn = LiveTurn(world, directives("stream 50", "begin one two three", "hang"))
    steer, sent = driver.Steer(directives("say steered")), []

    def cut_in(turn, event):
        if event["type"] == "item.delta" and not sent:
            sent.append(True)
            turn.write(turn.driver.steer(steer))
            if world.version == "0.98.0":
                turn.write(turn.driver.interrupt())
    events = turn.run(cut_in)
    assert steer.answered.is_set()
    if world.version == "0.98.0":
        assert "before 0.162" in steer.refusal and events[-1]["type"] == "turn.failed"
        assert "turn.steered" not in [event["type"] for event in events]
    else:
        assert steer.refusal is None
        assert without_deltas(events)[2:4] == [
            {"type": "turn.steered", "message": directives("say steered")},
            {"type": "item.completed", "item": said(1, "steered")}]
        assert events[-1]["type"] == "turn.completed"


def test_an_interrupt(world):
    world.new_workspace()
    turn = LiveTurn(world, directives("stream 1", "begin one", "hang"))
    assert turn.driver.interrupt() == b""       # it isn't accepted yet
    asked_for = []

    def interrupt(turn, event):
        if event["type"] == "item.delta":
            asked_for.extend([turn.driver.interrupt(), turn.driver.interrupt()])
            turn.write(asked_for[-2])
    events = turn.run(interrupt)
    assert asked_for[1] == b"" and turn.status == 0
    assert [event["type"] for event in without_deltas(events)] == [
        "thread.started", "turn.started", "turn.failed"]
