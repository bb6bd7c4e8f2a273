"""stand_in_codex itself: that it does what the recorded runs of the real Codex did."""
import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import PATIENCE, is_alive, wait_for

HERE = Path(__file__).resolve().parent
STAND_IN = HERE / "stand_in_codex"
RUNS = HERE / "codex-runs"
RECORDED = sorted(str(path.relative_to(RUNS))[:-len(".run.json")]
                  for path in RUNS.glob("*/*.run.json"))
UNKNOWN = "01a2021d-0000-7000-8000-000000000000"
OLD_AND_NEW = ("0.50.0", "0.98.0", "0.169.0")


class Codex:
    """Starts the stand-in with a CODEX_HOME of its own."""

    def __init__(self, home):
        self.home = home

    def start(self, *words, version="0.169.0"):
        env = dict(os.environ, CODEX_HOME=str(self.home), STAND_IN_CODEX_VERSION=version,
                   PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        return subprocess.Popen([str(STAND_IN), *words], env=env,
                                cwd=str(self.home), stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def exec(self, prompt, *words, version="0.169.0"):
        """Run one turn to its end; return its process with `out` and `err`."""
        process = self.start("exec", "--json", *words, version=version)
        process.out, process.err = process.communicate(prompt.encode(), timeout=PATIENCE)
        return process

    def steps(self, *steps, version="0.169.0"):
        return self.exec(json.dumps({"stand_in": steps}), version=version)

    def rollouts(self):
        return sorted(self.home.glob("sessions/*/*/*/rollout-*.jsonl"))

    def log(self):
        return [json.loads(line) for line in (self.home / "stand_in.log").read_text().splitlines()]


@pytest.fixture
def codex(tmp_path):
    return Codex(tmp_path)


def events(out):
    return [json.loads(line) for line in out.split(b"\n")[:-1]]


def shape(value):
    """The keys of an object in their order, down to the leaves."""
    return [(key, shape(inner)) for key, inner in value.items()] if isinstance(value, dict) else ""


def recorded(name, ending):
    return (RUNS / (name + ending)).read_bytes()


@pytest.mark.parametrize("name", RECORDED)
def test_a_replay_is_the_recorded_run(codex, name):
    run = codex.steps({"replay": name})
    assert run.out == recorded(name, ".stdout.jsonl")
    assert run.err == recorded(name, ".stderr.txt")
    assert run.returncode == json.loads(recorded(name, ".run.json"))["exit_status"]


@pytest.mark.parametrize("version", OLD_AND_NEW)
def test_an_ordinary_turn_has_the_recorded_shape(codex, version):
    run = codex.exec("one", version=version)
    turn1 = recorded(version + "/turn1", ".stdout.jsonl")
    assert [shape(event) for event in events(run.out)] == [shape(event) for event in events(turn1)]
    assert [event["type"] for event in events(run.out)] == [e["type"] for e in events(turn1)]
    assert all(line.startswith(b'{"type":"') and b": " not in line.replace(b"said: ", b"")
               for line in run.out.splitlines())
    assert (run.returncode, run.err) == (0, b"Reading prompt from stdin...\n")


def test_a_resume_appends_to_the_rollout(codex):
    thread_id = events(codex.exec("one").out)[0]["thread_id"]
    path, = codex.rollouts()
    assert path.name.endswith("-%s.jsonl" % thread_id)
    before = path.read_text()
    again = codex.exec("two\u2028", "resume", thread_id)
    assert events(again.out)[0]["thread_id"] == thread_id
    assert codex.rollouts() == [path] and path.read_text().startswith(before)
    lines = events(path.read_bytes())
    assert lines[0]["type"] == "session_meta" and lines[0]["payload"]["id"] == thread_id
    texts = [line["payload"]["content"][0]["text"] for line in lines
             if line["type"] == "response_item"]
    assert texts == ["one", "You said: one", "two\u2028", "You said: two\u2028"]


@pytest.mark.parametrize("version", OLD_AND_NEW)
@pytest.mark.parametrize("prompt", ("one", '{"stand_in": [{"thread": "resume"}]}'))
def test_an_unknown_thread(codex, version, prompt):
    run = codex.exec(prompt, "resume", UNKNOWN, version=version)
    name = version + "/resume_unknown_uuid"
    assert run.returncode == json.loads(recorded(name, ".run.json"))["exit_status"]
    if version == "0.169.0":
        assert run.out == b"" and run.err.splitlines()[-1] == recorded(
            name, ".stderr.txt").splitlines()[-1]
    else:
        assert events(run.out)[0]["thread_id"] != UNKNOWN


@pytest.mark.parametrize("version", OLD_AND_NEW)
def test_a_missing_directory(codex, version):
    run = codex.exec("one", "--cd", str(codex.home / "none"), version=version)
    name = version + "/cd_missing"
    assert run.returncode == json.loads(recorded(name, ".run.json"))["exit_status"]
    assert run.err == recorded(name, ".stderr.txt")


@pytest.mark.parametrize("words", (
    ["--colour", "red"], ["--model"], ["--sandbox", "none"], ["resume"],
    ["resume", UNKNOWN, "--sandbox", "read-only"], ["resume", UNKNOWN, "the prompt"]))
def test_usage_errors(codex, words):
    run = codex.exec("one", *words)
    assert (run.returncode, run.out) == (2, b"") and run.err.startswith(b"error: ")


def test_options_and_calls_are_recorded(codex):
    words = ["--model", "m", "--model=m", "--sandbox", "read-only", "--skip-git-repo-check",
             "--cd", str(codex.home), "--config", 'a="b"', "-c", "c=d", "--add-dir", "/"]
    assert codex.exec("one", *words).returncode == 0
    call, prompt = codex.log()
    assert call["argv"] == ["exec", "--json"] + words and call["cwd"] == str(codex.home)
    assert call["env"]["CODEX_HOME"] == str(codex.home)
    assert prompt == {"pid": call["pid"], "prompt": "one"}


def test_image_before_resume_swallows_it_and_after_it_is_for_new_versions(codex):
    thread_id = events(codex.exec("one").out)[0]["thread_id"]
    after = ("resume", thread_id, "--image", "a.png", "b.png")
    assert events(codex.exec("two", *after).out)[0]["thread_id"] == thread_id
    assert codex.exec("two", *after, version="0.50.0").returncode == 2
    swallowed = codex.exec("two", "--image", "a.png", "resume", thread_id)
    assert events(swallowed.out)[0]["thread_id"] != thread_id


def test_versions_and_an_empty_prompt(codex):
    assert codex.start("--version").communicate()[0] == b"codex-cli 0.169.0\n"
    (codex.home / "stand_in_version").write_text("0.1.2\n")
    assert codex.start("--version", version="").communicate()[0] == b"codex-cli 0.1.2\n"
    run = codex.exec(" \n")
    assert (run.returncode, run.out) == (1, b"") and b"No prompt" in run.err


def test_steps_that_print(codex):
    run = codex.steps({"thread": UNKNOWN}, {"event": {"a": "\u2028", "type": "x"}}, {"line": "no"},
                      {"raw_base64": base64.b64encode(b"\xff\n").decode()},
                      {"bytes": {"n": 3, "prefix": "<", "suffix": ">\n"}},
                      {"big": {"type": "item.completed", "size": 300000}},
                      {"count": {"n": 3, "size": 200}}, {"stderr": "e"}, {"stderr_bytes": 70000},
                      {"rollout_line": "{bad"}, {"complete": True}, {"fail": "m"})
    lines = run.out.split(b"\n")
    assert lines[1:5] == ['{"type":"x","a":"\u2028"}'.encode(), b"no", b"\xff", b"<xxx>"]
    assert len(json.loads(lines[5])["item"]["text"]) == 300000
    assert [json.loads(line)["item"]["text"].split()[0] for line in lines[6:9]] == ["0", "1", "2"]
    assert [len(line) for line in lines[6:9]] == [199] * 3
    assert [json.loads(line)["type"] for line in lines[9:12]] == ["turn.completed", "error",
                                                                  "turn.failed"]
    assert run.returncode == 1 and len(run.err) == 70002
    assert codex.rollouts()[0].read_text().endswith("{bad\n")


def test_a_script_in_a_file_leaves_stdin_alone(codex):
    (codex.home / "stand_in.json").write_text('{"stand_in": [{"line": "a"}, {"exit": 3}]}')
    run = codex.exec("one")
    assert (run.returncode, run.out, run.err, len(codex.log())) == (3, b"a\n", b"", 1)
    (codex.home / "stand_in.json").write_text('{"stand_in": [{"read_stdin": true}]}')
    assert codex.exec("x" * 20000).returncode == 0
    assert codex.log()[-1]["prompt_length"] == 20000


def test_what_is_no_step_runs_nothing(codex):
    for step in ({"lime": 1}, {}, "line", {"line": "a", "exit": 1}):
        run = codex.steps({"line": "a"}, step)
        assert (run.returncode, run.out) == (98, b"") and b"unknown step" in run.err
    assert codex.steps({"line": 1}).returncode == 98


@pytest.mark.parametrize("version, status", (("0.98.0", 0), ("0.169.0", 1)))
def test_sigint(codex, version, status):
    ready = str(codex.home / "ready")
    process = codex.start("exec", "--json", version=version)
    process.stdin.write(json.dumps({"stand_in": [
        {"thread": "new"}, {"on_sigint_print": {"type": "x"}}, {"touch": ready},
        {"wait_for": str(codex.home / "never")}]}).encode())
    process.stdin.close()
    wait_for(lambda: os.path.exists(ready))
    process.send_signal(signal.SIGINT)
    assert process.stdout.read().endswith(b'\n{"type":"x"}\n') and process.wait(30) == status
    assert events(codex.rollouts()[0].read_bytes())[-1]["payload"]["type"] == "turn_aborted"
    process.stdout.close()
    process.stderr.close()


def test_endings(codex):
    assert codex.steps({"kill": "SIGKILL"}).returncode == -signal.SIGKILL
    assert codex.steps({"ignore": ["SIGTERM"]}, {"kill": "SIGTERM"}).returncode == 0
    run = codex.steps({"line": "a"}, {"close_stdout": True}, {"line": "b"})
    assert (run.returncode, run.out) == (0, b"a\n")
    process = codex.start("exec", "--json")
    process.stdout.close()
    _, process.err = process.communicate(b"one")
    assert process.returncode == 101 and b"panicked" in process.err


def test_children(codex):
    pidfile = codex.home / "pids"
    spec = {"argv": ["sleep", "60"], "stdout": "null", "pidfile": str(pidfile)}
    codex.steps({"spawn": spec}, {"spawn": dict(spec, session=True, double_fork=True)},
                {"spawn": dict(spec, clean_env=True, ignore=["SIGTERM"])})
    plain, orphan, bare = [int(line) for line in pidfile.read_text().split()]
    try:
        for pid in (plain, orphan, bare):
            assert Path("/proc/%d/cmdline" % pid).read_bytes() == b"sleep\x0060\x00"
        assert os.getsid(plain) == os.getsid(0) != os.getsid(orphan)
        assert b"CODEX_HOME=" in Path("/proc/%d/environ" % orphan).read_bytes()
        assert Path("/proc/%d/environ" % bare).read_bytes() == b""
        os.kill(plain, signal.SIGTERM)
        os.kill(bare, signal.SIGTERM)
        wait_for(lambda: not is_alive(plain))
        assert is_alive(bare)
    finally:
        for pid in (plain, orphan, bare):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
    run = codex.steps({"spawn": {"argv": ["/no/such/program"]}})
    assert run.returncode == 98 and b"FileNotFoundError" in run.err


def test_a_chain_of_forks_ends_by_itself(codex):
    pidfile = codex.home / "pids"
    codex.steps({"spawn_forks": {"n": 20, "seconds": 0.5, "pidfile": str(pidfile)}},
                {"sleep": 0.1})
    wait_for(lambda: len(pidfile.read_text().split()) > 5)
    wait_for(lambda: not any(is_alive(int(pid)) for pid in pidfile.read_text().split()))
    pids = pidfile.read_text().split()
    assert len(set(pids)) == len(pids) <= 20


# As an app-server

APP_SERVER_RUNS = HERE / "app-server-runs"
CONVERSATIONS = sorted(str(path.relative_to(APP_SERVER_RUNS))[:-len(".jsonl")]
                       for path in APP_SERVER_RUNS.glob("*/*.jsonl"))


def conversation(name):
    """What was written and what was printed in a recorded conversation: (who, object) each."""
    text = (APP_SERVER_RUNS / (name + ".jsonl")).read_text(encoding="utf-8")
    return [(line[0], json.loads(line[2:])) for line in text.split("\n")[:-1]]


def printed(messages):
    return [message for who, message in messages if who == "<"
            and not message.get("method", "").startswith("codex/event/")]


class Server:
    """A client of the stand-in as an app-server."""

    def __init__(self, codex, version="0.169.0", behaviour=None):
        path = codex.home / "stand_in_app_server.json"
        path.write_text(json.dumps(behaviour or {}))
        self.process = codex.start("--config", 'a="b"', "app-server", version=version)
        self.home, self.last = codex.home, 0
        self.events = 0                     # lines `codex/event/`

    def write(self, message):
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def request(self, method, **params):
        self.last += 1
        self.write({"id": self.last, "method": method, "params": params})

    def read(self):
        """The next line, parsed, but for 0.98's `codex/event/`; None at the end."""
        line = self.process.stdout.readline()
        if line.startswith(b'{"method":"codex/event/'):
            self.events += 1
            return self.read()
        return json.loads(line) if line.endswith(b"\n") else line.decode() or None

    def until(self, condition):
        """All that comes until that which meets the condition."""
        found = [self.read()]
        while not condition(found[-1]):
            assert found[-1] is not None, found
            found.append(self.read())
        return found

    def answer(self):
        return self.until(lambda message: "method" not in message)[-1]

    def open(self, thread_id=None):
        """Begin a thread, or resume one; its id."""
        self.request("initialize", clientInfo={"name": "test"})
        assert self.answer()["id"] == self.last
        if thread_id:
            self.request("thread/resume", threadId=thread_id, cwd=str(self.home))
        else:
            self.request("thread/start", cwd=str(self.home))
        return self.answer()["result"]["thread"]["id"]

    def turn(self, prompt, thread_id=None):
        """Start a turn on a new thread: the answer and the turn's id."""
        self.thread_id = self.open(thread_id)
        self.request("turn/start", threadId=self.thread_id, input=[
            {"type": "localImage", "path": "/a.png"}, {"type": "text", "text": prompt}])
        self.turn_id = self.answer()["result"]["turn"]["id"]

    def steps(self, *steps):
        self.turn(json.dumps({"stand_in": [{"exit": 98}], "app_server": steps}))

    def rest(self):
        return self.until(lambda message: message.get("method") == "turn/completed")

    def close(self):
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


def methods(messages):
    return [message.get("method") for message in messages]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_replay_is_the_recorded_turn(codex, name):
    messages = printed(conversation(name))
    if "turn/started" not in methods(messages):
        return                              # it was refused: below
    recorded = messages[methods(messages).index("turn/started") + 1:]
    server = Server(codex, name.split("/")[0])
    server.steps({"replay": name})
    assert server.read()["method"] == "turn/started"
    for wanted in recorded:
        if "method" in wanted:
            got = server.read()
            for ids in (wanted["params"], got["params"]):
                ids.pop("turnId", None)
                thread_id = ids.pop("threadId", server.thread_id)
                ids.get("turn", {}).pop("id", None)
            assert got == wanted and thread_id == server.thread_id
    assert server.close() == (0, b"", b"")


def check_answer(got, wanted):
    """The stand-in's answer is like the recorded one, of which it may leave keys out."""
    assert list(got) == list(wanted)                    # the error before the id, as well
    if "error" in wanted:
        assert got["error"]["code"] == wanted["error"]["code"]
        assert got["error"]["message"].split(",")[0] == wanted["error"]["message"].split(",")[0]
        return
    assert set(got["result"]) <= set(wanted["result"])
    for about in {"thread", "turn"} & set(got["result"]):
        assert set(got["result"][about]) <= set(wanted["result"][about])


STEPS_LIKE = {"words": None, "refused": None, "failed": [{"fail": "no luck"}],
              "interrupted": [{"begin": "one two"}, {"sleep": 120}],
              "steered": [{"begin": "one two"}, {"wait_for_steer": True}, {"complete": True}]}


@pytest.mark.parametrize("name", sorted(STEPS_LIKE))
@pytest.mark.parametrize("version", ("0.98.0", "0.169.0"))
def test_it_converses_as_the_real_one(codex, version, name):
    """Asked the same, it answers and tells the same, with keys that the real one has, too."""
    server, ids, spoke = Server(codex, version), {}, False
    messages = conversation("%s/%s" % (version, name))
    answers = {message["id"]: message for message in printed(messages) if "id" in message}
    for message in (message for who, message in messages if who == ">"):
        params = message.get("params", {})
        if message["method"] == "turn/start":
            params["input"] = [{"type": "text", "text": json.dumps(
                {"app_server": STEPS_LIKE[name]} if STEPS_LIKE[name] else "an ordinary turn")}]
        for key, about in (("threadId", "thread"), ("turnId", "turn"), ("expectedTurnId", "turn")):
            if key in params:
                params[key] = ids.get(about, params[key])
        if message["method"] in ("turn/steer", "turn/interrupt") and not spoke:
            server.until(lambda message: message["method"] == "item/agentMessage/delta")
            spoke = True
        server.write(message)
        if "id" in message:
            got = server.answer()
            if got["id"] in answers:                    # the recording ended where it was refused
                check_answer(got, answers[got["id"]])
            for about in {"thread", "turn"} & set(got.get("result", ())):
                ids[about] = got["result"][about]["id"]
    if name != "refused":
        rest, last = server.rest(), printed(messages)[-1]
        assert set(methods(rest)) <= set(methods(printed(messages)))
        assert rest[-1]["params"]["turn"]["status"] == last["params"]["turn"]["status"]
        assert bool(rest[-1]["params"]["turn"]["error"]) == (name == "failed")
    assert server.close()[0] == 0
    assert (server.events > 0) == (version == "0.98.0")


def test_an_ordinary_turn_streams_and_its_thread_can_be_resumed_by_exec(codex):
    server = Server(codex)
    server.turn("one")
    rest = server.rest()
    deltas = [message["params"]["delta"] for message in rest
              if message["method"] == "item/agentMessage/delta"]
    assert deltas == ["You", " said:", " one"] and codex.log()[-1]["prompt"] == "one"
    assert all(message["params"]["threadId"] == server.thread_id for message in rest)
    assert server.close()[0] == 0
    thread_id = server.thread_id
    codex.exec("two", "resume", thread_id)
    server = Server(codex)
    server.turn("three", thread_id)
    server.rest()
    server.close()
    texts = [line["payload"]["content"][0]["text"] for line in events(
        codex.rollouts()[0].read_bytes()) if line["type"] == "response_item"]
    assert texts == ["one", "You said: one", "two", "You said: two", "three", "You said: three"]


def test_execs_steps_are_a_live_turn_too(codex):
    server = Server(codex)
    command = {"id": "item_0", "type": "command_execution", "command": "c", "status": "in_progress",
               "exit_code": None, "aggregated_output": ""}
    server.turn(json.dumps({"stand_in": [
        {"thread": "new"}, {"event": {"type": "item.started", "item": command}},
        {"count": {"n": 2}}, {"touch": str(codex.home / "x")}, {"complete": True}]}))
    started, command, *_, usage, end = server.rest()
    assert command["params"]["item"]["status"] == "inProgress"
    assert command["params"]["item"]["type"] == "commandExecution"
    assert usage["params"]["tokenUsage"]["total"]["cachedInputTokens"] == 7
    assert end["params"]["turn"]["status"] == "completed" and (codex.home / "x").exists()
    server.close()


def test_misbehaviour_in_a_turn(codex):
    server = Server(codex)
    server.steps({"begin": "half of"}, {"notify": {"method": "a/b", "params": {"c": 1}}},
                 {"ask": {"method": "item/tool/call", "params": {}}}, {"line": "no JSON"},
                 {"deltas": {"n": 3, "size": 5}}, {"bytes": {"n": 4}}, {"exit": 7})
    question = server.until(lambda message: "id" in message)[-1]
    server.write({"id": question["id"], "error": {"code": -32601, "message": "no"}})
    assert server.process.stdout.readline() == b"no JSON\n"
    rest = server.until(lambda message: message == "xxxx")
    assert [message["params"]["delta"] for message in rest[1:4]] == ["0 xxx", "1 xxx", "2 xxx"]
    assert server.close()[0] == 7


def test_deltas_may_tell_when_they_were_made(codex):
    server, begin = Server(codex), time.monotonic()
    server.turn(json.dumps({"app_server": [
        {"deltas": {"n": 3, "size": 30, "pause": 0.01, "stamp": True}}, {"complete": True}]}))
    *_, one, two, three, item, _, _ = server.rest()
    deltas = [message["params"]["delta"] for message in (one, two, three)]
    times = [float(delta.split()[0]) for delta in deltas]
    assert begin < times[0] + 1e-6 and begin + 0.02 < times[2] + 1e-6   # of which digits are cut
    assert times == sorted(times) and times[2] < time.monotonic() + 1e-6
    assert item["params"]["item"]["text"] == "".join(deltas) and len(deltas[0]) == 30
    server.close()


@pytest.mark.parametrize("method", ("initialize", "thread/start", "turn/start"))
def test_misbehaviour_at_each_step(codex, method):
    def until_then(*steps):
        server, thread_id = Server(codex, behaviour={method: list(steps)}), None
        for name in ("initialize", "thread/start", "turn/start"):
            server.request(name, clientInfo={"name": "test"}, threadId=server.last and thread_id,
                           input=[])
            if name == method:
                return server
            thread_id = server.answer()["result"].get("thread", {}).get("id")
    assert until_then({"exit": 3}).close()[0] == 3
    assert until_then({"kill": "SIGKILL"}).close()[0] == -signal.SIGKILL
    server = until_then({"answer_half": True}, {"exit": 1})
    half = server.until(lambda message: isinstance(message, str))[-1]
    assert half.startswith('{"id":') and server.close()[0] == 1
    server = until_then({"answer": {"error": {"code": -1, "message": "no"}}})
    assert server.answer() == {"error": {"code": -1, "message": "no"}, "id": server.last}
    server.close()
    server = until_then()
    server.request("no/such")
    assert server.answer()["id"] == server.last         # and none to the one before
    server.close()
    server = until_then({"answer_later": True})
    server.request("no/such")
    first, second = (message["id"] for message in (server.answer(), server.answer()))
    assert (first, second) == (server.last, server.last - 1)
    server.close()
    server = until_then({"answer_big": 18000000})
    assert len(json.dumps(server.answer())) > 18000000
    server.close()


def test_the_end_of_stdin_in_a_turn(codex):
    for version, ending in (("0.98.0", b"turn/completed"), ("0.169.0", b"")):
        server = Server(codex, version)
        server.steps({"sleep": 0.5}, {"complete": True})
        status, out, _ = server.close()
        assert status == 0 and ending in out and (not ending or b"turn/completed" in out)


def test_a_second_interrupt_is_not_answered_by_098(codex):
    for version, answers in (("0.98.0", 1), ("0.169.0", 2)):
        server = Server(codex, version)
        server.steps({"begin": "a"}, {"sleep": 120})
        for _ in range(2):
            server.request("turn/interrupt", threadId=server.thread_id, turnId=server.turn_id)
        server.request("no/such")
        got = server.until(lambda message: message.get("id") == server.last)
        assert sum("id" in message for message in got) == answers + 1
        server.close()
