"""What stand_in_codex.py does as `codex app-server`."""
import json
import os
import queue
import re
import signal
import sys
import threading
import time

from stand_in_codex import (PROMPT_LIMIT, STEPS, Run, append, compact, fail, leave, new_thread_id,
                            read_text, run_steps, script_in, write_all)

APP_SERVER_RUNS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "app-server-runs")


class TurnOver(BaseException):
    """The turn whose step wants to print has ended."""


class Turn:
    """What the steps of an app-server's turn share with it: the turn's part in a Run."""

    def __init__(self, server, turn_id):
        self.server = server
        self.id = turn_id
        self.ended = threading.Lock()       # taken by whoever ends it
        self.interrupted = False
        self.steers = queue.Queue()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __getattr__(self, name):
        return getattr(self.server, name)

    @property
    def over(self):
        return self.ended.locked()

    def about(self, **more):
        return dict({"id": self.id, "items": [], "status": "inProgress", "error": None}, **more)

    def notify(self, method, **params):
        if self.over:
            raise TurnOver
        ids = {"threadId": self.server.thread_id}
        if method != "turn/started":
            ids["turnId"] = self.id
        self.server.notify(method, dict(ids, **params))

    def run(self):
        try:
            self.notify("turn/started", turn=self.about())
            steps = script_in(self.prompt, "app_server", "stand_in")
            if steps is None:
                self.say("You said: " + self.prompt[:200])
                self.emit({"type": "turn.completed", "usage": self.usage()})
            else:
                run_steps(self, steps, TURN_STEPS)
        except TurnOver:
            pass
        except BrokenPipeError:
            fail("the app-server's stdout is closed", 101)

    def say(self, text, has_end=True):
        self.say_pieces(re.findall(r"\s*\S+|\s+", text), has_end)

    def say_pieces(self, pieces, has_end=True, pause=0.0):
        item = {"type": "agentMessage", "id": "msg_%s" % os.urandom(16).hex(), "text": ""}
        self.notify("item/started", item=item)
        said, due = [], time.monotonic()
        for piece in pieces:
            self.notify("item/agentMessage/delta", itemId=item["id"], delta=piece)
            said.append(piece)
            due += pause
            time.sleep(max(0, due - time.monotonic()))
        if has_end:
            text = "".join(said)
            self.record_message("assistant", "output_text", text)
            self.notify("item/completed", item=dict(item, text=text))

    def emit(self, event):
        """An event of exec's as notifications."""
        kind = event["type"]
        if kind in ("item.started", "item.completed"):
            item = {camel(key): value for key, value in event["item"].items()}
            for key in {"type", "status"} & set(item):
                item[key] = camel(item[key])
            item.setdefault("summary", [item.get("text")])
            self.notify(kind.replace(".", "/"), item=item)
        elif kind == "turn.completed":
            total = {camel(key): value for key, value in event["usage"].items()}
            self.notify("thread/tokenUsage/updated", tokenUsage={
                "total": dict(total, totalTokens=0), "last": total, "modelContextWindow": 1})
            self.end("completed")
        elif kind == "error":
            self.notify("error", error={"message": event["message"], "additionalDetails": None},
                        willRetry=False)
        elif kind == "turn.failed":
            self.end("failed", {"message": event["error"]["message"]})

    def end(self, status, error=None):
        if not self.ended.acquire(blocking=False):
            return
        endings = {"completed": "task_complete", "interrupted": "turn_aborted"}
        self.record("event_msg", type=endings.get(status, "error"))
        self.server.notify("turn/completed", {
            "threadId": self.thread_id, "turn": self.about(status=status, error=error)})


def camel(name):
    return re.sub("_(.)", lambda match: match.group(1).upper(), name)


class AppServer(Run):
    """The main thread reads requests and answers them, and each turn has a thread of its own."""

    def __init__(self, home, version, options):
        super().__init__(home, version, options)
        self.behaviour = json.loads(
            read_text(os.path.join(home, "stand_in_app_server.json")) or "{}")
        self.request = None
        self.thread_id = None
        self.turn = None
        self.turns = 0
        self.later = []                     # answers that the next one goes before
        self.replies = queue.Queue()        # to questions
        self.lock = threading.Lock()        # a line at a time

    def serve(self):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for line in sys.stdin.buffer:
            message = json.loads(line)
            append(os.path.join(self.home, "stand_in.log"),
                   compact({"pid": os.getpid(), "read": message})[:100000] + "\n")
            if "method" not in message:
                self.replies.put(message)
            elif "id" in message:
                self.request = message
                run_steps(self, self.behaviour.get(message["method"], [{"answer": True}]),
                          REQUEST_STEPS)
        if self.turn and not self.turn.over and self.numbers < (0, 100):
            self.turn.thread.join()
        leave(0)

    def print(self, message):
        with self.lock:
            write_all(1, (compact(message) + "\n").encode("utf-8", "backslashreplace"))

    def notify(self, method, params):
        if self.numbers < (0, 100):
            self.print({"method": "codex/event/" + method.replace("/", "_"), "params": {
                "id": "", "msg": params, "conversationId": self.thread_id}})
            self.print({"method": method, "params": params})
        else:
            self.print({"method": method, "params": params,
                        "emittedAtMs": int(time.time() * 1000)})

    def reply(self, what):
        """Print an answer to the request, and those that waited for it."""
        number = self.request["id"]
        self.print(dict({"id": number}, **what) if "result" in what else dict(what, id=number))
        while self.later:
            self.print(self.later.pop())

    def act(self):
        """Do what is asked; return the answer (None: there is none) and what is to follow it."""
        method, params = self.request["method"], self.request.get("params", {})
        act = self.ACTS.get(method)
        if not act or method == "turn/steer" and self.numbers < (0, 100):
            return refusal("Invalid request: unknown variant `%s`, expected one of `initialize`"
                           % method)
        return act(self, params)

    def initialize(self, params):
        return {"result": {"userAgent": "%s/%s (a stand-in)" % (
            params["clientInfo"]["name"], self.version)}}, None

    def login(self, params):
        return {"result": {"type": params["type"]}}, lambda: self.notify(
            "account/login/completed", {"loginId": None, "success": True, "error": None})

    def read_config(self, params):
        return {"result": {"config": {"model": None, "model_provider": None, "profile": None}}}, None

    def thread_answer(self, params):
        self.directory = params.get("cwd", self.directory)
        about = {"id": self.thread_id, "preview": "", "cliVersion": self.version, "turns": []}
        return {"result": {"thread": about, "cwd": self.directory}}, None

    def start_thread(self, params):
        self.thread_id = new_thread_id()
        return self.thread_answer(params)

    def resume_thread(self, params):
        if params.get("excludeTurns") and (0, 140) <= self.numbers < (0, 151):
            return refusal("thread/resume.excludeTurns requires experimentalApi capability")
        if not self.find_rollout(params["threadId"]):
            return refusal("no rollout found for thread id " + params["threadId"])
        self.thread_id = params["threadId"]
        return self.thread_answer(params)

    def start_turn(self, params):
        text = text_of(params)
        if params["threadId"] != self.thread_id:
            return refusal("thread not found: " + params["threadId"])
        if len(text) > PROMPT_LIMIT and self.numbers >= (0, 100):
            return refusal("Input exceeds the maximum length of %d characters." % PROMPT_LIMIT,
                           -32602)
        self.take_prompt(text)
        self.open_rollout(self.thread_id)
        self.turn = Turn(self, str(self.turns) if self.numbers < (0, 100) else new_thread_id())
        self.turns += 1
        return {"result": {"turn": self.turn.about()}}, self.turn.thread.start

    def steer(self, params):
        if not self.turn or self.turn.over:
            return refusal("no active turn to steer")
        if params["expectedTurnId"] != self.turn.id:
            return refusal("expected active turn id `%s` but found `%s`" % (
                params["expectedTurnId"], self.turn.id))
        self.record_message("user", "input_text", text_of(params))
        return {"result": {"turnId": self.turn.id}}, lambda: self.turn.steers.put(text_of(params))

    def interrupt(self, params):
        turn = self.turn
        if not turn or turn.over or turn.id != params["turnId"]:
            return None if self.numbers < (0, 100) else {"result": {}}, None
        if turn.interrupted and self.numbers < (0, 100):
            return None, None
        turn.interrupted = True
        return {"result": {}}, lambda: turn.end("interrupted")

    ACTS = {"initialize": initialize, "account/login/start": login, "config/read": read_config,
            "thread/start": start_thread, "thread/resume": resume_thread, "turn/start": start_turn,
            "turn/steer": steer, "turn/interrupt": interrupt}


def refusal(message, code=-32600):
    return {"error": {"code": code, "message": message}}, None


def text_of(params):
    return "\n".join(part["text"] for part in params["input"] if part["type"] == "text")


# Steps of an app-server: a function of it and of what the script gives, when a request came...

def answer(server, what):
    reply, follow = server.act() if what is True else (what, None)
    if reply:
        server.reply(reply)
    if follow:
        follow()


def answer_big(server, size):
    reply, follow = server.act()
    reply["result"].get("thread", reply["result"])["turns"] = ["x" * size]
    server.reply(reply)
    if follow:
        follow()


def answer_half(server, _):
    line = compact(dict({"id": server.request["id"]}, **server.act()[0])).encode()
    write_all(1, line[:len(line) // 2])


def answer_later(server, _):
    reply, follow = server.act()
    server.later.append(dict({"id": server.request["id"]}, **reply))
    if follow:
        follow()


# ...or of its turn

def replay_turn(turn, name):
    with open(os.path.join(APP_SERVER_RUNS, name + ".jsonl"), encoding="utf-8") as file:
        lines = file.read().split("\n")[:-1]
    started = next(number for number, line in enumerate(lines)
                   if line.startswith('< {"method":"turn/started"'))
    recorded = json.loads(lines[started][2:])["params"]
    ids = {recorded["threadId"]: turn.server.thread_id, recorded["turn"]["id"]: turn.id}
    for line in lines[started + 1:]:
        message = json.loads(line[2:])
        if not line.startswith('< {"method"'):
            continue
        params = message["params"]
        for key in {"threadId", "turnId"} & set(params):
            params[key] = ids.get(params[key], params[key])
        if message["method"] == "turn/completed":
            params["turn"]["id"] = turn.id
            turn.ended.acquire(blocking=False)
        turn.server.print(message)


def ask(turn, question):
    number = "question-%s" % os.urandom(4).hex()
    turn.server.print(dict({"id": number}, **question))
    try:
        while turn.replies.get(timeout=120)["id"] != number:
            pass
    except queue.Empty:
        fail("stand_in_codex: a question was not answered", 97)


def deltas(turn, spec):
    size = spec.get("size", 8)
    begins = (("%.6f " % time.monotonic() if spec.get("stamp") else "%d " % number)
              for number in range(spec["n"]))
    turn.say_pieces((begin.ljust(size, "x")[:size] for begin in begins),
                    pause=spec.get("pause", 0))


def wait_for_steer(turn, _):
    try:
        turn.say("You said: " + turn.steers.get(timeout=120)[:200])
    except queue.Empty:
        fail("stand_in_codex: no message cut in", 97)


def fail_live_turn(turn, message):
    turn.emit({"type": "error", "message": message})
    turn.emit({"type": "turn.failed", "error": {"message": message}})


TURN_STEPS = dict(
    STEPS, replay=replay_turn, ask=ask, deltas=deltas, wait_for_steer=wait_for_steer,
    fail=fail_live_turn, thread=lambda turn, _: None,
    say=lambda turn, text: turn.say(text), begin=lambda turn, text: turn.say(text, has_end=False),
    notify=lambda turn, what: turn.notify(what["method"], **what.get("params", {})))
REQUEST_STEPS = dict(STEPS, answer=answer, answer_big=answer_big, answer_half=answer_half,
                     answer_later=answer_later)
