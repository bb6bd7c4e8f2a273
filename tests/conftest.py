"""Fixtures: engines, and what must not be left behind by a test."""

import os
import signal
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import harness  # noqa: E402
import replicas_engine  # noqa: E402

# What a background job or nohup ignores, the engines under test would ignore, too.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_subreaper():
    """An engine in the tests' own process makes it the parent of orphans, and nobody reaps them;
    and lets nobody look into it."""
    yield
    replicas_engine.prctl(replicas_engine.PR_SET_CHILD_SUBREAPER, 0)
    replicas_engine.prctl(replicas_engine.PR_SET_DUMPABLE, 1)


@pytest.fixture
def make_engine(tmp_path):
    """Start engines in folders of their own; whatever they leave is an error, and stopped."""
    engines = []

    def make(name="engine", start=True, **env):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        engine = harness.Engine(folder, **env)
        engines.append(engine)
        return engine.start() if start else engine

    yield make
    for engine in engines:
        if engine.process:
            engine.stop()
    left = [pid for engine in engines
            for pid in harness.processes_with("CODEX_HOME", engine.codex_home)]
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


def unavailable(reason):
    """Skip a test for `reason`; where CI is set that is a failure instead."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
