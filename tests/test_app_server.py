"""The driver of a live turn, with an app-server that misbehaves: the stand-in Codex."""

import json
import os
import subprocess
import sys

import pytest

from harness import STAND_IN_CODEX
from replicas_engine import Codex, Settings, TurnOptions
from test_live_turns_equal import LiveTurn, driver, without_deltas

VERSIONS = ("0.98.0", "0.169.0")
UNKNOWN = "01a2021d-0000-7000-8000-000000000000"


class World:
    """Homes for the stand-in, as LiveTurn wants them."""

    def __init__(self, folder, version):
        self.folder, self.version = folder, version
        self.codex = Codex(STAND_IN_CODEX)
        self.codex.version = version
        self.settings = Settings({"HOME": str(folder), "WORKSPACE_HOME": str(folder),
                                  "CODEX_HOME": str(folder), "CODEX_API_KEY": "sk-one",
                                  "REPLICAS_ENGINE_SANDBOX": "config"})

    def options(self, **options):
        made = TurnOptions(options, self.settings)
        made.write_files(os.path.join(str(self.folder), "files"))
        return made

    def start(self, arguments, live):
        env = {"CODEX_HOME": str(self.folder), "STAND_IN_CODEX_VERSION": self.version,
               "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
        return subprocess.Popen(arguments, env=env, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)

    def behave(self, **methods):
        """Do these steps at these requests, whose `/` is written `_`."""
        with open(os.path.join(str(self.folder), "stand_in_app_server.json"), "w") as file:
            json.dump({name.replace("_", "/"): steps for name, steps in methods.items()}, file)

    def live(self, *steps, thread_id=None, on_event=lambda turn, event: None, **options):
        """A turn of those steps, driven to its end."""
        turn = LiveTurn(self, json.dumps({"app_server": steps}) if steps else "one", thread_id,
                        options)
        turn.run(on_event)
        return turn

    def read(self, method):
        """The parameters of the requests of that method that the stand-in has read."""
        with open(os.path.join(str(self.folder), "stand_in.log"), encoding="utf-8") as file:
            lines = [json.loads(line).get("read", {}) for line in file]
        return [line.get("params") for line in lines if line.get("method") == method]


@pytest.fixture(params=VERSIONS)
def world(tmp_path, request):
    return World(tmp_path, request.param)


def types(turn):
    return [event["type"] for event in without_deltas(turn.events)]


WHOLE = ["thread.started", "turn.started", "item.completed", "turn.completed"]


def test_a_turn_and_the_next_on_its_thread(world):
    turn = world.live()
    assert types(turn) == WHOLE and turn.status == 0
    again = world.live(thread_id=turn.events[0]["thread_id"])
    assert again.events[0] == turn.events[0] and types(again) == WHOLE
    assert "".join(event["item"]["text_delta"] for event in turn.events
                   if event["type"] == "item.delta") == "You said: one"


@pytest.mark.parametrize("version, wanted", [("0.98.0", None), ("0.140.0", None),
                                             ("0.151.0", True), (None, None)])
def test_the_turns_of_a_thread_are_excluded_where_codex_can(tmp_path, version, wanted):
    world = World(tmp_path, version or "0.140.0")
    world.codex.version = version
    thread_id = world.live().events[0]["thread_id"]
    assert types(world.live(thread_id=thread_id)) == WHOLE
    assert world.read("thread/resume")[0].get("excludeTurns") == wanted


def test_what_is_not_set_is_left_out_and_what_is_set_goes_to_its_place(world):
    world.live()
    opened, = world.read("thread/start")
    begun, = world.read("turn/start")
    assert set(opened) == {"cwd", "approvalPolicy"} and set(begun) == {"threadId", "input"}
    schema = {"type": "object"}
    png = "data:image/png;base64,iVBORw0KGgo="
    world.live(thread_id=begun["threadId"], model="m", reasoning_effort="high", web_search=False,
               network_access=False, sandbox_mode="read-only", output_schema=schema, images=[png])
    resumed, = world.read("thread/resume")
    resumed.pop("excludeTurns", None)           # which goes by the version
    assert resumed == {
        "threadId": begun["threadId"], "cwd": str(world.folder),
        "approvalPolicy": "never", "sandbox": "read-only", "model": "m", "config": {
            "model_reasoning_effort": "high", "sandbox_workspace_write.network_access": False,
            "web_search": "disabled"}}
    begun = world.read("turn/start")[-1]
    assert begun["outputSchema"] == schema
    assert [part["type"] for part in begun["input"]] == ["localImage", "text"]
    assert os.path.isabs(begun["input"][0]["path"])


@pytest.mark.parametrize("config, provider", [
    ({"model_provider": None, "profile": None}, "openai"), ({"model_provider": "mine"}, "mine"),
    ({"model_provider": "mine", "profile": "p", "profiles": {"p": {"model_provider": "its"}}},
     "its"),
    ({"model_provider": "mine", "profile": "p", "profiles": {"p": {"model_provider": None}}},
     "mine")], ids=["Codex's own", "the user's", "a profile's", "a profile without"])
def test_a_resume_names_the_configured_provider(world, config, provider):
    """Or 0.169 goes on with the model and the effort of the turn before."""
    thread_id = world.live().events[0]["thread_id"]
    world.behave(config_read=[{"answer": {"result": {"config": config}}}])
    assert types(world.live(thread_id=thread_id)) == WHOLE
    assert world.read("thread/resume")[-1]["modelProvider"] == provider
    for named in ({"model": "m"}, {"reasoning_effort": "low"}):     # is enough by itself
        assert types(world.live(thread_id=thread_id, **named)) == WHOLE
        assert "modelProvider" not in world.read("thread/resume")[-1]
    assert len(world.read("config/read")) == 1
    world.behave(config_read=[{"answer": {"error": {"code": -32601, "message": "what is that"}}}])
    with pytest.raises(driver.Refused, match="what is that"):       # then codex exec takes it
        world.live(thread_id=thread_id)


def test_without_a_key_nobody_logs_in(world):
    world.settings.key = None
    assert types(world.live()) == WHOLE and world.read("account/login/start") == []


@pytest.mark.parametrize("method", ["initialize", "account_login_start", "thread_start",
                                    "turn_start"])
def test_a_refusal_is_told_before_any_event(world, method):
    for steps in ([{"answer": {"error": {"code": -1, "message": "not today"}}}],
                  [{"line": "not today"}], [{"line": "[]"}], [{"answer": {"result": 1}}],
                  [{"answer_half": True}, {"line": ""}]):
        world.behave(**{method: steps})
        turn = LiveTurn(world, "one")
        if steps == [{"answer": {"result": 1}}] and method in ("initialize", "account_login_start"):
            assert types(turn) == [] and turn.run() and types(turn) == WHOLE    # nothing is read
            continue
        with pytest.raises(driver.Refused, match="not today|we don't know"):
            turn.run()
        assert turn.events == [] and not turn.driver.accepted


@pytest.mark.parametrize("method", ["initialize", "account_login_start", "thread_start",
                                    "turn_start"])
def test_death_before_the_turn_was_accepted(world, method):
    world.behave(**{method: [{"exit": 5}]})
    turn = LiveTurn(world, "one")
    assert turn.run() == [] and turn.status == 5
    assert not turn.driver.accepted and not turn.driver.over


def test_death_in_the_turn(world):
    turn = world.live({"begin": "half of"}, {"bytes": {"n": 9, "prefix": "{"}}, {"exit": 5})
    assert turn.status == 5 and turn.driver.accepted and not turn.driver.over
    assert types(turn) == ["thread.started", "turn.started"]
    assert "".join(event["item"]["text_delta"] for event in turn.events[2:]) == "half of"


def test_a_line_that_is_none_in_the_turn(world):
    turn = LiveTurn(world, json.dumps({"app_server": [{"line": "no"}, {"complete": True}]}))
    with pytest.raises(ValueError, match="2 bytes"):
        turn.run()
    assert turn.driver.accepted


def test_answers_out_of_order_and_18_mb_of_them(world):
    thread_id = world.live().events[0]["thread_id"]
    world.behave(thread_resume=[{"answer_later": True}])
    turn = world.live(thread_id=thread_id)
    assert types(turn) == WHOLE and turn.events[0]["thread_id"] == thread_id
    world.behave(thread_resume=[{"answer_big": 18000000}])
    assert types(world.live(thread_id=thread_id)) == WHOLE
    world.behave(turn_start=[{"answer_later": True}], turn_interrupt=[{"answer": True}])
    turn = world.live({"begin": "a"}, {"complete": True})
    assert types(turn) == ["thread.started", "turn.started", "turn.completed"]


def test_an_answer_that_comes_twice_counts_once(world):
    twice = [{"answer": True}, {"answer": {"result": {"turn": {"id": "other"}}}}]
    world.behave(initialize=twice, account_login_start=twice, thread_start=twice, turn_start=twice)
    assert types(world.live({"sleep": 0.3}, {"say": "a"}, {"complete": True})) == WHOLE
    assert len(world.read("thread/start")) == len(world.read("turn/start")) == 1


def test_an_unknown_thread(world):
    with pytest.raises(driver.Refused, match="no rollout found"):
        world.live(thread_id=UNKNOWN)


def test_questions_are_refused_and_what_is_unknown_passed_over(world):
    item = {"type": "newThing", "id": "n1", "someKey": {"innerKey": 1}}
    turn = world.live(
        {"ask": {"method": "item/tool/call", "params": {}}},
        {"notify": {"method": "no/such", "params": {"a": 1}}},
        {"notify": {"method": "item/completed", "params": {"item": item}}},
        {"notify": {"method": "turn/completed", "params": {"threadId": UNKNOWN, "turn": {}}}},
        {"complete": True})
    assert turn.events[2] == {"type": "item.completed", "item": {
        "id": "item_0", "type": "new_thing", "some_key": {"innerKey": 1}}}
    assert types(turn) == WHOLE
    with open(os.path.join(str(world.folder), "stand_in.log"), encoding="utf-8") as file:
        refusal = [json.loads(line)["read"] for line in file if '"error"' in line][-1]
    assert refusal["error"]["code"] == -32601 and refusal["id"].startswith("question-")


def test_deltas_are_joined_and_have_an_end(world):
    turn = world.live({"deltas": {"n": 2000, "size": 10}}, {"complete": True})
    deltas = [event["item"] for event in turn.events if event["type"] == "item.delta"]
    assert "".join(item["text_delta"] for item in deltas) == turn.events[-2]["item"]["text"]
    assert {item["id"] for item in deltas} == {"item_0"}
    assert 5 <= len(deltas) and all(len(item["text_delta"]) < 4096 + 10 for item in deltas)
    turn = world.live({"deltas": {"n": 90, "size": 100000}}, {"say": "on"}, {"complete": True})
    deltas = [event["item"]["text_delta"] for event in turn.events if event["type"] == "item.delta"]
    assert 8000000 < sum(map(len, deltas)) <= driver.MAX_DELTAS
    assert types(turn)[2:] == ["item.completed", "item.completed", "turn.completed"]


def steer_once(message):
    """Have the message cut in at the first delta: the Steer, and what `live` takes."""
    steer, sent = driver.Steer(message), []

    def on_event(turn, event):
        if event["type"] == "item.delta" and not sent:
            sent.append(True)
            turn.write(turn.driver.steer(steer))
    return steer, on_event


def test_a_steer_is_taken_or_refused(world):
    steer, on_event = steer_once("on")
    if world.version == "0.98.0":
        turn = world.live({"begin": "half"}, {"sleep": 1}, {"complete": True}, on_event=on_event)
        assert "before 0.162" in steer.refusal and world.read("turn/steer") == []
        assert "turn.steered" not in types(turn)
    else:
        turn = world.live({"begin": "half"}, {"wait_for_steer": True}, {"complete": True},
                          on_event=on_event)
        assert steer.answered.is_set() and steer.refusal is None
        assert types(turn)[2:] == ["turn.steered", "item.completed", "turn.completed"]


def test_the_ending_waits_for_a_steers_answer(tmp_path):
    """Or a message that was taken would come after the turn's end, and be lost."""
    world = World(tmp_path, "0.169.0")
    path = os.path.join(str(world.folder), "ended")
    for answer, kinds in (({"result": {}}, ["turn.steered", "turn.completed"]),
                          ({"error": {"code": -1, "message": "too late"}}, ["turn.completed"])):
        world.behave(turn_steer=[{"wait_for": path}, {"answer": answer}])
        steer, on_event = steer_once("on")
        turn = world.live({"begin": "half"}, {"sleep": 1}, {"complete": True}, {"touch": path},
                          on_event=on_event)
        assert types(turn)[2:] == kinds and turn.status == 0
        assert steer.answered.is_set() and bool(steer.refusal) == ("error" in answer)
        os.unlink(path)
    world.behave(turn_steer=[{"wait_for": path}, {"exit": 5}])
    steer, on_event = steer_once("on")
    turn = world.live({"begin": "half"}, {"sleep": 1}, {"complete": True}, {"touch": path},
                      on_event=on_event)
    assert types(turn)[2:] == ["turn.completed"] and not steer.answered.is_set()
    assert list(turn.driver.steers.values()) == [steer]
