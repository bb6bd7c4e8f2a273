"""stand_in_model itself: how it streams, which only a client that sees every event can tell."""

import http.client
import json
import subprocess
import sys
import urllib.parse

import pytest

import harness

TEXT = "Hello \u2028 thére,  a_word_of_more_than_16_characters\tand an end "


@pytest.fixture(scope="module")
def model():
    process = subprocess.Popen(
        [sys.executable, harness.STAND_IN_MODEL, "--exit-with-stdin"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE)
    yield urllib.parse.urlsplit(process.stdout.readline().decode().strip())
    process.stdin.close()
    process.stdout.close()
    assert process.wait(harness.PATIENCE) == 0


def ask(model, *directives, since=(), status=200):
    """The events of the response to that message, or to what Codex sends after it."""
    message = "\n".join("model: " + directive for directive in directives)
    body = {"prompt_cache_key": message, "input": [{"role": "user", "content": message}, *since],
            "tools": [{"name": "exec_command", "type": "function"}]}
    connection = http.client.HTTPConnection(model.hostname, model.port, timeout=harness.PATIENCE)
    try:
        connection.request("POST", model.path + "/responses", json.dumps(body))
        response = connection.getresponse()
        data = response.read().decode()
    finally:
        connection.close()
    assert response.status == status, data
    return [json.loads(block.partition("\ndata: ")[2]) for block in data.split("\n\n")[:-1]]


def types(events):
    return [event["type"][len("response."):] for event in events]


def texts(events, kind):
    return [event["delta"] for event in events if event["type"] == "response.%s.delta" % kind]


def test_who_does_not_ask_gets_whole_items(model):
    events = ask(model, "think so", "say " + TEXT)
    assert types(events) == ["created"] + ["output_item.added", "output_item.done"] * 2 + [
        "completed"]
    assert events[3]["item"] == events[4]["item"]


@pytest.mark.parametrize("verb, text, part", (("say", "output_text", "content_part"),
                                              ("think", "reasoning_summary_text",
                                               "reasoning_summary_part")))
def test_words(model, verb, text, part):
    events = ask(model, "stream 1", "%s %s" % (verb, TEXT), "stream 0", "run true")
    assert types(events)[:3] == ["created", "output_item.added", part + ".added"]
    words = texts(events, text)
    assert "".join(words) == TEXT and len(words) > 7
    assert types(events)[3 + len(words):] == [
        text + ".done", part + ".done", "output_item.done", "output_item.added",
        "output_item.done", "completed"]
    begun, done = events[1]["item"], events[5 + len(words)]["item"]
    assert begun["id"] == done["id"] and not (begun.get("content") or begun.get("summary"))
    assert (done.get("content") or done["summary"])[0]["text"] == TEXT


def test_the_pace_holds_for_the_responses_after_a_tool_and_till_the_next_pace(model):
    outcome = {"type": "function_call", "name": "exec_command"}
    assert texts(ask(model, "stream 1", "run true", "say a b", since=[outcome]),
                 "output_text") == ["a", " b"]


def test_a_message_without_its_end(model):
    events = ask(model, "begin half a", "say whole")
    assert texts(events, "output_text") == ["half", " a"]
    assert [event["item"]["content"] and event["item"]["content"][0]["text"]
            for event in events if "item" in event] == [[], "whole", "whole"]


def test_a_dropped_stream_goes_on_at_its_pace(model):
    with pytest.raises(http.client.IncompleteRead):
        ask(model, "stream 1", "begin half a", "drop", "say a b")
    assert texts(ask(model, "stream 1", "begin half a", "drop", "say a b"),
                 "output_text") == ["a", " b"]


def test_a_pace_is_a_number(model):
    ask(model, "stream fast", status=400)
