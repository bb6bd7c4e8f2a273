"""Stopping: everything that a turn started, in whatever session; and nothing else."""

import contextlib
import errno
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest

import conftest
import harness
import replicas_engine
import tricks
from harness import command_of, is_alive, running, script, wait_for, zombies_of

# Every process to be stopped is found by a number in its command line that no other has, and not
# in the engine's way.
numbers = itertools.count(os.getpid() * 1000)


def unique():
    return "4000.%012d" % next(numbers)


def sleepers(number):
    """Those among them that do the sleeping, and are not Codex's or a shell's command line."""
    return [pid for pid in running(number) if command_of(pid)[:1] == [b"sleep"]]


# Two ways to know them

def works(command):
    try:
        return subprocess.run(command, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


@contextlib.contextmanager
def delegated():
    """The folder of a control group that is delegated to root as systemd does it; None if that
    can't be made."""
    folder = None
    try:
        with open("/proc/self/cgroup", encoding="ascii") as file:
            own, = [line[3:].strip() for line in file if line.startswith("0::")]
        tree, = [tree for tree in replicas_engine.CGROUP_TREES
                 if os.path.exists("%s%s/cgroup.procs" % (tree, own))]
        folder = tempfile.mkdtemp(prefix="delegated-", dir=tree + own)
        os.setxattr(folder, "trusted.delegate", b"1")
    except (OSError, ValueError):
        yield None
    else:
        yield folder
    for path, _, _ in os.walk(folder or "", topdown=False):
        wait_for(replicas_engine.ControlGroup(path).is_empty)
        os.rmdir(path)


with delegated() as trial:
    WAYS = ["process table", "control group"] if trial else ["process table"]


@pytest.fixture
def go_the_way():
    """A function: have an engine that isn't started yet know a turn's processes in that way."""
    with contextlib.ExitStack() as stack:
        def go(engine, way):
            if way == "control group":
                engine.cgroup = stack.enter_context(delegated())
        yield go


# The real Codex

NOT_IN_THE_SANDBOX = ["in a PID namespace"]
LANDLOCKED = ["0.98.0", "0.50.0"]           # their sandboxes take no user namespaces
TRICKS = [name for name in tricks.COMMANDS
          if name not in NOT_IN_THE_SANDBOX or not conftest.lacks("user namespaces")]


@pytest.fixture
def real_engine(go_the_way, make_engine, model):
    """A function: an engine that goes that way, with the real Codex of that version."""
    def start(way, version):
        codex = conftest.real_codex(version)
        engine = make_engine(start=False, CODEX_PATH=codex, CODEX_API_KEY="a key")
        model(engine.codex_home)
        go_the_way(engine, way)
        return engine.start()

    return start


def run_for_long(engine, names, **options):
    """A turn in which what these tricks start is running: its id, and the number of all that."""
    number = unique()
    tricks.prepare(engine.folder)
    command, count, made = tricks.command(names, number, engine.folder, sys.executable)
    turn = engine.start_turn("model: run %s\nmodel: hang" % command, **options)
    wait_for(lambda: len(sleepers(number)) >= count, names)
    for name in made:
        wait_for(lambda: os.path.exists(os.path.join(engine.workspace, name)), name)
    return turn, number


@pytest.mark.parametrize("way, sandbox", [(WAYS[0], "danger-full-access"),
                                          (WAYS[-1], "workspace-write")])
@pytest.mark.parametrize("version", harness.CODEX_VERSIONS)
def test_the_real_codex_and_all_it_runs(real_engine, version, way, sandbox):
    """All tricks in one turn; where they can make a difference, each in a turn of its own."""
    engine, thread = real_engine(way, version), None
    if sandbox == "workspace-write" and version not in LANDLOCKED:
        conftest.need("user namespaces")
    names = [name for name in TRICKS
             if sandbox != "workspace-write" or name not in NOT_IN_THE_SANDBOX]
    alone = sandbox == "danger-full-access" and version == harness.CODEX_VERSIONS[0]
    for name in [[name] for name in names] if alone else [names]:
        turn, number = run_for_long(engine, name, sandbox_mode=sandbox)
        answer = engine.post("/codex/interrupt")
        left = running(number)
        assert not left, (name, [command_of(pid) for pid in left])
        events = harness.check_stream(engine.events(turn))
        assert answer.json() == {"success": True, "interrupted": True, "turn_id": turn}, (
            name, events, engine.log())
        assert events[-2].json()["error"]["code"] == "interrupted"
        if thread:
            assert events[0].json()["thread_id"] == thread, name
        thread = events[0].json()["thread_id"]
    events = engine.send("model: say It goes on.", sandbox_mode=sandbox)
    assert events[0].json()["thread_id"] == thread
    assert events[-2].type == "turn.completed"


@pytest.mark.parametrize("version, way", [(version, WAYS[0]) for version in harness.CODEX_VERSIONS]
                         + [(harness.CODEX_VERSIONS[0], way) for way in WAYS[1:]])
def test_the_real_codex_of_an_engine_that_is_killed(real_engine, version, way):
    """In a control group the kernel ends them all, so that the version makes no difference."""
    engine, bystander = real_engine(way, version), unique()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [os.kill(pid, signal.SIGKILL) for pid in sleepers(bystander)])
        subprocess.run(["setsid", "-f", "sleep", bystander], check=True)
        engine.send("model: run setsid -f sleep %s >/dev/null 2>&1 </dev/null" % bystander,
                    sandbox_mode="danger-full-access")          # and one that a turn left
        bystanders = wait_for(lambda: sleepers(bystander)[1:] and sleepers(bystander))
        turn, number = run_for_long(engine, TRICKS, sandbox_mode="danger-full-access")
        engine.kill()
        engine.start()
        assert engine.events(turn)[-2].json()["error"]["code"] == "engine_restarted"
        left = running(number)
        assert not left, [command_of(pid) for pid in left]
        assert sleepers(bystander) == bystanders


# What other processes do, with the stand-in

def sleeper(number, **how):
    return {"spawn": dict({"argv": ["sleep", number], "stdout": "null"}, **how)}


@pytest.fixture(params=WAYS)
def engine(request, go_the_way, make_engine):
    """An engine with the stand-in Codex, for each way to know a turn's processes."""
    made = make_engine(start=False)
    go_the_way(made, request.param)
    return made.start()


HANG = {"sleep": 120}
BEGIN = {"thread": "resume"}
IGNORE = {"ignore": ["SIGINT", "SIGTERM"]}


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
    wait_for(lambda: not zombies_of(engine.process.pid))    # a control group is empty before that
    assert engine.send("Hello")[-2].type == "turn.completed"


@pytest.mark.parametrize("clean_env", [False, True])
def test_a_chain_of_forks_each_in_a_session_of_its_own(engine, clean_env):
    """A process that lives for a moment only, after which another one is there."""
    for _ in range(2):
        number = unique()
        started = os.path.join(engine.workspace, number + ".chain")
        engine.start_turn(script(BEGIN, {"spawn": {
            "argv": [sys.executable, "-c", tricks.FORK_CHAIN, number, "sessions"], "stdout": "null",
            "clean_env": clean_env}}, HANG))
        wait_for(lambda: os.path.exists(started))
        assert engine.post("/codex/interrupt").json()["interrupted"] is True
        for _ in range(20):
            assert not running(number)


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


@pytest.mark.parametrize("way", WAYS)
def test_codex_gets_time_for_its_last_words(go_the_way, make_engine, way):
    engine = make_engine(start=False, constants={"INTERRUPT_PATIENCE": harness.PATIENCE})
    go_the_way(engine, way)
    engine.start()
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
    for _ in range(2):
        number = unique()
        chain = {"argv": [sys.executable, "-c", tricks.FORK_CHAIN, number], "stdout": "null",
                 "session": True}
        engine.start_turn(script(BEGIN, {"spawn": chain}, {"spawn": dict(chain, clean_env=True)},
                                 HANG))
        wait_for(lambda: os.path.exists(os.path.join(engine.workspace, number + ".chain")))
        assert engine.post("/codex/interrupt").json()["interrupted"] is True
        assert not running(number)


def test_orphans_that_die_are_reaped_while_nothing_happens(engine):
    number = unique()
    spawn = {"spawn": {"argv": ["bash", "-c", "exec -a x%s sleep 0.3" % number], "stdout": "null",
                       "double_fork": True}}
    engine.send(script(BEGIN, *[spawn] * 20 + [{"complete": True}]))
    wait_for(lambda: not running(number))
    wait_for(lambda: not zombies_of(engine.process.pid))


# What gets away from the ways to know a turn's processes

def threads_of(pid):
    try:
        return os.listdir("/proc/%d/task" % pid)
    except OSError:
        return []


@pytest.mark.parametrize("how", [{}, {"session": True}, {"clean_env": True, "session": True}],
                         ids=lambda how: " ".join(how) or "plain")
def test_a_process_whose_first_thread_has_ended(engine, how):
    """It looks like a zombie, and is none."""
    path = os.path.join(engine.folder, "pid")
    argv = [sys.executable, "-c", tricks.PARTLY_DEAD, path]
    engine.start_turn(script(BEGIN, {"spawn": dict(
        {"argv": argv, "stdout": "null", "double_fork": True}, **how)}, HANG))
    wait_for(lambda: os.path.exists(path + ".dead"))
    with open(path + ".dead", encoding="ascii") as file:
        pid = int(file.read())
    wait_for(lambda: not is_alive(pid))
    assert len(threads_of(pid)) == 2
    assert engine.post("/codex/interrupt").json()["interrupted"] is True
    wait_for(lambda: not threads_of(pid), patience=60)      # alive it would be there for 120 s


@pytest.mark.parametrize("value", ["", "another", "0123456789abcdef" * 2, "an earlier turn's"])
def test_a_process_with_another_mark_that_left_the_tree(engine, value):
    number = unique()
    if value == "an earlier turn's":
        engine.send("Hello")
        value = engine.calls()[-1]["env"][replicas_engine.MARK]
    argv = ["env", "%s=%s" % (replicas_engine.MARK, value), "setsid", "-f", "sleep", number]
    engine.start_turn(script(BEGIN, {"spawn": {"argv": argv, "stdout": "null"}}, HANG))
    wait_for(lambda: sleepers(number))
    assert engine.post("/codex/interrupt").json()["interrupted"] is True
    assert not running(number)


def test_a_bystander_that_an_earlier_turn_left_forks_while_another_is_stopped(engine):
    """Without the variable: it is the limit that tells it from the turn's own orphans."""
    number, other = unique(), unique()
    forks = ("trap 'sleep %s & exit' USR1; while :; do sleep 0.01; done" % number)
    pids = os.path.join(engine.folder, "pids")
    engine.send(script(BEGIN, {"spawn": {"argv": ["bash", "-c", forks], "stdout": "null",
                                         "session": True, "clean_env": True, "pidfile": pids}},
                       {"complete": True}))
    with open(pids, encoding="ascii") as file:
        pid = int(file.read())
    engine.start_turn(script(BEGIN, sleeper(other, session=True, clean_env=True), HANG))
    wait_for(lambda: sleepers(other))
    os.kill(pid, signal.SIGUSR1)
    wait_for(lambda: not is_alive(pid))
    server, = wait_for(lambda: sleepers(number))        # it was forked, and is yet to be what it is
    engine.post("/codex/interrupt")
    assert not running(other)
    assert sleepers(number) == [server]
    os.kill(server, signal.SIGKILL)


@pytest.fixture
def shim(tmp_path):
    """A script as CODEX_PATH that starts Codex and waits for it."""
    path = tmp_path / "codex"
    path.write_text('#!/bin/sh\n"%s" "$@"\nexit $?\n' % harness.STAND_IN_CODEX)
    path.chmod(0o755)
    return str(path)


def test_a_codex_behind_a_script_that_does_not_exit_after_its_turn(make_engine, shim):
    engine = make_engine(CODEX_PATH=shim)
    number = unique()
    turn = engine.start_turn(script(IGNORE, BEGIN, sleeper(number, session=True),
                                    {"complete": True}, HANG))
    wait_for(lambda: engine.status()["turn"]["last_event_id"] == "%d.2" % turn)
    codex = engine.calls()[-1]["pid"]
    assert engine.post("/codex/interrupt").json()["interrupted"] is False
    wait_for(lambda: not is_alive(codex))   # killed, and not a child that the engine waits for
    server, = sleepers(number)              # which it left on purpose
    os.kill(server, signal.SIGKILL)


def test_a_codex_behind_a_script_is_asked_politely(make_engine, shim):
    engine = make_engine(CODEX_PATH=shim, constants={"INTERRUPT_PATIENCE": harness.PATIENCE})
    last = {"type": "item.completed", "item": {"id": "item_9", "type": "error", "message": "Stop."}}
    turn = engine.start_turn(script(BEGIN, {"on_sigint_print": last}, {"event": {"type": "x"}},
                                    HANG))
    wait_for(lambda: engine.status()["turn"]["last_event_id"] == "%d.2" % turn)
    engine.post("/codex/interrupt")
    assert [event.type for event in engine.events(turn)][2] == "item.completed"


NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def test_a_bystander_under_an_engine_that_is_process_1(make_engine):
    """Whoever loses his parent in a container becomes the child of its process 1."""
    if not works(NAMESPACE + ["true"]):
        conftest.unavailable("a PID namespace can't be made: that takes root")
    engine = make_engine(start=False)
    engine.program = NAMESPACE + harness.Engine.program
    engine.start()
    try:
        number, mine = unique(), unique()
        engine.start_turn(script(BEGIN, sleeper(mine, session=True, double_fork=True),
                                 sleeper(mine, clean_env=True), HANG))
        wait_for(lambda: len(sleepers(mine)) == 2)
        process_1 = child_of(engine.process.pid)
        subprocess.run(["nsenter", "--target", str(process_1), "--pid", "sh", "-c",
                        "setsid sleep %s >/dev/null 2>&1 &" % number], check=True)
        server, = wait_for(lambda: sleepers(number))
        engine.post("/codex/interrupt")
        assert not running(mine)
        assert sleepers(number) == [server]
    finally:
        engine.kill()                       # and its whole namespace with it
        wait_for(lambda: not running(number) and not running(mine))


def child_of(parent):
    child, = [pid for pid, entry in replicas_engine.processes() if entry.parent == parent]
    return child


# Looks that fail

UNDUMPABLE = """\
#!%s
import ctypes, sys
sys.path.insert(0, %r)
import stand_in_codex
ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
stand_in_codex.run_as_codex()
"""
# Even root sees only what it may trace, if it can't trace everything and isn't of the group root.
CONFINED = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace", "--regid=65534",
            "--clear-groups"]
HIDING = ["unshare", "--mount", "sh", "-c", 'mount -t proc -o hidepid=2 proc /proc && exec "$@"',
          "sh"] + CONFINED


@pytest.mark.parametrize("signals", [{"ignore": []}, {"ignore": ["SIGINT", "SIGTERM"]}],
                         ids=["polite", "deaf"])
def test_a_codex_that_the_process_table_hides(make_engine, tmp_path, signals):
    """hidepid=2 of proc(5), and a Codex that isn't dumpable, as 0.50 makes itself."""
    if not works(HIDING + ["true"]):
        conftest.unavailable("/proc can't be mounted anew: that takes root")
    program = tmp_path / "codex"
    program.write_text(UNDUMPABLE % (sys.executable, harness.TESTS))
    program.chmod(0o755)
    engine = make_engine(start=False, CODEX_PATH=str(program))
    engine.program = HIDING + harness.Engine.program
    engine.start()
    number = unique()
    engine.start_turn(script(signals, BEGIN, sleeper(number, session=True), HANG))
    wait_for(lambda: sleepers(number))
    codex = engine.calls()[-1]["pid"]
    inside = ["nsenter", "--target", str(engine.process.pid), "--mount"]
    inside += CONFINED + ["ls", "/proc"]
    seen = subprocess.run(inside, stdout=subprocess.PIPE, check=True).stdout.split()
    assert str(engine.process.pid).encode() not in seen and str(codex).encode() not in seen
    assert engine.post("/codex/interrupt").json()["interrupted"] is True
    assert not is_alive(codex) and not running(number)


# TurnProcesses itself

MARK = os.urandom(16).hex()


@pytest.fixture
def control_groups(monkeypatch):
    """Asked for before `begin`: the turns have some."""
    if "control group" not in WAYS:
        pytest.skip("control groups can't be made here")
    with delegated() as folder:
        monkeypatch.setattr(replicas_engine, "delegated_cgroup", lambda: folder)
        yield


@pytest.fixture
def begin(monkeypatch):
    """A function that starts a shell as a turn's Codex, which waits for its prompt as that does:
    the TurnProcesses that begin with it."""
    turns = []
    monkeypatch.setattr(replicas_engine, "INTERRUPT_PATIENCE", harness.PATIENCE)

    def start(command="exec sleep 300", mark=MARK, at_once=False):
        turn = replicas_engine.TurnProcesses.create(7, mark)
        env = dict(os.environ, **{replicas_engine.MARK: mark})
        argv = ["sh", "-c", command if at_once else "read prompt; " + command]
        child = replicas_engine.start_process(argv, turn, env=env, stdin=subprocess.PIPE)
        turns.append(turn)
        child.stdin.write(b"Hello\n")
        child.stdin.close()
        if command.endswith("exec sleep 300"):
            wait_for(lambda: command_of(child.pid)[0] == b"sleep")
        return turn

    yield start
    monkeypatch.undo()
    for turn in turns:
        assert turn.stop() == []
        turn.child.wait()
        turn.discard()


def recovered(turn, boot=None, mark=None, **codex):
    """What another engine makes of what this one saved, but for what is told here."""
    saved = turn.saved()
    saved["codex"].update(codex)
    saved["boot"], saved["mark"] = boot or saved["boot"], mark or saved["mark"]
    return replicas_engine.TurnProcesses.from_saved(json.loads(json.dumps(saved)))


@contextlib.contextmanager
def waited_for(turn):
    """As an engine's thread does, and process 1 when that engine has ended."""
    reaper = threading.Thread(target=turn.child.wait)
    reaper.start()
    yield
    reaper.join()


def test_stopping(begin):
    turn = begin()
    assert turn.find() == {turn.pid} and turn.is_codex_there()
    assert turn.stop() == [] and turn.stop() == []
    assert turn.child.returncode == -signal.SIGINT
    assert turn.find() == set() and not turn.is_codex_there()


def test_stopping_what_another_engine_ran(begin):
    turn = begin()
    other = recovered(turn)
    assert other.find() == {turn.pid} and other.is_codex_there()
    with waited_for(turn):
        assert other.stop() == []
    assert turn.child.returncode == -signal.SIGINT


@pytest.mark.parametrize("lie", [
    lambda saved: {"started": saved["codex"]["started"] - 1}, lambda saved: {"started": None},
    lambda saved: {"boot": saved["boot"][::-1]}, lambda saved: {"boot": ["a boot"]}],
    ids=["another process", "no start", "another boot", "not a boot"])
def test_a_process_that_merely_has_the_same_pid(begin, lie):
    bystander = begin()
    other = recovered(bystander, mark="a mark of nobody", **lie(bystander.saved()))
    assert other.find() == set() and not other.is_codex_there()
    assert other.stop() == []
    assert bystander.child.poll() is None


def test_a_pid_that_nobody_has(begin):
    turn = begin()
    other = recovered(turn)
    turn.stop()
    assert replicas_engine.process(turn.pid) is None
    assert not other.is_codex_there() and other.stop() == []


@pytest.mark.parametrize("saved", [
    {}, {"mark": MARK}, {"mark": None, "codex": {}}, {"mark": "", "codex": {}},
    {"mark": 7, "codex": {}}, {"mark": [MARK], "codex": {}}, {"mark": MARK, "codex": [1, 2]},
    {"mark": MARK, "codex": {"pid": "1"}}, {"mark": MARK, "codex": {"pid": True}},
    {"mark": MARK, "codex": {"pid": -1}}, {"mark": MARK, "codex": {"pid": 0}},
    {"mark": MARK, "codex": {"pid": 1e9}}, {"mark": MARK, "codex": {"pid": 1 << 70}},
    {"mark": MARK, "codex": {"pid": 1, "started": "1"}}, {"mark": MARK, "codex": {"started": {}}}])
def test_what_no_engine_wrote(saved):
    with pytest.raises(ValueError):
        replicas_engine.TurnProcesses.from_saved(saved)


@pytest.mark.parametrize("codex", [{}, {"pid": None}, {"pid": 1, "started": 1},
                                   {"pid": 1 << 40, "started": 1}])
def test_what_tells_nobody(codex):
    """Logs of 0.2.0 don't tell the boot: there only the mark counts."""
    turn = replicas_engine.TurnProcesses.from_saved({"mark": "a mark of nobody", "codex": codex})
    assert turn.stop() == []


def test_a_log_that_names_the_engine_as_its_turns_process(begin):
    """Or the process that started it."""
    turn = begin()
    for pid in (os.getpid(), os.getppid()):
        other = recovered(turn, pid=pid, started=replicas_engine.process(pid).started_ticks)
        with pytest.raises(ValueError):
            other.stop()


def test_a_mark_is_one_turns_alone(begin):
    turn, longer, none = begin(), begin(mark=MARK + "e"), begin(mark="")
    assert recovered(turn).find() == {turn.pid}
    assert replicas_engine.marks_of(none.pid) == replicas_engine.marks_for("")
    with waited_for(turn):
        assert recovered(turn).stop() == []
    assert longer.child.poll() is None and none.child.poll() is None


def test_starting_reads_no_process_table(begin, monkeypatch):
    def refuse():
        raise AssertionError("the process table was read")

    monkeypatch.setattr(replicas_engine, "processes", refuse)
    assert begin().saved()["codex"]["started"] > 0


def test_an_orphan_of_what_was_there_before_codex(begin):
    """What a script had started before it became the engine is no turn's, nor what that forks."""
    helper = subprocess.Popen(["sh", "-c", "read go; (sleep 300 & echo $!); exec sleep 300"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    replicas_engine.prctl(replicas_engine.PR_SET_CHILD_SUBREAPER, 1)
    try:
        ticks = replicas_engine.process(helper.pid).started_ticks / os.sysconf("SC_CLK_TCK")
        wait_for(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > ticks + 0.1)
        turn = begin()
        helper.stdin.write(b"go\n")
        helper.stdin.close()
        orphan = int(helper.stdout.readline())
        assert turn.find() == {turn.pid} and turn.stop() == []
        os.kill(orphan, signal.SIGKILL)
        wait_for(lambda: os.waitpid(orphan, 0))
    finally:
        replicas_engine.prctl(replicas_engine.PR_SET_CHILD_SUBREAPER, 0)
        with helper:
            helper.kill()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM])
@pytest.mark.parametrize("before", ["", "trap '' INT TERM; "], ids=["polite", "deaf"])
def test_a_look_that_fails_is_no_answer(begin, monkeypatch, number, before):
    """Codex is stopped all the same, for it is our child."""
    def fail(path):
        raise OSError(number, os.strerror(number), path)

    turn = begin(before + "exec sleep 300")
    monkeypatch.setattr(replicas_engine, "TERMINATE_PATIENCE", 0.1)
    monkeypatch.setattr(replicas_engine, "KILL_PATIENCE", 0.5)
    monkeypatch.setattr(replicas_engine, "INTERRUPT_PATIENCE", 0.5)
    monkeypatch.setattr(replicas_engine, "_read", fail)
    with pytest.raises(OSError) as error:
        turn.stop()
    assert error.value.errno == number
    wait_for(lambda: not turn.is_codex_there(), patience=60)
    with pytest.raises(OSError):
        recovered_without_a_look(turn).stop()
    monkeypatch.undo()
    assert turn.stop() == []


def recovered_without_a_look(turn):
    return replicas_engine.TurnProcesses(turn.mark, turn.pid, turn.started_ticks)


def test_a_process_table_that_is_not_there(begin, monkeypatch):
    """An empty /proc shows nobody, and that is no answer either."""
    turn = begin()
    monkeypatch.setattr(replicas_engine, "_look", lambda call, path: None)
    monkeypatch.setattr(replicas_engine, "TERMINATE_PATIENCE", 0.1)
    monkeypatch.setattr(replicas_engine, "KILL_PATIENCE", 0.1)
    with pytest.raises(OSError):
        turn.stop()
    wait_for(lambda: not turn.is_codex_there(), patience=60)


def check_stopping_without_descriptors(begin):
    turn = begin("setsid sleep 300 & wait")
    wait_for(lambda: len(turn.find()) == 2)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        with pytest.raises(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert turn.stop() == []
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert turn.find() == set()


def test_no_descriptor_is_left(begin):
    """One is kept for the looks."""
    check_stopping_without_descriptors(begin)


SOMEBODY_ELSES = """\
import os, subprocess, sys, time
sys.path.insert(0, %r)
import replicas_engine
replicas_engine.prctl(replicas_engine.PR_SET_CHILD_SUBREAPER, 1)
for patience in ("INTERRUPT_PATIENCE", "TERMINATE_PATIENCE", "KILL_PATIENCE"):
    setattr(replicas_engine, patience, 0.2)
turn = replicas_engine.TurnProcesses.create(7, "a mark")
replicas_engine.start_process(["setpriv", "--reuid=65534", "sleep", %r], turn,
                              stdout=subprocess.DEVNULL)
while not (replicas_engine.command_of(turn.pid) or "").startswith("sleep"):
    time.sleep(0.01)
print(turn.stop(), turn.pid, turn.is_codex_there())
"""


def test_what_cannot_be_stopped_is_said():
    """Another user's process, and an engine that may not kill it."""
    program = ["setpriv", "--bounding-set=-kill", "--inh-caps=-kill"]
    if os.geteuid() != 0 or not works(program + ["true"]):
        conftest.unavailable("takes root and setpriv")
    number = unique()
    try:
        code = SOMEBODY_ELSES % (harness.ROOT, number)
        said = subprocess.run(program + [sys.executable, "-c", code], stdout=subprocess.PIPE,
                              universal_newlines=True, check=True).stdout
        pid, = sleepers(number)
        assert said == "%s %d True\n" % ([{"pid": pid, "command": "sleep " + number}], pid)
    finally:
        for pid in running(number):
            os.kill(pid, signal.SIGKILL)


def test_orphans_behind_a_child_that_is_not_waited_for(begin):
    """The dead of others are never in the way for long."""
    replicas_engine.prctl(replicas_engine.PR_SET_CHILD_SUBREAPER, 1)
    turn = begin("for i in 1 2 3; do sleep 0.1 & done")
    wait_for(lambda: not is_alive(turn.pid))
    before = replicas_engine.reap_orphans()
    turn.child.wait()
    wait_for(lambda: replicas_engine.reap_orphans() >= before and not zombies_of(os.getpid()))


def test_marks(begin):
    turn = begin()
    assert replicas_engine.marks_of(turn.pid) == replicas_engine.marks_for(MARK)
    turn.stop()
    assert replicas_engine.marks_of(turn.pid) == set()


def test_a_name_with_anything_in_it(tmp_path):
    """proc(5): the name in /proc/<pid>/stat may hold blanks and brackets."""
    program = str(tmp_path / ") Z 1 (")
    os.symlink("/bin/sleep", program)
    child = subprocess.Popen([program, "300"])
    try:
        wait_for(lambda: command_of(child.pid)[1:2] == [b"300"])
        entry = replicas_engine.process(child.pid)
        assert entry.parent == os.getpid() and entry.state in (b"S", b"R")
        assert entry.session == os.getsid(0) and entry.started_ticks > 0
    finally:
        child.kill()
        child.wait()


# Control groups

def test_a_turn_in_a_control_group(control_groups, begin):
    turn = begin("setsid -f env -i sleep 300; exec sleep 300")
    other = begin(mark=MARK[::-1])
    wait_for(lambda: len(turn.find()) == 2)
    folder = turn.cgroup.folder
    assert turn.saved()["cgroup"] == folder and other.cgroup.folder != folder
    assert turn.stop() == [] and turn.cgroup.is_empty()
    assert turn.child.returncode == -signal.SIGINT
    assert other.child.poll() is None
    turn.discard()
    assert not os.path.exists(folder) and os.path.exists(other.cgroup.folder)


@pytest.mark.parametrize("kernel", ["5.14", "older", "much older"])
@pytest.mark.parametrize("trick", ["", "trap '' INT TERM; ", "kill -STOP $$; "])
def test_another_engines_control_group(control_groups, begin, monkeypatch, kernel, trick):
    """Whether or not there is cgroup.kill or cgroup.freeze, and nobody who is deaf or stopped."""
    absent = {"5.14": (), "older": ("cgroup.kill",), "much older": ("cgroup.kill", "cgroup.freeze")}
    write = replicas_engine.ControlGroup._write

    def write_if_there(group, name, text):
        write(group, name + ".absent" if name in absent[kernel] else name, text)

    monkeypatch.setattr(replicas_engine.ControlGroup, "_write", write_if_there)
    monkeypatch.setattr(replicas_engine, "INTERRUPT_PATIENCE", 0.5)
    turn = begin(trick + "setsid -f env -i sleep 300; sleep 300; :")
    if "STOP" not in trick:
        wait_for(lambda: len(turn.find()) == 3)
    other = recovered(turn)
    assert other.cgroup.folder == turn.cgroup.folder
    with waited_for(turn):
        assert other.stop() == []
    assert other.cgroup.is_empty()


@pytest.mark.parametrize("lie", [7, "", "/", "/sys/fs/cgroup", "/sys/fs/cgroup/unified",
                                 "/etc/replicas-turn-7-%s", ["/sys/fs/cgroup"]],
                         ids=repr)
def test_a_control_group_that_is_no_turns(lie):
    lie = lie.replace("%s", MARK) if isinstance(lie, str) else lie
    turn = replicas_engine.TurnProcesses.from_saved({"mark": MARK, "codex": {}, "cgroup": lie})
    assert turn.cgroup is None


def test_a_control_group_of_another_turn(control_groups, begin):
    turn = begin()
    saved = dict(turn.saved(), mark=MARK[::-1])
    assert replicas_engine.TurnProcesses.from_saved(saved).cgroup is None
    saved = dict(turn.saved(), cgroup=turn.cgroup.folder + "/../" + os.path.basename(
        turn.cgroup.folder))
    assert replicas_engine.TurnProcesses.from_saved(saved).cgroup is None


def test_a_script_that_starts_codex_at_once(control_groups, begin, monkeypatch):
    """What was there before the script itself was put in is put in behind it."""
    add = replicas_engine.ControlGroup.add

    def add_late(group, pid):
        if not group.pids():
            wait_for(lambda: sum(entry.parent == pid for _, entry in
                                 replicas_engine.processes()) == 2)
        add(group, pid)

    monkeypatch.setattr(replicas_engine.ControlGroup, "add", add_late)
    turn = begin("sleep 300 & sleep 300 & wait", at_once=True)
    assert len(turn.find()) == 3
    assert turn.stop() == []


def test_a_process_that_stays_in_its_turns_control_group(control_groups, begin):
    """In one below it, even; and the group goes when the process has gone, at another turn's end.
    """
    turn = begin("setsid -f sleep 300")
    turn.child.wait()
    server, = turn.find()
    below = turn.cgroup.folder + "/below"
    os.mkdir(below)
    with open(below + "/cgroup.procs", "w", encoding="ascii") as file:
        file.write(str(server))
    assert turn.find() == {server} and not turn.cgroup.is_empty()
    turn.discard()
    assert os.path.exists(below)
    os.kill(server, signal.SIGKILL)
    wait_for(turn.cgroup.is_empty)
    other = begin(mark=MARK[::-1])
    other.stop()
    other.discard()
    assert not os.path.exists(turn.cgroup.folder)


def test_a_control_group_when_no_descriptor_is_left(control_groups, begin):
    check_stopping_without_descriptors(begin)
