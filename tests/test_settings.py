"""Settings: what the environment and .env may say, and what stops the start."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest

import conftest
import harness
import replicas_engine
from replicas_engine import ENGINE_SETTINGS, Settings, SettingsError, parse_dotenv


def test_defaults():
    settings = Settings({"HOME": "/home/someone"})
    assert settings.secret is None
    assert (settings.host, settings.port) == (None, 3737)
    assert settings.workspace == "/home/someone"
    assert settings.codex_home == "/home/someone/.codex"
    assert settings.state == "/home/someone/.local/state/replicas-engine"
    assert settings.sandbox == "workspace-write"
    assert settings.model is None
    assert (settings.idle_timeout, settings.turn_timeout) == (1800, 0)
    assert settings.max_body == 33554432
    assert settings.max_connections == 256
    assert settings.max_history == 4294967296
    assert not settings.development


def test_fractions_of_seconds():
    settings = Settings({"REPLICAS_ENGINE_IDLE_TIMEOUT": "0.5", "REPLICAS_ENGINE_TURN_TIMEOUT": "7"})
    assert (settings.idle_timeout, settings.turn_timeout) == (0.5, 7)


def test_workspace_without_a_home():
    assert Settings({}).workspace == "/home/ubuntu"


@pytest.mark.parametrize("env, state", [
    ({"REPLICAS_ENGINE_STATE": "/a", "STATE_DIRECTORY": "/b"}, "/a"),
    ({"STATE_DIRECTORY": "/b:/c", "XDG_STATE_HOME": "/d"}, "/b"),
    ({"XDG_STATE_HOME": "/d"}, "/d/replicas-engine"),
    ({"XDG_STATE_HOME": "relative"}, "/h/.local/state/replicas-engine"),
    ({"REPLICAS_ENGINE_STATE": "~/x"}, "/h/x"),
    ({"REPLICAS_ENGINE_STATE": ""}, "/h/.local/state/replicas-engine"),
])
def test_state_directory(env, state):
    assert Settings(dict(env, HOME="/h")).state == state


def test_sandbox_config_leaves_it_to_codex():
    assert Settings({"REPLICAS_ENGINE_SANDBOX": "config"}).sandbox is None


def test_secret_is_bytes_without_blanks_around():
    assert Settings({"REPLICAS_ENGINE_SECRET": " sé\n"}).secret == "sé".encode()


WRONG = [
    ("PORT", "abc"), ("PORT", "-1"), ("PORT", "65536"), ("PORT", "80.5"), ("ANY", "a\0b"), ("PORT", "٣"),
    ("REPLICAS_ENGINE_IDLE_TIMEOUT", "1h"), ("REPLICAS_ENGINE_TURN_TIMEOUT", "-5"),
    ("REPLICAS_ENGINE_MAX_BODY", "0"), ("REPLICAS_ENGINE_MAX_CONNECTIONS", "0"),
    ("REPLICAS_ENGINE_SANDBOX", "none"), ("REPLICAS_ENGINE_SANDBOX", "Read-Only"),
    ("REPLICAS_ENGINE_MODEL", "a\nb"), ("REPLICAS_ENGINE_MODEL", "m" * 201),
    ("REPLICAS_ENGINE_SECRET", "a\x01b"),
]


@pytest.mark.parametrize("name, value", WRONG)
def test_what_cannot_be_used_is_named(name, value):
    with pytest.raises(SettingsError, match=name):
        Settings({name: value})


@pytest.mark.parametrize("name, value", [("PORT", "abc"), ("REPLICAS_ENGINE_SANDBOX", "none")])
def test_a_wrong_setting_stops_the_start(tmp_path, name, value):
    run = subprocess.run([sys.executable, harness.MODULE], cwd=str(tmp_path), timeout=harness.PATIENCE,
                         env={"HOME": str(tmp_path), name: value}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT)
    assert run.returncode == 2
    lines = run.stdout.decode().splitlines()
    assert len(lines) == 1 and "%s=%s" % (name, value) in lines[0]


def test_a_secret_that_no_header_can_carry_is_not_shown(tmp_path):
    run = subprocess.run([sys.executable, harness.MODULE], cwd=str(tmp_path), timeout=harness.PATIENCE,
                         env={"HOME": str(tmp_path), "REPLICAS_ENGINE_SECRET": "tell\x01nobody"},
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.returncode == 2
    assert b"REPLICAS_ENGINE_SECRET" in run.stdout and b"nobody" not in run.stdout


def test_dotenv():
    assert parse_dotenv(
        "# a comment\n"
        "PLAIN=value\n"
        "export EXPORTED=yes\r\n"
        "SPACED =  two words  \n"
        "COMMENTED=value # not this\n"
        "HASH=a#b\n"
        "QUOTED='a#b'\n"
        "SINGLE='one # $two \\n'\n"
        "DOUBLE=\"line\\nand\\t\\\"quotes\\\"\" # gone\n"
        "BACK=`it's \"this\"`\n"
        "LINES=\"first\nsecond\"\n"
        "EMPTY=\n"
        "this is no assignment\n"
        "YAML: too\n"
        "EQUALS=a=b\n"
        "LAST=end"
    ) == {"PLAIN": "value", "EXPORTED": "yes", "SPACED": "two words", "COMMENTED": "value",
          "HASH": "a", "QUOTED": "a#b", "SINGLE": "one # $two \\n",
          "DOUBLE": "line\nand\\t\\\"quotes\\\"", "BACK": "it's \"this\"",
          "LINES": "first\nsecond", "EMPTY": "", "YAML": "too", "EQUALS": "a=b", "LAST": "end"}


PIECES = ["A", "B", "export", "export ", "=", ": ", ":", "," " = ", " ", "\t", "\n", "\n", "\r\n",
          "\r", "'", '"', "`", "\\'", '\\"', "\\`", "\\n", "\\r", "\\t", "\\\\", "#", " # c", "x",
          "pa#ss", "y z", "\u00a0", "\ufeff", "\x0b", "\x1c", "\x85", "é", "-", "._", "0", "A=",
          "B='", 'C="', "D=`"]


def test_dotenv_is_read_as_dotenv_reads_it():
    package = os.path.join(harness.ROOT, ".cache", "dotenv", "node_modules", "dotenv")
    if not os.path.isdir(package) or not shutil.which("node"):
        conftest.unavailable("the npm package dotenv is not in .cache: see tests/run")
    source = random.Random(17)
    texts = ["".join(source.choice(PIECES) for _ in range(source.randrange(1, 16)))
             for _ in range(20000)]
    program = ("const {parse} = require(process.argv[1]); process.stdout.write(JSON.stringify("
               "JSON.parse(require('fs').readFileSync(0, 'utf8')).map(text => parse(text))))")
    node = subprocess.run(["node", "-e", program, package], input=json.dumps(texts).encode(),
                          stdout=subprocess.PIPE, check=True, timeout=harness.PATIENCE)
    for text, expected in zip(texts, json.loads(node.stdout.decode())):
        assert parse_dotenv(text) == expected, text


def test_dotenv_takes_linear_time():
    """A pattern that tries again from everywhere takes the better part of an hour for these."""
    program = ("import replicas_engine\n"
               "for begin in ('', \"A='\", 'A=\"', 'A=', 'A', 'A:'):\n"
               "    for piece in ('x', '\\n', ' ', 'A=', \"A='\", \"\\\\'\", \"\\\\'  \", 'export ', '#'):\n"
               "        replicas_engine.parse_dotenv(begin + piece * (10 ** 6 // len(piece)))\n")
    subprocess.run([sys.executable, "-c", program], env=dict(os.environ, PYTHONPATH=harness.ROOT),
                   check=True, timeout=5 * harness.PATIENCE)


def test_the_environment_wins_over_dotenv(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("PORT=1111\nREPLICAS_ENGINE_MODEL=from-file\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"PORT": "2222", "HOME": str(tmp_path)})
    settings = Settings.from_process()
    assert (settings.port, settings.model) == (2222, "from-file")


def test_an_engine_reads_dotenv(make_engine):
    engine = make_engine(start=False, REPLICAS_ENGINE_SECRET=None)
    with open(os.path.join(engine.folder, ".env"), "w") as file:
        file.write("REPLICAS_ENGINE_SECRET=from-the-file\nOPENAI_API_KEY=a-key\n")
    engine.start()
    assert engine.request("GET", "/ping", secret="from-the-file").status == 200
    engine.request("POST", "/codex/send", {"message": "hi"}, secret="from-the-file")
    env = engine.calls()[0]["env"]
    assert env["OPENAI_API_KEY"] == env["CODEX_API_KEY"] == "a-key"
    assert "REPLICAS_ENGINE_SECRET" not in env


def test_a_dotenv_that_is_a_folder_is_passed_over(make_engine):
    engine = make_engine(start=False)
    os.mkdir(os.path.join(engine.folder, ".env"))
    assert engine.start().get("/ping").status == 200
    harness.wait_for(lambda: "warning the file .env can't be read: Is a directory" in engine.log())


def test_importing_the_module_does_nothing(tmp_path):
    program = ("import os, threading; os.environ['PORT'] = 'abc'; import replicas_engine; "
               "print(replicas_engine.application.runner, threading.active_count(), os.listdir('.'))")
    run = subprocess.run([sys.executable, "-c", program], cwd=str(tmp_path), timeout=harness.PATIENCE,
                         env=dict(os.environ, PYTHONPATH=harness.ROOT), stdout=subprocess.PIPE)
    assert run.stdout.split() == [b"None", b"1", b"[]"]


def test_the_settings_are_those_of_the_readme():
    with open(os.path.join(harness.ROOT, "README.md"), encoding="utf-8") as file:
        table = re.findall(r"^\| (`[A-Z_`, ]+`) \|", file.read(), re.MULTILINE)
    names = set(re.findall(r"[A-Z_]+", " ".join(table)))
    assert {name for name in names if name.startswith("REPLICAS_ENGINE_")} == set(ENGINE_SETTINGS)
    with open(replicas_engine.__file__, encoding="utf-8") as file:
        module = file.read()
    for name in names - {"REPLICAS_ENGINE_SECRET"}:
        assert '"%s"' % name in module or name in ENGINE_SETTINGS, name


# What can be used, but hardly as it is meant

def problems_of(folder, monkeypatch, **env):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(os, "environ", dict(env, HOME=str(folder)))
    return ["%(problem)s: %(details)s" % found for found in Settings.from_process().problems]


@pytest.mark.parametrize("name, says", [
    ("REPLICAS_ENGINE_SANDBOXES", "set REPLICAS_ENGINE_SANDBOX instead"),
    ("REPLICAS_ENGINE_STAT", "set REPLICAS_ENGINE_STATE instead"),
    ("REPLICAS_ENGINE_PORT", "set PORT instead"),
    ("REPLICAS_ENGINE_WORKSPACE", "set WORKSPACE_HOME instead"),
    ("REPLICAS_ENGINE_TYPO", "README lists them"),
    ("REPLICAS_ENGINE_" + 40 * "Q", "README lists them")])
def test_a_name_that_only_looks_like_a_setting(tmp_path, monkeypatch, name, says):
    found, = problems_of(tmp_path, monkeypatch, **{name: "1"})
    assert found.startswith(name + " is not a setting") and says in found


def test_dotenv_with_lines_that_set_nothing(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("# a comment\n\nA='one\ntwo'\nPORT 3737\nB=1\n  export C\n")
    (tmp_path / ".env").chmod(0o600)
    assert problems_of(tmp_path, monkeypatch) == [
        "lines of the file .env set nothing: 5, 7: write NAME=value, or # in front of it"]


def test_a_dotenv_that_others_can_read(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("PORT=1\n")
    (tmp_path / ".env").chmod(0o640)
    assert problems_of(tmp_path, monkeypatch) == [
        "other users can read the file .env: chmod 600 .env"]


def test_a_secret_in_dotenv_is_the_agents_to_read(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("REPLICAS_ENGINE_SECRET=a\n")
    (tmp_path / ".env").chmod(0o600)
    found, = problems_of(tmp_path, monkeypatch)
    assert "agent can read REPLICAS_ENGINE_SECRET" in found
    assert problems_of(tmp_path, monkeypatch, REPLICAS_ENGINE_SECRET="b") == []


def test_a_dotenv_that_is_a_pipe_does_not_hold_up_the_start(tmp_path, monkeypatch):
    os.mkfifo(str(tmp_path / ".env"))
    found, = problems_of(tmp_path, monkeypatch)
    assert ".env can't be read" in found and "regular file" in found
