"""Stopping: everything that a turn started, in whatever session; and nothing else."""

import itertools
import os
import signal
import subprocess
import sys
import threading

import pytest

import conftest
import harness
import replicas_engine
from harness import is_alive, script, wait_for

# Every process to be stopped is found by a number in its command line that no other has, and not
# in the engine's way.
numbers = itertools.count(os.getpid() * 1000)


def unique():
    return "4000.%012d" % next(numbers)


def running(number):
    """The living processes that have the number in their command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/cmdline" % name, "rb") as file:
                    words = file.read().split(b"\0")
            except OSError:
                continue
            if any(number.encode() in word for word in words) and is_alive(int(name)):
                found.append(int(name))
    return found


def sleepers(number):
    """Those among them that do the sleeping, and are not Codex's or a shell's command line."""
    return [pid for pid in running(number) if command_of(pid)[:1] == [b"sleep"]]


def command_of(pid):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def zombies_of(pid):
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/%s/stat" % name, "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] == b"Z":
                found.append(int(name))
    return found


# The real Codex

FORK_CHAIN = """\
import os, sys, time
open("chain", "w").close()
end = time.monotonic() + 20
for _ in range(50000):
    if time.monotonic() > end or os.fork():
        os._exit(0)
    if "sessions" in sys.argv:
        os.setsid()
"""

# What a turn runs: the command, and how many processes sleep when it is well under way.
COMMANDS = {
    "under a shell": ("bash -c 'sleep {n}; true'; true", 1),
    "in the background": ("sleep {n} & (sleep {n} &) ; sleep {n}", 3),
    "with setsid": ("setsid sleep {n} & setsid -f sleep {n}; sleep {n}", 3),
    "with nohup": ("nohup sleep {n} >/dev/null 2>&1 & nohup sleep {n} >/dev/null 2>&1", 2),
    "ignoring signals": ("trap '' TERM INT HUP; setsid sleep {n} & sleep {n}; sleep {n}", 2),
    "a chain of forks": ("sleep {n} & {python} {chain} {n}; wait", 1),
    "many forks": ("for i in $(seq 150); do sleep {n} & done; wait", 150),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The stand-in model: a function that points a CODEX_HOME at it."""
    process = subprocess.Popen([sys.executable, harness.STAND_IN_MODEL, "--exit-with-stdin"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    url = process.stdout.readline().decode().strip()

    def configure(codex_home):
        with open(os.path.join(codex_home, "config.toml"), "w", encoding="utf-8") as file:
            file.write('model_provider = "stand-in"\n[model_providers.stand-in]\n'
                       'name = "Stand-in"\nbase_url = "%s"\nwire_api = "responses"\n'
                       'requires_openai_auth = true\nrequest_max_retries = 1\n'
                       'stream_max_retries = 1\n[features]\nplugins = false\n'
                       '[analytics]\nenabled = false\n' % url)

    yield configure
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("sandbox", ["danger-full-access", "workspace-write"])
@pytest.mark.parametrize("version", ["0.169.0", "0.98.0", "0.50.0"])
def test_the_real_codex_and_all_it_runs(make_engine, model, version, sandbox):
    codex = harness.codex_program(version)
    if codex is None:
        conftest.unavailable("Codex %s is not installed: see tests/run" % version)
    engine = make_engine(start=False, CODEX_PATH=codex, CODEX_API_KEY="a key")
    model(engine.codex_home)
    engine.start()
    chain = os.path.join(engine.workspace, "chain.py")
    with open(chain, "w", encoding="utf-8") as file:
        file.write(FORK_CHAIN)
    thread = None
    for name, (command, count) in COMMANDS.items():
        number = unique()
        command = command.format(n=number, python=sys.executable, chain=chain)
        turn = engine.start_turn("model: run " + command, sandbox_mode=sandbox)
        wait_for(lambda: len(sleepers(number)) >= count, name)
        if "{chain}" in COMMANDS[name][0]:
            wait_for(lambda: os.path.exists(os.path.join(engine.workspace, "chain")))
        answer = engine.post("/codex/interrupt")
        left = running(number)
        assert not left, (name, [command_of(pid) for pid in left])
        assert answer.json() == {"success": True, "interrupted": True, "turn_id": turn}
        events = harness.check_stream(engine.events(turn))
        assert events[-2].json()["error"]["code"] == "interrupted"
        if thread:
            assert events[0].json()["thread_id"] == thread, name
        thread = events[0].json()["thread_id"]
    events = engine.send("model: say It goes on.", sandbox_mode=sandbox)
    assert events[0].json()["thread_id"] == thread
    assert events[-2].type == "turn.completed"


# What other processes do, with the stand-in

def sleeper(number, **how):
    return {"spawn": dict({"argv": ["sleep", number], "stdout": "null"}, **how)}


HANG = {"sleep": 120}
BEGIN = {"thread": "resume"}


@pytest.mark.parametrize("how", [
    {}, {"session": True}, {"double_fork": True}, {"session": True, "double_fork": True},
    {"clean_env": True, "session": True}, {"clean_env": True, "double_fork": True},
    {"clean_env": True, "session": True, "double_fork": True},
    {"session": True, "double_fork": True, "ignore": ["SIGINT", "SIGTERM"]},
    {"clean_env": True, "session": True, "double_fork": True, "ignore": ["SIGINT", "SIGTERM"]},
], ids=lambda how: " ".join(how) or "plain")
def test_whatever_an_interrupted_turn_started(engine, how):
    number = unique()
    engine.start_turn(script(BEGIN, sleeper(number, **how), HANG))
    wait_for(lambda: sleepers(number))
    assert engine.post("/codex/interrupt").json()["interrupted"] is True
    assert not running(number)
    assert not zombies_of(engine.process.pid)
    assert engine.send("Hello")[-2].type == "turn.completed"


@pytest.mark.parametrize("clean_env", [False, True])
def test_a_chain_of_forks_each_in_a_session_of_its_own(engine, clean_env):
    """A process that lives for a moment only, after which another one is there."""
    started = os.path.join(engine.workspace, "chain")
    for _ in range(4):
        number = unique()
        engine.start_turn(script(BEGIN, {"spawn": {
            "argv": [sys.executable, "-c", FORK_CHAIN, "sessions", number], "stdout": "null",
            "clean_env": clean_env}}, HANG))
        wait_for(lambda: os.path.exists(started))
        assert engine.post("/codex/interrupt").json()["interrupted"] is True
        for _ in range(20):
            assert not running(number)
        os.unlink(started)


@pytest.mark.parametrize("path", ["/codex/interrupt", "/codex/reset"])
def test_codex_itself_ignoring_the_signals(engine, path):
    number = unique()
    signals = {"ignore": ["SIGINT", "SIGTERM"]}
    turn = engine.start_turn(script(signals, BEGIN, sleeper(number, session=True), HANG))
    wait_for(lambda: sleepers(number))
    codex = engine.calls()[-1]["pid"]
    assert engine.post(path).status == 200
    assert not running(number) and not is_alive(codex)
    assert engine.events(turn)[-2].json()["error"]["code"] == "interrupted"


def test_a_codex_that_is_stopped(engine):
    turn = engine.start_turn(script(BEGIN, HANG))
    codex = wait_for(engine.calls)[-1]["pid"]
    os.kill(codex, signal.SIGSTOP)
    assert engine.post("/codex/interrupt").json()["turn_id"] == turn
    assert not is_alive(codex)


def test_codex_gets_time_for_its_last_words(engine):
    last = {"type": "item.completed", "item": {"id": "item_9", "type": "error", "message": "Stop."}}
    turn = engine.start_turn(script(BEGIN, {"on_sigint_print": last}, {"event": {"type": "x"}},
                                    HANG))
    wait_for(lambda: engine.status()["turn"]["last_event_id"] == "%d.2" % turn)
    engine.post("/codex/interrupt")
    assert [event.type for event in engine.events(turn)] == [
        "thread.started", "x", "item.completed", "error", "turn.failed", "done"]
    with open(engine.status()["session_file"], encoding="utf-8") as file:
        assert "turn_aborted" in file.read()


@pytest.mark.parametrize("how", [
    {"session": True}, {"double_fork": True, "session": True},
    {"clean_env": True, "session": True}, {"clean_env": True, "double_fork": True},
], ids=" ".join)
@pytest.mark.parametrize("ending", [{"complete": True}, {"kill": "SIGKILL"}],
                         ids=lambda ending: list(ending)[0])
def test_what_a_turn_that_ended_by_itself_left_stays(engine, how, ending):
    number = unique()
    engine.send(script(BEGIN, sleeper(number, **how), ending))
    server, = sleepers(number)
    engine.send("Hello")
    assert sleepers(number) == [server]
    other = unique()
    engine.start_turn(script(BEGIN, sleeper(other, **how), HANG))
    wait_for(lambda: sleepers(other))
    engine.post("/codex/interrupt")
    assert not running(other)
    engine.post("/codex/reset")
    assert sleepers(number) == [server]
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: not os.path.exists("/proc/%d" % server), "its reaping")
    assert not zombies_of(engine.process.pid)


def test_what_is_left_outlives_the_engine(engine):
    number = unique()
    engine.send(script(BEGIN, sleeper(number, session=True, clean_env=True), {"complete": True}))
    server, = sleepers(number)
    try:
        assert engine.stop() == 0
        assert is_alive(server)
        engine.start()
        engine.start_turn(script(BEGIN, HANG))
        engine.post("/codex/interrupt")
        assert is_alive(server)
    finally:
        os.kill(server, signal.SIGKILL)


def test_an_interrupt_after_the_turns_end_and_before_codexs(engine, tmp_path):
    """The turn has ended by itself: what it left stays, and only Codex is seen to."""
    number, done = unique(), str(tmp_path / "done")
    turn = engine.start_turn(script(BEGIN, sleeper(number, session=True), {"complete": True},
                                    {"wait_for": done}))
    wait_for(lambda: engine.status()["turn"]["last_event_id"] == "%d.2" % turn)
    codex = engine.calls()[-1]["pid"]
    assert engine.post("/codex/interrupt").json() == {
        "success": True, "interrupted": False, "turn_id": None}
    assert not is_alive(codex)
    assert engine.events(turn)[-2].type == "turn.completed"
    server, = sleepers(number)
    os.kill(server, signal.SIGKILL)


def test_forks_all_the_time(engine):
    number = unique()
    chain = {"argv": [sys.executable, "-c", FORK_CHAIN, number], "stdout": "null", "session": True}
    for _ in range(3):
        engine.start_turn(script(BEGIN, {"spawn": chain}, {"spawn": dict(chain, clean_env=True)},
                                 HANG))
        wait_for(lambda: os.path.exists(os.path.join(engine.workspace, "chain")))
        assert engine.post("/codex/interrupt").json()["interrupted"] is True
        assert not running(number)
        os.unlink(os.path.join(engine.workspace, "chain"))


def test_orphans_that_die_are_reaped_while_nothing_happens(engine):
    number = unique()
    spawn = {"spawn": {"argv": ["bash", "-c", "exec -a x%s sleep 0.3" % number], "stdout": "null",
                       "double_fork": True}}
    engine.send(script(BEGIN, *[spawn] * 20 + [{"complete": True}]))
    wait_for(lambda: not running(number))
    wait_for(lambda: not zombies_of(engine.process.pid))


# TurnProcesses itself

def spawn(mark=None, code="import time; time.sleep(300)"):
    env = dict(os.environ, **({replicas_engine.MARK: mark} if mark else {}))
    child = subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True)
    wait_for(lambda: b"-c" in command_of(child.pid))
    return child


def reaped(child):
    """Stop what the test started, and wait for it, as a parent does."""
    child.kill()
    child.wait()


def stop_and_reap(processes, child):
    reaper = threading.Thread(target=child.wait)
    reaper.start()
    processes.stop()
    reaper.join()


def test_a_process_that_merely_has_the_same_pid():
    child = spawn()
    try:
        started = replicas_engine.process(child.pid).started
        before = replicas_engine.TurnProcesses("a mark of nobody", child.pid, started - 1)
        assert before.find() == {}
        before.stop()
        assert child.poll() is None
        stop_and_reap(replicas_engine.TurnProcesses("a mark of nobody", child.pid, started), child)
        assert child.returncode == -signal.SIGINT
    finally:
        reaped(child)


def test_a_pid_that_nobody_has():
    child = spawn()
    started = replicas_engine.process(child.pid).started
    reaped(child)
    assert replicas_engine.process(child.pid) == (None, None, None, None)
    replicas_engine.TurnProcesses("a mark of nobody", child.pid, started).stop()


def test_a_mark_is_one_turns_alone():
    mine, other = spawn("1234abcd"), spawn("1234abcde")
    try:
        processes = replicas_engine.TurnProcesses("1234abcd", mine.pid)
        assert set(processes.find()) == {mine.pid}
        stop_and_reap(processes, mine)
        assert other.poll() is None
    finally:
        reaped(mine)
        reaped(other)


def test_marks():
    child = spawn("1234abcd")
    try:
        assert replicas_engine.mark_of(child.pid) == "1234abcd"
        assert replicas_engine.mark_of(os.getpid()) is None
    finally:
        reaped(child)
    assert replicas_engine.mark_of(child.pid) is None


def test_a_name_with_anything_in_it(tmp_path):
    """proc(5): the name in /proc/<pid>/stat may hold blanks and brackets."""
    program = str(tmp_path / ") Z 1 (")
    os.symlink("/bin/sleep", program)
    child = subprocess.Popen([program, "300"])
    try:
        wait_for(lambda: command_of(child.pid)[1:2] == [b"300"])
        entry = replicas_engine.process(child.pid)
        assert entry.parent == os.getpid() and entry.state in (b"S", b"R") and entry.started > 0
    finally:
        reaped(child)
