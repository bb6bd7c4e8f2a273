"""packaging/: what can be said of its files without a machine to install them on."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

import harness
from conftest import need, real_codex, unavailable

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGING = os.path.join(CHECKOUT, "packaging")
SHELL_SCRIPTS = ["build-deb", "cloud-init", "get-codex", "install", "replicas-engine", "try",
                 "debian/postinst", "debian/postrm", "debian/prerm"]
SETUP = "replicas-engine-setup"
SECRET = "16-or-more-of-them"
UNITS = ["replicas-engine.service", "replicas-engine.socket"]


def run(*command, **options):
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=harness.PATIENCE, **options)


def ok(*command, **options):
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def script(name):
    return os.path.join(PACKAGING, name)


@pytest.fixture(scope="module")
def deb(tmp_path_factory):
    need("dpkg-deb")
    return ok(script("build-deb"), str(tmp_path_factory.mktemp("deb"))).stdout.strip()


def test_every_script_is_known_here():
    found = []
    for folder, _, names in os.walk(PACKAGING):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                if file.readline().startswith(b"#!"):
                    found.append(os.path.relpath(os.path.join(folder, name), PACKAGING))
    assert sorted(found) == sorted(SHELL_SCRIPTS + [SETUP])


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_scripts_are_executable_posix_sh(name):
    assert os.access(script(name), os.X_OK)
    with open(script(name)) as file:
        assert file.readline() == "#!/bin/sh\n"
    ok("sh", "-n", script(name))
    if shutil.which("dash"):
        ok("dash", "-n", script(name))


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shellcheck(name):
    need("shellcheck")
    ok("shellcheck", "--shell=sh", script(name))


def test_setup_is_python_that_takes_nothing_from_whoever_calls_it():
    """It runs as root: neither the environment nor the working directory have a say."""
    assert os.access(script(SETUP), os.X_OK)
    with open(script(SETUP)) as file:
        text = file.read()
    assert text.startswith("#!/usr/bin/python3 -IBS\n")
    compile(text, SETUP, "exec")


def test_first_boot_script_of_cloud_init():
    with open(script("cloud-init.yaml")) as file:
        text = file.read()
    body = text.split("    content: |\n", 1)[1]
    assert all(line.startswith("      ") or not line for line in body.splitlines())
    first_boot = re.sub("(?m)^ {6}", "", body)
    ok("sh", "-n", "-c", first_boot)
    need("shellcheck")
    done = run("shellcheck", "--shell=sh", "-", input=first_boot, stdin=None)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["build-deb", "install", "cloud-init", "try"])
def test_help(name):
    assert "Usage:" in ok(script(name), "--help").stdout
    done = run(script(name), "--nonsense")
    assert done.returncode and "unknown option: --nonsense" in done.stderr


def test_units_verify(tmp_path):
    """With the systemd of this machine. On the one that packages run on: test_packaging_systemd."""
    need("systemd-analyze")
    for name in UNITS:
        with open(script(name)) as file:
            text = file.read()
        # What is not installed here is not the units' fault.
        text = text.replace("/usr/sbin/replicas-engine-setup", "/bin/true")
        (tmp_path / name).write_text(text)
    done = run("systemd-analyze", "verify", *[str(tmp_path / name) for name in UNITS])
    if "Cannot determine cgroup" in done.stderr:        # which Debian 11's needs
        unavailable("systemd-analyze needs control groups here")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_unit_hides_no_process_from_the_engine():
    """It has to find those of its turns, also the ones that are not dumpable."""
    with open(script("replicas-engine.service")) as file:
        settings = re.findall(r"(?m)^\s*(ProtectProc|ProcSubset)\s*=\s*(\S*)", file.read())
    assert set(settings) <= {("ProtectProc", "default"), ("ProcSubset", "all")}


def test_deb_is_reproducible(deb, tmp_path):
    """Another directory, time zone, language and umask, and newer files: the same bytes."""
    copy = tmp_path / "another place" / "checkout"
    copy.mkdir(parents=True)
    ok("cp", "-r", PACKAGING, str(copy))
    for name in ("replicas_engine.py", "README.md"):
        if os.path.exists(os.path.join(CHECKOUT, name)):
            shutil.copy(os.path.join(CHECKOUT, name), str(copy))
    epoch = run("git", "-C", CHECKOUT, "log", "-1", "--format=%ct").stdout.strip() or "1767225600"
    built = []
    for umask, zone in (("022", "UTC"), ("077", "Asia/Tokyo")):
        env = dict(os.environ, SOURCE_DATE_EPOCH=epoch, TZ=zone, LC_ALL="C.UTF-8")
        name = ok("sh", "-c", 'umask %s; exec "$0" out' % umask,
                  str(copy / "packaging" / "build-deb"), env=env, cwd=str(tmp_path)).stdout.strip()
        with open(name, "rb") as file:
            built.append(file.read())
        os.unlink(name)
    assert built[0] == built[1]


def test_every_commit_has_a_version_of_its_own(tmp_path):
    """So that a newer one upgrades; a release's tag has just its number."""
    source = tmp_path / "source"
    shutil.copytree(PACKAGING, str(source / "packaging"))
    shutil.copy(os.path.join(CHECKOUT, "replicas_engine.py"), str(source))
    git = ["git", "-C", str(source), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    ok(*git, "init", "-q")
    ok(*git, "add", "-A")
    versions = []
    for moment in ("2026-11-25T23:59:58+0000", "2026-11-26T01:59:59+0200", "2026-11-26T00:00:00Z"):
        env = dict(os.environ, GIT_COMMITTER_DATE=moment)
        ok(*git, "commit", "-q", "--allow-empty", "-m", "x", env=env)
        deb = ok(str(source / "packaging" / "build-deb"), str(tmp_path)).stdout.strip()
        versions.append(ok("dpkg-deb", "-f", deb, "Version").stdout.strip())
        ok("dpkg-deb", "-x", deb, str(tmp_path / "tree"))
        module = str(tmp_path / "tree" / "usr" / "lib" / "replicas-engine" / "replicas_engine.py")
        assert ok(sys.executable, module, "--version").stdout.split() == [
            "replicas-engine", versions[-1]]
    number = versions[0].partition("+")[0]
    assert versions[0].startswith(number + "+git20261125235958.")
    for older, newer in zip([number] + versions, versions):
        ok("dpkg", "--compare-versions", older, "lt", newer)
    # Where git refuses to look there is no version, and none is made up.
    done = run(str(source / "packaging" / "build-deb"), str(tmp_path / "none"),
               env=dict(os.environ, GIT_TEST_ASSUME_DIFFERENT_OWNER="1"))
    assert done.returncode and "safe.directory" in done.stderr, done
    assert not (tmp_path / "none").exists()
    ok(*git, "tag", "v" + number)
    assert ok(str(source / "packaging" / "build-deb"), str(tmp_path)).stdout.strip().endswith(
        "/replicas-engine_%s_all.deb" % number)


def test_deb_holds_what_it_should(deb):
    version = re.search('(?m)^__version__ = "(.*)"$',
                        open(os.path.join(CHECKOUT, "replicas_engine.py")).read()).group(1)
    name = re.fullmatch(r"replicas-engine_(%s(\+git[0-9]{14}\.[0-9a-f]+)?)_all\.deb"
                        % re.escape(version), os.path.basename(deb))
    version = name.group(1)
    fields = ok("dpkg-deb", "-f", deb).stdout.splitlines()
    assert {"Version: " + version, "Architecture: all", "Depends: python3 (>= 3.8)"} <= set(fields)
    lines = ok("dpkg-deb", "-c", deb).stdout.splitlines()
    assert all(line.split()[1] == "root/root" for line in lines)
    modes = {line.split()[-1]: line.split()[0] for line in lines if not line.startswith("d")}
    assert modes.pop("./usr/bin/replicas-engine") == "-rwxr-xr-x"
    assert modes.pop("./usr/sbin/replicas-engine-setup") == "-rwxr-xr-x"
    assert modes.pop("./usr/lib/replicas-engine/get-codex") == "-rwxr-xr-x"
    assert set(modes.values()) == {"-rw-r--r--"}
    assert {"./usr/lib/replicas-engine/replicas_engine.py",
            "./usr/lib/replicas-engine/__main__.py",
            "./usr/lib/systemd/system/replicas-engine.service",
            "./usr/lib/systemd/system/replicas-engine.socket",
            "./usr/share/replicas-engine/settings.env"} <= set(modes)


def test_lintian(deb):
    need("lintian")
    done = run("lintian", deb)
    # Debian 11's takes systemd's own place for units, where /usr is merged, for a wrong one.
    assert not [line for line in done.stdout.split("\n") if not line.startswith(("W:", "I:", "N:"))
                and line and "systemd-service-file-outside-lib" not in line], done


def user_data(tmp_path, *options, secrets=""):
    """(the text, its write_files by path as (encoding, content))"""
    text = ok(script("cloud-init"), *options, stdin=None, input=secrets).stdout
    (tmp_path / "user-data").write_text(text)
    files = {}
    for item in re.split(r"(?m)^  - path: ", text)[1:]:
        path, rest = item.split("\n", 1)
        head, content = rest.split("    content: |\n", 1)
        files[path] = ("b64" if "encoding: b64" in head else None,
                       re.sub("(?m)^ {6}", "", content))
    return text, files


def test_cloud_init_with_a_url_fits_everywhere(tmp_path):
    text, files = user_data(
        tmp_path, "--url", "https://host.test/e.deb?a=1&b=2", "--sha256", "ab" * 32, "--secret",
        "-", "--user", "debian", "--port", "4000", "--codex", "none", secrets=SECRET + "\r\n")
    assert len(text) < 16384 and text.startswith("#cloud-config\n")
    first_boot = files["/run/replicas-engine-first-boot"][1]
    for line in ("PACKAGE='https://host.test/e.deb?a=1&b=2'", "SHA256='%s'" % ("ab" * 32),
                 "SECRET='%s'" % SECRET, "SERVICE_USER='debian'", "PORT='4000'", "CODEX=''"):
        assert re.search("(?m)^%s( |$)" % re.escape(line), first_boot), line


@pytest.mark.parametrize("option, value, what", [
    ("--secret", SECRET, "standard input"), ("--codex-api-key", "sk-given", "standard input"),
    ("--secret", "-", "nothing on standard input"), ("--user", "a b", "letters, digits and"),
    ("--user", "root", "that is not root"), ("--port", "abc", "a number from 1 to 65535"),
    ("--port", "65536", "a number from 1 to 65535"), ("--url", "nonsense", "https://"),
    ("--url", "https://host.test/a'b", "letters, digits and"), ("--sha256", "ab", "sha256sum"),
    ("--deb", "/etc/passwd", "packaging/build-deb"), ("--secret", "", "needs a value")])
def test_cloud_init_refuses(option, value, what):
    done = run(script("cloud-init"), option, value)
    assert done.returncode == 1 and not done.stdout
    assert option in done.stderr and what in done.stderr


@pytest.mark.parametrize("secret, what", [
    ("it's one of 16 or more", "letters, digits and"), (SECRET + "&", "letters, digits and"),
    (SECRET[:15], "16 characters or more")])
def test_cloud_init_refuses_the_secret(secret, what):
    done = run(script("cloud-init"), "--secret", "-", input=secret + "\n", stdin=None)
    assert done.returncode == 1 and not done.stdout
    assert what in done.stderr and secret not in done.stderr


def test_cloud_init_puts_no_secret_on_a_command_line(tmp_path, deb):
    """With a stand-in before each program, which notes what it is given."""
    bin, noted = tmp_path / "bin", tmp_path / "noted"
    bin.mkdir()
    for name in "base64 cat dirname dpkg-deb mktemp rm sed sha256sum wc".split():
        (bin / name).write_text('#!/bin/sh\nprintf "%%s\\n" "$0" "$@" >>"%s"\nexec %s "$@"\n'
                                % (noted, shutil.which(name)))
        (bin / name).chmod(0o755)
    done = run(script("cloud-init"), "--deb", deb, "--secret", "-", "--codex-api-key", "-",
               input=SECRET + "\nsk-given\n", stdin=None,
               env={"PATH": "%s:%s" % (bin, os.environ["PATH"])})
    assert "'%s'" % SECRET in done.stdout and "'sk-given'" in done.stdout
    text = noted.read_text()
    assert "base64" in text and SECRET not in text and "sk-given" not in text


@pytest.mark.parametrize("good", [True, False])
def test_first_boot(tmp_path, good):
    """With stand-ins for what it calls. A setting that was filled in by hand and can't be used must
    not leave an engine running whose secret nobody knows."""
    _, files = user_data(tmp_path, "--url", "https://host.test/e.deb", "--secret", "-",
                         "--codex-api-key", "-", "--codex", "none",
                         secrets=SECRET + "\nsk-/a&b?\n")
    first_boot = files["/run/replicas-engine-first-boot"][1]
    for folder in ("/run/", "/etc/replicas-engine/"):
        first_boot = first_boot.replace(folder, "%s/" % tmp_path)
    (tmp_path / "first-boot").write_text(first_boot)
    (tmp_path / "settings.env").write_text("#CODEX_API_KEY=\n")
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in [
            ("python3", 'touch "$4"'), ("apt-get", ":"), ("replicas-engine", ":"),
            ("systemctl", 'echo "systemctl $*"'),
            ("replicas-engine-setup", 'echo "setup $*"; case $* in *--secret*) cat ;; esac\n'
             + ("" if good else "exit 1"))]:
        (bin / name).write_text("#!/bin/sh\n%s\n" % text)
        (bin / name).chmod(0o755)
    done = run("sh", str(tmp_path / "first-boot"),
               env={"PATH": "%s:%s" % (bin, os.environ["PATH"])})
    setup = "setup %s --user ubuntu --port 3737 --secret -\n%s\n"
    if good:
        assert done.returncode == 0, done
        assert done.stdout == (setup % ("--dry-run", SECRET) + setup % ("--allow-sandbox", SECRET)
                               + "systemctl restart replicas-engine.service\n")
        assert (tmp_path / "settings.env").read_text().endswith("\nCODEX_API_KEY=sk-/a&b?\n")
    else:
        assert done.returncode == 1, done
        assert done.stdout == setup % ("--dry-run", SECRET) + (
            "systemctl disable --now replicas-engine.socket replicas-engine.service\n")


def test_cloud_init_with_the_package_in_it(deb, tmp_path):
    import base64
    _, files = user_data(tmp_path, "--deb", deb)
    encoding, content = files["/run/replicas-engine-package.deb"]
    assert encoding == "b64"
    with open(deb, "rb") as file:
        assert base64.b64decode(content) == file.read()


@pytest.mark.parametrize("option", ["--secret=" + SECRET, "--secret " + SECRET, "--secret= "])
def test_install_takes_a_secret_from_standard_input_only(option):
    done = run(script("install"), *option.split(" "), input=SECRET, stdin=None)
    assert done.returncode == 1 and "standard input" in done.stderr
    assert SECRET not in done.stderr


def test_install_as_an_ordinary_user_says_so():
    if os.geteuid() != 0:
        done = run(script("install"))
    else:
        need("setpriv")
        # An unreadable checkout is not what is tested here.
        done = run("setpriv", "--reuid=65534", "--clear-groups", "sh", "-s",
                   input=open(script("install")).read(), stdin=None, cwd="/")
    assert done.returncode == 1 and "only root can do this" in done.stderr


def test_the_command_says_what_it_is_for():
    done = run(script("replicas-engine"))
    assert done.returncode == 2 and "sudo replicas-engine --check" in done.stderr
    as_user = ()
    if os.geteuid() == 0:
        need("setpriv")
        as_user = ("setpriv", "--reuid=65534", "--clear-groups")
    done = run(*as_user, "sh", "-s", "--", "--check", input=open(script("replicas-engine")).read(),
               stdin=None, cwd="/")
    assert "sudo replicas-engine --check" in done.stderr


# ---- get-codex

@pytest.mark.parametrize("npm, machine, codex, asked", [
    ("9.2.0", "x86_64", "latest", "--global @openai/codex@latest"),
    ("6.14.4", "aarch64", "0.98.0", "--global @openai/codex@0.98.0"),
    ("7.5.2", "x86_64", "latest", "--omit=optional --global @openai/codex-linux-x64@"
     "npm:@openai/codex@0.169.0-linux-x64 @openai/codex@0.169.0"),
    ("7.5.2", "aarch64", "latest", "--omit=optional --global @openai/codex-linux-arm64@"
     "npm:@openai/codex@0.169.0-linux-arm64 @openai/codex@0.169.0"),
    ("7.5.2", "x86_64", "0.98.0", "--global @openai/codex@0.98.0"),
    ("7.5.2", "x86_64", "0.98.99", None), ("7.5.2", "riscv64", "1", "--global @openai/codex@1")])
def test_get_codex(tmp_path, npm, machine, codex, asked):
    """npm 7 is asked for this machine's Codex alone: it would take every platform's."""
    for name, text in [("uname", "echo " + machine), ("npm", """case $*: in
        --version:) echo %s ;;
        "view @openai/codex@latest optionalDependencies.@openai/codex-"*:)
            echo "npm:@openai/codex@0.169.0-${3##*/codex-}" ;;
        "view @openai/codex@0.98.0 "*:) ;;
        install*:) echo "$@" ;;
        *) exit 1 ;;
        esac""" % npm)]:
        (tmp_path / name).write_text("#!/bin/sh\n%s\n" % text)
        (tmp_path / name).chmod(0o755)
    done = run(script("get-codex"), codex, "--global",
               env={"PATH": "%s:%s" % (tmp_path, os.environ["PATH"])})
    assert (done.returncode, done.stdout) == (
        (0, "install %s\n" % asked) if asked else (1, "")), done


# ---- replicas-engine-setup

@pytest.fixture(scope="module")
def setup_module():
    loader = importlib.machinery.SourceFileLoader("replicas_engine_setup", script(SETUP))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(module)
    sys.dont_write_bytecode = before
    return module


@pytest.mark.parametrize("before, after", [
    ("", "NAME=new value\n"),
    ("OTHER=1\nNAMES=2", "OTHER=1\nNAMES=2\nNAME=new value\n"),
    ("# NAME=\n#NAME=old\nOTHER=1\n", "# NAME=\nNAME=new value\nOTHER=1\n"),
    ("#NAME=\n NAME = a \\\nb\nOTHER=1\n", "#NAME=\nNAME=new value\nOTHER=1\n"),
    ("NAME=old\r\nOTHER=1\r\n", "NAME=new value\nOTHER=1\r\n"),
    ("NAME=new value\nNAME=old", "NAME=new value\nNAME=new value\n"),
    ("X='a\n#NAME=1\nNAME=1'\n", "X='a\n#NAME=1\nNAME=1'\nNAME=new value\n"),
    ("NAME='new value' #\n", "NAME=new value\n"),
    ("NAME='new value'\n#x\n", "NAME='new value'\n#x\n")])
def test_setup_changes_a_setting_and_nothing_else(setup_module, before, after):
    changed = setup_module.SettingsFile(before).put("NAME", "new value")
    assert changed.text == after and changed.values["NAME"] == "new value"


# ---- try

@pytest.fixture
def checkout(tmp_path_factory):
    """A copy of this checkout, not under the temporary directory, where Codex's sandbox fails."""
    folder = os.path.join(CHECKOUT, ".cache", "try copies", str(os.getpid()))
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    ok("cp", "-r", PACKAGING, os.path.join(CHECKOUT, "tests"),
       os.path.join(CHECKOUT, "replicas_engine.py"), folder)
    yield folder
    run(os.path.join(folder, "packaging", "try"), "--stop")
    shutil.rmtree(folder, ignore_errors=True)


def attempt(checkout, path, message="Hello, whoever you are.", **env):
    home = os.path.join(checkout, "home")
    os.makedirs(home, exist_ok=True)
    return run(os.path.join(checkout, "packaging", "try"), message,
               env=dict({"PATH": path, "HOME": home}, **env), cwd="/")


# Nothing listens at the port of this proxy.
PROXY = {"http_proxy": "http://127.0.0.1:9", "all_proxy": "http://127.0.0.1:9"}


def check_try(checkout, done, **env):
    assert done.returncode == 0, done.stdout + done.stderr
    assert "event: thread.started" in done.stdout and "event: turn.completed" in done.stdout
    assert "event: item.delta" in done.stdout and "event: done" in done.stdout
    # The lines to go on with work as they are printed.
    settings = re.search(r"(?m)^ENGINE=.*\nSECRET='.*'$", done.stdout).group()
    lines = re.findall(r"(?m)^(curl .*)$", done.stdout)
    assert len(lines) == 3
    for line in lines:
        answer = ok("sh", "-c", settings + "\n" + line.replace("curl", "curl -sf", 1),
                    env=dict(os.environ, **env)).stdout
        assert answer, line
        assert "/codex/status" not in line or "\"has_active_thread\":true" in answer
    url = re.search(r"http://127\.0\.0\.1:\d+", done.stdout).group()
    stopped = ok(os.path.join(checkout, "packaging", "try"), "--stop")
    assert (stopped.stdout, stopped.stderr) == ("Stopped.\n", "")
    assert run("curl", "-sf", url + "/health").returncode == 7


def bare_path(tmp_path):
    """A PATH with neither Codex nor npm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh cat curl dirname env git grep kill mkdir nohup od python3 rm sed setsid sleep"
                 " tee tr bash ls").split():
        if shutil.which(tool):
            (folder / tool).symlink_to(sys.executable if tool == "python3" else shutil.which(tool))
    return str(folder)


def test_try_without_codex_and_npm(checkout, tmp_path):
    need("curl")
    done = attempt(checkout, bare_path(tmp_path))
    assert "tests/stand_in_codex" in done.stdout, done.stdout + done.stderr
    check_try(checkout, done)


def test_try_says_what_npm_says_and_leaves_nothing_without_a_turn(checkout, tmp_path):
    need("curl")
    path = bare_path(tmp_path)
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho the network is down, $npm_config_cache >&2\nexit 1\n")
    npm.chmod(0o755)
    done = attempt(checkout, path, " ")
    said = "the network is down, %s/.cache/try/npm" % checkout
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert "npm can't get it" in done.stdout and "Message is required" in done.stdout
    assert done.stdout.endswith("Stopped.\n") and "that was no turn" in done.stderr
    url = re.search(r"http://127\.0\.0\.1:\d+", done.stdout).group()
    assert run("curl", "-sf", url + "/health").returncode == 7


def test_ctrl_c_in_a_first_turn_stops_all_of_it(checkout, tmp_path):
    """Each process of the terminal's gets it."""
    need("curl")
    home = tmp_path / "home"
    home.mkdir()
    message = harness.script({"thread": "new"}, {"event": {"type": "turn.started"}}, {"sleep": 120})
    with open(tmp_path / "said", "w+") as output:
        process = subprocess.Popen(
            [os.path.join(checkout, "packaging", "try"), message], stdout=output, cwd="/",
            env={"PATH": bare_path(tmp_path), "HOME": str(home)}, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))    # as by a terminal

        def said():
            output.seek(0)
            return output.read()
        harness.wait_for(lambda: "event: turn.started" in said() or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(harness.PATIENCE) == 130 and said().endswith("Stopped.\n"), said()
        url = re.search(r"http://127\.0\.0\.1:\d+", said()).group()
    assert run("curl", "-sf", url + "/health").returncode == 7


def test_try_with_codex_and_without_a_key(checkout, tmp_path):
    need("curl")
    codex = real_codex("0.169.0")
    done = attempt(checkout, os.path.dirname(codex) + ":" + os.environ["PATH"], **PROXY)
    assert "tests/stand_in_model" in done.stdout, done.stdout + done.stderr
    check_try(checkout, done, **PROXY)


def test_try_twice_leaves_one_engine(checkout, tmp_path):
    need("curl")
    path = bare_path(tmp_path)
    first = attempt(checkout, path).stdout
    second = attempt(checkout, path).stdout
    old, new = [re.search(r"http://127\.0\.0\.1:\d+", text).group() for text in (first, second)]
    assert old == new or run("curl", "-sf", old + "/health").returncode == 7
    ok("curl", "-sf", new + "/health")
    # One that was killed is stopped, without a word.
    pids = os.path.join(checkout, ".cache", "try", "pids")
    with open(pids) as file:
        pid = int(file.read())
    os.kill(pid, signal.SIGKILL)
    harness.wait_for(lambda: not harness.is_alive(pid))
    stopped = ok(os.path.join(checkout, "packaging", "try"), "--stop")
    assert (stopped.stdout, stopped.stderr) == ("Stopped.\n", "")
