"""packaging/openapi.json: it is OpenAPI, and says what the engine does, no more and no less.

That the answers are as it says is checked in every test: see contract.py.
"""

import email.message
import json

import pytest

import contract
import harness
import replicas_engine
from conftest import need_module

CONTRACT = harness.CONTRACT


def operations():
    """(path, method, operation) of the document."""
    for path, item in CONTRACT.paths.items():
        for method, operation in item.items():
            if method != "parameters":
                yield path, method, operation


def parameters():
    """(path, parameter) of everything that may be in a query."""
    return [(path, parameter) for path, method, operation in operations() if method != "head"
            for parameter in operation.get("parameters", ()) if parameter["in"] == "query"]


def test_it_is_openapi():
    need_module("openapi_spec_validator").validate(CONTRACT.document)


def test_it_has_the_routes_of_the_engine_and_no_others():
    router = replicas_engine.Application().router
    routes = {(path.replace("N", "{turn_id}"), method) for path, methods in router.paths.items()
              for method in methods if path}        # no path: OPTIONS *
    assert routes == {(path, method.upper()) for path, method, _ in operations()}


def test_head_is_documented_as_get_is():
    for item in CONTRACT.paths.values():
        get, head = item.get("get", {}), item.get("head", {})
        for key in ("parameters", "responses", "security"):
            assert get.get(key) == head.get(key)


def test_every_component_is_used():
    text = json.dumps(CONTRACT.document)
    for kind in ("parameters", "headers", "responses", "schemas"):
        for name in CONTRACT.components[kind]:
            assert '"#/components/%s/%s"' % (kind, name) in text or name in (
                "NotFound", "MethodNotAllowed")     # of what is not in the document


def test_keys_of_a_message():
    message = CONTRACT.schema("Message")["properties"]
    assert set(message) == {"message"} | {option.key for option in replicas_engine.TURN_OPTIONS}
    assert message["reasoning_effort"]["enum"] == list(replicas_engine.REASONING_EFFORTS)
    assert message["sandbox_mode"]["enum"] == list(replicas_engine.SANDBOX_MODES)
    assert message["images"]["maxItems"] == replicas_engine.MAX_IMAGES


def test_limits_and_words_are_those_of_the_engine():
    schema = CONTRACT.schema
    assert CONTRACT.document["info"]["version"] == replicas_engine.__version__
    assert set(schema("Failure")["properties"]["code"]["enum"]) == (
        {"exited", "not_started"} | set(replicas_engine.STOP_MESSAGES))
    assert (schema("Failure")["then"]["properties"]["message"]["maxLength"]
            == replicas_engine.MAX_FAILURE_MESSAGE)
    assert (schema("TurnWithMessage")["properties"]["final_message"]["maxLength"]
            == replicas_engine.MAX_FINAL_MESSAGE)
    assert schema("Queue")["properties"]["turns"]["maxItems"] == replicas_engine.MAX_QUEUED
    threads = schema("Threads")["properties"]["threads"]
    assert threads["maxItems"] == replicas_engine.MAX_THREADS
    assert (threads["items"]["properties"]["first_message"]["maxLength"]
            == replicas_engine.MAX_FIRST_MESSAGE)
    limit = CONTRACT.components["parameters"]["LimitThreads"]["schema"]
    assert limit["default"] == replicas_engine.DEFAULT_THREADS
    assert CONTRACT.schema("OtherEvent")["properties"]["type"]["pattern"] == (
        "^%s$" % replicas_engine.EVENT_TYPE.pattern)


def test_parameters_are_taken_as_documented_and_not_otherwise(used):
    for path, parameter in parameters():
        name, schema = parameter["name"], parameter["schema"]
        target = "%s?%s=" % (path.replace("{turn_id}", "1"), name)
        if schema["type"] == "integer":
            limits = schema.get("enum") or (schema["minimum"], schema["maximum"])
            good, bad = limits, [min(limits) - 1, max(limits) + 1, "x", "1.5", ""]
        else:
            good, bad = schema.get("examples", ()), ["?", "x" * 200]
        if name == "turn":
            bad.remove(0)                           # of which there is none, as of others
        for value in bad:
            answer = used.get(target + str(value))
            assert (answer.status, answer.json()["error"]) == (400, "Invalid " + name)
        for value in good:
            if name != "follow":                    # which has no end
                assert used.request("HEAD", target + str(value)).status in (200, 204, 404, 410)
        assert used.get(target + "1&%s=1" % name).status == 400     # given twice


def test_what_codex_prints_fits_the_events_schemas():
    """Every line of every recorded run."""
    count = 0
    for version, scenario in harness.recordings():
        for line in harness.recording(version, scenario).decode("utf-8", "replace").split("\n"):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            assert CONTRACT.problems(CONTRACT.events[event["type"]], event) == []
            count += 1
    assert count > 100


# The check itself

def complaints(method, target, status, body=b"", **fields):
    """What is found wrong with an answer."""
    headers = email.message.Message()
    for name, value in fields.items():
        headers[name.replace("_", "-")] = value
    checker = contract.Contract()
    response = checker.check_head(method, target, status, headers)
    if response:
        checker.check_body(method, target, response, headers, body)
    return checker.complaints


RIGHT = {"Content_Type": "application/json", "Cache_Control": "no-store"}
PONG = b'{"message":"pong","timestamp":"2026-11-23T04:36:16.234Z"}'


def test_an_answer_that_fits():
    assert complaints("GET", "/ping", 200, PONG, **RIGHT) == []
    assert complaints("GET", "/ping?x=1", 200, PONG, Date="today", **RIGHT) == []


@pytest.mark.parametrize("method, target, status, body, fields", [
    ("GET", "/ping", 200, b'{"message":"pong"}', RIGHT),
    ("GET", "/ping", 200, PONG.replace(b"Z", b""), RIGHT),
    ("GET", "/ping", 200, PONG, dict(RIGHT, Content_Type="text/html")),
    ("GET", "/ping", 200, PONG, dict(RIGHT, Cache_Control="public")),
    ("GET", "/ping", 200, PONG, {"Content_Type": "application/json"}),
    ("GET", "/ping", 200, PONG, dict(RIGHT, X_New="1")),
    ("GET", "/ping", 202, PONG, RIGHT),
    ("HEAD", "/ping", 200, PONG, RIGHT),
    ("GET", "/pong", 200, PONG, RIGHT),
    ("POST", "/ping", 200, PONG, RIGHT),
    ("GET", "/ping", 400, b'{"error":"Oops","details":"x"}', RIGHT),
    ("GET", "/pong", 404, b'{"error":"Oops"}', RIGHT),
    ("POST", "/ping", 405, b'{"error":"Method not allowed"}', RIGHT),       # without Allow
    ("GET", "/codex/turns/1", 404, b'{"error":"Oops","details":"x"}', RIGHT),
])
def test_answers_that_do_not_fit(method, target, status, body, fields):
    assert complaints(method, target, status, body, **fields) != []


def test_events_that_do_not_fit():
    checker = contract.Contract()
    for lines in (["id: 7.1", "event: item.delta", 'data: {"type":"item.delta","item":{}}'],
                  ["id: 7", "event: done", "data: {}"],
                  ["id: 7.2", "event: done", 'data: {"type":"done"}'],
                  ["id: 7.2", "event: a b", "data: {}"],
                  ["id: 7.2", "event: turn.failed",
                   'data: {"type":"turn.failed","error":{"message":"x","code":"new"}}'],
                  ["event: turn.started", 'data: {"type":"turn.started"}']):
        harness.CONTRACT = None                     # these are not the engine's
        try:
            event = harness.Event(lines)
        finally:
            harness.CONTRACT = CONTRACT
        before = len(checker.complaints)
        checker.check_event(event)
        assert len(checker.complaints) > before, lines


def test_what_is_not_read_whole_is_checked_as_far_as_it_is(used):
    connection, response = used.open("GET", "/codex/status")
    assert response.read(10) and response.read() and CONTRACT.complaints == []
    connection.close()
