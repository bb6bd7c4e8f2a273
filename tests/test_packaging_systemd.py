"""packaging/ on Debian machines with a real systemd, booted in containers."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest

import conftest
import harness
import packaging_machine
import tricks
from packaging_machine import CHECKOUT, CLONE, SETTINGS, Machine

BASE = "http://127.0.0.1:3737"
VERIFY = "systemd-analyze verify replicas-engine.service replicas-engine.socket"
CLOUD_INIT = os.path.join(CHECKOUT, "packaging", "cloud-init")
CLIENTS = os.path.join(CHECKOUT, "tests", "packaging_clients.py")


@pytest.fixture(scope="module", autouse=True)
def possible():
    conftest.need("machines")


@pytest.fixture
def machine():
    with Machine() as machine:
        yield machine.boot()


@pytest.fixture(scope="module")
def installation():
    """A machine that it was installed on, halted: what others begin with."""
    with Machine() as machine:
        machine.boot()
        machine.install()
        machine.rest()
        yield machine


@pytest.fixture
def installed(installation):
    """A machine that it was installed on."""
    with Machine(like=installation) as machine:
        yield machine.boot()


@pytest.fixture(scope="module")
def shared(installation):
    """The same one for all tests that leave it as they find it."""
    with Machine(like=installation) as machine:
        yield machine.boot()


def test_a_machine_that_is_killed_while_it_is_made_leaves_no_mount(tmp_path, monkeypatch):
    """Or who deletes .cache afterwards deletes what is in this machine's /dev/shm."""
    program = tmp_path / "bin" / "mmdebstrap"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor tree; do :; done\nmkdir -p "$tree/dev"\n'
                       'mount --bind %s "$tree/dev" || exit 1\nkill -KILL $$\n' % tmp_path)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr(packaging_machine, "CACHE", str(tmp_path / "machines"))
    for _ in range(2):                      # and the next one begins anew
        with pytest.raises(subprocess.CalledProcessError) as caught:
            packaging_machine.tree()
        assert caught.value.returncode == -signal.SIGKILL
        with open("/proc/self/mountinfo") as mounts:
            assert str(tmp_path) not in mounts.read()
    assert program.exists()


def build_deb(folder, version=None):
    """The .deb of this checkout; of a copy with another version in it."""
    source = CHECKOUT
    if version:
        source = str(folder / version)
        os.makedirs(source)
        shutil.copytree(os.path.join(CHECKOUT, "packaging"), os.path.join(source, "packaging"))
        with open(os.path.join(CHECKOUT, "replicas_engine.py")) as file:
            text = re.sub('(?m)^__version__ = ".*"$', '__version__ = "%s"' % version, file.read())
        with open(os.path.join(source, "replicas_engine.py"), "w") as file:
            file.write(text)
    done = subprocess.run([os.path.join(source, "packaging", "build-deb"), str(folder)],
                          stdout=subprocess.PIPE, check=True, universal_newlines=True)
    return done.stdout.strip()


@pytest.fixture(scope="session")
def deb(tmp_path_factory):
    return build_deb(tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="session")
def newer_deb(tmp_path_factory):
    return build_deb(tmp_path_factory.mktemp("newer"), "9.9.9")


def put(machine, file, target="/srv/engine.deb"):
    shutil.copy(file, machine.path(target))
    return target


def check_service(machine, user="ubuntu", port=3737, secret=None):
    """An active, enabled service that answers, with a secret that only root can read on disk."""
    assert machine.states() == ["active", "active", "enabled", "enabled"], machine.journal()
    found = machine.secret()
    assert found == secret if secret else re.match("[0-9a-f]{64}$", found)
    assert json.loads(machine.get("/health", port=port)[1])["status"] == "ok"
    assert machine.get("/ping", port=port)[0] == 401
    assert machine.get("/ping", found, port)[0] == 200
    assert machine.out("stat -c '%%a %%U %%G' %s" % SETTINGS) == "600 root root"
    # Whatever was written since the machine is there, wherever it is.
    search = ("find / /run /tmp /dev/shm -xdev -type f -newercc '%s/packaging' -exec grep -lsF '%s'"
              " '{}' + 2>/dev/null || true" % (CLONE, found))
    assert SETTINGS in machine.out(search).split()
    others = "setpriv --reuid=%s --regid=%s --init-groups %s" % (user, user, search)
    assert machine.out(others) == ""
    assert machine.out("ps -o user= -p %d" % machine.pid()) == user
    assert found not in machine.journal()
    check_bytecode(machine, user)
    return found


ENGINE = "/usr/lib/replicas-engine"
# The files that Python would take bytecode from, each of them once for every Python.
BYTECODE = """
import glob, importlib.util, os
for source in glob.glob("%s/*.py"):
    with open(importlib.util.cache_from_source(source), "rb") as file:
        head = file.read(16)
    with open(source, "rb") as file:
        source_hash = importlib.util.source_hash(file.read())
    assert head == importlib.util.MAGIC_NUMBER + bytes([3, 0, 0, 0]) + source_hash, (source, head)
    print(os.path.basename(source))
""" % ENGINE


def check_bytecode(machine, user="ubuntu"):
    """The service runs from bytecode that is that of the module here, and root's alone to write."""
    assert machine.out("tr '\\0' ' ' </proc/%d/cmdline" % machine.pid()).split() == [
        "/usr/bin/python3", "-I", "-u", ENGINE]
    assert sorted(machine.out("python3 -I -", input=BYTECODE).split()) == [
        "__main__.py", "replicas_engine.py"]
    assert machine.out("find %s ! -type l -printf '%%U:%%G %%m\n' | sort -u" % ENGINE).split(
        "\n") == ["0:0 644", "0:0 755"]
    assert machine.out("setpriv --reuid=%s --regid=%s --init-groups find %s -writable" % (
        user, user, ENGINE)) == ""


def strange(machine, known):
    """What the machine has beyond the files that are known, and has not any more."""
    return machine.strange(known), machine.out(
        "find / -xdev -path '%s' -prune -o -path /proc -prune -o -path /run/systemd/transient"
        " -prune -o -name '*replicas*' -print" % CLONE)


# ---- install

def test_install(machine):
    before = machine.files()
    out = machine.install().stdout
    assert "answers on port 3737" in out and "journalctl" in out
    assert "npm install -g @openai/codex" in out  # Codex is not here, and that is said
    secret = check_service(machine)
    assert secret not in out

    # A second run changes nothing, and doesn't restart.
    files, pid = machine.files(), machine.pid()
    machine.install()
    assert machine.files() == files and machine.pid() == pid

    # A newer module is taken, with secret and settings kept.
    text = machine.read(CLONE + "/replicas_engine.py")
    machine.write(CLONE + "/replicas_engine.py", text + "\n# newer\n")
    machine.install()
    assert machine.pid() != pid
    assert check_service(machine) == secret

    # It is there again after a boot.
    machine.halt()
    machine.boot()
    assert check_service(machine) == secret

    pid = machine.pid()
    machine.install("--uninstall")
    assert strange(machine, before) == ([], "")
    assert machine.out("pgrep -u ubuntu || true") == ""
    assert machine.out("systemctl list-units --all --no-legend 'replicas*'") == ""
    machine.install("--uninstall")


def test_bytecode(installed):
    """Python takes it when it is right, does without it when it isn't, and a run renews it."""
    machine = installed
    loaded = "setpriv --reuid=ubuntu --regid=ubuntu --clear-groups python3 -I -v %s --version 2>&1"

    def from_bytecode():
        out = machine.out(loaded % ENGINE)
        return ["code object from '%s/__pycache__/%s." % (ENGINE, name) in out
                for name in ("__main__", "replicas_engine")]

    assert from_bytecode() == [True, True]

    # Another module of the same size and time, as two versions of the package may have.
    module = ENGINE + "/replicas_engine.py"
    machine.run("cp -p %s /srv/old; sed -i 's/^__version__ = \"./__version__ = \"8/' %s;"
                " touch -r /srv/old %s" % (module, module, module))
    assert machine.out("stat -c '%%s %%Y' /srv/old %s | uniq | wc -l" % module) == "1"
    files = machine.files()
    assert "replicas-engine 8." in machine.out("replicas-engine --version")  # and that as root
    machine.run("systemctl restart replicas-engine")
    assert json.loads(machine.get("/ping", machine.secret())[1])
    assert machine.files() == files and from_bytecode() == [True, False]
    machine.run("replicas-engine-setup")
    assert from_bytecode() == [True, True]
    check_bytecode(machine)

    # None at all, as after an upgrade of Python.
    machine.run("rm -r %s/__pycache__; systemctl restart replicas-engine" % ENGINE)
    assert machine.get("/health")[0] == 200
    assert "replicas-engine 8." in machine.out("replicas-engine --version")
    assert not os.path.exists(machine.path(ENGINE, "__pycache__"))
    machine.install()
    check_service(machine)


def test_install_with_options(machine):
    machine.run("useradd --create-home alice")
    out = machine.install("--user alice --port=4000 --workspace '/srv/my work' --secret -",
                          input="given-by-hand_16\r\n").stdout
    assert "answers on port 4000" in out and "alice in /srv/my work" in out
    check_service(machine, "alice", 4000, "given-by-hand_16")
    assert machine.out("stat -c %U '/srv/my work'") == "alice"
    status = json.loads(machine.get("/codex/status", "given-by-hand_16", 4000)[1])
    assert status["working_directory"] == "/srv/my work"
    listening = "cat /proc/net/tcp /proc/net/tcp6 | awk '$4 == \"0A\" { print $2 }'"
    assert [line.split(":")[1] for line in machine.out(listening).split()] == ["0FA0"]

    # All kept where nothing is said.
    files, pid = machine.files(), machine.pid()
    machine.install()
    assert machine.files() == files and machine.pid() == pid

    # Another port and address, and back.
    machine.run("replicas-engine-setup --port 4001 --host 127.0.0.1")
    check_service(machine, "alice", 4001, "given-by-hand_16")
    assert machine.out(listening).split() == ["0100007F:0FA1"]
    assert machine.get("/health", port=4000)[0] == 0
    out = machine.out("replicas-engine-setup --host ::1")
    turn = re.search(r"A turn: ((?:.*\n){3})", out).group(1)
    assert "http://[::1]:4001/" in turn
    assert "Codex" in json.loads(machine.out(turn.replace("sudo", "")))["error"]
    machine.run("replicas-engine-setup --port 3737 --host :: --user ubuntu --workspace /home/ubuntu"
                " --secret -", input="another-by-hand.2")
    check_service(machine, "ubuntu", 3737, "another-by-hand.2")
    assert machine.out("curl -s 'http://[::1]:3737/health'")
    assert machine.out("ls /etc/systemd/system | grep replicas || true") == ""


def test_install_says_what_is_missing_and_changes_nothing(machine):
    machine.run("python3 -c 'import socket, time; s = socket.create_server((\"\", 3737));"
                " time.sleep(600)' >/dev/null 2>&1 &")
    machine.wait_for(lambda: machine.out("grep -c :0E99 /proc/net/tcp", check=False) == "1")
    before = machine.files()
    for options, what in [
            ("", "port 3737: Address already in use"),
            ("--port 4000 --user nobody-here", "there is no user 'nobody-here'"),
            ("--port 4000 --user root", "as root the agent could"),
            ("--port 70000", "a number from 1 to 65535 is needed, not 70000"),
            ("--port 0x10", "a number from 1 to 65535 is needed, not 0x10"),
            ("--port 4000 --host example", "host: an IP address is needed, not example"),
            ("--host 999.1.1.1", "host: an IP address is needed, not 999.1.1.1"),
            ("--host 192.0.2.1", "no interface of this machine has the address 192.0.2.1"),
            ("--port 4000 --workspace /tmp/work", "a /tmp and /var/tmp of its own"),
            ("--port 4000 --workspace relative/path", "an absolute path is needed"),
            ("--port 4000 --workspace /etc/passwd", "is not a directory"),
            ("--port 4000 --secret - <<END\nwith-twenty-\"quotes\"\nEND", "--secret: letters, digits"),
            ("--port 4000 --secret - <<END\nfifteen-of-them\nEND", "less than 16 characters"),
            ("--port 4000 --secret - </dev/null", "--secret -: nothing on standard input"),
            ("--port 4000 --secret on-a-command-line", "--secret needs -, and the secret on"),
            ("--port 4000 --secret", "--secret needs a value"),
            ("--port 4000 --with-codex", "apt-get install npm"),
            ("--nonsense", "unknown option: --nonsense"),
            ("--port", "--port needs a value")]:
        done = machine.install(options, check=False)
        assert done.returncode == 1 and what in done.stderr, (options, done)
        assert "Traceback" not in done.stderr
        assert machine.files() == before, options
    machine.run("mv /usr/bin/python3 /usr/bin/python3.away")
    before = machine.files()
    done = machine.install("--port 4000", check=False)
    machine.run("true")
    assert done.returncode == 1 and "apt-get install python3" in done.stderr
    assert machine.files() == before


def test_directories_in_the_settings(installed):
    machine = installed
    settings, pid = machine.read(SETTINGS), machine.pid()
    # What only the service doesn't see.
    machine.run("ln -s /var/tmp /srv/link; mkdir /tmp/work; chmod 777 /tmp/work")
    machine.write(SETTINGS, settings + "CODEX_HOME=/srv/link/ch\nWORKSPACE_HOME=/tmp/work\n", 0o600)
    done = machine.run("replicas-engine-setup", check=False)
    assert done.returncode == 1 and machine.pid() == pid
    assert "CODEX_HOME: /srv/link/ch: the service has a /tmp" in done.stderr
    assert "--workspace: /tmp/work: the service has a /tmp" in done.stderr
    assert re.search("MISSING +workspace: WORKSPACE_HOME=/tmp/work",
                     machine.run("replicas-engine --check", check=False).stdout)

    # What isn't there yet, and what the user can't make.
    machine.write(SETTINGS, settings + "CODEX_HOME='/srv/codex home'\nWORKSPACE_HOME=~/a/b\n"
                  "REPLICAS_ENGINE_STATE=/srv/deep/state\n", 0o600)
    machine.run("replicas-engine-setup")
    check_service(machine)
    assert machine.out("stat -c '%U %a' '/srv/codex home' /srv/deep/state /srv/deep"
                       " /home/ubuntu/a /home/ubuntu/a/b").split("\n") == [
        "ubuntu 700", "ubuntu 700", "root 755", "ubuntu 755", "ubuntu 755"]
    assert machine.out("ls /srv/deep/state")
    machine.run("nsenter -t %d -m setpriv --reuid=ubuntu --clear-groups touch '/srv/codex home/x'"
                % machine.pid())
    checked = machine.run("replicas-engine --check", check=False).stdout
    assert re.search("(?m)^ok +workspace: /home/ubuntu/a/b$", checked)
    assert re.search("(?m)^ok +state: /srv/deep/state$", checked)


def test_setup_applies_what_stands_in_the_settings(installed):
    machine = installed
    settings, pid = machine.read(SETTINGS), machine.pid()
    environment = "tr '\\0' '\\n' </proc/%d/environ"

    def change(text):
        machine.write(SETTINGS, settings + text, 0o600)

    # A change restarts the service; the next run doesn't.
    change("REPLICAS_ENGINE_MODEL=mine\n")
    machine.run("replicas-engine-setup")
    assert machine.pid() != pid
    pid = machine.pid()
    assert "REPLICAS_ENGINE_MODEL=mine" in machine.out(environment % pid).split("\n")
    machine.run("replicas-engine-setup")
    assert machine.pid() == pid

    # Neither does it where somebody else restarted the service after the change.
    change("")
    machine.run("systemctl restart replicas-engine")
    pid = machine.pid()
    machine.run("replicas-engine-setup")
    assert machine.pid() == pid
    assert "REPLICAS_ENGINE_MODEL=mine" not in machine.out(environment % pid).split("\n")
    assert machine.out("stat -c '%a %U' /run/replicas-engine-started-with") == "600 root"

    # What the engine would refuse is refused, in its words, and nothing is changed.
    for text, what in [
            ("REPLICAS_ENGINE_SANDBOX=full\n", "REPLICAS_ENGINE_SANDBOX=full is none of"),
            ("REPLICAS_ENGINE_IDLE_TIMEOUT='1 h'\n", "REPLICAS_ENGINE_IDLE_TIMEOUT=1 h is not"),
            ("PORT=http\n", "a number from 1 to 65535 is needed, not http"),
            ("CODEX_HOME=relative/path\n", "CODEX_HOME: an absolute path is needed"),
            ("REPLICAS_ENGINE_STATE=state\n", "REPLICAS_ENGINE_STATE: an absolute path is needed"),
            ("CODEX_HOME=/tmp/x\n", "CODEX_HOME: /tmp/x: the service has a /tmp"),
            ("REPLICAS_ENGINE_WEBHOOK_URL=https://h.test/\n", "set both or neither"),
            ("REPLICAS_ENGINE_WEBHOOK_URL=ftp://h.test/\nREPLICAS_ENGINE_WEBHOOK_SECRET=any\n",
             "not the URL of an http or https server"),
            ("REPLICAS_ENGINE_SECRET=fifteen-of-them\n", "less than 16 characters"),
            ("A note.\n", "not NAME=value; mend or delete it.")]:
        change(text)
        before = machine.files()
        done = machine.run("replicas-engine-setup --workspace /home/ubuntu/new", check=False)
        assert done.returncode == 1 and what in done.stderr, (text, done)
        assert "Nothing was changed." in done.stderr and "Traceback" not in done.stderr
        assert machine.files() == before and machine.pid() == pid
        done = machine.run("replicas-engine --check", check=False)
        assert done.returncode == 1 and what in done.stdout, (text, done)
        assert "Nothing was changed." not in done.stdout + done.stderr
    change("WORKSPACE_HOME=relative/path\n")
    assert "an absolute path is needed" in machine.run("replicas-engine-setup", check=False).stderr

    # Whoever else could read the file or write it can't afterwards.
    for how in ("chown ubuntu", "chmod 664", "chmod 604"):
        change("")
        machine.run("%s %s; replicas-engine-setup" % (how, SETTINGS))
        assert machine.out("stat -c '%%a %%U %%G' %s" % SETTINGS) == "600 root root"


def test_setup_restarts_a_service_that_cannot_write_its_directories(installed):
    """Each was deleted, and perhaps made again: the service's own view of the files knows but the
    first.  While a turn runs nothing is restarted."""
    machine = installed
    machine.run("echo REPLICAS_ENGINE_STATE=/srv/state >>" + SETTINGS)
    machine.run("replicas-engine-setup --workspace /srv/work")
    for folder in ("/srv/work", "/srv/state", "/var/lib/replicas-engine"):
        if folder.startswith("/var"):
            machine.run("sed -i '/^REPLICAS_ENGINE_STATE=/d' %s; replicas-engine-setup" % SETTINGS)
        pid = machine.pid()
        machine.run("rm -r " + folder)
        if not folder.startswith("/var"):
            machine.run("mkdir {0}; chown ubuntu {0}".format(folder))
        done = machine.run("replicas-engine --check", check=False)
        assert done.returncode == 1
        assert re.search("MISSING (service: .*%s: .*; sudo systemctl restart replicas-engine"
                         "|state: .*%s: .*; sudo replicas-engine-setup)" % (folder, folder),
                         done.stdout), done
        machine.run("rm -rf %s; replicas-engine-setup" % folder)
        assert machine.pid() != pid
        machine.run("nsenter -t %d -m setpriv --reuid=ubuntu --clear-groups touch %s/x"
                    % (machine.pid(), folder))
        pid = machine.pid()
        machine.run("replicas-engine-setup")
        assert machine.pid() == pid
        done = machine.run("replicas-engine --check", check=False)
        assert "MISSING service" not in done.stdout, done
    machine.run("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
    done = machine.run("replicas-engine --check", check=False)
    assert "MISSING service" not in done.stdout, done


def test_setup_names_what_mends_a_directory_that_the_user_cannot_write(installed):
    machine = installed
    settings = machine.read(SETTINGS)
    machine.run("mkdir /home/ubuntu/w /srv/s")
    user, pid = machine.out("id -u ubuntu"), machine.pid()
    # On this one the engine would not start.
    machine.write(SETTINGS, settings + "REPLICAS_ENGINE_STATE=/srv/s\n", 0o600)
    done = machine.run("replicas-engine-setup", check=False)
    assert done.returncode == 1 and "sudo chown -R ubuntu /srv/s/" in done.stderr, done
    assert machine.pid() == pid
    for text, subject in [("WORKSPACE_HOME=/home/ubuntu/w\n", "workspace"),
                          ("CODEX_HOME=~/w\n", "codex home")]:
        machine.write(SETTINGS, settings + text, 0o600)
        said = machine.run("replicas-engine-setup").stdout
        assert re.search("MISSING %s: .*=/home/ubuntu/w: it can't be written; sudo chown %s "
                         "/home/ubuntu/w, if" % (subject, user), said), said
    machine.run("chown ubuntu: /home/ubuntu/w")
    checked = machine.run("replicas-engine --check", check=False).stdout
    assert re.search("(?m)^ok +codex home: /home/ubuntu/w$", checked)
    # The agent isn't to write there: then nobody needs to.
    machine.write(SETTINGS, settings + "WORKSPACE_HOME=/srv\nREPLICAS_ENGINE_SANDBOX=read-only\n",
                  0o600)
    assert "MISSING workspace" not in machine.run("replicas-engine-setup").stdout


def test_secret_is_known_as_systemd_reads_it(installed):
    """With blanks and quotes, which systemd takes away."""
    machine = installed
    settings = machine.read(SETTINGS)
    for line in ("  REPLICAS_ENGINE_SECRET = given-by-hand_16",
                 "REPLICAS_ENGINE_SECRET='given-by-hand_16'",
                 'REPLICAS_ENGINE_SECRET="given-by-"hand_16'):
        machine.write(SETTINGS, re.sub("(?m)^REPLICAS_ENGINE_SECRET=.*", line, settings), 0o600)
        out = machine.out("replicas-engine-setup")
        turn = re.search(r"A turn: ((?:.*\n){3})", out).group(1)
        assert "Codex" in json.loads(machine.out(turn.replace("sudo", "")))["error"]
        shown = re.search(r"The secret: (.*)", out).group(1)
        assert machine.out(shown.replace("sudo", "")) == "given-by-hand_16"
        done = machine.run("replicas-engine --check", check=False)
        assert re.search("(?m)^ok +secret: ", done.stdout) and not done.stderr, done
    machine.run("rm " + SETTINGS)
    done = machine.run("replicas-engine --check", check=False)
    assert done.returncode == 1 and "MISSING secret: " in done.stdout and not done.stderr, done


def check_reading(machine):
    """Settings of random characters: setup knows what systemd makes of them, or refuses them."""
    draw = random.Random(11)
    texts = []
    for _ in range(40):
        lines = ["%s%s=%s" % (draw.choice(["", "", " "]), draw.choice("VWXYZ"), "".join(
            draw.choice("ab \t\\'\"#;=$`é") for _ in range(draw.randrange(9)))) for _ in range(3)]
        lines += draw.sample(["", "# note", "; note \\", "#\\ note", "no setting", "export W=1", "V"],
                             2) if draw.random() < 0.5 else []
        draw.shuffle(lines)
        texts.append(draw.choice(["\n", "\n", "\r\n"]).join(lines) + draw.choice(["", "\n"]))
    machine.write("/srv/texts.json", json.dumps(texts))
    found = json.loads(machine.out("python3 -IB -", input=READ_SETTINGS, timeout=120))
    for text, (values, complaint, systemd) in zip(texts, found):
        assert complaint or values == systemd, (text, values, systemd)
    assert sum(not complaint for _, complaint, _ in found) > 10
    machine.run("rm /srv/texts.*")


# What setup and what systemd make of each of the texts.
READ_SETTINGS = r"""
import importlib.machinery, importlib.util, json, subprocess
loader = importlib.machinery.SourceFileLoader("setup", "/usr/sbin/replicas-engine-setup")
setup = importlib.util.module_from_spec(importlib.util.spec_from_loader("setup", loader))
loader.exec_module(setup)
found = []
for text in json.load(open("/srv/texts.json")):
    with open("/srv/texts.env", "w", newline="") as file:
        file.write(text)
    settings = setup.SettingsFile(setup.read("/srv/texts.env"))
    out = subprocess.run(["systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--property="
                          "EnvironmentFile=/srv/texts.env", "/usr/bin/env", "-0"], check=True,
                         stdout=subprocess.PIPE).stdout.decode()
    systemd = dict(line.split("=", 1) for line in out.split("\0") if line[:1] in "VWXYZ"
                   and line[1:2] == "=")
    found.append((settings.values, settings.complaint, systemd))
print(json.dumps(found))
"""


def test_settings_are_read_as_systemd_reads_them(shared):
    check_reading(shared)


def test_install_with_codex(machine):
    machine.write("/usr/local/bin/npm", '#!/bin/sh\necho "$@" >/srv/npm-called\n'
                  "printf '#!/bin/sh\\necho codex-cli 0.169.0\\n' >/usr/local/bin/codex\n"
                  "chmod 755 /usr/local/bin/codex\n", 0o755)
    machine.install("--with-codex")
    assert machine.read("/srv/npm-called") == "install --global @openai/codex@latest\n"
    check_service(machine)
    machine.run("rm /srv/npm-called")
    machine.install("--with-codex")
    assert not os.path.exists(machine.path("/srv/npm-called"))


def test_where_the_sandbox_is_forbidden(machine):
    """As on Ubuntu 24.04, whose AppArmor this machine doesn't have: with stand-ins."""
    machine.write("/usr/local/bin/bwrap", "#!/bin/sh\necho 'bwrap: loopback: Failed' >&2; exit 1\n",
                  0o755)
    out = machine.install().stdout
    assert "bwrap: loopback: Failed" in out and "replicas-engine-setup --allow-sandbox" in out
    machine.write("/usr/local/sbin/apt-get", """#!/bin/sh
case "$*" in *install*bubblewrap*apparmor-profiles*)
    mkdir -p /usr/share/apparmor/extra-profiles /etc/apparmor.d
    echo profile >/usr/share/apparmor/extra-profiles/bwrap-userns-restrict
esac
""", 0o755)
    machine.write("/usr/local/sbin/apparmor_parser", """#!/bin/sh
[ "$*" = "-r /etc/apparmor.d/bwrap-userns-restrict" ] && cat "$2" || exit 1
printf '#!/bin/sh\\n' >/usr/local/bin/bwrap
""", 0o755)
    out = machine.install("--allow-sandbox").stdout
    assert "profile" in out.split() and "can't be made" not in out
    assert "sandbox" not in machine.get("/codex/status", machine.secret())[1].replace(
        '"sandbox_mode"', "")
    assert "can't be made" not in machine.run("replicas-engine-setup").stdout


# ---- The .deb

def test_deb(machine, deb, newer_deb):
    before = machine.files()
    package = put(machine, deb)
    out = machine.run("dpkg -i " + package).stdout
    assert "answers on port 3737" in out
    secret = check_service(machine)
    done = machine.install(check=False)
    assert done.returncode and "Debian package" in done.stderr

    # The same again.
    files = machine.files()
    machine.run("dpkg -i " + package)
    again = machine.files()
    assert set(again) == set(files)
    assert not [path for path in files if again[path] != files[path]
                and path.startswith(("/etc/", "/home/"))]

    # An upgrade keeps secret and settings.
    machine.run("echo REPLICAS_ENGINE_MODEL=mine >>" + SETTINGS)
    machine.run("replicas-engine-setup --port 4000")
    pid, settings = machine.pid(), machine.read(SETTINGS)
    machine.run("dpkg -i " + put(machine, newer_deb))
    assert machine.pid() != pid and machine.read(SETTINGS) == settings
    assert check_service(machine, port=4000) == secret
    assert "9.9.9" in machine.out("replicas-engine --version")

    # Removed: not running, settings kept for the next time.
    machine.run("dpkg -r replicas-engine")
    assert machine.out("pgrep -u ubuntu || true") == ""
    assert machine.get("/health", port=4000)[0] == 0
    assert machine.read(SETTINGS) == settings
    machine.run("dpkg -i " + package)
    assert check_service(machine, port=4000) == secret

    # From the package to a checkout and back, with all kept. A purge after that takes nothing.
    machine.run("dpkg -r replicas-engine")
    machine.install()
    machine.run("dpkg -P replicas-engine")
    assert check_service(machine, port=4000) == secret
    out = machine.run("dpkg -i " + put(machine, newer_deb)).stdout
    assert "replicas-engine 9.9.9 answers on port 4000" in out
    assert check_service(machine, port=4000) == secret
    status = json.loads(machine.get("/codex/status", secret, 4000)[1])
    assert status["engine"]["version"] == "9.9.9"

    machine.run("dpkg -P replicas-engine; rm %s" % package)
    assert strange(machine, before) == ([], "")
    assert machine.out("systemctl list-units --all --no-legend 'replicas*'") == ""
    assert machine.out("dpkg -l | grep replicas || true") == ""


def test_deb_stays_disabled(machine, deb, newer_deb):
    machine.run("dpkg -i " + put(machine, deb))
    machine.run("systemctl disable --now replicas-engine.socket replicas-engine.service")
    machine.run("dpkg -i " + put(machine, newer_deb))
    assert machine.states() == ["inactive", "inactive", "disabled", "disabled"]
    machine.run("rm -r /var/lib/replicas-engine")       # as if it had never run
    checked = machine.run("replicas-engine --check", check=False).stdout
    assert "ok      state: /var/lib/replicas-engine\n" in checked, checked
    assert not os.path.exists(machine.path("/var/lib/replicas-engine"))


def test_deb_where_there_is_no_such_user(machine, deb):
    machine.run("userdel -r ubuntu; useradd --create-home debian", check=False)
    done = machine.run("dpkg -i " + put(machine, deb))
    assert "sudo replicas-engine-setup --user NAME" in done.stderr and "debian" in done.stderr
    assert "not started" in done.stderr
    assert machine.states()[:2] == ["inactive", "inactive"]
    machine.run("replicas-engine-setup --user debian")
    secret = check_service(machine, "debian")
    machine.run("dpkg -i " + put(machine, deb))
    assert check_service(machine, "debian") == secret


def test_deb_upgrades_an_engine_with_a_short_secret(machine, deb, newer_deb):
    """As 0.1.0's machines may have one: it is said, and costs nothing."""
    machine.run("dpkg -i " + put(machine, deb))
    machine.run("sed -i 's/^REPLICAS_ENGINE_SECRET=.*/REPLICAS_ENGINE_SECRET=short/' %s;"
                " systemctl restart replicas-engine" % SETTINGS)
    done = machine.run("dpkg -i " + put(machine, newer_deb))
    assert "less than 16 characters" in done.stderr
    assert "replicas-engine 9.9.9 answers" in done.stdout
    assert machine.get("/ping", "short")[0] == 200


def test_deb_where_no_systemd_runs(deb):
    """As when an image is built: enabled, not started."""
    with Machine() as machine:
        put(machine, deb)
        out = subprocess.run(["chroot", machine.root, "dpkg", "-i", "/srv/engine.deb"], check=True,
                             stdout=subprocess.PIPE, universal_newlines=True).stdout
        assert "starts when systemd does" in out
        before = sorted(os.listdir(machine.path("/root")))
        done = subprocess.run(["chroot", machine.root, "replicas-engine", "--check"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        assert done.returncode == 1 and "systemd does not run here" in done.stdout
        assert sorted(os.listdir(machine.path("/root"))) == before
        machine.boot()
        check_service(machine)


def test_on_the_oldest_debian(deb):
    """systemd 247 and Python 3.9, without merged /usr."""
    with Machine(suite="bullseye") as machine:
        machine.boot()
        before = machine.files()
        machine.install("--port 4000")
        check_service(machine, port=4000)
        check_reading(machine)
        verify = machine.run(VERIFY)
        assert verify.stdout + verify.stderr == ""
        done = machine.run("replicas-engine --check", check=False)
        assert re.search("(?m)^ok +state: ", done.stdout) and not done.stderr, done
        assert not machine.out("journalctl -p warning -b | grep replicas-engine-check || true")
        machine.install("--uninstall")
        machine.run("dpkg -i " + put(machine, deb))
        check_service(machine)
        machine.run("dpkg -P replicas-engine; rm /srv/engine.deb")
        assert strange(machine, before) == ([], "")


# ---- cloud-init

def test_cloud_init(tmp_path, deb):
    data = subprocess.run(
        [CLOUD_INIT, "--deb", deb, "--secret", "-", "--codex-api-key", "-", "--port", "4000"],
        input="the-fleet-s-secret\nsk-/&given\n",
        stdout=subprocess.PIPE, check=True, universal_newlines=True).stdout
    with Machine(["cloud-init"]) as machine:
        seed = "/var/lib/cloud/seed/nocloud/"
        machine.write(seed + "meta-data", "instance-id: one\nlocal-hostname: one\n")
        machine.write(seed + "user-data", data, 0o600)
        machine.write("/etc/cloud/cloud.cfg.d/99-test.cfg",
                      "datasource_list: [NoCloud]\nnetwork: {config: disabled}\n")
        machine.write("/etc/cloud/ds-identify.cfg", "policy: enabled\n")
        # Its network is its own and empty: npm is one that needs none.
        machine.write("/usr/local/bin/npm", '#!/bin/sh\necho "$@" >/srv/npm-called\n', 0o755)
        machine.boot()
        done = machine.run("cloud-init status --wait --long", check=False, timeout=120)
        log = machine.read("/var/log/cloud-init-output.log")
        assert "status: done" in done.stdout, done.stdout + log
        schema = machine.run("cloud-init schema --config-file %suser-data" % seed)
        assert "Valid schema" in schema.stdout, schema
        check_service(machine, port=4000, secret="the-fleet-s-secret")
        assert "\nCODEX_API_KEY=sk-/&given\n" in machine.read(SETTINGS)
        assert machine.read("/srv/npm-called") == "install --global @openai/codex@latest\n"
        assert machine.out("ls /run/replicas-engine.deb* 2>/dev/null || true") == ""

        # The next boot changes nothing.
        settings = machine.read(SETTINGS)
        machine.run("rm /srv/npm-called")
        machine.halt()
        machine.boot()
        machine.run("cloud-init status --wait", check=False, timeout=120)
        check_service(machine, port=4000, secret="the-fleet-s-secret")
        assert machine.read(SETTINGS) == settings
        assert not os.path.exists(machine.path("/srv/npm-called"))


# ---- The units

def test_units(shared):
    verify = shared.run(VERIFY)
    assert verify.stdout + verify.stderr == ""
    security = shared.out("systemd-analyze security --no-pager replicas-engine.service")
    score = float(re.search(r"exposure level for \S+: ([0-9.]+)", security).group(1))
    print("systemd-analyze security: %s" % score)
    assert score <= 3.0


def test_restart_leaves_what_the_user_has_in_shared_memory(shared):
    shared.run("setpriv --reuid=ubuntu --clear-groups touch /dev/shm/the-users")
    shared.run("systemctl restart replicas-engine && test -e /dev/shm/the-users && rm"
               " /dev/shm/the-users")


def test_needrestart_leaves_the_engine_alone():
    """With a library of its process replaced, as by an upgrade of Debian's."""
    with Machine(["needrestart"]) as machine:
        machine.boot()
        machine.install()
        pid = machine.pid()
        library = machine.out("awk '/libz|libexpat|libc[.]so/ { print $6; exit }' /proc/%d/maps" % pid)
        machine.run("cp -p {0} {0}.new; mv {0}.new {0}".format(library))
        assert library in machine.out("grep deleted /proc/%d/maps" % pid)
        named = machine.run("needrestart -l -r a")
        print(named.stdout, named.stderr)
        assert machine.pid() == pid and "replicas-engine.service" in named.stdout
        # Without the file it would have been restarted.
        machine.run("rm /etc/needrestart/conf.d/replicas-engine.conf; needrestart -l -r a")
        machine.wait_for(lambda: machine.pid() != pid)


CODEX = "0.169.0"


@pytest.fixture(scope="module")
def codex_installation():
    """A halted machine with the real Codex. The workspace is /home/ubuntu/project."""
    codex = packaging_machine.codex_program(CODEX)
    if not codex:
        conftest.unavailable("Codex %s is not in .cache/codex: see tests/run" % CODEX)
    folder, name = os.path.split(os.path.dirname(codex))
    binds = [(folder, "/opt/codex"), (os.path.join(CHECKOUT, "tests"), "/opt/tests")]
    with Machine(binds=binds) as machine:
        os.symlink("/opt/codex/%s/codex" % name, machine.path("/usr/local/bin/codex"))
        machine.boot()
        machine.install("--workspace /home/ubuntu/project")
        machine.run("echo CODEX_API_KEY=stand-in >>" + SETTINGS)
        machine.rest()
        yield machine


@pytest.fixture
def with_codex(codex_installation):
    """A machine with the real Codex and the stand-in model, on which turns are possible."""
    with Machine(binds=codex_installation.binds, like=codex_installation) as machine:
        machine.boot()
        machine.run("systemd-run --quiet --unit=stand-in-model -p User=ubuntu"
                    " python3 /opt/tests/stand_in_model --codex-home /home/ubuntu/.codex")
        machine.wait_for(lambda: machine.run("test -s /home/ubuntu/.codex/config.toml",
                                             check=False).returncode == 0)
        yield machine


def events(text):
    """The events of a stream: (type, data)."""
    found = re.findall(r"(?m)^event: (\S+)\ndata: (.*)$", text)
    return [(kind, json.loads(data)) for kind, data in found]


def send(machine, message, **more):
    status, text = machine.post("/codex/send", dict(message=message, **more), machine.secret())
    assert status == 200, text
    return events(text)


def commands(found):
    return [data["item"] for kind, data in found
            if kind == "item.completed" and data["item"]["type"] == "command_execution"]


# Everything that the agent could try to get at the secret by.
SNOOP = ("cat %s; env; for p in /proc/[0-9]*; do tr '\\0' '\\n' <$p/environ; cat $p/cmdline; done;"
         " cat /proc/*/task/*/environ; ls -l /proc/*/fd; systemctl show replicas-engine;"
         " systemctl cat replicas-engine; journalctl -u replicas-engine; cat /run/systemd/units/*;"
         " cat /etc/replicas-engine/*; su -c true; sudo -n true; true" % SETTINGS)


def test_a_real_turn(with_codex):
    machine = with_codex
    status = json.loads(machine.get("/codex/status", machine.secret())[1])
    assert status["codex"]["version"] == CODEX
    assert machine.run("replicas-engine --check", check=False).returncode == 0
    # A file that the user and the service's unit could write, but Codex's sandbox must not.
    found = send(machine, "model: run echo made >inside.txt; echo no >/home/ubuntu/outside.txt;"
                          " echo no >/home/ubuntu/.codex/outside.txt; echo ran; %s\n"
                          "model: say That was it." % SNOOP)
    assert found[-2][0] == "turn.completed" and found[-1][0] == "done", found
    command, = commands(found)
    assert "ran" in command["aggregated_output"].split()
    assert machine.out("cat /home/ubuntu/project/inside.txt; stat -c %U /home/ubuntu/project/inside.txt"
                       ) == "made\nubuntu"
    assert machine.out("find / -xdev -name outside.txt") == ""
    secret = machine.secret()
    assert secret not in json.dumps(found)

    # Without Codex's sandbox: what is left is the service's own, and the secret is still safe.
    # Processes that are not dumpable, as the engine is, can be seen: it must find its turns'.
    engine = "/proc/%d/stat" % machine.pid()
    found = send(machine, "model: run echo yes >/home/ubuntu/outside.txt; echo ran; ls %s; %s\n"
                          "model: say That was it." % (engine, SNOOP),
                 sandbox_mode="danger-full-access")
    command, = commands(found)
    assert {"ran", engine} <= set(command["aggregated_output"].split())
    assert "REPLICAS_ENGINE_SECRET" not in command["aggregated_output"].replace(
        "set REPLICAS_ENGINE_SECRET", "")
    assert machine.out("cat /home/ubuntu/outside.txt") == "yes"
    assert secret not in json.dumps(found)
    assert secret not in machine.get("/codex/history", secret)[1]

    # All of it outside the unit's confines fails: the agent isn't root, and won't be.
    found = send(machine, "model: run echo no >/usr/outside.txt; echo no >/etc/outside.txt;"
                          " grep NoNewPrivs /proc/self/status\nmodel: say Done.",
                 sandbox_mode="danger-full-access")
    assert "NoNewPrivs:\t1" in commands(found)[0]["aggregated_output"]
    assert machine.out("ls /usr/outside.txt /etc/outside.txt 2>/dev/null || true") == ""


# ---- Never down

class Clients:
    """Eight clients in the machine, and readers of the running turn, until `finish`."""

    def __init__(self, machine):
        self.machine = machine
        secret = machine.secret()
        shutil.copy(CLIENTS, machine.path("/opt/c.py"))
        command = machine.enter() + ["env", "-i", "python3", "/opt/c.py", secret, "/srv/stop"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True)

    def finish(self):
        self.machine.write("/srv/stop", "")
        found = json.loads(self.process.communicate(timeout=harness.PATIENCE)[0])
        os.remove(self.machine.path("/srv/stop"))
        print("8 clients: %(outcomes)s, longest %(longest).2f s" % found)
        return found


def running_turn(machine):
    """Starts a turn that would run for long, with three readers; returns them when it runs."""
    secret = machine.secret()
    texts = [None] * 3

    def read(n):
        if n == 0:
            body = {"message": "model: run echo begun; sleep 3579\nmodel: say never"}
            texts[0] = machine.post("/codex/send", body, secret)[1]
        else:
            texts[n] = machine.get("/codex/events", secret)[1]

    threads = [threading.Thread(target=read, args=(n,)) for n in range(3)]
    threads[0].start()
    machine.wait_for(lambda: machine.out("pgrep -f '[s]leep 3579' || true"))
    for thread in threads[1:]:
        thread.start()
    machine.wait_for(lambda: int(machine.out("pgrep -c curl || true")) >= 3)
    return threads, texts


@pytest.mark.parametrize("how", ["restart", "upgrade"])
def test_no_request_is_refused(with_codex, newer_deb, deb, how):
    machine = with_codex
    thread_id = send(machine, "model: say First.")[0][1]["thread_id"]
    if how == "upgrade":
        machine.run("systemctl stop replicas-engine.socket replicas-engine.service")
        machine.run("dpkg -i " + put(machine, deb))
    threads, texts = running_turn(machine)
    clients = Clients(machine)
    machine.wait_for(lambda: clients.process.poll() is None and
                     int(machine.out("grep -c ':0E99 .* 01 ' /proc/net/tcp6 || true")) >= 0)
    pid = machine.pid()
    if how == "restart":
        machine.run("sleep 0.5; systemctl restart replicas-engine; sleep 1")
    else:
        machine.run("sleep 0.5; dpkg -i %s; sleep 1" % put(machine, newer_deb))
    found = clients.finish()
    assert machine.pid() != pid
    assert set(found["outcomes"]) == {"200"}, found
    assert found["outcomes"]["200"] > 100

    for thread in threads:
        thread.join(harness.PATIENCE)
    for text in texts:
        ending = events(text)
        assert [kind for kind, _ in ending[-2:]] == ["turn.failed", "done"], text
        assert ending[-2][1]["error"]["code"] == "shutdown"
    assert machine.out("pgrep -f '[s]leep 3579' || true") == ""
    # The thread goes on.
    assert send(machine, "model: say Second.")[0][1]["thread_id"] == thread_id


def test_kill_9(with_codex):
    machine = with_codex
    thread_id = send(machine, "model: say First.")[0][1]["thread_id"]
    pid = machine.pid()
    # The clients' view: one that comes at that moment waits for its answer, and gets it.
    took = float(machine.out("kill -9 %d; sleep 0.02; curl -sf -o /dev/null -w '%%{time_total}'"
                             " %s/health" % (pid, BASE)))
    print("answered after kill -9: %.2f s" % took)
    assert machine.pid() != pid
    assert send(machine, "model: say Second.")[0][1]["thread_id"] == thread_id
    # In the middle of a turn: nothing of it is left, and the turn has its ending.
    threads, _ = running_turn(machine)
    machine.run("kill -9 %d" % machine.pid())
    for thread in threads:
        thread.join(harness.PATIENCE)
    machine.wait_for(lambda: machine.get("/health")[0] == 200)
    assert machine.out("pgrep -f '[s]leep 3579' || true") == ""
    ending = events(machine.get("/codex/events", machine.secret())[1])
    assert ending[-2][0] == "turn.failed" and ending[-1][0] == "done", (ending, machine.journal())
    assert ending[-2][1]["error"]["code"] == "engine_restarted"
    assert send(machine, "model: say Third.")[0][1]["thread_id"] == thread_id


def test_watchdog(installed):
    """A paused machine must not have its engine killed; where the owner wants one it is fed."""
    machine = installed
    assert machine.out("systemctl show -p WatchdogUSec --value replicas-engine") in ("0", "infinity")
    machine.write("/etc/systemd/system/replicas-engine.service.d/test.conf",
                  "[Service]\nWatchdogSec=3\n")
    machine.run("systemctl daemon-reload; systemctl restart replicas-engine")
    pid = machine.pid()
    machine.run("sleep 7")
    assert machine.pid() == pid


def test_nobody_reads_the_secret_before_the_engine_runs(installed):
    """Something else in its place, which does nothing for its secret."""
    machine = installed
    machine.write("/etc/systemd/system/replicas-engine.service.d/test.conf",
                  "[Service]\nType=exec\nExecStart=\nExecStart=/bin/sleep 3579\n")
    machine.run("systemctl daemon-reload; systemctl restart replicas-engine")
    environ = "/proc/%d/environ" % machine.pid()
    assert machine.secret() in machine.out("tr '\\0' '\\n' <%s" % environ)
    done = machine.run("su ubuntu -s /bin/sh -c 'cat %s'" % environ, check=False)
    assert done.returncode != 0 and not done.stdout


def test_check_tries_what_the_unit_allows(installed):
    """Whatever the operator's own drop-in takes away or gives."""
    machine = installed

    def checked(lines):
        machine.write("/etc/systemd/system/replicas-engine.service.d/test.conf", lines)
        machine.run("systemctl daemon-reload; systemctl restart replicas-engine")
        return machine.run("replicas-engine --check", check=False).stdout

    assert re.search("(?m)^ok +sandbox: ", checked("[Service]\n"))
    assert "MISSING sandbox: " in checked("[Service]\nRestrictNamespaces=yes\n")
    assert "MISSING sandbox: " in checked("[Service]\nSystemCallFilter=\\\n  ~unshare\n")
    out = checked("[Service]\nInaccessiblePaths=/home/ubuntu\nEnvironment=REPLICAS_ENGINE_X=%n\n"
                  "[Unit]\nDescription=A unit of mine\n")
    assert "MISSING workspace: " in out and "REPLICAS_ENGINE_X is not a setting" in out
    assert machine.out("ls /run/systemd/system /run | grep replicas-engine-check || true") == ""
    assert machine.out("systemctl list-units --all --no-legend 'replicas-engine-check*'") == ""
    assert not machine.out("journalctl -p warning -b | grep replicas-engine-check || true")


def test_check_does_not_have_the_secret(installed):
    machine = installed
    machine.run("echo REPLICAS_ENGINE_WEBHOOK_URL=http://127.0.0.1:9/ >>{0}; "
                "echo REPLICAS_ENGINE_WEBHOOK_SECRET=the-key-of-the-webhook >>{0}".format(SETTINGS))
    machine.write("/srv/codex", "#!/bin/sh\nsleep 4\necho codex-cli 0.169.0\n", 0o755)
    machine.run("echo CODEX_PATH=/srv/codex >>" + SETTINGS)
    out = machine.out("replicas-engine --check >/srv/checked & sleep 2; for pid in $(pgrep -f"
                      " '[-]I /usr/lib/replicas-engine --check'); do cat /proc/$pid/environ; done |"
                      " tr '\\0' '\\n'; wait")
    assert "CODEX_PATH=/srv/codex" in out and machine.secret() not in out
    assert "the-key-of-the-webhook" not in out
    assert "ok      secret: REPLICAS_ENGINE_SECRET is set" in machine.out("cat /srv/checked")


def test_check_finds_what_is_wrong_with_the_settings_and_the_socket(installed):
    machine = installed
    machine.run("echo no setting >>%s; echo PORT=4000 >>%s" % (SETTINGS, SETTINGS))
    done = machine.run("replicas-engine --check", check=False)
    assert done.returncode == 1 and "MISSING settings: " in done.stdout and "NAME=" in done.stdout
    machine.run("sed -i /^no/d " + SETTINGS)
    done = machine.run("replicas-engine --check", check=False)
    assert re.search("MISSING port: .*PORT=4000 is passed over.*3737 of every interface; sudo "
                     "replicas-engine-setup", done.stdout), done
    machine.run("systemctl stop replicas-engine; userdel ubuntu")
    done = machine.run("replicas-engine --check", check=False)
    assert done.returncode == 1
    assert re.search("MISSING settings: there is no user 'ubuntu' .*\n +sudo replicas-engine-setup",
                     done.stdout), done


def test_stop_leaves_no_process(with_codex):
    machine = with_codex
    threads, texts = running_turn(machine)
    group = machine.out("systemctl show -p ControlGroup --value replicas-engine")
    start = time.monotonic()
    machine.run("systemctl stop replicas-engine.socket replicas-engine.service")
    print("stop with a running turn: %.2f s" % (time.monotonic() - start))
    for thread in threads:
        thread.join(harness.PATIENCE)
    assert events(texts[0])[-2][1]["error"]["code"] == "shutdown"
    assert machine.out("systemctl show -p Result --value replicas-engine") == "success"
    machine.run("systemctl stop stand-in-model")
    assert machine.out("pgrep -u ubuntu -a || true") == ""
    assert machine.out("cat /sys/fs/cgroup/systemd%s/cgroup.procs /sys/fs/cgroup%s/cgroup.procs"
                       " 2>/dev/null || true" % (group, group)) == ""
    assert machine.get("/health")[0] == 0


NUMBER = "4000.3571"                    # in the command line of whatever a turn tries to hide
ESCAPED = "cat /proc/[0-9]*/task/*/cmdline 2>/dev/null | grep -azc '^%s$' || true" % NUMBER
CGROUPS = ("find /sys/fs/cgroup -path '*/replicas-engine.service/*' -type d"
           " -name 'replicas-turn-*' | sort -u")


def start_escapes(machine, names):
    """A turn in which these tricks are under way, in the thread that reads its events."""
    folder = "/home/ubuntu/project/"
    tricks.prepare(machine.path("/srv"))
    command, count, made = tricks.command(names, NUMBER, "/srv")
    machine.run("cd %s; rm -f %s" % (folder, " ".join(made)))
    thread = threading.Thread(target=machine.post, args=("/codex/send", {
        "message": "model: run %s\nmodel: say Done." % command,
        "sandbox_mode": "danger-full-access"}, machine.secret()))
    thread.start()
    machine.wait_for(lambda: int(machine.out("pgrep -fc '^sleep %s' || true" % NUMBER)) >= count)
    assert int(machine.out(ESCAPED)) >= count
    for name in made:
        machine.wait_for(lambda: os.path.exists(machine.path(folder, name)))
    return thread


def test_nothing_gets_away_from_a_turns_control_group(with_codex):
    """All tricks at once; and nothing is hit that is not the turn's.  With the older Codexes the same
    is tried in test_processes.py, in a control group that is delegated as systemd does it."""
    machine = with_codex
    machine.run("setsid -f setpriv --reuid=ubuntu --clear-groups sleep 4000.1 >/dev/null 2>&1")
    for how in ("kill -9", "interrupt"):
        thread = start_escapes(machine, tricks.COMMANDS)
        cgroup = machine.out(CGROUPS)
        pids = machine.out("cat %s/cgroup.procs" % cgroup).split()
        assert set(machine.out("pgrep -f '^sleep %s'" % NUMBER).split()) <= set(pids)
        if how == "interrupt":
            status, text = machine.post("/codex/interrupt", {}, machine.secret())
            assert (status, json.loads(text)["interrupted"]) == (200, True), machine.journal()
            populated = machine.out("cat %s/cgroup.events || true" % cgroup)
            assert populated == "" or "populated 0" in populated
        else:
            machine.run("kill -9 %d" % machine.pid())
            machine.wait_for(lambda: machine.get("/codex/events", machine.secret())[0] == 200)
        assert machine.out(ESCAPED) == "0"
        thread.join(harness.PATIENCE)
        machine.wait_for(lambda: machine.out(CGROUPS) == "")
    assert machine.out("pgrep -fc '^sleep 4000.1$'") == "1"


def test_setup_ends_no_turn_to_mend_the_service(with_codex):
    machine, folder = with_codex, "/srv/work"
    machine.run("replicas-engine-setup --workspace " + folder)
    curl = ("echo \"X-Replicas-Engine-Secret: $(replicas-engine-setup --print-secret)\" |"
            " curl -sf -H @- -X POST http://127.0.0.1:3737/codex/")
    machine.run(curl + "send -H 'Prefer: respond-async' -d '%s'" % json.dumps(
        {"message": "model: run sleep 3579\nmodel: say never"}))
    machine.wait_for(lambda: machine.run("pgrep -f '^sleep 3579'", check=False).returncode == 0)
    pid = machine.pid()
    machine.run("rm -r " + folder)
    said = machine.run("replicas-engine-setup").stdout
    assert re.search("MISSING service: as it runs: WORKSPACE_HOME=%s: .*; sudo systemctl restart "
                     "replicas-engine" % folder, said) and machine.pid() == pid, said
    machine.run(curl + "interrupt")
    said = machine.run("replicas-engine-setup").stdout
    assert "MISSING service" not in said and machine.pid() != pid, said


def test_what_turns_leave_running(with_codex):
    """It stays in its control group, is asked to end before a restart ends it, and then leaves no
    group behind."""
    machine = with_codex
    machine.run("rm -f /home/ubuntu/project/asked")
    found = send(machine, "model: run setsid -f sh -c 'trap \"echo >asked; exit\" TERM;"
                          " while :; do sleep 0.1; done' serves >/dev/null 2>&1 </dev/null\n"
                          "model: say Done.", sandbox_mode="danger-full-access")
    assert found[-2][0] == "turn.completed"
    cgroup = machine.out(CGROUPS)
    thread = start_escapes(machine, ["without an environment", "partly dead"])
    assert machine.post("/codex/interrupt", {}, machine.secret())[0] == 200
    thread.join(harness.PATIENCE)
    assert machine.out(ESCAPED) == "0" and machine.out(CGROUPS) == cgroup
    assert machine.out("pgrep -f '[s]erves' | wc -l") != "0"
    machine.run("systemctl restart replicas-engine")
    machine.run("test -e /home/ubuntu/project/asked")
    assert machine.out("pgrep -f '[s]erves' | wc -l") == "0"
    send(machine, "model: say Hello.")
    assert machine.out(CGROUPS) == ""


# ---- What systemctl status shows

def test_status_of_a_healthy_engine(with_codex):
    with_codex.wait_for_status(r'Status: "\w')
    with_codex.wait_for_status("port 3737")


def test_status_with_a_port_in_use(installed):
    machine = installed
    machine.run("systemctl stop replicas-engine.socket replicas-engine.service")
    machine.run("python3 -c 'import socket, time; s = socket.create_server((\"\", 3737));"
                " open(\"/srv/hog\", \"w\"); time.sleep(600)' >/dev/null 2>&1 &"
                " echo $! >/srv/hog.pid")
    machine.wait_for(lambda: os.path.exists(machine.path("/srv/hog")))
    machine.run("systemctl start replicas-engine", check=False)
    machine.run("sleep 8")
    machine.wait_for_status(r"replicas-engine\[\d+\]: .*3737.*in use")
    # It waits a little between its attempts, and is there when the port is free.
    assert 1 <= machine.journal().count("Scheduled restart job") <= 4
    machine.run("kill $(cat /srv/hog.pid)")
    took = machine.wait_for(lambda: machine.get("/health")[0] == 200)
    print("there after the port was free: %.2f s" % took)
    assert machine.states()[:2] == ["active", "active"]


def test_status_without_a_secret(installed):
    machine = installed
    machine.run("sed -i '/SECRET=/d' %s; systemctl restart replicas-engine" % SETTINGS)
    assert machine.get("/health")[0] == 200 and machine.get("/ping", "any")[0] == 500
    machine.wait_for_status("REPLICAS_ENGINE_SECRET")


def test_status_with_a_setting_that_cannot_be_used(installed):
    machine = installed
    machine.run("echo REPLICAS_ENGINE_MAX_BODY=abc >>" + SETTINGS)
    machine.run("systemctl restart replicas-engine", check=False)
    # Clients that come don't make it loop.
    for _ in range(8):
        machine.run("curl -s -m 2 %s/health" % BASE, check=False)
    machine.wait_for_status(r"replicas-engine\[\d+\]: .*REPLICAS_ENGINE_MAX_BODY")
    machine.wait_for_status("status=2")
    assert machine.states()[0] == "failed"
    done = machine.run("replicas-engine-setup", check=False)
    assert done.returncode == 1 and "REPLICAS_ENGINE_MAX_BODY=abc" in done.stderr, done
    machine.run("sed -i /MAX_BODY=abc/d %s; replicas-engine-setup" % SETTINGS)
    check_service(machine)


def test_status_with_a_broken_line(installed):
    machine = installed
    machine.run("echo 'PORT 4000' >>%s; systemctl restart replicas-engine" % SETTINGS, check=False)
    number = machine.out("grep -n '^PORT 4000' %s | cut -d: -f1" % SETTINGS)
    machine.wait_for_status("%s, line %s: not NAME=value; mend or delete it" % (SETTINGS, number))
    done = machine.run("replicas-engine-setup", check=False)
    assert done.returncode and "line " + number in done.stderr
    # Mended: it starts by itself.
    mend = "sed -i '/^PORT 4000/d' %s" % SETTINGS
    machine.run(mend)
    machine.wait_for(lambda: machine.get("/health")[0] == 200)
    # Or at once, also while what failed is still on its way out.
    machine.run("echo 'PORT 4000' >>%s; systemctl restart --no-block replicas-engine" % SETTINGS)
    machine.wait_for(lambda: machine.states()[0] == "deactivating" and "line " in machine.status())
    machine.run(mend)
    machine.run("replicas-engine-setup")


def test_status_without_codex(shared):
    machine = shared
    machine.wait_for_status("npm install -g @openai/codex")
    assert machine.get("/health")[0] == 200
    done = machine.run("replicas-engine --check", check=False)
    assert done.returncode == 1 and "npm install -g @openai/codex" in done.stdout + done.stderr
