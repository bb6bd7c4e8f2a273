"""Fixtures: engines, what tests need of the machine, and what no test may leave behind."""

import contextlib
import functools
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import contract  # noqa: E402
import harness  # noqa: E402
import replicas_engine  # noqa: E402

harness.CONTRACT = contract.Contract()

# What a background job or nohup ignores, the engines under test would ignore, too.
for number, action in ((signal.SIGINT, signal.default_int_handler),
                       (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, action)


# What tests need of the machine.  Each is probed once, and what it lacks is one reason.

def unavailable(reason):
    """Skip a test for `reason`; where CI is set that is a failure instead."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _no_root():
    return None if os.geteuid() == 0 else "only root can test this"


def _no_tmpfs():
    """Whether a small file system can be mounted, which a full disk takes."""
    if lacks("root"):
        return lacks("root")
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder],
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if mounted.returncode:
            return "no tmpfs can be mounted: " + mounted.stdout.decode().strip()
        subprocess.run(["umount", folder], check=True)
    return None


def _no_machines():
    """Whether others can be booted (packaging_machine.py)."""
    missing = next(filter(None, map(lacks, (
        "root", "systemd-nspawn", "mmdebstrap", "nsenter", "setpriv", "dpkg-deb"))), None)
    if missing or os.path.ismount("/sys/fs/cgroup"):
        return missing
    return "no machine can be booted: control groups are not mounted"


def _no_user_namespaces():
    """Whether they can be made, as Codex's sandbox is one; not in a chroot, for one."""
    made = subprocess.run(["unshare", "--user", "--map-root-user", "true"],
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return "no user namespace can be made, and so no sandbox" if made.returncode else None


PROBES = {"root": _no_root, "tmpfs": _no_tmpfs, "machines": _no_machines,
          "user namespaces": _no_user_namespaces}


@functools.lru_cache(maxsize=None)
def lacks(what):
    """Why there is no `what` of PROBES, or no program of that name; None if there is."""
    if what in PROBES:
        return PROBES[what]()
    return None if shutil.which(what) else "the program %s is not installed" % what


def need(*needs):
    """Skip the test if the machine lacks one of them; where CI is set that is a failure."""
    for what in needs:
        if lacks(what):
            unavailable(lacks(what))


def need_module(name):
    """The module, which is from PyPI; without it the test is skipped."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return unavailable("%s is not installed" % name)


def real_codex(version):
    """The program of the real Codex; without it the test is skipped."""
    program = harness.codex_program(version)
    return program or unavailable("Codex %s is not in .cache/codex: see tests/run" % version)


@pytest.fixture(autouse=True)
def no_subreaper():
    """An engine in the tests' own process makes it the parent of orphans, and nobody reaps them;
    and lets nobody look into it."""
    yield
    replicas_engine.prctl(replicas_engine.PR_SET_CHILD_SUBREAPER, 0)
    replicas_engine.prctl(replicas_engine.PR_SET_DUMPABLE, 1)


@pytest.fixture(autouse=True)
def logged_in_time():
    """What an engine in the tests' own process logs is written in the test whose engine it is."""
    yield
    for handler in replicas_engine.logger.handlers:
        handler.flush()


@pytest.fixture(autouse=True)
def answers_fit_the_contract():
    """What the engine answers in a test is what packaging/openapi.json says."""
    yield
    complaints, harness.CONTRACT.complaints = harness.CONTRACT.complaints, []
    assert not complaints


@pytest.fixture
def make_engine(tmp_path):
    """Start engines in folders of their own; whatever they leave is an error, and stopped."""
    engines = []

    def make(name="engine", start=True, constants=None, **env):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        engine = harness.Engine(folder, constants, **env)
        engines.append(engine)
        return engine.start() if start else engine

    yield make
    for engine in engines:
        if engine.process:
            engine.stop()
        if os.path.exists(engine.log_path):
            # Shown where the test failed
            print("The log of %s:\n%s" % (engine.folder, engine.log()[-4000:]))

    def found():
        return [pid for engine in engines
                for pid in harness.processes_with("CODEX_HOME", engine.codex_home)]

    # What a killed engine merely looked around with is no turn's, and ends by itself.
    with contextlib.suppress(AssertionError):
        harness.wait_for(lambda: not any(replicas_engine.marks_of(pid) <= {"engine"}
                                         for pid in found()))
    left = found()
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert not left, "processes were left behind"


@pytest.fixture
def engine(make_engine):
    """An engine with the stand-in Codex."""
    return make_engine()


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


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """An engine with a turn behind it."""
    engine = harness.Engine(tmp_path_factory.mktemp("used")).start()
    engine.send("hello")
    yield engine
    engine.stop()


class Disk:
    """A file system that can be filled."""

    def __init__(self, path):
        self.ballast = os.path.join(path, "ballast")

    def fill(self, but=0):
        """Leave no more than `but` bytes of room."""
        with open(self.ballast, "ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * 4096)
            file.truncate(file.tell() - but)

    def free(self):
        os.unlink(self.ballast)


@pytest.fixture
def small_disk(make_engine, tmp_path):
    """An engine whose state is on a file system of 400 KiB, and that file system."""
    need("tmpfs")
    state = tmp_path / "small"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k,mode=700", "tmpfs", str(state)],
                   check=True)
    engine = make_engine(start=False, REPLICAS_ENGINE_STATE=str(state),
                         PORT=str(harness.free_port()))     # its own, though it is killed
    engine.state = str(state)
    try:
        yield engine.start(), Disk(str(state))
        engine.stop()
    finally:
        subprocess.run(["umount", "--lazy", str(state)], check=True)
