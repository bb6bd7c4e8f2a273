"""The process as a whole: its command line, its start and its end, its log."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
import types

import pytest

import conftest
import harness
import replicas_engine
from harness import script, wait_for
from replicas_engine import Problems, Settings


def run(*arguments, **options):
    return subprocess.run([sys.executable, harness.MODULE, *arguments], timeout=harness.PATIENCE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def test_version():
    result = run("--version")
    assert (result.returncode, result.stdout) == (
        0, b"replicas-engine %s\n" % replicas_engine.__version__.encode())


def test_help():
    result = run("--help")
    assert result.returncode == 0
    for word in (b"--check", b"--version", b"REPLICAS_ENGINE_SECRET", b"README.md"):
        assert word in result.stdout


def test_an_unknown_option():
    result = run("--chekc")
    assert result.returncode == 2 and b"--chekc" in result.stdout


@pytest.fixture
def complete(tmp_path):
    """An environment in which --check finds everything."""
    for name in ("workspace", ".codex"):
        (tmp_path / name).mkdir()
    return {"HOME": str(tmp_path), "CODEX_PATH": harness.STAND_IN_CODEX, "PATH": os.environ["PATH"],
            "WORKSPACE_HOME": str(tmp_path / "workspace"), "CODEX_API_KEY": "k",
            "REPLICAS_ENGINE_SECRET": harness.SECRET, "TMPDIR": str(tmp_path / "tmp"),
            "REPLICAS_ENGINE_SANDBOX": "danger-full-access", "HOST": "127.0.0.1", "PORT": "0"}


def check(env):
    result = run("--check", env=env, cwd=env["HOME"])
    return result.returncode, result.stdout.decode("utf-8", "replace")


def test_check_finds_everything(complete):
    status, output = check(complete)
    assert status == 0, output
    assert all(line.startswith("ok ") for line in output.splitlines())
    assert "version 0.169.0" in output


@pytest.mark.parametrize("change, says", [
    ({"CODEX_PATH": "/nowhere"}, "CODEX_PATH=/nowhere"),
    ({"CODEX_PATH": None, "PATH": "/nowhere"}, "npm install -g @openai/codex"),
    ({"CODEX_PATH": "/bin/true"}, "does not say its version"),
    ({"CODEX_API_KEY": None}, "OPENAI_API_KEY"),
    ({"REPLICAS_ENGINE_SECRET": None}, "REPLICAS_ENGINE_SECRET"),
    ({"WORKSPACE_HOME": "/nowhere"}, "WORKSPACE_HOME"),
    ({"REPLICAS_ENGINE_STATE": "/dev/null/nowhere"}, "REPLICAS_ENGINE_STATE"),
])
def test_check_says_what_is_missing(complete, change, says):
    env = {name: value for name, value in dict(complete, **change).items() if value}
    status, output = check(env)
    assert status == 1
    missing = [line for line in output.splitlines() if line.startswith("MISSING")]
    if missing and shutil_which_codex(change):
        pytest.skip("this machine has a Codex in one of npm's global places")
    assert len(missing) == 1 and says in missing[0]


def shutil_which_codex(change):
    return "PATH" in change and any(
        os.path.exists(os.path.join(place, "codex")) for place in replicas_engine.GLOBAL_PLACES)


def test_check_takes_a_login_for_a_key(complete, tmp_path):
    login, env = tmp_path / ".codex" / "auth.json", dict(complete)
    del env["CODEX_API_KEY"]
    for text, why in (("", "it is not JSON"), ('{"auth_mode":"apikey","last_refresh":"2026",'
                                                '"OPENAI_API_KEY":null}', "no login"),
                      ('{"tokens":null}', "no login"), ("\xff", "UTF-8")):
        login.write_text(text, "latin-1")
        status, output = check(env)
        assert status == 1 and re.search("MISSING key.*auth.json: .*%s" % why, output)
    login.write_text('{"tokens":{"access_token":"x"}}')
    status, output = check(env)
    assert status == 0 and "the login in %s" % login in output


# The same problems, found by --check, told at the start, and in GET /codex/status

def find_problems(env):
    settings = Settings(env)
    problems = Problems(settings, replicas_engine.CodexFinder(settings))
    problems.try_out()
    return {found["problem"]: found["details"] for found in problems.find()}


def test_no_problems(complete):
    assert find_problems(complete) == {}


def test_a_secret_that_can_be_guessed(complete):
    (text, remedy), = find_problems(dict(complete, REPLICAS_ENGINE_SECRET="15 characters..")).items()
    assert "15 characters" in text and "16" in remedy


def test_a_directory_that_cannot_be_written_is_not_to_be_made(complete, monkeypatch):
    conftest.need("user namespaces")        # or there is another problem
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != complete["WORKSPACE_HOME"]
                        and access(path, mode))
    (text, remedy), = find_problems(complete).items()
    assert "can't be written" in text and "make it" not in remedy and "WORKSPACE_HOME" in remedy
    assert find_problems(dict(complete, REPLICAS_ENGINE_SANDBOX="read-only")) == {}


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_check_prints_any_path(complete, encoding):
    env = dict(complete, PYTHONIOENCODING=encoding, WORKSPACE_HOME="/nowhere/\xfc\udcff")
    status, output = check(env)
    assert status == 1 and "Traceback" not in output
    assert "MISSING workspace: WORKSPACE_HOME=/nowhere/" in output
    assert "\nok      port: " in output     # it goes on to its end


def test_a_relative_path_where_the_working_directory_was_deleted(complete):
    program = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, sys.argv[1:])"
    for arguments, expected in (([], 2), (["--check"], 1)):
        folder = os.path.join(complete["HOME"], "gone")
        os.mkdir(folder)
        result = subprocess.run(
            [sys.executable, "-c", program, sys.executable, "-I", harness.MODULE, *arguments],
            env=dict(complete, WORKSPACE_HOME="here"), cwd=folder, timeout=harness.PATIENCE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert result.returncode == expected, result.stdout
        assert b"WORKSPACE_HOME=here" in result.stdout and b"Traceback" not in result.stdout


@pytest.mark.parametrize("name, folder", [("CODEX_HOME", ".codex"),
                                          ("REPLICAS_ENGINE_STATE", "workspace")])
def test_a_place_below_the_temporary_directory(complete, name, folder):
    env = dict(complete, **{name: os.path.join(complete["HOME"], folder, "..", folder)})
    assert find_problems(env) == {}
    (text, remedy), = find_problems(
        dict(env, TMPDIR=os.path.join(complete["HOME"], folder))).items()
    assert name in text and "lies below" in text and name in remedy


def test_a_full_disk(complete, monkeypatch):
    room = os.statvfs(complete["HOME"])
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(
        room[:4] + (0,) + room[5:]) if path == complete["WORKSPACE_HOME"] else room)
    (text, remedy), = find_problems(complete).items()
    assert "disk is full" in text and remedy == "make room"


def test_remedies_of_the_installed_service(complete, monkeypatch):
    monkeypatch.setattr(replicas_engine, "SETUP", sys.executable)
    env = dict(complete, STATE_DIRECTORY=complete["HOME"], WORKSPACE_HOME="/nowhere",
               REPLICAS_ENGINE_SECRET="short")
    assert list(find_problems(env).values()) == ["sudo replicas-engine-setup --secret -",
                                                 "sudo replicas-engine-setup"]
    env.update(WORKSPACE_HOME="/dev/null", CODEX_HOME=complete["TMPDIR"])
    assert list(find_problems(env).values())[1:] == ["sudo replicas-engine-setup"] * 2


def test_a_sandbox_that_could_not_be_tried_is_as_it_was(monkeypatch):
    """On a busy machine, or one that is out of processes: neither mended nor new."""
    for trial in (["sleep", "60"], ["/nowhere/bwrap"], ["sh", "-c", "kill -9 $$"]):
        for name in ("BWRAP_TRIAL", "SANDBOX_TRIAL"):
            monkeypatch.setattr(replicas_engine, name, trial)
        monkeypatch.setattr(replicas_engine, "TRIAL_PATIENCE", 0.2 if "60" in trial else 60.0)
        assert replicas_engine.try_sandbox() is None
        assert replicas_engine.try_sandbox("no") == "no"


@pytest.mark.parametrize("error, remedy", [
    (errno.EADDRINUSE, "set PORT to another"), (errno.EACCES, "set PORT to another"),
    (errno.EADDRNOTAVAIL, "set HOST to another"), (errno.EMFILE, "try again")])
def test_what_to_do_where_nobody_can_listen(complete, error, remedy):
    assert replicas_engine.listen_problem(
        Settings(complete), OSError(error, os.strerror(error)))["details"] == remedy


def test_a_sandbox_that_cannot_be_made(complete, tmp_path):
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho bwrap: No permissions >&2\nexit 1\n")
    bwrap.chmod(0o755)
    status, output = check(dict(complete, REPLICAS_ENGINE_SANDBOX="workspace-write",
                                PATH="%s:%s" % (tmp_path, complete["PATH"])))
    assert status == 1
    assert "MISSING sandbox: Codex's sandbox can't be made here: bwrap: No permissions" in output


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_settings_file_of_the_service_that_others_can_use(complete, monkeypatch, tmp_path, mode):
    monkeypatch.setattr(replicas_engine, "SETUP", sys.executable)
    monkeypatch.setattr(replicas_engine, "SETTINGS_FILE", str(tmp_path / "settings.env"))
    (tmp_path / "settings.env").touch()
    (tmp_path / "settings.env").chmod(mode)
    (text, remedy), = find_problems(dict(complete, STATE_DIRECTORY=complete["HOME"])).items()
    assert "settings.env" in text and remedy == "sudo replicas-engine-setup"


@pytest.mark.parametrize("host, port, listens, wrong", [
    (None, "3737", "[::]:3737", ""), ("::", "3737", "[::]:3737", ""),
    ("127.0.0.1", "3737", "127.0.0.1:3737", ""), ("127.0.0.1", "3737", "[::]:3737", "HOST"),
    (None, "3737", "127.0.0.1:3737", "HOST"), (None, "4000", "[::]:3737", "PORT"),
    ("127.0.0.1", "4000", "[::]:3737", "HOST PORT")])
def test_check_and_the_socket_of_systemd(complete, monkeypatch, tmp_path, host, port, listens, wrong):
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho 'Listen=%s (Stream)'\n" % listens)
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", "%s:%s" % (tmp_path, complete["PATH"]))
    monkeypatch.setattr(replicas_engine, "SETUP", sys.executable)
    env = dict(complete, STATE_DIRECTORY=complete["HOME"], HOST=host or "", PORT=port)
    _, problems = replicas_engine.check_port(Settings(env))
    assert [found["details"] for found in problems] == (["sudo replicas-engine-setup"] if wrong
                                                        else [])
    assert [" ".join(re.findall("(HOST|PORT)=", found["problem"])) for found in problems] == (
        [wrong] if wrong else [])


def test_problems_come_and_go_while_the_engine_runs(make_engine, tmp_path):
    """What the engine's user mends is seen without a restart, and what breaks is a warning."""
    bwrap, workspace = tmp_path / "bwrap", tmp_path / "workspace"
    bwrap.write_text("#!/bin/sh\necho bwrap: No permissions >&2\nexit 1\n")
    bwrap.chmod(0o755)
    workspace.mkdir()
    engine = make_engine(start=False, constants={"PROBLEMS_INTERVAL": 0.1}, CODEX_API_KEY="k",
                         WORKSPACE_HOME=str(workspace), REPLICAS_ENGINE_SANDBOX="workspace-write",
                         TMPDIR=str(tmp_path / "engine" / "tmp"))
    engine.env["PATH"] = "%s:%s" % (tmp_path, engine.env["PATH"])
    engine.start()

    def problems():
        return [found["problem"] for found in engine.status()["problems"]]
    wait_for(lambda: problems() == ["Codex's sandbox can't be made here: bwrap: No permissions"])
    bwrap.write_text("#!/bin/sh\n")
    wait_for(lambda: problems() == [])
    workspace.rmdir()
    gone = "WORKSPACE_HOME=%s: No such file or directory" % workspace
    wait_for(lambda: " warning %s: make it" % gone in engine.log())
    assert problems() == [gone] and engine.log().count("No permissions") == 1


@pytest.mark.parametrize("part", ["", "turns", "lock"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_state_directory_that_is_no_longer_what_it_was(make_engine, part, replaced):
    """And the status, which says it, doesn't die of it; nor is it made anew behind our back."""
    engine = make_engine(constants={"PROBLEMS_INTERVAL": 0.1})
    engine.send("hello")
    path = os.path.join(engine.state, part).rstrip("/")
    os.rename(path, path + ".old")
    if replaced:
        open(path, "w").close()
    status = engine.status()
    assert status["turn"] is None or part == "lock"
    if part != "lock":
        answer = engine.get("/codex/turns")
        assert answer.status == 503 and answer.json()["details"] == "%s/turns: %s directory%s" % (
            engine.state, "Not a" if replaced else "No such file or",
            ": see REPLICAS_ENGINE_STATE")
        assert "Traceback" not in engine.log()
    if part != "turns":                     # which the next turn makes anew
        wait_for(lambda: " warning REPLICAS_ENGINE_STATE=%s: " % engine.state in engine.log())
        assert sum(found["problem"].startswith("REPLICAS_ENGINE_STATE=")
                   for found in engine.status()["problems"]) == 1


def test_a_read_only_file_system_is_not_to_be_made(complete, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: types.SimpleNamespace(f_flag=os.ST_RDONLY))
    found = find_problems(complete)
    for name in ("WORKSPACE_HOME", "CODEX_HOME", "REPLICAS_ENGINE_STATE"):
        (text, remedy), = [pair for pair in found.items() if pair[0].startswith(name)]
        assert "can't be " in text and "read-only" in remedy and name in remedy
        assert "make it" not in remedy and "chown" not in remedy


def test_directories_that_cannot_be_made_or_entered(complete, monkeypatch):
    """The remedy is never to give away what is above them; and what is there isn't taken for
    missing."""
    access, lstat, state = os.access, os.lstat, complete["HOME"] + "/closed/state"
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/" and access(path, mode))
    (text, remedy), = find_problems(dict(complete, REPLICAS_ENGINE_STATE="/nowhere/state")).items()
    assert text == "REPLICAS_ENGINE_STATE=/nowhere/state: it can't be made in /"
    assert remedy == "sudo install -d -m 700 -o %d /nowhere/state, or set REPLICAS_ENGINE_STATE" % (
        os.geteuid())

    def closed(look):
        def look_into(path, **options):
            if path == state:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return look(path, **options)
        return look_into
    monkeypatch.setattr(os, "lstat", closed(lstat))
    monkeypatch.setattr(os, "stat", closed(os.stat))
    assert find_problems(dict(complete, REPLICAS_ENGINE_STATE=state)) == {
        "REPLICAS_ENGINE_STATE=%s: Permission denied" % state: "let the engine's user in"}


def test_a_state_directory_that_is_closed(make_engine):
    """Requests are answered to the very end, and the status is one."""
    runner = make_engine(start=False).runner()
    runner.open()
    problems = Problems(runner.settings, runner.finder, runner.state)
    before = problems.find()
    runner.close()
    assert problems.find() == before and "STATE" not in str(before)


def test_a_state_directory_of_another_user(complete, monkeypatch):
    """An engine could not start on it: it makes it its own alone (chmod(2))."""
    os.makedirs(os.path.join(Settings(complete).state, "turns"))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    (text, remedy), = find_problems(complete).items()
    assert "not all of it is the engine's" in text and remedy.startswith("sudo chown -R ")


def test_a_state_directory_by_the_name_of_lock(complete):
    assert find_problems(dict(complete, REPLICAS_ENGINE_STATE=complete["HOME"] + "/block")) == {}
    assert not os.path.exists(complete["HOME"] + "/block")      # whoever looks makes nothing


@pytest.mark.parametrize("words, version", [
    ("git version 2.39.5", None), ("Python 3.11.7", None), ("codex-cli 0.169.0", "0.169.0"),
    ("Codex CLI v0.98.0", "0.98.0"), ("0.98.0-alpha.1", "0.98.0-alpha.1"),
    ("warning: old\ncodex-cli 0.50.0", "0.50.0")])
def test_a_program_that_is_no_codex(complete, tmp_path, words, version):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho '%s'\n" % words)
    program.chmod(0o755)
    settings = Settings(dict(complete, CODEX_PATH=str(program)))
    finder = replicas_engine.CodexFinder(settings)
    assert finder.version(finder.find()) == version
    assert [*find_problems(settings.env)] == ([] if version else [
        "%s does not say its version" % program])


def test_a_codex_that_was_too_slow_to_say_its_version_is_asked_again(make_engine, tmp_path):
    slow = tmp_path / "slow"
    slow.touch()
    codex = tmp_path / "codex"
    codex.write_text("#!/bin/sh\n[ -e '%s' ] && exec sleep 60\necho codex-cli 0.98.0\n" % slow)
    codex.chmod(0o755)
    engine = make_engine(CODEX_PATH=str(codex), constants={
        "PROBLEMS_INTERVAL": 0.1, "VERSION_PATIENCE": 0.3})
    wait_for(lambda: "does not say its version" in engine.log())
    slow.unlink()
    wait_for(lambda: engine.status()["codex"]["version"] == "0.98.0")


def test_a_file_system_without_a_size_is_not_full(complete):
    assert "disk is full" not in str(find_problems(dict(complete, WORKSPACE_HOME="/proc")))


@pytest.mark.parametrize("error, words", [
    (OSError(errno.EADDRINUSE, "Address already in use (while attempting to bind on address "
             "('127.0.0.1', 1))"), "Address already in use"),
    (OSError(errno.EROFS, "Read-only file system", "/x"), "Read-only file system"),
    (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:992)"),
     "wrong version number"),
    (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
     "Temporary failure in name resolution"),
    (MemoryError(), "Cannot allocate memory"), (ValueError("it is broken"), "it is broken"),
    (socket.timeout("timed out"), "timed out"), (KeyError("x"), "KeyError: 'x'"),
    (RuntimeError(), "RuntimeError"),
    (UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid start byte"), "byte 2 is not UTF-8")])
def test_errors_are_told_without_python(error, words):
    assert replicas_engine.words_of(error) == words


@pytest.mark.parametrize("error, text", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room there"),
    (OSError(errno.EROFS, "Read-only file system", b"/x"),
     "/x: Read-only file system: let the engine write there, or name another place"),
    (OSError(errno.EEXIST, "File exists", 7), "File exists: see README")])
def test_what_to_do_fits_the_error(error, text):
    assert replicas_engine.explanation(error, "see README") == text


def test_the_start_warns_of_problems(make_engine):
    engine = make_engine(CODEX_PATH="/bin/true", WORKSPACE_HOME="/nowhere",
                         REPLICAS_ENGINE_SECRET="short", REPLICAS_ENGINE_SANDBOXX="read-only")
    for text in ("/bin/true does not say its version", "WORKSPACE_HOME=/nowhere: No such file",
                 "REPLICAS_ENGINE_SECRET can be guessed", "Codex has no key and no login",
                 "REPLICAS_ENGINE_SANDBOXX is not a setting: set REPLICAS_ENGINE_SANDBOX instead"):
        wait_for(lambda: " warning " + text in engine.log(), text)


def test_check_and_the_port(complete):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, output = check(dict(complete, PORT=str(taken.getsockname()[1])))
    assert status == 1 and "set PORT to another" in output


def test_check_beside_a_running_engine(complete, engine):
    """All is well if it is the one of this state directory; else there would be no start."""
    port = str(engine.port)
    status, output = check(dict(complete, PORT=port, REPLICAS_ENGINE_STATE=engine.state))
    assert status == 0 and "an engine answers" in output
    status, output = check(dict(complete, PORT=port))
    assert status == 1 and re.search("MISSING port: HOST=127.0.0.1, PORT=%s can't be used: Address "
                                     "already in use; set PORT to another" % port, output)
    status, output = check(dict(complete, REPLICAS_ENGINE_STATE=engine.state))
    assert status == 1 and "another engine is running with the state directory %s, pid %d; " % (
        engine.state, engine.process.pid) in output


def test_a_port_in_use(make_engine, engine):
    second = make_engine("second", start=False, PORT=str(engine.port)).start(wait=False)
    assert second.process.wait(harness.PATIENCE) == 1
    assert ("error HOST=127.0.0.1, PORT=%d can't be used: Address already in use; set PORT to "
            "another\n" % engine.port) in second.log()


@pytest.mark.parametrize("port", [True, False])
def test_a_state_directory_in_use(make_engine, engine, port):
    """With the port of that engine, too."""
    second = make_engine("second", start=False, REPLICAS_ENGINE_STATE=engine.state,
                         PORT=str(engine.port if port else 0))
    second.start(wait=False)
    assert second.process.wait(harness.PATIENCE) == 1
    assert "another engine is running with the state directory %s, pid %d" % (
        engine.state, engine.process.pid) in second.log()


def test_who_has_no_state_directory_does_not_listen(make_engine, engine):
    """It would have taken the place of the socket of the engine that has it, had both been
    started at once; and whoever had connected to it would have been reset."""
    second = make_engine("second", start=False, REPLICAS_ENGINE_STATE=engine.state,
                         HOST="unix:engine.sock").start(wait=False)
    assert second.process.wait(harness.PATIENCE) == 1
    assert not os.path.exists(os.path.join(second.folder, "engine.sock"))


def test_a_state_directory_that_cannot_be_made(make_engine):
    engine = make_engine(start=False, REPLICAS_ENGINE_STATE="/proc/nowhere").start(wait=False)
    assert engine.process.wait(harness.PATIENCE) == 2
    assert "REPLICAS_ENGINE_STATE=/proc/nowhere" in engine.log()
    assert "Traceback" not in engine.log()


@pytest.mark.parametrize("host", ["999.1.1.1", "no such name"])
def test_a_host_that_is_none(make_engine, host):
    engine = make_engine(start=False, HOST=host).start(wait=False)
    assert engine.process.wait(harness.PATIENCE) == 2
    assert "HOST=" + host in engine.log() and "Traceback" not in engine.log()


def test_without_standard_error(make_engine):
    """What is opened first must not become standard error, where the log goes."""
    engine = make_engine(start=False)
    engine.port = harness.free_port()
    engine.env["PORT"] = str(engine.port)
    engine.process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"] + engine.program, env=engine.env,
        cwd=engine.folder)

    def answers():
        with contextlib.suppress(OSError):
            return engine.get("/ping").status == 200
    wait_for(answers)
    assert engine.send("hi")[-2].type == "turn.completed"
    assert engine.stop() == 0
    for folder, _, names in os.walk(engine.state):
        for name in names:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                assert "/ping 200" not in file.read()


def test_the_state_is_private(engine):
    engine.send("hi")
    for folder, _, files in os.walk(engine.state):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in files:
            mode = os.stat(os.path.join(folder, name)).st_mode
            assert stat.S_IMODE(mode) & 0o077 == 0 or name == "lock", name


def test_signals_that_were_blocked(make_engine):
    """By whoever started the engine: it ends when told, and Codex is none the worse."""
    engine = make_engine(start=False)
    engine.program = [sys.executable, "-c", "import os, signal, sys\n"
                      "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])\n"
                      "os.execv(sys.executable, sys.argv[1:])"] + list(engine.program)
    engine.start()
    engine.start_turn(harness.script({"thread": "new"}, {"sleep": 120}))
    codex = int(wait_for(lambda: re.search(r"codex pid (\d+)", engine.log())).group(1))
    for pid in (engine.process.pid, codex):
        assert int(harness._proc(pid, "status").partition(b"SigBlk:")[2].split()[0], 16) == 0
    assert engine.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_idle_engine_ends_when_told(engine, number):
    with socket.create_connection(("127.0.0.1", engine.port)) as idle:
        assert engine.stop(number) == 0
        assert idle.recv(1) == b""
    assert "stopped" in engine.log()


def test_without_a_secret_it_warns(make_engine):
    engine = make_engine(REPLICAS_ENGINE_SECRET=None)
    wait_for(lambda: "REPLICAS_ENGINE_SECRET is not set" in engine.log())
    assert engine.request("GET", "/health", secret=None).status == 200
    assert engine.request("GET", "/ping").status == 500


# Its log

def test_a_line_a_request(engine):
    engine.get("/health")
    engine.get("/ping?x=1")
    engine.get("/nowhere")
    engine.send("a message that nobody else may read")
    engine.request("GET", "/ping", secret="a wrong secret")
    lines = wait_for(lambda: engine.log().count(" ms,") == 4 and engine.log()).splitlines()
    # Each by the thread of its connection, after the answer: in any order.
    assert sorted(re.sub(r"[0-9.]+ ms,", "N ms,", line.split(" ", 2)[2]) for line in lines
                  if " ms," in line) == [
        "GET /nowhere 404 N ms, from 127.0.0.1", "GET /ping 200 N ms, from 127.0.0.1",
        "GET /ping 401 N ms, from 127.0.0.1", "POST /codex/send 200 N ms, from 127.0.0.1"]
    for line in lines:
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (debug|info|warning|error) ", line)
    assert "turn 1 started" in engine.log()
    wait_for(lambda: "turn 1 ended: turn.completed" in engine.log())   # by its own thread
    assert "nobody else" not in engine.log() and harness.SECRET not in engine.log()
    assert "wrong secret" not in engine.log() and "/health" not in engine.log()


def test_refused_secrets_are_warnings_and_few(engine):
    for _ in range(30):
        engine.request("GET", "/ping", secret="a wrong secret")
        engine.request("GET", "/ping", secret=None)
    wait_for(lambda: engine.log().count("GET /ping 401") == 60)
    assert engine.log().count(
        " warning a request from 127.0.0.1 was refused: Unauthorized: Invalid secret") == 1
    assert engine.log().count(" was refused: ") == 1


def test_development_logs_more(make_engine):
    engine = make_engine(NODE_ENV="development")
    engine.get("/health")
    wait_for(lambda: "GET /health 200" in engine.log())


def start_with_log(make_engine, log_fd):
    """An engine whose log goes to the descriptor, once it answers."""
    engine = make_engine(start=False)
    engine.port = harness.free_port()
    engine.env["PORT"] = str(engine.port)
    engine.process = subprocess.Popen([sys.executable, harness.MODULE], env=engine.env,
                                      cwd=engine.folder, stderr=log_fd)

    def answers():
        with contextlib.suppress(OSError):
            return engine.get("/ping").status == 200

    wait_for(answers)
    return engine


def fill_log(engine):
    """Have it log more lines, of 2 KB, than a pipe, a socket and the engine itself hold."""
    request = "GET /%s HTTP/1.1\r\nHost: x\r\nX-Replicas-Engine-Secret: %s\r\n\r\n" % (
        2000 * "x", harness.SECRET)
    with socket.create_connection(("127.0.0.1", engine.port), harness.PATIENCE) as sock:
        answers = sock.makefile("rb")
        for _ in range(50):
            sock.sendall(50 * request.encode())
            missing = 50
            while missing:
                line = answers.readline()
                assert line
                missing -= b"HTTP/1.1 404 " in line         # behind the last one's body


LOGS = {"pipe": os.pipe, "terminal": os.openpty,
        "socket": lambda: [sock.detach() for sock in socket.socketpair()]}


@pytest.mark.parametrize("kind", LOGS)
def test_a_log_that_nobody_reads_stops_nothing(make_engine, kind):
    """0.1.0 crashed on a pipe; a terminal is stopped by Ctrl-S, or belongs to a frozen tmux."""
    ends = LOGS[kind]()
    try:
        engine = start_with_log(make_engine, ends[1])
        fill_log(engine)
        assert engine.send("hi")[-2].type == "turn.completed"
        assert engine.stop() == 0
    finally:
        for fd in ends:
            os.close(fd)


def test_what_a_log_did_not_take_is_counted(make_engine):
    out, into = os.pipe()
    engine = start_with_log(make_engine, into)
    os.close(into)
    with open(out, "rb") as pipe:
        fill_log(engine)
        lines = iter(pipe.readline, b"")
        assert any(b"listening" in line for line in lines)

        def notice():
            engine.get("/ping")
            return re.search(rb"\((\d+) lines were dropped", pipe.readline())
        dropped = int(wait_for(notice).group(1))
        assert 1 <= dropped < 2500
        engine.process.terminate()
        assert b" stopped" in list(lines)[-1]
    assert engine.stop() == 0


def test_a_log_on_a_full_disk(make_engine):
    """RLIMIT_FSIZE stands in for the disk: EFBIG instead of ENOSPC."""
    engine = make_engine(start=False)
    engine.program = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh"] + engine.program
    engine.start()
    fill_log(engine)
    assert os.path.getsize(engine.log_path) <= 1024
    assert engine.get("/ping").status == 200
    assert engine.stop() == 0


def test_a_log_that_is_closed_stops_nothing(make_engine):
    out, into = os.pipe()
    engine = start_with_log(make_engine, into)
    os.close(into)
    os.close(out)
    assert engine.send("hi")[-2].type == "turn.completed"
    assert engine.stop() == 0


def test_journal_priorities(make_engine, tmp_path):
    """systemd.exec(5): $JOURNAL_STREAM names standard error's device and inode."""
    log = tmp_path / "journal"
    log.touch()
    status = os.stat(str(log))
    with open(str(log), "ab") as file:
        engine = make_engine(start=False)
        env = dict(engine.env, JOURNAL_STREAM="%d:%d" % (status.st_dev, status.st_ino),
                   REPLICAS_ENGINE_SECRET="", REPLICAS_ENGINE_STATE=str(tmp_path / "state"))
        process = subprocess.Popen([sys.executable, harness.MODULE], env=env, cwd=str(tmp_path),
                                   stderr=file)
        wait_for(lambda: "\n<4>REPLICAS_ENGINE_SECRET is not set" in log.read_text())
        process.terminate()
        process.wait()
    lines = log.read_text().splitlines()
    assert lines[0].startswith("<6>replicas-engine ") and lines[-1] == "<6>stopped"


# What must not end it, and what must

def make_altered(make_engine, *lines, **env):
    """An engine in which the lines of Python ran before its start; they find it as `engine`, and
    `wanted()` is true once the test has made the file wanted."""
    engine = make_engine(start=False, **env)
    engine.program = [sys.executable, "-W", "error", "-c", "\n".join((
        "import errno, os, re, signal, sys, threading, time",
        "sys.path.insert(0, %r)" % harness.ROOT,
        "import replicas_engine as engine",
        "def wanted(): return os.path.exists('wanted')",
        "def fail(*args, **keys): raise OSError(errno.EMFILE, 'Too many open files')",
        *lines,
        "sys.exit(engine.main([]))"))]
    return engine.start()


def want(engine):
    open(os.path.join(engine.folder, "wanted"), "w").close()


def limits(pid):
    """The soft and the hard limit of a process's descriptors."""
    with open("/proc/%d/limits" % pid) as file:
        return re.search(r"Max open files +(\d+) +(\d+)", file.read()).groups()


def test_the_descriptor_limit_is_raised_but_not_for_codex(make_engine):
    engine = make_engine(start=False)
    engine.program = ["sh", "-c", 'ulimit -S -n 200; ulimit -H -n 2000; exec "$@"', "sh",
                      *engine.program]
    engine.start()
    assert limits(engine.process.pid) == ("2000", "2000")
    engine.start_turn(script({"thread": "new"}, {"sleep": 60}))
    call = wait_for(engine.calls)[0]
    wait_for(lambda: limits(call["pid"]) == ("200", "2000"))
    engine.post("/codex/interrupt")


def test_many_inherited_descriptors(make_engine):
    """select(2) takes none above 1023."""
    engine = make_engine(start=False)
    engine.program = [sys.executable, "-c", "import os, resource, sys\n"
                      "limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
                      "resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))\n"
                      "for _ in range(1100): os.set_inheritable(os.dup(0), True)\n"
                      "os.execv(sys.argv[1], sys.argv[1:])", *engine.program]
    engine.start()
    assert engine.send("hi")[-2].type == "turn.completed"
    assert engine.stop() == 0


def test_a_main_thread_that_cannot_do_its_work(make_engine):
    engine = make_altered(make_engine, "engine.reap_orphans = fail")
    engine.process.send_signal(signal.SIGCHLD)
    wait_for(lambda: "the main thread could not" in engine.log())
    assert engine.get("/ping").status == 200
    assert engine.stop() == 0


def test_without_a_thread_to_be_had(make_engine, notifications):
    """An agent may fill the machine's process table, or the service's TasksMax."""
    engine = make_altered(
        make_engine, "start = threading.Thread.start",
        "def start_or_not(thread):",
        "    if wanted(): raise RuntimeError(\"can't start new thread\")",
        "    start(thread)",
        "threading.Thread.start = start_or_not", NOTIFY_SOCKET=notifications.getsockname())
    assert notifications.recv(100).startswith(b"READY=1")   # it has all threads that it needs
    with contextlib.closing(engine.connect()) as connection:
        connection.request("GET", "/health")
        assert connection.getresponse().read()
        want(engine)
        engine.process.send_signal(signal.SIGCHLD)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
    assert engine.stop() == 0
    assert "Traceback" not in engine.log()


def test_an_end_that_fails_is_one_all_the_same(make_engine):
    engine = make_altered(make_engine, "engine.CodexRunner.close = fail")
    assert engine.stop() == 0
    assert "Too many open files" in engine.log()


def test_an_accept_loop_that_hangs_ends_the_engine(make_engine):
    engine = make_altered(
        make_engine, "engine.HANG_LIMIT = 2",
        "def service_actions(server):",
        "    while wanted(): time.sleep(3600)",
        "    server.looks += 1",
        "engine.WSGIServer.service_actions = service_actions")
    want(engine)
    assert engine.process.wait(harness.PATIENCE) == -signal.SIGPROF
    assert "accept loop hangs" in engine.log() and "in service_actions" in engine.log()


def test_code_that_lets_no_other_thread_run_ends_the_engine(make_engine):
    engine = make_altered(
        make_engine, "engine.CPU_HANG_LIMIT = 3",
        "def service_actions(server):",
        "    server.looks += 1",
        "    if wanted(): re.match('(a+)+$', 50 * 'a' + 'b')",
        "engine.WSGIServer.service_actions = service_actions")
    want(engine)
    assert engine.process.wait(harness.PATIENCE) == -signal.SIGPROF
    assert "in service_actions" in engine.log()


def test_a_pause_of_the_machine_is_not_a_hang(make_engine):
    engine = make_altered(make_engine, "engine.HANG_LIMIT = 4", "engine.CPU_HANG_LIMIT = 3")
    engine.process.send_signal(signal.SIGSTOP)
    time.sleep(5)                           # the pause
    engine.process.send_signal(signal.SIGCONT)
    assert engine.send("hi")[-2].type == "turn.completed"
    assert engine.stop() == 0


# systemd's protocols, spoken by a test instead of systemd

@pytest.fixture
def notifications(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(harness.PATIENCE)
        yield sock


def test_the_status_line_names_the_turn_that_runs(make_engine, notifications, tmp_path):
    """And not the newest, which waits."""
    engine, gate = make_engine(NOTIFY_SOCKET=notifications.getsockname()), tmp_path / "gate"
    engine.start_turn(script({"thread": "new"}, {"wait_for": str(gate)}, {"complete": True}))
    for _ in range(2):
        engine.start_turn(script({"thread": "new"}, {"sleep": 30}), when_busy="queue")
    gate.touch()
    wait_for(lambda: notifications.recv(100) == b"STATUS=Running turn 2")


def test_notify_and_watchdog(make_engine, notifications):
    engine = make_engine(NOTIFY_SOCKET=notifications.getsockname(), WATCHDOG_USEC="4000000")
    assert notifications.recv(100) == b"READY=1\nSTATUS=Idle"
    assert notifications.recv(100) == b"WATCHDOG=1"
    engine.start_turn(script({"thread": "new"}, {"sleep": 30}))
    wait_for(lambda: notifications.recv(100) == b"STATUS=Running turn 1")
    wait_for(engine.calls)
    engine.post("/codex/interrupt")
    wait_for(lambda: notifications.recv(100) == b"STATUS=Idle")
    assert "NOTIFY_SOCKET" not in engine.calls()[0]["env"]
    assert "WATCHDOG_USEC" not in engine.calls()[0]["env"]
    engine.process.send_signal(signal.SIGTERM)
    wait_for(lambda: notifications.recv(100) == b"STOPPING=1")
    assert engine.process.wait(harness.PATIENCE) == 0


def test_the_status_line_tells_of_a_failure_until_a_turn_succeeds(make_engine, notifications):
    """Also over an interrupt, a restart, and kill -9, which is a failure itself."""
    engine = make_engine(NOTIFY_SOCKET=notifications.getsockname())
    failing = {"event": {"type": "turn.failed", "error": {"message": "boom"}}}
    engine.send(script({"thread": "new"}, failing))

    def comes(line):
        wait_for(lambda: notifications.recv(500).decode().endswith("STATUS=" + line), line)
    comes("Idle; turn 1 failed: boom")
    engine.start_turn(script({"thread": "new"}, {"sleep": 60}))
    comes("Running turn 2; turn 1 failed: boom")
    engine.post("/codex/interrupt")
    comes("Idle; turn 1 failed: boom")
    engine.send(script({"thread": "new"}, {"event": {"type": "turn.failed"}}))
    comes("Idle; turn 3 failed: Codex does not say why")
    wait_for(lambda: re.search(r" warning turn 3 ended: .* s: Codex does not say why\n",
                               engine.log()))
    engine.start_turn(script({"thread": "new"}, {"sleep": 60}))
    engine.post("/codex/interrupt")
    engine.restart()
    comes("Idle; turn 3 failed: Codex does not say why")
    engine.send(script({"thread": "new"}, {"line": json.dumps(
        {"type": "turn.failed", "error": {"message": "half \ud83d"}})}))
    comes("Idle; turn 5 failed: half ?")    # a lone surrogate, which UTF-8 does not have
    engine.restart()
    comes("Idle; turn 5 failed: half ?")
    engine.start_turn(script({"thread": "new"}, {"sleep": 60}))
    engine.kill()
    engine.start()
    comes("Idle; turn 6 failed: The engine ended unexpectedly during the turn and was started "
          "again")
    os.rename(engine.workspace, engine.workspace + ".gone")
    assert engine.post("/codex/send", {"message": "x"}).status == 503
    comes("Idle; a turn could not be started: The workspace directory is missing: " + (
        "%s is not a directory: make it, or set WORKSPACE_HOME" % engine.workspace))
    os.rename(engine.workspace + ".gone", engine.workspace)
    engine.send("hello")
    comes("Idle")


def test_a_mistake_of_the_client_is_no_error_of_the_engine(make_engine):
    engine = make_engine(STAND_IN_CODEX_VERSION="0.50.0")
    assert engine.post("/codex/send", {"message": "x", "reasoning_effort": "xhigh"}).status == 400
    wait_for(lambda: " info a turn could not be started: Invalid reasoning_effort" in engine.log())


def test_notifications_that_nobody_takes(make_engine, notifications):
    engine = make_engine(NOTIFY_SOCKET=notifications.getsockname(), WATCHDOG_USEC="4000000")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                sock.sendto(b"X=1", notifications.getsockname())
    assert engine.send("hi")[-2].type == "turn.completed"
    assert engine.stop() == 0


def test_a_socket_from_systemd(make_engine):
    """sd_listen_fds(3); the socket goes on being there while the engine is not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        engine = make_engine(start=False, LISTEN_FDS="1", HOST="0.0.0.0")
        engine.port = listener.getsockname()[1]

        program = ("import os, sys\nos.dup2(int(sys.argv[1]), 3)\n"
                   "os.environ['LISTEN_PID'] = str(os.getpid())\n"
                   "os.execv(sys.executable, [sys.executable, sys.argv[2]])")

        def start():
            with open(engine.log_path, "ab") as log_file:
                engine.process = subprocess.Popen(
                    [sys.executable, "-c", program, str(listener.fileno()), harness.MODULE],
                    env=engine.env, cwd=engine.folder, stderr=log_file,
                    pass_fds=[listener.fileno()])

        start()
        assert engine.send("hi")[-2].type == "turn.completed"
        assert "LISTEN_FDS" not in engine.calls()[0]["env"]
        assert engine.stop() == 0
        assert "listening on port %d of 127.0.0.1" % engine.port in engine.log()
        assert re.search("warning HOST=0.0.0.0 and PORT=0 are passed over.*: make them agree",
                         engine.log())
        waiting = engine.connect()
        waiting.request("GET", "/health")       # nobody is there, and nothing is refused
        start()
        assert waiting.getresponse().status == 200
        waiting.close()


def test_several_sockets_from_systemd(make_engine, tmp_path):
    path = str(tmp_path / "engine.sock")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        engine = make_engine(start=False)
        engine.port = one.getsockname()[1]
        engine.program = [
            sys.executable, "-c", "import fcntl, os, sys\n"
            "fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 50) for fd in sys.argv[1:3]]\n"
            "for n, fd in enumerate(fds): os.dup2(fd, 3 + n)\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2')\n"
            "os.execv(sys.argv[3], sys.argv[3:])", str(other.fileno()), str(one.fileno()),
            *engine.program]
        with open(engine.log_path, "ab") as log_file:
            engine.process = subprocess.Popen(
                engine.program, env=engine.env, cwd=engine.folder, stderr=log_file,
                pass_fds=[one.fileno(), other.fileno()])
        assert engine.get("/ping").status == 200
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert b" 200 " in sock.recv(1000)
        places = "on unix:%s and port %d of 127.0.0.1," % (path, engine.port)
        wait_for(lambda: places in engine.log(), "the log")
        assert engine.stop() == 0
