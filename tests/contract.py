"""packaging/openapi.json, and answers held against it."""

import gzip
import http.client
import json
import os
import re

from jsonschema import Draft202012Validator

from harness import ROOT

PATH = os.path.join(ROOT, "packaging", "openapi.json")
# Fields that say nothing of the resource, or are settled by `content`
GENERAL_FIELDS = frozenset(("connection", "content-length", "content-type", "date", "server",
                            "transfer-encoding"))
# What OpenAPI has no place for: a path that isn't there, and a method that a path doesn't have
NO_PATH, NO_METHOD = {"404": "NotFound"}, {"405": "MethodNotAllowed"}
ALWAYS = {"401": "Unauthorized", "500": "ServerError", "503": "Unavailable", "default": "Refused"}
# Of these the engine makes some itself, and answers for their form; the others are Codex's words
ENGINES_EVENTS = ("item.delta", "turn.steered")


def as_number(text):
    """A JSON number of whatever length."""
    return int(text) if len(text) < 20 else float(text)


def from_json(text):
    return json.loads(text if isinstance(text, str) else text.decode("utf-8"), parse_int=as_number)


class Contract:
    """The document: which answer may come on what, and what doesn't fit."""

    def __init__(self):
        with open(PATH, encoding="utf-8") as file:
            self.document = json.load(file)
        self.complaints = []            # of all answers so far, as text
        self._resolved = {}             # reference -> what it leads to, without references
        self._validators = {}           # id of a schema -> its validator
        self._right = set()             # hashes of what was found to fit
        self.paths = {path: self.resolve(item) for path, item in self.document["paths"].items()}
        self.components = self.resolve(self.document["components"])
        self._patterns = [(re.compile(re.sub(r"\\{\w+\\}", "[0-9]{1,15}", re.escape(path))), path)
                          for path in self.paths]
        self.events = {kind: self.resolve({"$ref": reference}) for kind, reference in
                       self.schema("Event")["discriminator"]["mapping"].items()}

    def resolve(self, value):
        """The value with what its references lead to in their places."""
        if isinstance(value, list):
            return [self.resolve(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" not in value:
            return {key: self.resolve(item) for key, item in value.items()}
        reference = value["$ref"]
        if reference not in self._resolved:
            target = self.document
            for name in reference[len("#/"):].split("/"):
                target = target[name]
            self._resolved[reference] = self.resolve(target)
        return self._resolved[reference]

    def schema(self, name):
        return self.components["schemas"][name]

    def problems(self, schema, value):
        """What of the value doesn't fit the schema, as text."""
        validator = self._validators.get(id(schema))
        if validator is None:
            validator = self._validators[id(schema)] = Draft202012Validator(schema)
        return ["%s: %s" % (error.json_path, error.message[:1000])
                for error in validator.iter_errors(value)]

    def problems_once(self, schema, value, read=lambda value: value):
        """The same of read(value), for what comes again and again: what fits is not tried anew."""
        key = hash((id(schema), value))
        if key in self._right:
            return []
        problems = self.problems(schema, read(value))
        if not problems:
            self._right.add(key)
        return problems

    def responses(self, method, target):
        """The responses that may come to the request, by status."""
        path = re.sub(r"\Ahttp://[^/?]*", "", target).partition("?")[0]
        known = next((name for pattern, name in self._patterns if pattern.fullmatch(path)), None)
        if known and method.lower() in self.paths[known]:
            return self.paths[known][method.lower()]["responses"]
        names = dict(ALWAYS, **(NO_METHOD if known else NO_PATH))
        return {status: self.components["responses"][name] for status, name in names.items()}

    def connection(self, *arguments, **keywords):
        """An HTTPConnection whose answers are checked."""
        return CheckedConnection(self, *arguments, **keywords)

    # An answer, as it comes

    def check_head(self, method, target, status, headers):
        """The response that it is, if there is one."""
        if method == "OPTIONS" and target == "*" and status == 204:
            return None
        responses = self.responses(method, target)
        response = responses.get(str(status), responses["default"])
        where = "%s %s: %d: " % (method, target[:200], status)
        if str(status) not in responses and status < 400:
            self.complaints.append(where + "this status isn't documented")
            return None
        documented = {name.lower(): (name, header)
                      for name, header in response.get("headers", {}).items()}
        for lower, (name, header) in documented.items():
            values = headers.get_all(name)
            if values:
                self.complaints += [where + "%s: %s" % (name, problem) for problem in
                                    self.problems_once(header["schema"], ", ".join(values))]
            elif header.get("required"):
                self.complaints.append(where + "%s is missing" % name)
        unknown = {name.lower() for name in headers} - set(documented) - GENERAL_FIELDS
        if unknown:
            self.complaints.append(where + "not documented: %s" % ", ".join(sorted(unknown)))
        kind = headers.get_content_type()
        if "content" in response and kind not in response["content"]:
            self.complaints.append(where + "the type %s isn't documented" % kind)
        return response

    def check_body(self, method, target, response, headers, body):
        """The whole body of an answer."""
        where = "%s %s: " % (method, target[:200])
        media = response.get("content", {}).get("application/json")
        if method == "HEAD" or "content" not in response:
            if body:
                self.complaints.append(where + "there is a body")
        elif media:
            if headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            self.complaints += [where + problem for problem in
                                self.problems_once(media["schema"], body, from_json)]

    def check_webhook(self, headers, body):
        """A request that the webhook's receiver got."""
        request = self.resolve(self.document["webhooks"]["turnFinished"]["post"])
        media = request["requestBody"]["content"]["application/json"]
        self.complaints += ["webhook: " + problem for problem in self.problems(
            media["schema"], json.loads(body.decode("utf-8")))]
        for parameter in request["parameters"]:
            self.complaints += ["webhook: %s: %s" % (parameter["name"], problem) for problem in
                                self.problems(parameter["schema"], headers.get(parameter["name"]))]

    def check_event(self, event):
        """An event of a stream: a harness.Event."""
        problems = self.problems_once(
            self.schema("ServerSentEvent"), (event.id, event.type, event.data),
            lambda value: dict(zip(("id", "event", "data"), value)))
        if event.type == "done":
            schema = self.schema("Done")
        elif event.type in ENGINES_EVENTS or '"code":' in event.data:
            schema = self.events.get(event.type)
        else:
            schema = None
        if schema:
            problems += self.problems_once(schema, event.data, from_json)
        self.complaints += ["event %s %s: %s" % (event.id, event.type, problem)
                            for problem in problems]


class CheckedResponse(http.client.HTTPResponse):
    """An answer that is held against the contract while it is read."""

    def __init__(self, contract, target, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self._contract = contract
        self._request = (keywords.get("method"), target)
        self._response = None

    def begin(self):
        super().begin()
        self._response = self._contract.check_head(*self._request, self.status, self.headers)

    def read(self, amt=None):
        body = super().read(amt)
        if amt is None and self._response:
            self._contract.check_body(*self._request, self._response, self.headers, body)
        self._response = None               # what comes now isn't the whole body
        return body


class CheckedConnection(http.client.HTTPConnection):
    """A connection whose answers are held against the contract."""

    def __init__(self, contract, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self._contract = contract

    def putrequest(self, method, url, *arguments, **keywords):
        self.response_class = lambda *given, **named: CheckedResponse(
            self._contract, url, *given, **named)
        super().putrequest(method, url, *arguments, **keywords)
