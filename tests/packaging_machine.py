"""Debian machines for the tests of packaging/: a root tree made with mmdebstrap, booted with
systemd-nspawn, each on an overlay of its own and in a network of its own. Needs root."""

import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import uuid

import harness

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.path.join(CHECKOUT, ".cache", "machines")
SUITE = "trixie"
PACKAGES = "systemd,systemd-sysv,dbus,python3,curl,libpam-systemd,procps"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLONE = "/srv/a clone"  # packaging/ works from a clone at any path
SETTINGS = "/etc/replicas-engine/settings.env"
# What no installation is looked for in, and what the system itself keeps, and Codex.
NOT_OURS = ("/proc", "/sys", "/run", "/dev", "/tmp", "/var/log", "/var/tmp", "/var/cache",
            "/var/lib/apt", "/var/lib/dpkg", "/var/lib/systemd/timers", CLONE)
KEPT_BY_OTHERS = ("/etc", "/root", "/srv", "/var/lib/systemd", "/var/lib/systemd/random-seed",
                  "/etc/ld.so.cache", "/etc/machine-id", "/etc/.updated", "/var/.updated",
                  "/home/ubuntu/.codex")


def codex_program(version):
    """The real Codex's own program, which needs no Node, or None."""
    found = glob.glob(os.path.join(CHECKOUT, ".cache", "codex", version, "node_modules", "@openai",
                                   "*", "vendor", os.uname().machine + "-*-linux-*", "*", "codex"))
    return found[0] if found else None


def tree(extra=(), suite=SUITE):
    """The root tree with those packages besides PACKAGES; made once, then taken from the cache."""
    packages = ",".join((PACKAGES,) + tuple(extra))
    name = "%s-%s" % (suite, hashlib.sha256(packages.encode()).hexdigest()[:12])
    path = os.path.join(CACHE, name)
    os.makedirs(CACHE, exist_ok=True)
    with open(os.path.join(CACHE, name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(path):
            subprocess.run(["rm", "-rf", "--one-file-system", path + ".new"], check=True)
            # It binds this machine's /dev and more into the tree.  In a namespace of its own that
            # goes with it, however it ends: else who deletes the tree would delete those.
            subprocess.run(["unshare", "--mount", "mmdebstrap", "--quiet", "--variant=minbase",
                            "--include=" + packages, suite, path + ".new"], check=True,
                           stdin=subprocess.DEVNULL)
            subprocess.run(["chroot", path + ".new", "useradd", "--create-home",
                            "--shell", "/bin/bash", "ubuntu"], check=True)
            with open(path + ".new/etc/hosts", "w") as hosts:
                hosts.write("127.0.0.1 localhost\n::1 localhost\n")
            os.rename(path + ".new", path)
    return path


def cgroup_folders():
    """The folders of our own control group: cgroups(7), in the hierarchies by which systemd knows
    a service's processes."""
    with open("/proc/self/cgroup") as groups, open("/proc/self/mountinfo") as mounts:
        groups = [line.rstrip("\n").split(":", 2) for line in groups]
        mounts = [line.split() for line in mounts]
    for _, controllers, group in groups:
        for mount in mounts:
            kind, _, options = mount[mount.index("-") + 1:]
            if (kind == "cgroup2" and controllers == ""
                    or kind == "cgroup" and controllers == "name=systemd" in options.split(",")):
                yield os.path.normpath(os.path.join(mount[4], os.path.relpath(group, mount[3])))
                break


def remove_cgroup(folder):
    """Removes a control group in which nothing runs any more, and those in it."""
    for path, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(path)
        except OSError:
            pass
    return not os.path.exists(folder)


def sweep():
    """Clears away what test runs that were killed have left: control groups, mounts, folders."""
    for folder in cgroup_folders():
        for group in glob.glob(os.path.join(folder, "replicas-*-*")):
            if not os.path.exists("/proc/" + os.path.basename(group).split("-")[1]):
                remove_cgroup(group)
    for base in glob.glob(os.path.join(CACHE, "run-*-*")):
        if not os.path.exists("/proc/" + os.path.basename(base).split("-")[1]):
            subprocess.run(["umount", os.path.join(base, "root")], stderr=subprocess.DEVNULL)
            if not os.path.ismount(os.path.join(base, "root")):
                shutil.rmtree(base, ignore_errors=True)


def about(path):
    """What an installation could change of a file: mode, owner, size, time, and where a link leads;
    None where there is none. Bytecode is compiled again at each setup, and has no time."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return (found.st_mode, found.st_uid, None if stat.S_ISDIR(found.st_mode) else found.st_size,
            None if "/__pycache__" in path else found.st_mtime_ns,
            os.readlink(path) if stat.S_ISLNK(found.st_mode) else None)


class Machine:
    """A booted machine. A context manager: nothing of it is left afterwards.

    It has the disk of `like`, another one that is halted and stays so for as long, or a new one.
    """

    def __init__(self, extra=(), suite=SUITE, binds=(), like=None):
        self.name = "replicas-%d-%s" % (os.getpid(), uuid.uuid4().hex[:12])
        self.cgroups = [os.path.join(folder, self.name) for folder in cgroup_folders()]
        self.layers = like.layers if like else [tree(extra, suite)]     # the newest first
        self.binds = binds
        self.leader = None
        self._nspawn = None
        self._mounted = False

    def __enter__(self):
        sweep()
        self.base = tempfile.mkdtemp(prefix="run-%d-" % os.getpid(), dir=CACHE)
        try:
            self._lay()
            if not os.path.exists(self.path(CLONE)):
                self._copy_clone()
                self._update()
            return self
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exc):
        self.close()

    def _lay(self):
        self.root = os.path.join(self.base, "root")
        for name in ("root", "upper", "work"):
            os.mkdir(os.path.join(self.base, name))
        layers = "lowerdir=%s,upperdir=%s/upper,workdir=%s/work" % (
            ":".join(self.layers), self.base, self.base)
        mount = subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, self.root],
                               stderr=subprocess.DEVNULL)
        self._mounted = mount.returncode == 0
        if self._mounted:
            self.layers = [self.base + "/upper"] + self.layers
        else:  # An overlay can't lie on another one, as in some CI containers.
            subprocess.run(["cp", "-a", "--reflink=auto", self.layers[0] + "/.", self.root],
                           check=True)
            self.layers = [self.root, self.layers[-1]]
        for source, target in self.binds:
            os.makedirs(self.path(target), exist_ok=True)

    def _copy_clone(self):
        os.makedirs(self.path(CLONE))
        shutil.copytree(os.path.join(CHECKOUT, "packaging"), self.path(CLONE, "packaging"))
        for name in ("replicas_engine.py", "README.md"):
            if os.path.exists(os.path.join(CHECKOUT, name)):
                shutil.copy(os.path.join(CHECKOUT, name), self.path(CLONE, name))

    def _update(self):
        """What the first boot would do, to spare it that: systemd-update-done.service(8)."""
        for path in ("/etc/.updated", "/var/.updated"):
            self.write(path, "")
            shutil.copystat(self.path("/usr"), self.path(path))
        # Masked, systemd.generator(7): they look for disks and the like, at each daemon-reload.
        os.makedirs(self.path("/etc/systemd/system-generators"))
        for path in glob.glob(self.path("/lib/systemd/system-generators/systemd-*")):
            os.symlink("/dev/null", self.path("/etc/systemd/system-generators",
                                              os.path.basename(path)))

    def path(self, *parts):
        """Where a path of the machine lies here."""
        return os.path.join(self.root, *[part.lstrip("/") for part in parts])

    def write(self, path, text, mode=0o644):
        os.makedirs(os.path.dirname(self.path(path)), exist_ok=True)
        with open(self.path(path), "w") as file:
            file.write(text)
        os.chmod(self.path(path), mode)

    def read(self, path):
        with open(self.path(path)) as file:
            return file.read()

    def boot(self):
        # It has a control group of its own: two machines in one would take each other's processes
        # for theirs. It goes when we are killed, and the machine with it.
        for folder in self.cgroups:
            os.makedirs(folder, exist_ok=True)
        command = ["sh", "-c", 'while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done;'
                   ' shift; exec "$@"', "sh"] + self.cgroups + ["--"]
        command += ["setpriv", "--pdeathsig", "KILL",
                   "systemd-nspawn", "--quiet", "-D", self.root, "--boot", "--register=no",
                   "--keep-unit", "-M", self.name, "--private-network", "--console=pipe"]
        command += ["--bind-ro=%s:%s" % bind for bind in self.binds]
        self._log = open(os.path.join(self.base, "console.log"), "ab")
        self._nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log,
                                        stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + harness.PATIENCE
        while time.monotonic() < deadline:
            self.leader = self._find_leader()
            # "degraded" will do: what doesn't work in a container is not ours.
            if self.leader and self.out("systemctl is-system-running --wait", check=False) in (
                    "running", "degraded"):
                return self
            if self._nspawn.poll() is not None:
                break
            time.sleep(0.1)
        with open(os.path.join(self.base, "console.log"), errors="replace") as log:
            raise RuntimeError("the machine did not boot:\n" + log.read()[-4000:])

    def _find_leader(self):
        children = "/proc/%d/task/%d/children" % (self._nspawn.pid, self._nspawn.pid)
        try:
            with open(children) as file:
                pids = file.read().split()
        except FileNotFoundError:
            return None
        return int(pids[0]) if pids else None

    def halt(self):
        """As when the plug is pulled. The disk is kept, and the machine can boot again."""
        if self._nspawn is None:
            return
        if self.leader and self._nspawn.poll() is None:
            try:
                os.kill(self.leader, signal.SIGKILL)  # pid 1 of its namespace: all go with it
            except ProcessLookupError:
                pass
        try:
            self._nspawn.wait(10)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()
        self._log.close()
        self._nspawn = self.leader = None

    def rest(self):
        """Halt it for good, so that others may have the disk of it."""
        self.halt()
        if self._mounted:
            self._unmount()

    def _unmount(self):
        for _ in range(50):
            if subprocess.run(["umount", self.root], stderr=subprocess.DEVNULL).returncode == 0:
                break
            time.sleep(0.1)
        else:
            subprocess.run(["umount", "--lazy", self.root], check=True)
        self._mounted = False

    def close(self):
        self.halt()
        for folder in self.cgroups:
            for _ in range(50):  # The dead leave it a moment later.
                if remove_cgroup(folder):
                    break
                time.sleep(0.1)
        if self._mounted:
            self._unmount()
        shutil.rmtree(self.base, ignore_errors=True)

    def enter(self):
        """The command line that another is appended to in order to run in the machine."""
        return ["nsenter", "-t", str(self.leader), "-a"]

    def run(self, command, check=True, timeout=harness.PATIENCE, input=None):
        """A shell command line as root in the machine; its output is text."""
        arguments = self.enter() + ["env", "-i", "PATH=" + PATH, "HOME=/root",
                                    "sh", "-c", "cd /\n" + command]
        process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            universal_newlines=True, start_new_session=True)
        try:
            stdout, stderr = process.communicate(input or "", timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        if check and process.returncode:
            raise AssertionError("%s: status %d\n%s%s\n%s" % (
                command, process.returncode, stdout, stderr, self.journal()))
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    def out(self, command, **options):
        return self.run(command, **options).stdout.strip()

    def journal(self):
        return self.run("journalctl -u replicas-engine.service -u replicas-engine.socket"
                        " --no-pager -n 60 -o short-precise", check=False).stdout

    # What the tests ask of the installed engine.

    def install(self, options="", **how):
        return self.run("'%s/packaging/install' %s" % (CLONE, options), **how)

    def secret(self):
        return self.out("sed -n 's/^REPLICAS_ENGINE_SECRET=//p' " + SETTINGS)

    def pid(self):
        return int(self.out("systemctl show -p MainPID --value replicas-engine.service"))

    def states(self):
        """Active and enabled, of the service and of the socket."""
        return self.out("systemctl is-active replicas-engine.service replicas-engine.socket;"
                        "systemctl is-enabled replicas-engine.service replicas-engine.socket",
                        check=False).split()

    def status(self):
        """What `systemctl status` shows."""
        return self.run("systemctl status --no-pager --full replicas-engine.service",
                        check=False).stdout

    def wait_for_status(self, pattern):
        """Wait until `systemctl status` shows what the regular expression finds: what is logged
        gets there a little later."""
        self.wait_for(lambda: re.search(pattern, self.status()))

    def get(self, path, secret=None, port=3737):
        """(status, body) of a GET in the machine; status 0 where there was no answer."""
        return self._curl("-m 30", path, secret, port, "", 35)

    def post(self, path, body, secret, port=3737, timeout=60):
        return self._curl("-m %d --data-binary @/dev/fd/3" % timeout, path, secret, port,
                          json.dumps(body), timeout + 5)

    def _curl(self, options, path, secret, port, body, timeout):
        # The secret is not in the arguments, which the agent could read.
        header = "X-Replicas-Engine-Secret: " + secret if secret else ""
        got = self.run("IFS= read -r header; { echo \"$header\" | curl -sN -H @- %s"
                       " -w '\\n%%{http_code}' http://127.0.0.1:%d%s; } 3<&0" % (
                           options, port, path),
                       input=header + "\n" + body, timeout=timeout, check=False).stdout
        text, _, status = got.rpartition("\n")
        return int(status), text

    def wait_for(self, condition, seconds=harness.PATIENCE, every=0.05):
        """Seconds that passed until condition() was true."""
        start = time.monotonic()
        while not condition():
            if time.monotonic() - start > seconds:
                raise AssertionError("not within %s s\n%s" % (seconds, self.journal()))
            time.sleep(every)
        return time.monotonic() - start

    def files(self):
        """Every file of the disk that isn't as the tree has it, and could be so by an installation:
        a dictionary of what `about` says of it."""
        found = {}
        for layer in self.layers[:-1] if self._mounted else self.layers:
            for folder, folders, names in os.walk(layer):
                place = folder[len(layer):]
                folders[:] = [name for name in folders if place + "/" + name not in NOT_OURS]
                for name in folders + names:
                    path = place + "/" + name
                    now = about(self.path(path))
                    if path not in KEPT_BY_OTHERS and now != about(self.layers[-1] + path):
                        found[path] = now
        return found

    def strange(self, known):
        """The paths, but of directories of the tree, that are in one of `files` and `known` alone."""
        return sorted(path for path in set(self.files()) ^ set(known)
                      if not os.path.isdir(self.layers[-1] + path))
