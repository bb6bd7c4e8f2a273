"""Codex: finding it, its version, its arguments, its environment, and `--check`."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import types

import pytest

import harness
import replicas_engine
from conftest import real_codex
from replicas_engine import (HTTPError, CodexFinder, Settings, TurnOptions, codex_arguments,
                             codex_environment, config_argument)

REAL_VERSIONS = harness.CODEX_VERSIONS
TRIPLE, DEPENDENCY = replicas_engine.PLATFORMS.get(os.uname().machine, (None, None))
ON_A_PLATFORM = pytest.mark.skipif(TRIPLE is None, reason="there is no Codex for this machine")


def program(path, text="#!/bin/sh\necho codex-cli 1.2.3\n", mode=0o755):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    return path


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Find Codex on a machine whose home is empty and that has none in its global places."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("GLOBAL_PLACES", "NODE_VERSIONS"):
        places = [place for place in getattr(replicas_engine, name) if place.startswith("~")]
        monkeypatch.setattr(replicas_engine, name, places)

    def find(**env):
        settings = Settings(dict({"HOME": str(home), "PATH": str(tmp_path / "nothing")}, **env))
        return CodexFinder(settings).find()
    find.home = home
    return find


def refusal(find, **env):
    with pytest.raises(HTTPError) as caught:
        find(**env)
    assert caught.value.status == 503
    assert caught.value.body["error"] == "Codex CLI not found"
    return caught.value.body["details"]


# Finding it

def test_codex_path_is_taken_before_all_others(find, tmp_path):
    chosen = program(tmp_path / "chosen" / "my codex")
    program(tmp_path / "bin" / "codex")
    assert find(CODEX_PATH=str(chosen), PATH=str(tmp_path / "bin")).program == str(chosen)


def test_a_relative_codex_path_is_relative_to_the_engines_directory(find, tmp_path, monkeypatch):
    program(tmp_path / "tools" / "codex")
    monkeypatch.chdir(tmp_path)
    assert find(CODEX_PATH="tools/codex").program == str(tmp_path / "tools" / "codex")


def test_a_codex_path_in_the_home_may_begin_with_a_tilde(find):
    chosen = program(find.home / "codex")
    assert find(CODEX_PATH="~/codex").program == str(chosen)


@pytest.mark.parametrize("kind", ["missing", "directory", "not executable", "dangling link"])
def test_a_codex_path_that_is_no_program_is_refused_and_nothing_else_is_taken(find, tmp_path, kind):
    path = tmp_path / "chosen"
    if kind == "directory":
        path.mkdir()
    elif kind == "not executable":
        program(path, mode=0o644)
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "gone")
    program(tmp_path / "bin" / "codex")
    details = refusal(find, CODEX_PATH=str(path), PATH=str(tmp_path / "bin"))
    assert details == "CODEX_PATH=%s is not an executable file" % path


def test_path_is_searched_in_its_order_for_what_can_be_run(find, tmp_path):
    (tmp_path / "a" / "codex").mkdir(parents=True)
    program(tmp_path / "b" / "codex", mode=0o644)
    right = program(tmp_path / "c" / "codex")
    program(tmp_path / "d" / "codex")
    path = os.pathsep.join(str(tmp_path / name) for name in "abcd")
    assert find(PATH=path).program == str(right)


def test_a_relative_folder_on_path_is_no_folder_of_the_workspace(find, tmp_path, monkeypatch):
    program(tmp_path / "bin" / "codex")
    monkeypatch.chdir(tmp_path)
    assert find(PATH="bin").program == str(tmp_path / "bin" / "codex")


@pytest.mark.parametrize("place", [
    ".npm-global/bin/codex", ".local/bin/codex", ".volta/bin/codex", ".bun/bin/codex",
    ".local/share/pnpm/codex", ".nvm/versions/node/v22.1.0/bin/codex",
    ".local/share/fnm/node-versions/v22.1.0/installation/bin/codex"])
def test_global_places_are_searched_when_path_has_none(find, place):
    installed = program(find.home / place)
    assert find().program == str(installed)


def test_path_comes_before_the_global_places(find, tmp_path):
    program(find.home / ".npm-global" / "bin" / "codex")
    assert find(PATH=str(program(tmp_path / "bin" / "codex").parent)).program == str(
        tmp_path / "bin" / "codex")


def test_without_codex_the_answer_says_how_to_get_it(find):
    details = refusal(find)
    assert "npm install -g @openai/codex" in details and "CODEX_PATH" in details


def test_codex_is_found_as_soon_as_it_is_installed(find, tmp_path):
    settings = Settings({"HOME": str(find.home), "PATH": str(tmp_path / "bin")})
    finder = CodexFinder(settings)
    with pytest.raises(HTTPError):
        finder.find()
    program(tmp_path / "bin" / "codex")
    assert finder.find().program == str(tmp_path / "bin" / "codex")


# npm's wrapper and the native binary behind it

def npm_package(prefix, layout):
    """An npm install below `prefix`: the wrapper's path, the native binary's, PATH's folder."""
    package = prefix / "lib" / "node_modules" / "@openai" / "codex"
    wrapper = program(package / "bin" / "codex.js", "#!/usr/bin/env node\n")
    vendor = {"in the package": package / "vendor",
              "nested": package / "node_modules" / "@openai" / str(DEPENDENCY) / "vendor",
              "hoisted": package.parent / str(DEPENDENCY) / "vendor"}[layout]
    names = ("codex/codex", "path") if layout == "in the package" else ("bin/codex", "codex-path")
    native = program(vendor / str(TRIPLE) / names[0])
    return wrapper, native, vendor / str(TRIPLE) / names[1]


@ON_A_PLATFORM
@pytest.mark.parametrize("layout", ["in the package", "nested", "hoisted"])
@pytest.mark.parametrize("way", ["CODEX_PATH", "symlink on PATH", "chain of symlinks"])
def test_a_wrapper_is_followed_to_its_native_binary(find, tmp_path, layout, way):
    wrapper, native, path = npm_package(tmp_path / "prefix", layout)
    bin_codex = link(tmp_path / "prefix" / "bin" / "codex",
                     os.path.relpath(str(wrapper), str(tmp_path / "prefix" / "bin")))
    if way == "CODEX_PATH":
        env = {"CODEX_PATH": str(wrapper)}
    elif way == "symlink on PATH":
        env = {"PATH": str(bin_codex.parent)}
    else:
        env = {"PATH": str(link(tmp_path / "other" / "codex", bin_codex).parent)}
    codex = find(**env)
    assert (codex.program, codex.path_folder) == (str(native), str(path))
    settings = Settings({"HOME": str(find.home), "PATH": "/usr/bin"})
    assert codex_environment(settings, codex, "m")["PATH"] == "%s:/usr/bin" % path


@ON_A_PLATFORM
def test_the_newer_place_wins_over_what_an_update_left(find, tmp_path):
    _, _, _ = npm_package(tmp_path / "prefix", "hoisted")
    wrapper, native, _ = npm_package(tmp_path / "prefix", "in the package")
    assert find(CODEX_PATH=str(wrapper)).program == str(native)


@ON_A_PLATFORM
@pytest.mark.parametrize("native", ["missing", "another machine's", "not executable"])
def test_a_wrapper_without_a_native_binary_is_run_itself(find, tmp_path, native):
    wrapper, binary, _ = npm_package(tmp_path / "prefix", "hoisted")
    if native == "missing":
        binary.unlink()
    elif native == "not executable":
        binary.chmod(0o644)
    else:
        shutil.move(str(binary.parent.parent), str(binary.parent.parent.parent / "riscv64-linux"))
    codex = find(CODEX_PATH=str(wrapper))
    assert (codex.program, codex.path_folder) == (str(wrapper), None)


def test_a_shell_script_that_starts_codex_is_run_itself(find, tmp_path):
    shim = program(tmp_path / "bin" / "codex")
    codex = find(PATH=str(shim.parent))
    assert (codex.program, codex.path_folder) == (str(shim), None)


@pytest.mark.parametrize("version", REAL_VERSIONS)
def test_npms_own_install_of_the_real_codex(find, version):
    installed = real_codex(version)
    settings = Settings({"HOME": str(find.home), "CODEX_PATH": installed})
    finder = CodexFinder(settings)
    codex = finder.find()
    with open(codex.program, "rb") as file:
        assert file.read(4) == b"\x7fELF"
    assert os.path.exists(os.path.join(codex.path_folder, "rg"))
    assert finder.version(codex) == version


# Its version

@pytest.fixture
def version_of(tmp_path):
    """What the finder says about a program; `calls()` counts how often it was run."""
    finder = CodexFinder(Settings({"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}))
    calls = tmp_path / "calls"
    calls.write_text("")

    def version_of(text, name="codex"):
        text = text.replace("#!/bin/sh\n", "#!/bin/sh\necho \"$@\" >>%s\n" % calls)
        temporary = program(tmp_path / "new", text)
        path = tmp_path / name
        temporary.replace(path)
        return finder.version(replicas_engine.Codex(str(path)))
    version_of.again = lambda name="codex": finder.version(
        replicas_engine.Codex(str(tmp_path / name)))
    version_of.calls = lambda: calls.read_text().split("\n")[:-1]
    return version_of


def test_the_version_is_asked_once_for_each_file(version_of):
    assert version_of("#!/bin/sh\necho codex-cli 1.2.3\n") == "1.2.3"
    assert [version_of.again() for _ in range(5)] == ["1.2.3"] * 5
    assert version_of.calls() == ["--version"]
    assert version_of("#!/bin/sh\necho codex-cli 1.2.4\n") == "1.2.4"       # as long as the other
    assert version_of.again() == "1.2.4"
    assert version_of.calls() == ["--version"] * 2


@pytest.mark.parametrize("line, version", [
    ("codex-cli 0.169.0", "0.169.0"), ("codex 10.20.30-alpha.4", "10.20.30-alpha.4"),
    ("codex-cli 1.2.3+build.5", "1.2.3+build.5"), ("codex-cli", None), ("", None),
    ("codex-cli 1.2", None)])
def test_what_counts_as_a_version(version_of, line, version):
    assert version_of("#!/bin/sh\necho '%s'\n" % line) == version


@pytest.mark.parametrize("text", [
    "#!/bin/sh\nexit 3\n", "#!/bin/sh\necho 1.2.3 >&2\n", "#!/bin/sh\nhead -c 100000 /dev/zero\n",
    "#!/bin/sh\nexec yes rubbish\n", "#!/bin/sh\nkill -9 $$\n", "#!/nowhere/sh\n", "no program",
    ""], ids=["fails", "on stderr", "zeros", "endless", "killed", "no interpreter", "text",
              "empty"])
def test_a_program_that_says_no_version_has_none(version_of, text):
    assert version_of(text) is None
    assert version_of.again() is None


def test_a_program_that_is_gone_has_no_version(version_of):
    assert version_of.again("never was") is None


@pytest.mark.parametrize("hang", ["sleep 300", "sleep 300 & wait", "exec >&-; sleep 300"])
def test_a_program_that_hangs_has_no_version_and_is_ended(version_of, monkeypatch, tmp_path, hang):
    monkeypatch.setattr(replicas_engine, "VERSION_PATIENCE", 0.5)
    mark = "%s/mark" % tmp_path
    assert version_of("#!/bin/sh\nexport HANGING=%s\n%s\n" % (mark, hang)) is None
    harness.wait_for(lambda: not harness.processes_with("HANGING", mark), "the end of all of it")
    assert version_of.again() is None
    assert version_of.calls() == ["--version"]


def test_asking_for_versions_leaves_no_zombies_and_no_descriptors(version_of):
    def zombies():
        return set(harness.zombies_of(os.getpid()))

    version_of("#!/bin/sh\necho 1.2.3\n")
    descriptors, before = len(harness.descriptors_of()), zombies()
    for _ in range(5):
        version_of("#!/bin/sh\necho 1.2.3\n")
    assert len(harness.descriptors_of()) == descriptors
    assert zombies() <= before              # those are orphans of other tests


# Its environment

# What systemd 255 sets for a service with everything on, beside what a login has
SYSTEMD = """CACHE_DIRECTORY CONFIGURATION_DIRECTORY CREDENTIALS_DIRECTORY EXIT_CODE EXIT_STATUS
    FDSTORE INVOCATION_ID JOURNAL_STREAM LISTEN_FDNAMES LISTEN_FDS LISTEN_PID LOGS_DIRECTORY MAINPID
    MANAGERPID MEMORY_PRESSURE_WATCH MEMORY_PRESSURE_WRITE NOTIFY_SOCKET REMOTE_ADDR REMOTE_PORT
    RUNTIME_DIRECTORY SERVICE_RESULT STATE_DIRECTORY SYSTEMD_EXEC_PID TRIGGER_UNIT WATCHDOG_PID
    WATCHDOG_USEC""".split()


def environment(path=None, **env):
    settings = Settings(dict({"HOME": "/home/somebody"}, **env))
    return codex_environment(settings, replicas_engine.Codex("/bin/codex", path), "a mark")


def test_nothing_of_the_engines_and_nothing_of_systemds_reaches_codex():
    own = {"REPLICAS_ENGINE_" + name: "x" for name in ("SECRET", "STATE", "OF_THE_FUTURE")}
    own.update((name, "1") for name in SYSTEMD + ["PORT", "HOST"])
    own["REPLICAS_ENGINE_SANDBOX"] = "read-only"
    kept = {"LANG": "C.UTF-8", "GIT_AUTHOR_NAME": "Ω", "PORTABLE": "1", "MY_REPLICAS_ENGINE_X": "1"}
    assert environment(**dict(own, **kept)) == dict(
        kept, HOME="/home/somebody", CODEX_HOME="/home/somebody/.codex", REPLICAS_TURN="a mark")


def test_codex_gets_its_home_whole():
    env = environment(CODEX_HOME="~/codex home")
    assert env["CODEX_HOME"] == "/home/somebody/codex home"


@pytest.mark.parametrize("given, seen", [
    ({"OPENAI_API_KEY": "a"}, ("a", "a")), ({"CODEX_API_KEY": "b"}, (None, "b")),
    ({"OPENAI_API_KEY": "a", "CODEX_API_KEY": "b"}, ("a", "b")),
    ({"OPENAI_API_KEY": "a", "CODEX_API_KEY": ""}, ("a", "a")), ({}, (None, None))])
def test_either_key_reaches_codex(given, seen):
    env = environment(**given)
    assert (env.get("OPENAI_API_KEY"), env.get("CODEX_API_KEY")) == seen


def test_the_engine_hands_on_its_own_and_dotenvs_variables(make_engine):
    engine = make_engine(start=False, FROM_THE_PROCESS="process", IN_BOTH="process",
                         NOT_TO_BE_SEEN=None)
    with open(os.path.join(engine.folder, ".env"), "w", encoding="utf-8") as file:
        file.write("FROM_THE_FILE='file 1'\nIN_BOTH=file\nOPENAI_API_KEY=sk-file\n"
                   "REPLICAS_ENGINE_MODEL=model-of-the-file\n")
    engine.start()
    engine.send("hello")
    call, = engine.calls()
    env = call["env"]
    assert (env["FROM_THE_PROCESS"], env["IN_BOTH"], env["FROM_THE_FILE"]) == (
        "process", "process", "file 1")
    assert env["CODEX_API_KEY"] == env["OPENAI_API_KEY"] == "sk-file"
    assert "--model=model-of-the-file" in call["argv"]
    assert env["CODEX_HOME"] == engine.codex_home and env["HOME"] == engine.home
    assert not [name for name in env if name.startswith("REPLICAS_ENGINE") or name in SYSTEMD]
    assert harness.SECRET not in json.dumps(env)
    assert "PORT" not in env and "HOST" not in env
    assert call["cwd"] == engine.workspace


# Its arguments

EVERYTHING = {
    "model": "m", "reasoning_effort": "high", "sandbox_mode": "read-only", "network_access": True,
    "web_search": True, "output_schema": {"type": "object"},
    "images": ["data:image/gif;base64,R0lGODlh"]}


def arguments(tmp_path, body=(), thread_id=None, **env):
    settings = Settings(dict({"HOME": str(tmp_path), "WORKSPACE_HOME": str(tmp_path)}, **env))
    options = TurnOptions(dict(body), settings)
    options.write_files(str(tmp_path / "files"))
    return codex_arguments(settings, replicas_engine.Codex("/bin/codex"), options, thread_id)


def test_the_least_arguments(tmp_path):
    assert arguments(tmp_path) == ["/bin/codex", "exec", "--json", "--skip-git-repo-check",
                                   "--cd", str(tmp_path), "--sandbox", "workspace-write"]


def test_options_go_before_resume_and_images_behind_it(tmp_path):
    words = arguments(tmp_path, EVERYTHING, "an-id", OPENAI_BASE_URL="http://127.0.0.1/v1")
    place = words.index("resume")
    assert words[place:] == ["resume", "an-id", "--image", str(tmp_path / "files/image-1.gif")]
    assert words[:6] == ["/bin/codex", "exec", "--json", "--skip-git-repo-check", "--cd",
                         str(tmp_path)]
    assert words[6:place] == [
        "--config", 'openai_base_url="http://127.0.0.1/v1"', "--model=m",
        "--config", 'model_reasoning_effort="high"', "--sandbox", "read-only",
        "--config", "sandbox_workspace_write.network_access=true",
        "--config", "tools.web_search=true", "--config", 'web_search="live"',
        "--output-schema", str(tmp_path / "files/schema.json")]


def test_without_a_thread_images_come_last_too(tmp_path):
    words = arguments(tmp_path, EVERYTHING)
    assert "resume" not in words
    assert words[-2:] == ["--image", str(tmp_path / "files/image-1.gif")]


NASTY = ['http://127.0.0.1/v1', 'a"b', 'a\\"b', "a'b", "'''", '"""', "a\nb", "a\r\nb", "tab\t",
         "DEL\x7f", "\x01\x1f", "\x80\x9f\u2028\u2029\x85", "é Ω 漢字 😀", "\ufeff", '"\n[evil]\nx="',
         'x"\napproval_policy = "never', "${HOME} $(id) `id`", "a#b = c", "\\u0041", "=", " ",
         "true"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_a_config_value_is_data_whatever_it_holds():
    import tomllib
    everything = "".join(map(chr, list(range(0xd800)) + list(range(0xe000, 0x11000))))
    for value in NASTY + [everything, True, False]:
        option, assignment = config_argument("some.key", value)
        assert option == "--config"
        key, _, quoted = assignment.partition("=")
        assert key == "some.key"
        assert tomllib.loads("value = %s\nnext = 1" % quoted) == {"value": value, "next": 1}
        assert "\n" not in assignment


def test_a_base_url_reaches_codex_as_one_argument(make_engine):
    url = 'http://127.0.0.1/"v1\\\n\x7fé😀'
    engine = make_engine(OPENAI_BASE_URL=url)
    engine.send("hello")
    call, = engine.calls()
    assert call["env"]["OPENAI_BASE_URL"] == url
    value = call["argv"][call["argv"].index("--config") + 1]
    assert value == 'openai_base_url="http://127.0.0.1/\\"v1\\\\\\n\\u007fé😀"'


@pytest.mark.parametrize("message", [
    "hello", "-", "--help", "--sandbox danger-full-access", "resume x", "a\nb\r\n\0c", "é 漢字 😀",
    " x \n", "/bin/sh -c id"], ids=repr)
def test_the_message_goes_to_stdin_and_nowhere_else(engine, message):
    assert engine.send(message)[-2].type == "turn.completed"
    assert engine.prompts() == [message]
    call, = engine.calls()
    assert message not in call["argv"]


# --check

def check(engine, *arguments):
    """Run `--check` with the engine's settings: its exit status and {what: (verdict, text)}."""
    outcome = subprocess.run(
        [sys.executable, "-W", "error", harness.MODULE, "--check", *arguments], env=engine.env,
        cwd=engine.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, universal_newlines=True, timeout=harness.PATIENCE)
    assert harness.SECRET not in outcome.stdout + outcome.stderr
    assert "Traceback" not in outcome.stderr
    lines = {}
    for line in outcome.stdout.splitlines():
        verdict, what, text = (line[:7].strip(), *line[8:].split(": ", 1))
        assert verdict in ("ok", "MISSING")
        lines[what] = (verdict, text)
    return types.SimpleNamespace(status=outcome.returncode, lines=lines, err=outcome.stderr)


WHAT = ["codex", "key", "secret", "workspace", "codex home", "state", "settings", "sandbox", "port"]


@pytest.fixture
def ready(make_engine):
    """An engine, not started, that has all it needs."""
    return make_engine(start=False, CODEX_API_KEY="sk-1",
                       REPLICAS_ENGINE_SANDBOX="danger-full-access")


def test_check_says_ok_for_everything_that_is_there(ready):
    result = check(ready)
    assert result.status == 0, result.lines
    assert list(result.lines) == WHAT
    assert result.lines == {
        "codex": ("ok", "%s, version 0.169.0" % harness.STAND_IN_CODEX),
        "key": ("ok", "CODEX_API_KEY"), "secret": ("ok", "REPLICAS_ENGINE_SECRET is set"),
        "workspace": ("ok", ready.workspace), "codex home": ("ok", ready.codex_home),
        "state": ("ok", ready.state), "settings": ("ok", "they can be used"),
        "sandbox": ("ok", "danger-full-access"),
        "port": ("ok", "0 is free")}
    assert result.err == ""
    assert ready.calls() == []                      # no turn for a check


def missing(engine, what, **env):
    """What `--check` says is missing when these settings are the engine's."""
    engine.env.update(env)
    engine.env = {name: value for name, value in engine.env.items() if value is not None}
    result = check(engine)
    assert result.status == 1
    assert [name for name in result.lines if result.lines[name][0] == "MISSING"] == [what]
    assert list(result.lines) == WHAT
    return result.lines[what][1]


def test_check_misses_codex(ready, tmp_path):
    assert "CODEX_PATH=%s/gone is not an executable file" % tmp_path in missing(
        ready, "codex", CODEX_PATH="%s/gone" % tmp_path)


def test_check_misses_a_codex_that_runs(ready, tmp_path):
    path = program(tmp_path / "codex", "#!/bin/sh\nexit 1\n")
    assert missing(ready, "codex", CODEX_PATH=str(path)).startswith(
        "%s does not say its version" % path)


def test_check_misses_a_key(ready):
    text = missing(ready, "key", CODEX_API_KEY=None)
    assert "OPENAI_API_KEY" in text and "codex login" in text


@pytest.mark.parametrize("way", ["OPENAI_API_KEY", "auth.json"])
def test_check_knows_every_kind_of_key(ready, way):
    del ready.env["CODEX_API_KEY"]
    if way == "auth.json":
        with open(os.path.join(ready.codex_home, "auth.json"), "w") as file:
            file.write('{"OPENAI_API_KEY":"sk-2"}')
    else:
        ready.env[way] = "sk-2"
    result = check(ready)
    assert result.status == 0 and way in result.lines["key"][1]
    assert "sk-2" not in str(result.lines)


def test_check_misses_a_secret(ready):
    assert "set REPLICAS_ENGINE_SECRET" in missing(ready, "secret", REPLICAS_ENGINE_SECRET=None)


def test_check_misses_a_workspace_and_does_not_make_it(ready, tmp_path):
    text = missing(ready, "workspace", WORKSPACE_HOME=str(tmp_path / "gone"))
    assert "set WORKSPACE_HOME" in text
    assert not (tmp_path / "gone").exists()


def test_check_misses_a_state_directory_that_can_be_made(ready, tmp_path):
    program(tmp_path / "file")
    text = missing(ready, "state", REPLICAS_ENGINE_STATE=str(tmp_path / "file" / "state"))
    assert "set REPLICAS_ENGINE_STATE" in text
    text = missing(ready, "state", REPLICAS_ENGINE_STATE=str(tmp_path / "file"))
    assert "set REPLICAS_ENGINE_STATE" in text


def test_check_makes_nothing(ready):
    shutil.rmtree(ready.codex_home)
    assert check(ready).status == 0
    assert not os.path.exists(ready.state) and not os.path.exists(ready.codex_home)


def test_check_misses_a_home_for_codex(ready):
    ready.env["CODEX_HOME"] = "/dev/null/x"
    assert check(ready).lines["codex home"] == (
        "MISSING", "CODEX_HOME=/dev/null/x: this is not a directory; set CODEX_HOME to one")


def test_check_misses_a_free_port(ready):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))            # it does not even listen
        text = missing(ready, "port", PORT=str(taken.getsockname()[1]))
    assert "set PORT to another" in text


def test_check_is_content_with_an_engine_that_runs(ready):
    ready.start()
    ready.env["PORT"] = str(ready.port)
    result = check(ready)
    assert result.status == 0
    assert result.lines["port"] == ("ok", "an engine answers on %d" % ready.port)
    assert ready.send("still there")


def test_check_of_a_unix_socket(ready, tmp_path):
    """It leaves none behind, and takes none away."""
    path = str(tmp_path / "engine.sock")
    ready.env["HOST"] = "unix:" + path
    for _ in range(2):
        result = check(ready)
        assert result.lines["port"] == ("ok", "unix:%s is free" % path)
        assert not os.path.exists(path)
    os.makedirs(ready.state)
    with socket.socket(socket.AF_UNIX) as other, (
            open(os.path.join(ready.state, "lock"), "w")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # as the engine has it that answers
        other.bind(path)
        other.listen()
        other.settimeout(harness.PATIENCE)
        checker = threading.Thread(target=lambda: results.append(check(ready)))
        results = []
        checker.start()
        other.accept()[0].close()               # the look whether anybody listens
        peer = other.accept()[0]
        peer.recv(1000)
        peer.sendall(b"HTTP/1.1 200 OK\r\nServer: replicas-engine\r\n\r\n")
        peer.close()
        checker.join()
        assert results[0].lines["port"] == ("ok", "an engine answers on unix:" + path)
        lock.close()                            # it works with another state directory
        assert "HOST=unix:%s can't be used" % path in missing(ready, "port")
    assert "set HOST to another" in missing(ready, "port", HOST="unix:/nowhere/engine.sock")


def test_check_says_everything_that_is_missing_at_once(ready, tmp_path):
    ready.env = {"PATH": "/nowhere", "HOME": str(tmp_path / "nobody"), "PORT": "0",
                 "HOST": "127.0.0.1", "CODEX_PATH": "/nowhere/codex",
                 "REPLICAS_ENGINE_SANDBOX": "danger-full-access", "TMPDIR": str(tmp_path / "tmp"),
                 "WORKSPACE_HOME": str(tmp_path / "gone"),
                 "REPLICAS_ENGINE_STATE": ready.state}
    result = check(ready)
    assert result.status == 1
    verdicts = [result.lines[what][0] for what in WHAT]
    assert verdicts == ["MISSING"] * 4 + ["ok"] * 5


def test_check_refuses_a_setting_that_cannot_be_used(ready):
    ready.env["PORT"] = "abc"
    result = check(ready)
    assert result.status == 1 and list(result.lines) == ["settings"]
    assert "PORT=abc" in result.lines["settings"][1]
