"""The application by itself, as PEP 3333 has it: secret, routes, bodies, errors.

Every call goes through wsgiref.validate, which watches both sides of the interface.
"""

import io
import json
import wsgiref.validate

import pytest

import harness
from replicas_engine import Application, Router, HTTPError, Settings

SECRET = "s3cret"


class Client:
    """Calls a WSGI application as a server would."""

    def __init__(self, application):
        self.application = wsgiref.validate.validator(application)

    def __call__(self, method, path, body=b"", secret=SECRET, **environ):
        path, _, query = path.partition("?")
        environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path,
                   "QUERY_STRING": query, "SERVER_NAME": "localhost", "SERVER_PORT": "80",
                   "SERVER_PROTOCOL": "HTTP/1.1", "wsgi.version": (1, 0),
                   "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body),
                   "wsgi.errors": io.StringIO(), "wsgi.multithread": True,
                   "wsgi.multiprocess": False, "wsgi.run_once": False, **environ}
        if body:
            environ["CONTENT_LENGTH"] = str(len(body))
        if secret is not None:
            environ["HTTP_X_REPLICAS_ENGINE_SECRET"] = secret
        started = []

        def start_response(status, headers, exc_info=None):
            started.append((status, headers))

        result = self.application(environ, start_response)
        try:
            body = b"".join(result)
        finally:
            result.close()
        assert len(started) == 1
        self.status, self.headers = int(started[0][0][:3]), dict(started[0][1])
        self.body = body
        if self.headers.get("Content-Type") == "application/json" and body:
            self.json = json.loads(body.decode())
        return self


@pytest.fixture
def make_client(tmp_path):
    applications = []

    def make(**env):
        settings = dict({"HOME": str(tmp_path), "REPLICAS_ENGINE_SECRET": SECRET,
                         "CODEX_PATH": harness.STAND_IN_CODEX, "PATH": "/usr/bin:/bin",
                         "CODEX_HOME": str(tmp_path / ".codex")}, **env)
        application = Application(Settings({k: v for k, v in settings.items() if v is not None}))
        applications.append(application)
        return Client(application)

    yield make
    for application in applications:
        if application.runner:
            application.runner.close()


@pytest.fixture
def client(make_client):
    return make_client()


def test_health_is_public_and_needs_nothing(client):
    assert client("GET", "/health", secret=None).status == 200
    assert list(client.json) == ["status", "timestamp"] and client.json["status"] == "ok"
    assert client.application is not None
    assert client("HEAD", "/health", secret=None).status == 200
    assert client.body == b"" and int(client.headers["Content-Length"]) > 0


def test_health_with_another_method_needs_the_secret(client):
    assert client("POST", "/health", secret=None).status == 401
    assert client("POST", "/health").status == 405
    assert client.headers["Allow"] == "GET, HEAD"


def test_ping(client):
    assert client("GET", "/ping").json["message"] == "pong"
    assert client.json["timestamp"].endswith("Z") and len(client.json["timestamp"]) == 24


HOW = ("send the engine's REPLICAS_ENGINE_SECRET, once, as "
       "X-Replicas-Engine-Secret: … or Authorization: Bearer …")
WITHOUT = {"error": "Unauthorized: X-Replicas-Engine-Secret header required", "details": HOW}
WRONG = {"error": "Unauthorized: Invalid secret", "details": HOW}


@pytest.mark.parametrize("headers, error", [
    ({}, WITHOUT),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": ""}, WITHOUT),
    ({"HTTP_AUTHORIZATION": "Basic czNjcmV0"}, WITHOUT),
    ({"HTTP_AUTHORIZATION": "Bearer"}, WITHOUT),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": "wrong"}, WRONG),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": "s3cre"}, WRONG),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": "s3crets"}, WRONG),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": "S3CRET"}, WRONG),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": "s3cret,s3cret"}, WRONG),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": "s\xe9cret"}, WRONG),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": "s" * 10000}, WRONG),
    ({"HTTP_AUTHORIZATION": "Bearer wrong"}, WRONG),
    ({"HTTP_X_REPLICAS_ENGINE_SECRET": "wrong", "HTTP_AUTHORIZATION": "Bearer s3cret"}, WRONG),
])
def test_unauthorized(client, headers, error):
    for path in ("/ping", "/codex/send", "/nowhere"):
        assert client("GET", path, secret=None, **headers).status == 401
        assert client.json == error


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_bearer(client, scheme):
    assert client("GET", "/ping", secret=None, HTTP_AUTHORIZATION=scheme + " s3cret").status == 200


def test_a_secret_beyond_ascii(make_client):
    client = make_client(REPLICAS_ENGINE_SECRET="schlüssel")
    sent = "schlüssel".encode().decode("latin-1")       # as WSGI brings the bytes of a header
    assert client("GET", "/ping", secret=sent).status == 200
    assert client("GET", "/ping", secret="schlussel").status == 401


def test_no_secret_configured(make_client):
    client = make_client(REPLICAS_ENGINE_SECRET=None)
    assert client("GET", "/health", secret=None).status == 200
    for path in ("/ping", "/nowhere"):
        assert client("GET", path, secret="anything").status == 500
        assert client.json == {
            "error": "Server configuration error: REPLICAS_ENGINE_SECRET not set"}


def test_routes(client):
    assert client("GET", "/nowhere").status == 404
    assert client("GET", "/ping/").status == 404
    assert client("GET", "/PING").status == 404
    assert client("GET", "/codex/send").status == 405 and client.headers["Allow"] == "POST"
    assert client("DELETE", "/codex/status").status == 405
    assert client.headers["Allow"] == "GET, HEAD"
    for path in ("/ping", "/codex/status", "/codex/history"):
        assert client("HEAD", path).status == 200 and client.body == b"", path


def test_every_answer_says_what_a_cache_may_do(client):
    for request in (("GET", "/health"), ("HEAD", "/health"), ("GET", "/ping"), ("GET", "/nowhere"),
                    ("GET", "/codex/send"), ("POST", "/codex/send"), ("GET", "/codex/status"),
                    ("GET", "/codex/history"), ("GET", "/codex/history?tail=x"),
                    ("GET", "/codex/events"), ("POST", "/codex/reset"), ("OPTIONS", "")):
        assert client(*request).headers["Cache-Control"] == "no-store", request
        client(*request, secret="wrong")
        assert client.headers["Cache-Control"] == "no-store", request
    client("POST", "/codex/send", b'{"message":"hi"}')
    for headers in ({}, {"HTTP_IF_NONE_MATCH": "*"}):
        client("GET", "/codex/history", **headers)
        assert client.headers["Cache-Control"] == "private, no-cache" and client.headers["ETag"]
    client("GET", "/codex/events")
    assert client.headers["Cache-Control"] == "no-cache, no-transform"


def test_options_of_the_whole_server(client):
    assert client("OPTIONS", "").status == 204
    assert client.headers["Allow"] == "DELETE, GET, HEAD, OPTIONS, POST"
    assert client("OPTIONS", "", secret="wrong").status == 401


def test_the_router_says_what_it_allows():
    router = Router(("GET", "/a", "get"), ("POST", "/a", "post"))
    assert router.handler("HEAD", "/a") == "get"
    with pytest.raises(HTTPError) as caught:
        router.handler("PUT", "/a")
    assert caught.value.headers == [("Allow", "GET, HEAD, POST")]


MESSAGE = {"error": "Message is required and must be a string"}


@pytest.mark.parametrize("body, error", [
    (b'{}', MESSAGE), (b'{"message":""}', MESSAGE), (b'{"message":null}', MESSAGE),
    (b'{"message":5}', MESSAGE), (b'{"message":["x"]}', MESSAGE), (b'{"text":"x"}', MESSAGE),
    (b'', None), (b'hello', None), (b'[1]', None), (b'"x"', None), (b'{"message":"x"', None),
    (b'{"message":"\xff"}', None), (b'{"message":NaN}', None), (b'[' * 100000, None),
])
def test_bodies_that_are_no_message(client, body, error):
    assert client("POST", "/codex/send", body).status == 400
    if error:
        assert client.json == error
    else:
        assert client.json["error"] == "Failed to process message" and client.json["details"]
    if body == b"hello":                    # where it isn't
        assert "line 1 column 1" in client.json["details"]
    assert client("GET", "/codex/status").json["turn"] is None


def test_a_message_of_blanks(client):
    for message in (" ", "\n\t ", "\u3000"):
        client("POST", "/codex/send", json.dumps({"message": message}).encode())
        assert client.status == 400 and client.json == {
            "error": "Message is required and must be a string", "details": "it is blank"}


def test_keys_that_mean_nothing_are_named(client):
    body = {"message": "Hello", "sandbox_mod": "read-only", "cwd": "/", "a b": 1, "m\r\n": 2, "ä": 3, "": 4,
            "\ud800" * 100: 5}
    client("POST", "/codex/send", json.dumps(body).encode())
    assert client.headers["X-Replicas-Ignored-Keys"] == (
        '"", a%20b, cwd, m%0D%0A, sandbox_mod, %C3%A4, ' + "%3F" * 64)
    client("POST", "/codex/send", b'{"message":"Hello"}')
    assert "X-Replicas-Ignored-Keys" not in client.headers


def test_a_body_that_is_compressed(client):
    client("POST", "/codex/send", b"\x1f\x8b\x08", HTTP_CONTENT_ENCODING="gzip")
    assert client.status == 415 and "without Content-Encoding" in client.json["details"]
    assert client.headers["Accept-Encoding"] == "identity"      # RFC 9110, 15.5.16
    client("POST", "/codex/send", b'{"message":"Hello"}', HTTP_CONTENT_ENCODING="Identity")
    assert client.status == 200


def test_a_path_with_a_slash_too_many(client):
    assert client("GET", "/ping/").json["details"] == "there is nothing at /ping/, but at /ping"
    assert client("GET", "/pong/").json["details"] == "there is nothing at /pong/"
    assert client("GET", "/").json["details"] == "there is nothing at /"
    for path, near in (("//Codex/status", "/codex/status"), ("/codex/turns/7/", "/codex/turns/7")):
        assert client("GET", path).json["details"].endswith(", but at " + near)


def test_a_path_as_a_table_has_it(client):
    """It names no turn, and above all not every message that waits."""
    for method, path in (("GET", "/codex/turns/N"), ("DELETE", "/codex/queue/N")):
        assert client(method, path).status == 404


def test_a_turn_of_another_machine_has_another_mark(client, make_client, tmp_path):
    """A machine that was set back gives ids again: X-Replicas-Turn-Mark tells."""
    marks = []
    for one in (client, make_client(REPLICAS_ENGINE_STATE=str(tmp_path / "other"))):
        one("POST", "/codex/send", b'{"message":"Hello"}')
        marks.append(one.headers["X-Replicas-Turn-Mark"])
        one("GET", "/codex/events?turn=1")
        assert one.headers["X-Replicas-Turn-Mark"] == marks[-1]
    assert len(set(marks)) == 2


def test_a_body_that_is_too_large(make_client):
    client = make_client(REPLICAS_ENGINE_MAX_BODY="100")
    assert client("POST", "/codex/send", b'{"message":"%s"}' % (b"x" * 100)).status == 413
    assert "REPLICAS_ENGINE_MAX_BODY" in client.json["details"]
    # as a chunked body comes: without a length
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": io.BytesIO(b"x" * 101)}
    assert client("POST", "/codex/send", **chunked).status == 413


def test_a_body_that_breaks_off(client):
    assert client("POST", "/codex/send", CONTENT_LENGTH="10").status == 400


@pytest.mark.parametrize("method, path", [
    ("POST", "/codex/reset"), ("POST", "/codex/interrupt"), ("GET", "/ping"), ("GET", "/health")])
def test_nothing_is_done_before_the_body_is_there(client, method, path):
    assert client(method, path, b"x" * 100).status == 200
    assert client(method, path, CONTENT_LENGTH="10").status == 400
    assert client(method, path, CONTENT_LENGTH="99999999").status == 413


def test_a_key_that_is_unknown_may_be_anything(client):
    body = b'{"message":"hi","n":%b}' % (b"1" * 5000)
    assert client("POST", "/codex/send", body).status == 200


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "", "nonsense"])
def test_a_turn_whatever_the_content_type(client, content_type):
    body = b'\xef\xbb\xbf{"message":"hi","unknown":[1]}'
    assert client("POST", "/codex/send", body, CONTENT_TYPE=content_type).status == 200
    assert client.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert client.headers["Cache-Control"] == "no-cache, no-transform"
    assert client.headers["X-Accel-Buffering"] == "no"
    assert client.headers["X-Replicas-Turn-Id"] == "1"
    events = harness.check_stream(harness.parse_events(client.body))
    assert [event.type for event in events] == [
        "thread.started", "turn.started", "item.completed", "turn.completed", "done"]


def test_codex_that_cannot_be_started(make_client, tmp_path):
    client = make_client(CODEX_PATH="/nowhere/codex")
    assert client("POST", "/codex/send", b'{"message":"hi"}').status == 503
    assert "CODEX_PATH" in client.json["details"]
    client = make_client(REPLICAS_ENGINE_STATE=str(tmp_path / "b"), WORKSPACE_HOME="/nowhere")
    assert client("POST", "/codex/send", b'{"message":"hi"}').status == 503
    assert "WORKSPACE_HOME" in client.json["details"]
    client = make_client(REPLICAS_ENGINE_STATE=str(tmp_path / "d"), CODEX_HOME="/proc/nowhere")
    assert client("POST", "/codex/send", b'{"message":"hi"}').status == 503
    assert "CODEX_HOME" in client.json["details"]
    program = tmp_path / "codex"
    program.write_text("#!/nowhere/interpreter\n")
    program.chmod(0o755)
    client = make_client(REPLICAS_ENGINE_STATE=str(tmp_path / "c"), CODEX_PATH=str(program))
    assert client("POST", "/codex/send", b'{"message":"hi"}').status == 503
    assert "CODEX_PATH" in client.json["details"]
    assert client("GET", "/codex/status").json["turn"] is None
    assert client("GET", "/codex/events").status == 404


@pytest.mark.parametrize("path, header, status", [
    ("/codex/events", None, 404), ("/codex/events?turn=7", None, 404),
    ("/codex/events?turn=x", None, 400), ("/codex/events?turn=-1", None, 400),
    ("/codex/events?after=7", None, 400), ("/codex/events?after=7.x", None, 400),
    ("/codex/events?after=7.4", None, 404), ("/codex/events", "7.4.1", 400),
    ("/codex/events?turn=8&after=7.4", None, 400), ("/codex/events?turn=1&turn=2", None, 400),
])
def test_streams_that_are_not_there(client, path, header, status):
    headers = {"HTTP_LAST_EVENT_ID": header} if header else {}
    assert client("GET", path, **headers).status == status
    assert client.json["details"]


def test_an_error_inside_is_a_500_without_a_traceback(make_client, monkeypatch):
    client = make_client()
    client("GET", "/ping")
    monkeypatch.setattr("replicas_engine.Rollouts.find", lambda self, thread_id: 1 // 0)
    monkeypatch.setattr("replicas_engine.CodexFinder.find", lambda self: 1 // 0)
    assert client("GET", "/codex/status").status == 500
    assert set(client.json) == {"error", "details"} and b"ZeroDivision" not in client.body


def test_an_engine_without_codex_is_healthy(make_client):
    client = make_client(CODEX_PATH="/nowhere/codex")
    assert client("GET", "/health", secret=None).status == 200
    assert client("GET", "/codex/status").json["codex"] is None
