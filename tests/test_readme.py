"""README: what it shows is run, and what it shows as answers are the answers."""

import itertools
import json
import os
import re
import subprocess

import pytest

import harness
import replicas_engine


def readme(folder=""):
    with open(os.path.join(harness.ROOT, folder, "README.md"), encoding="utf-8") as file:
        return file.read()


BLOCK = re.compile(r"```sh\n(.*?)```\n(?:```(json|text)\n(.*?)```)?", re.DOTALL)
EXAMPLES = [match.groups() for match in BLOCK.finditer(readme()) if "curl" in match.group(1)]


def shape(value):
    """What an answer promises: its keys, in their order."""
    return {key: shape(item) if key in ("turn", "codex", "engine") else None
            for key, item in value.items()} if isinstance(value, dict) else None


def types(stream):
    """The types of the events; however many deltas come in a row, that is one."""
    return [kind for kind, _ in itertools.groupby(
        event.type for event in harness.parse_events(stream))]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_example(used, number):
    commands, kind, shown = EXAMPLES[number]
    used.wait_for_turn()                                # one example doesn't
    variables = ('ENGINE=http://127.0.0.1:%d\nSECRET="X-Replicas-Engine-Secret: %s"\n'
                 % (used.port, harness.SECRET))
    run = subprocess.run(["bash", "-e"], input=(variables + commands.replace("curl ", "curl -sSf ")
                                                ).encode(),
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=harness.PATIENCE)
    output = run.stdout.decode()
    assert run.returncode == 0, output
    if kind == "json":
        answer = json.loads(output)
        assert list(answer) == list(json.loads(shown)) and shape(answer) == shape(json.loads(shown))
    elif kind == "text":
        assert types(output.encode()) == types(shown.encode() + b"\n")


def test_every_endpoint_is_shown():
    for path, methods in replicas_engine.Application().router.paths.items():
        for method in set(methods) - {"HEAD", "OPTIONS"}:
            assert "### %s %s\n" % (method, path.replace("/N", "")) in readme()


def test_every_option_is_in_the_table():
    for option in replicas_engine.TURN_OPTIONS:
        assert "| `%s` |" % option.key in readme()


def test_every_code_of_a_failure_is_in_the_table():
    for code in ["exited"] + list(replicas_engine.STOP_MESSAGES):
        assert "| `%s` |" % code in readme()


def test_the_two_commands_are_there():
    for command in ("packaging/try", "tests/run"):
        assert "\n    %s\n" % command in readme()
        assert os.access(os.path.join(harness.ROOT, command), os.X_OK)


@pytest.mark.parametrize("folder", ["", "packaging"])
def test_links_lead_somewhere(folder):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", readme(folder)):
        assert os.path.exists(os.path.join(harness.ROOT, folder, path))
        target = os.path.normpath(os.path.join(folder, os.path.dirname(path)))
        headings = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
                    for heading in re.findall(r"^#+ (.*)$", readme(target), re.MULTILINE)}
        assert anchor in headings or not anchor
