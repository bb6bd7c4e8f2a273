"""What POST /codex/send takes beside the message: how it reaches Codex, and what is refused."""

import base64
import json
import os
import socket
import stat

import pytest

import harness
import replicas_engine
from harness import script, wait_for

PNG = b"\x89PNG\r\n\x1a\n" + b"the rest of a PNG"
JPEG = b"\xff\xd8\xff\xe0" + b"the rest of a JPEG"
GIF = b"GIF89a" + b"the rest of a GIF"
WEBP = b"RIFF\x10\x00\x00\x00WEBPVP8 " + b"the rest"
ZIP = b"PK\x03\x04" + b"the rest of a ZIP"
SCHEMA = {"type": "object", "properties": {"é漢😀": {"type": "string", "maxLength": 2 ** 70}},
          "required": ["é漢😀"], "additionalProperties": False}
NASTY = ['"', '"\n[sandbox_workspace_write]\nnetwork_access = true\nx="', "high\" # ", "a\nb",
         "\r", "\0", "nul\0in it", "--sandbox danger-full-access", "--flag", "-c", "$(id)",
         "x" * 10 ** 6]
WRONG_TYPES = [None, 1, 1.5, True, [], ["x"], {}, {"a": "b"}]


def data_url(data, kind="png"):
    return "data:image/%s;base64,%s" % (kind, base64.b64encode(data).decode())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One engine for the tests that don't need one of their own."""
    engine = harness.Engine(tmp_path_factory.mktemp("shared"), harness.OPEN_TO_VIEW).start()
    yield engine
    engine.stop()
    assert harness.processes_with("CODEX_HOME", engine.codex_home) == []


def words(engine, message="hello", **options):
    """The arguments with which a turn of these options starts Codex, from --cd's value on."""
    engine.send(message, **options)
    argv = engine.calls()[-1]["argv"]
    return argv[argv.index("--cd") + 2:]


def turn_files(engine):
    """All files and folders in the state directory but those that every engine has there."""
    found = []
    for folder, folders, names in os.walk(engine.state):
        found += [os.path.join(folder, name) for name in folders + names]
    usual = ("/turns", "/lock", ".log", ".reset")
    return [path for path in found if not path.endswith(usual)]


def refusal(engine, **options):
    """The details of the 400 that a turn with the one option gets; nothing else has happened."""
    (key, value), = options.items()
    before = engine.status()["turn"], len(engine.calls()), os.listdir(engine.tmp)
    answer = engine.post("/codex/send", json.dumps({"message": "hello", key: value}))
    assert answer.status == 400, (answer.status, answer.body[:1000])
    body = answer.json()
    assert body["error"] == "Invalid %s" % key
    assert body["details"].startswith("%s " % key)
    assert len(body["details"]) < 300
    after = engine.status()["turn"], len(engine.calls()), os.listdir(engine.tmp)
    assert after == before
    assert turn_files(engine) == []
    return body["details"]


# What reaches Codex

DEFAULT = ["--sandbox", "workspace-write"]


def test_without_options_only_the_default_sandbox(shared):
    shared.post("/codex/reset")
    assert words(shared) == DEFAULT


@pytest.mark.parametrize("model", ["gpt-5.2-codex", "o3", "org/model:free", "a b", "x" * 200,
                                   "-starts-with-a-dash", "--sandbox=danger-full-access", "é 漢 😀",
                                   '"quoted"', "'; rm -rf / #", "model_provider=\"x\""])
def test_a_model_is_one_word(shared, model):
    shared.post("/codex/reset")
    assert words(shared, model=model) == ["--model=" + model] + DEFAULT


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max",
                                    "ultra", "persistent"])
def test_reasoning_efforts(shared, effort):
    shared.post("/codex/reset")
    assert words(shared, reasoning_effort=effort) == [
        "--config", 'model_reasoning_effort="%s"' % effort] + DEFAULT


@pytest.mark.parametrize("mode", ["read-only", "workspace-write", "danger-full-access"])
def test_sandbox_modes(shared, mode):
    shared.post("/codex/reset")
    assert words(shared, sandbox_mode=mode) == ["--sandbox", mode]


@pytest.mark.parametrize("on, word", [(True, "true"), (False, "false")])
def test_network_access(shared, on, word):
    shared.post("/codex/reset")
    assert words(shared, network_access=on) == DEFAULT + [
        "--config", "sandbox_workspace_write.network_access=" + word]


@pytest.mark.parametrize("on, word, mode", [(True, "true", "live"), (False, "false", "disabled")])
def test_web_search(shared, on, word, mode):
    shared.post("/codex/reset")
    assert words(shared, web_search=on) == DEFAULT + [
        "--config", "tools.web_search=" + word, "--config", 'web_search="%s"' % mode]


def test_every_turn_has_its_own_options_and_resumed_ones_too(shared):
    shared.post("/codex/reset")
    words(shared, model="one", sandbox_mode="danger-full-access", images=[data_url(PNG)])
    thread_id = shared.status()["thread_id"]
    assert words(shared) == DEFAULT + ["resume", thread_id]
    turn_id = shared.status()["turn"]["id"] + 1
    assert words(shared, model="two", sandbox_mode="read-only", images=[data_url(GIF)]) == [
        "--model=two", "--sandbox", "read-only", "resume", thread_id,
        "--image", "%s/turns/%d.files/image-1.gif" % (shared.state, turn_id)]


def test_unknown_keys_are_passed_over(shared):
    shared.post("/codex/reset")
    assert words(shared, sandbox="danger-full-access", Model="x", cwd="/") == DEFAULT


def test_a_key_that_is_given_twice_counts_once(shared):
    shared.post("/codex/reset")
    answer = shared.post("/codex/send", '{"model": "one", "message": "hello", "model": "two"}')
    assert answer.status == 200
    assert "--model=two" in shared.calls()[-1]["argv"]


def test_defaults_come_from_the_settings_and_yield_to_the_turn(make_engine):
    engine = make_engine(REPLICAS_ENGINE_MODEL="setting", REPLICAS_ENGINE_SANDBOX="read-only")
    assert words(engine) == ["--model=setting", "--sandbox", "read-only"]
    thread = ["resume", engine.status()["thread_id"]]
    assert words(engine) == ["--model=setting", "--sandbox", "read-only"] + thread
    assert words(engine, model="turn") == ["--model=turn", "--sandbox", "read-only"] + thread
    assert words(engine, sandbox_mode="danger-full-access") == [
        "--model=setting", "--sandbox", "danger-full-access"] + thread


def test_the_sandbox_can_be_left_to_codexs_own_config(make_engine):
    engine = make_engine(REPLICAS_ENGINE_SANDBOX="config")
    assert words(engine) == []
    engine.post("/codex/reset")
    assert words(engine, sandbox_mode="read-only") == ["--sandbox", "read-only"]


@pytest.mark.parametrize("name, value", [
    ("SANDBOX", "none"), ("SANDBOX", "Read-Only"), ("SANDBOX", " read-only"), ("SANDBOX", "--cd"),
    ("SANDBOX", "read-only\nx"), ("SANDBOX", '"'), ("SANDBOX", "x" * 100000), ("MODEL", "a\nb"),
    ("MODEL", "x" * 201), ("MODEL", "x" * 100000), ("MODEL", "a\tb"), ("MODEL", "DEL\x7f"),
    ("MODEL", os.fsdecode(b"not UTF-8 \xff"))], ids=lambda text: ascii(text)[:30])
def test_a_setting_that_cannot_be_used_stops_the_start(make_engine, name, value):
    engine = make_engine(start=False, **{"REPLICAS_ENGINE_" + name: value})
    engine.start(wait=False)
    assert engine.process.wait(timeout=harness.PATIENCE) == 2
    log = engine.log()
    assert "REPLICAS_ENGINE_" + name in log.splitlines()[0] and "Traceback" not in log
    assert "is none of read-only, " in log or "must be 1 to 200" in log or "printed" in log
    assert not os.path.exists(engine.state)


@pytest.mark.parametrize("name", ["SANDBOX", "MODEL"])
def test_a_setting_that_is_empty_is_the_default(make_engine, name):
    assert words(make_engine(**{"REPLICAS_ENGINE_" + name: ""})) == DEFAULT


# The files of a turn

def look(engine, **options):
    """Files of a turn as they are while it runs, {path: (mode, bytes)}, folders too; and its id."""
    go, seen = os.path.join(engine.folder, "go"), {}
    turn_id = engine.start_turn(script({"thread": "new"}, {"wait_for": go}, {"complete": True}),
                                **options)
    paths = turn_files(engine)
    for path in paths:
        data = None
        if not os.path.isdir(path):
            with open(path, "rb") as file:
                data = file.read()
        seen[path[len(engine.state):]] = (stat.S_IMODE(os.stat(path).st_mode), data)
    open(go, "w").close()
    engine.wait_for_turn()
    os.unlink(go)
    wait_for(lambda: len(engine.calls()) and engine.calls()[-1], "the record of the call")
    return seen, turn_id


def test_a_schema_is_a_private_file_while_its_turn_runs(engine):
    seen, turn_id = look(engine, output_schema=SCHEMA)
    folder = "/turns/%d.files" % turn_id
    mode, data = seen.pop(folder + "/schema.json")
    assert mode == 0o600 and json.loads(data.decode()) == SCHEMA
    assert seen == {folder: (0o700, None)}
    argv = engine.calls()[-1]["argv"]
    assert argv[argv.index("--output-schema") + 1] == engine.state + folder + "/schema.json"
    assert turn_files(engine) == []


@pytest.mark.parametrize("data, kind", [(PNG, "png"), (JPEG, "jpg"), (GIF, "gif"), (WEBP, "webp")])
@pytest.mark.parametrize("way", ["path", "data URL"])
def test_an_image_is_a_private_file_while_its_turn_runs(engine, data, kind, way):
    with open(os.path.join(engine.workspace, "picture"), "wb") as file:
        file.write(data)
    image = "picture" if way == "path" else data_url(data, "png")   # its bytes say what it is
    seen, turn_id = look(engine, images=[image])
    folder = "/turns/%d.files" % turn_id
    assert seen == {folder: (0o700, None), "%s/image-1.%s" % (folder, kind): (0o600, data)}
    assert engine.calls()[-1]["argv"][-2:] == [
        "--image", "%s%s/image-1.%s" % (engine.state, folder, kind)]
    assert turn_files(engine) == []


def test_images_keep_their_order(engine):
    with open(os.path.join(engine.workspace, "b"), "wb") as file:
        file.write(JPEG)
    seen, turn_id = look(engine, images=[data_url(PNG), "b", data_url(GIF)], output_schema={})
    folder = "/turns/%d.files/" % turn_id
    assert {path[len(folder):] for path in seen if path.startswith(folder)} == {
        "schema.json", "image-1.png", "image-2.jpg", "image-3.gif"}
    argv = engine.calls()[-1]["argv"]
    assert argv[-6:] == [word for name in ("image-1.png", "image-2.jpg", "image-3.gif")
                         for word in ("--image", engine.state + folder + name)]


@pytest.mark.parametrize("place", ["a, b.png", "-c", "--image", "sub dir/x,y", "é 漢 😀", "a\nb",
                                   "./sub/../in.png", "link", "absolute", "linked dir/x", "~",
                                   "x=1", ".hidden", "Data:image"], ids=ascii)
def test_an_image_in_the_workspace_by_any_name(engine, place):
    os.makedirs(os.path.join(engine.workspace, "sub"))
    os.makedirs(os.path.join(engine.workspace, "sub dir"))
    target = {"link": "target", "linked dir/x": "sub/x", "absolute": "in.png"}.get(place, place)
    with open(os.path.join(engine.workspace, target), "wb") as file:
        file.write(PNG)
    os.symlink("target", os.path.join(engine.workspace, "link"))
    os.symlink("sub", os.path.join(engine.workspace, "linked dir"))
    if place == "absolute":
        place = os.path.join(engine.workspace, "in.png")
    if place == "Data:image":                   # a URL's scheme knows no case: RFC 3986, 3.1
        assert "base64" in refusal(engine, images=[place])
        return
    seen, turn_id = look(engine, images=[place])
    assert seen["/turns/%d.files/image-1.png" % turn_id] == (0o600, PNG)


def test_a_workspace_that_is_a_link_is_the_folder_behind_it(make_engine):
    engine = make_engine(start=False)
    link = os.path.join(engine.folder, "link")
    os.symlink(engine.workspace, link)
    engine.env["WORKSPACE_HOME"] = link
    engine.start()
    with open(os.path.join(engine.workspace, "in.png"), "wb") as file:
        file.write(PNG)
    for path in ("in.png", link + "/in.png", engine.workspace + "/in.png"):
        assert "--image" in words(engine, images=[path])


def test_no_image_at_all_is_a_turn_without_one(shared):
    shared.post("/codex/reset")
    assert words(shared, images=[]) == DEFAULT


@pytest.mark.parametrize("ending", [
    {"complete": True}, {"fail": "it failed"}, {"exit": 3}, {"kill": "SIGKILL"}], ids=str)
def test_the_files_are_gone_however_the_turn_ends(shared, ending):
    events = shared.send(script({"thread": "new"}, ending), images=[data_url(PNG)],
                         output_schema=SCHEMA)
    assert events[-1].type == "done"
    assert turn_files(shared) == []


@pytest.mark.parametrize("end", ["interrupt", "reset", "shutdown", "kill"])
def test_the_files_are_gone_after_a_turn_that_is_cut_short(make_engine, end):
    engine = make_engine()
    steps = [{"thread": "new"}, {"wait_for": os.path.join(engine.folder, "never")}]
    engine.start_turn(script(*steps), images=[data_url(PNG)], output_schema=SCHEMA)
    assert len(turn_files(engine)) == 3
    if end == "shutdown":
        assert engine.stop() == 0
    elif end == "kill":
        engine.kill()
        assert len(turn_files(engine)) == 3
        engine.start()
        engine.wait_for_turn()
    else:
        assert engine.post("/codex/" + end).status == 200
    assert turn_files(engine) == []


@pytest.mark.parametrize("broken", ["codex", "codex that is no program"])
def test_no_file_is_left_by_a_turn_that_cannot_start(make_engine, tmp_path, broken):
    program = tmp_path / "codex"
    program.write_text("no program")
    if broken != "codex":
        program.chmod(0o755)
    engine = make_engine(CODEX_PATH=str(program))
    answer = engine.post("/codex/send", {"message": "hello", "images": [data_url(PNG)],
                                         "output_schema": SCHEMA})
    assert answer.status == 503
    assert turn_files(engine) == []
    program.unlink()
    os.symlink(harness.STAND_IN_CODEX, str(program))
    assert engine.start_turn("hello") == 1


def test_no_file_is_left_by_a_turn_that_has_to_wait(engine):
    go = os.path.join(engine.folder, "go")
    engine.start_turn(script({"thread": "new"}, {"wait_for": go}, {"complete": True}))
    answer = engine.post("/codex/send", {"message": "hello", "images": [data_url(PNG)]})
    assert answer.status == 409
    assert turn_files(engine) == []
    open(go, "w").close()
    engine.wait_for_turn()


def test_the_same_key_with_the_same_image_is_the_same_turn(engine):
    body = {"message": "hello", "images": [data_url(PNG)], "output_schema": SCHEMA}
    first = engine.request("POST", "/codex/send", body, {"Idempotency-Key": "k"})
    again = engine.request("POST", "/codex/send", body, {"Idempotency-Key": "k"})
    assert again.status == 200 and again.events() == first.events()
    body["images"] = [data_url(GIF)]
    assert engine.request("POST", "/codex/send", body, {"Idempotency-Key": "k"}).status == 422
    assert turn_files(engine) == [] and len(engine.calls()) == 1


def test_the_same_key_when_the_image_is_gone(engine):
    image = os.path.join(engine.workspace, "a.png")
    with open(image, "wb") as file:
        file.write(PNG)
    body, key = {"message": "hello", "images": ["a.png"]}, {"Idempotency-Key": "k"}
    first = engine.request("POST", "/codex/send", body, key)
    os.unlink(image)
    assert engine.request("POST", "/codex/send", body, key).events() == first.events()
    body["message"] = "another"
    assert engine.request("POST", "/codex/send", body, key).status == 422
    assert len(engine.calls()) == 1


# What is refused

def wrong(values, key, *reasons):
    return [pytest.param(key, value, reasons, id="%s=%s" % (key, ascii(value)[:40]))
            for value in values]


REFUSED = (
    wrong([value for value in WRONG_TYPES], "model", "must be a string")
    + wrong([""], "model", "must be 1 to 200 characters long")
    + wrong(["x" * 201, "x" * 10 ** 6], "model", "must be 1 to 200 characters long")
    + wrong(["a\nb", "a\rb", "\0", "a\tb", "\x7f", "\x1b[31m", "\ud800", "\u2028", "\u200b"],
            "model", "printed")
    + wrong(WRONG_TYPES + NASTY + ["", "HIGH", "high ", "most"], "reasoning_effort",
            "must be one of none, minimal, low, medium, high, xhigh, max, ultra, persistent")
    + wrong(WRONG_TYPES + NASTY + ["", "config", "Read-Only", "read_only", "none"], "sandbox_mode",
            "must be one of read-only, workspace-write, danger-full-access")
    + wrong([None, 0, 1, 1.0, "", "true", "false", "live", [], {}] + NASTY, "network_access",
            "must be true or false")
    + wrong([None, 0, 1, "true", "live", [], {}] + NASTY, "web_search", "must be true or false")
    + wrong([None, 1, True, False, "", "{}", [], [{}], '{"type":"object"}'] + NASTY,
            "output_schema", "must be an object")
    + wrong([None, 1, True, "", "a.png", {}, {"0": "a.png"}, [1], [None], [["a.png"]],
             [{"type": "local_image"}], ["in.png", 1]], "images", "must be a list")
    + wrong([[""], ["\0"], ["in.png\0"], ["x" * 10 ** 6], ["a/" * 10 ** 6], ["../" * 2000]],
            "images", "number 1: is not a path")
    + wrong([["x" * 300]], "images", "number 1: File name too long")
    + wrong([["missing.png"], ["in.png/x"], ["--flag"], ["-c"], ["a\nb"], ["$(id)"],
             ["in.png,in.png"]], "images", "number 1: N")
    + wrong([["http://x/y"], ["file:///etc/passwd"]], "images",
            "number 1: must be a path in the workspace, or a data: URL")
    + wrong([["\ud800"]], "images", "number 1: ")
    + wrong([[".."], ["../outside.png"], ["../../../../../../etc/passwd"], ["/etc/passwd"], ["/"],
             ["/dev/zero"], ["/proc/self/environ"], ["sub/../../outside.png"], ["out"],
             ["out dir/outside.png"], ["../workspace-not/x.png"], ["loop/../../outside.png"]],
            "images", "number 1: lies outside the workspace")
    + wrong([["."], ["sub"], ["sub/"]], "images", "number 1: Is a directory")
    + wrong([["fifo"]], "images", "number 1: is not a regular file")
    + wrong([["socket"]], "images", "number 1: No such device or address")
    + wrong([["loop"]], "images", "number 1: Too many levels of symbolic links")
    + wrong([["zip.png"], ["empty.png"], ["text.png"], [data_url(ZIP)], [data_url(b"")],
             [data_url(b"<svg/>", "svg+xml")], [data_url(PNG[1:])], [data_url(b"\n" + PNG)]],
            "images", "number 1: is not a PNG, JPEG, GIF or WebP image")
    + wrong([["in.png", "zip.png"], [data_url(PNG), data_url(ZIP)]], "images",
            "number 2: is not a PNG, JPEG, GIF or WebP image")
    + wrong([["data:"], ["data:,x"], ["data:image/png,x"], ["data:image/png;base64"],
             ["data:text/html;base64,iVBORw0KGgo="], ["data:image/png;a=b;base64,iVBORw0KGgo="],
             ["data:image/png\n;base64,iVBORw0KGgo="], ["data:image/;base64,iVBORw0KGgo="],
             ["data:application/octet-stream;base64,AAAA"], ["data:;base64,iVBORw0KGgo="]],
            "images", "number 1: must begin with data:image/<type>;base64,")
    + wrong([["data:image/png;base64," + garbage] for garbage in (
        "!!!!", "iVBORw0KGgo", "iVBORw0KGgo=\n", "iVBORw0K Ggo=", "iVBORw0KGgo=é", "%69",
        "iVBORw0KGgo=====x", "_-_-")], "images", "number 1: is not base64")
    + wrong([["data:image/png;base64,="]], "images", "number 1: is not")    # either, by version
    + wrong([["in.png"] * 101], "images", "must be at most 100"))


@pytest.fixture(scope="module")
def furnished(shared):
    """The shared engine, its workspace full of what can't be sent, beside a right in.png."""
    folder = shared.workspace
    files = {"in.png": PNG, "zip.png": ZIP, "empty.png": b"", "text.png": b"text\n",
             "../outside.png": PNG, "../workspace-not/x.png": PNG}
    os.mkdir(os.path.join(folder, "sub"))
    os.mkdir(os.path.join(shared.folder, "workspace-not"))
    for name, data in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(data)
    os.mkfifo(os.path.join(folder, "fifo"))
    links = {"out": "../outside.png", "out dir": "..", "loop": "loop"}
    for name, target in links.items():
        os.symlink(target, os.path.join(folder, name))
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(folder)                        # a socket's path is at most 107 bytes long
        try:
            sock.bind("socket")
        finally:
            os.chdir(here)
        yield shared


@pytest.mark.parametrize("key, value, reasons", REFUSED)
def test_a_value_that_cannot_be_used_is_refused(furnished, key, value, reasons):
    details = refusal(furnished, **{key: value})
    for reason in reasons:
        assert reason in details


def test_after_all_that_the_engine_is_as_it_was(furnished):
    def count():
        return len(harness.descriptors_of(furnished.process.pid))

    before = count()
    for value in (["sub"], ["fifo"], ["zip.png"], ["missing"], [data_url(ZIP)]) * 5:
        refusal(furnished, images=value)
    wait_for(lambda: count() <= before, "the descriptors to be closed")
    turn = furnished.status()["turn"]
    first = furnished.start_turn("hello")
    assert first == (turn["id"] if turn else 0) + 1
    furnished.wait_for_turn()


def test_the_first_of_several_wrong_keys_is_named(shared):
    answer = shared.post("/codex/send", {"message": "hello", "web_search": 1, "model": 2})
    assert answer.status == 400
    assert answer.json()["error"] in ("Invalid model", "Invalid web_search")


def test_unreadable_images_are_refused(engine):
    if os.getuid() == 0:
        pytest.skip("root can read every file")
    path = os.path.join(engine.workspace, "x.png")
    with open(path, "wb") as file:
        file.write(PNG)
    os.chmod(path, 0)
    assert "Permission denied" in refusal(engine, images=["x.png"])


@pytest.mark.parametrize("depth", [100, 900, *range(960, 1000), 3000, 100000])
def test_a_schema_of_any_depth_works_or_is_refused(shared, depth):
    body = '{"message": "hello", "output_schema": %s1%s}' % ('{"a":' * depth, "}" * depth)
    answer = shared.post("/codex/send", body)
    assert answer.status == 200 if depth == 100 else answer.status in (200, 400), answer.body[:500]
    assert turn_files(shared) == []


@pytest.mark.parametrize("schema", ["NaN", "Infinity", "-Infinity"])
def test_a_schema_of_what_is_no_json_is_refused(shared, schema):
    answer = shared.post("/codex/send", '{"message":"x","output_schema":{"maximum":%s}}' % schema)
    assert answer.status == 400 and answer.json()["error"] == "Failed to process message"


@pytest.mark.parametrize("number", ["1e400", "9" * 5000, "-0.0", "1" + "0" * 30])
def test_a_schemas_numbers_stay_json(shared, number):
    answer = shared.post("/codex/send", '{"message":"x","output_schema":{"maximum":%s}}' % number)
    assert answer.status == (400 if number == "1e400" else 200), answer.body
    assert turn_files(shared) == []


# Large ones

def test_a_data_url_of_40_mb_is_too_large_and_can_be_allowed(make_engine):
    image = PNG + os.urandom(1024) * (30 * 1024)
    body = json.dumps({"message": "hello", "images": [data_url(image)]})
    assert len(body) > 40 * 10 ** 6
    engine = make_engine("small")
    connection = engine.connect()
    try:
        connection.request("POST", "/codex/send", body,
                           {"X-Replicas-Engine-Secret": harness.SECRET})
        answer = harness.Answer(connection.getresponse())
        assert answer.status == 413 and "REPLICAS_ENGINE_MAX_BODY" in answer.json()["details"]
    except (BrokenPipeError, ConnectionResetError):
        pass                                    # it was answered before all of it was sent
    finally:
        connection.close()
    assert engine.status()["turn"] is None
    assert turn_files(engine) == []
    large = make_engine("large", REPLICAS_ENGINE_MAX_BODY=str(64 * 1024 * 1024))
    seen, turn_id = look(large, images=[data_url(image)])
    assert seen["/turns/%d.files/image-1.png" % turn_id][1] == image
    assert turn_files(large) == []


def test_images_of_the_workspace_have_the_bodys_limit_together(make_engine):
    engine = make_engine(REPLICAS_ENGINE_MAX_BODY="100000")
    for name, size in (("half", 50000), ("more", 60000), ("most", 100000), ("over", 100001)):
        with open(os.path.join(engine.workspace, name), "wb") as file:
            file.write(PNG.ljust(size, b"x"))
    assert "number 1: makes more than 100000 bytes" in refusal(engine, images=["over"])
    assert "number 2: makes more than 100000 bytes" in refusal(engine, images=["half", "more"])
    with open(os.path.join(engine.workspace, "sparse"), "wb") as file:
        file.write(PNG)
        file.truncate(2 ** 40)
    assert "number 1: makes more than 100000 bytes" in refusal(engine, images=["sparse"])
    engine.send("hello", images=["half", "half"])
    engine.send("hello", images=["most"])


def test_images_need_a_state_directory_without_a_comma(make_engine):
    engine = make_engine("state, with a comma")
    assert "REPLICAS_ENGINE_STATE" in refusal(engine, images=[data_url(PNG)])
    engine.send("hello", images=[], output_schema=SCHEMA)


def test_as_many_images_as_there_may_be(shared):
    shared.post("/codex/reset")
    images = [data_url(PNG)] * replicas_engine.MAX_IMAGES
    assert words(shared, images=images).count("--image") == len(images) == 100


def test_a_schema_of_megabytes(engine):
    schema = {"enum": ["x" * 100] * 50000}
    seen, turn_id = look(engine, output_schema=schema)
    assert json.loads(seen["/turns/%d.files/schema.json" % turn_id][1].decode()) == schema


# What a version can't do

@pytest.mark.parametrize("version, option, since", [       # None: it can be done
    ("0.50.0", {"images": [data_url(PNG)]}, "0.98"), ("0.97.9", {"images": [data_url(PNG)]}, "0.98"),
    ("0.50.0", {"images": []}, None), ("0.98.0", {"images": [data_url(PNG)]}, None),
    ("1.0.0", {"images": [data_url(PNG)]}, None),
    ("0.57.0", {"reasoning_effort": "none"}, "0.58"), ("0.58.0", {"reasoning_effort": "none"}, None),
    ("0.50.0", {"reasoning_effort": "xhigh"}, "0.59"),
    ("0.50.0", {"reasoning_effort": "minimal"}, None),
    ("0.98.0", {"reasoning_effort": "xhigh"}, None),
    ("0.98.0", {"reasoning_effort": "max"}, "0.138"),
    ("0.142.0", {"reasoning_effort": "ultra"}, "0.143"),
    ("0.150.1", {"reasoning_effort": "persistent"}, "0.151"),
    ("0.151.0", {"reasoning_effort": "persistent"}, None)], ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_a_version_cannot_do_is_refused_before_anything_starts(
        make_engine, version, option, since, resumed):
    engine = make_engine(STAND_IN_CODEX_VERSION=version)
    if resumed:
        engine.send("first")
    if since is None:
        engine.send("hello", **option)
        return
    details = refusal(engine, **option)
    assert "Codex %s" % version in details and "%s or newer" % since in details


def test_a_codex_that_does_not_say_its_version_is_taken_to_be_new(make_engine, tmp_path):
    shim = tmp_path / "codex"
    shim.write_text("#!/bin/sh\n[ \"$1\" = --version ] && exit 1\nexec %s \"$@\"\n"
                    % harness.STAND_IN_CODEX)
    shim.chmod(0o755)
    engine = make_engine(CODEX_PATH=str(shim))
    engine.send("hello", images=[data_url(PNG)])
