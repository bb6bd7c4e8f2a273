"""A stand-in for the Codex CLI: a real process that behaves as `codex exec` does, or misbehaves.

It is started in place of Codex. With an ordinary prompt on stdin it prints the events of a turn of
one message ("You said: ...") and keeps a rollout that can be resumed. What differs between versions
and matters here (unknown ids, SIGINT, a missing --cd, --image after `resume`) goes by its version:
the variable STAND_IN_CODEX_VERSION, else the file $CODEX_HOME/stand_in_version, else 0.169.0.
Stricter than Codex: a prompt is taken from stdin only, and --json or --experimental-json is needed.

Scripts. {"stand_in": [STEP, ...]} as the prompt, or in the file $CODEX_HOME/stand_in.json (then
stdin is not read unless a step reads it), replaces the ordinary turn. The steps run in order; then
the process exits with 0, or as the last replay did. Each step is an object with one key:

stdout
  {"replay": "0.169.0/turn1"}  stdout and stderr of codex-runs/, byte for byte; its thread gets a
                               rollout; its exit status or signal is used when the steps end
  {"thread": "resume"}         thread.started and the rollout: of the resumed thread, else of a new
                               one; an unknown id as in this version. Also "new", or any id
  {"event": {...}}             that event, compact, `type` first
  {"line": "text"}             the text and a line feed
  {"raw_base64": "..."}        these bytes
  {"bytes": {"n": N, "prefix": "", "suffix": ""}}   N times `x`, nothing else added
  {"big": {"size": N, "type": "item.completed"}}    one event whose text has N characters
  {"count": {"n": N, "size": 200, "pause": 0.0}}    N messages of about `size` bytes, whose texts
                               begin with 0, 1, 2...; `pause` seconds after each
  {"complete": true}           turn.completed with usage (or {"complete": {the usage}})
  {"fail": "message"}          error, turn.failed, exit 1
  {"close_stdout": true}       closes it (what is printed later goes nowhere)
stderr and rollout
  {"stderr": "text"}  {"stderr_bytes": N}  {"rollout_line": "text"} (the thread's, after "thread")
time and files
  {"sleep": seconds} (at most 120)  {"touch": "path"}  {"read_stdin": true}
  {"wait_for": "path"}         until it exists; exit 97 after 120 s or when the parent is gone
ending
  {"exit": N}  {"kill": "SIGKILL"} (itself)  {"ignore": ["SIGINT", "SIGTERM"]}
  {"on_sigint_print": {...}}   an event to print on SIGINT, before it exits
processes (the pidfile, an absolute path, gets a line from each; stdin is /dev/null)
  {"spawn": {"argv": [...], "stdout": "inherit" or "null" (stderr too), "session": false,
             "double_fork": false (an orphan at once), "clean_env": false (empty environment),
             "ignore": [signals], "pidfile": "path"}}   goes on when it runs
  {"spawn_forks": {"n": N, "seconds": S, "pidfile": "path", "stdout": "null", ...as spawn}}
                               a chain: each process forks the next and exits, up to N (at most
                               2000) within S (at most 20) seconds; then none is left

A script that can't be run (an unknown step) says so on stderr and exits 98, before its first step
if that can be seen. Writing to a closed stdout exits 101, as Codex's panic does. SIGINT adds
`turn_aborted` to the rollout and exits 1 (0 below 0.100); SIGTERM kills.

app-server. `stand_in_codex [--config KEY=VALUE]... app-server` speaks JSON-RPC over stdio as Codex
does, for one thread and one turn after the other, until stdin ends. With an ordinary prompt a turn
is that one message, word by word. Below 0.100 it knows no turn/steer, never answers a second
turn/interrupt, prints `codex/event/` too, and with a turn in progress goes on when stdin ends.

A script in the prompt runs as the turn: its "app_server" steps, or those of "stand_in" where it has
none; so one prompt can have both, for an engine that takes the other way. Then the turn goes on
until a step ends it. {"event": {...}}, {"count": ...} and {"complete": true} become notifications,
{"fail": "message"} ends the turn, {"thread": ...} does nothing, and there are

  {"replay": "0.98.0/words"}   what Codex printed for a turn, from app-server-runs/, with the ids of
                               this thread and turn
  {"notify": {"method": ..., "params": {...}}}      with the thread's and the turn's id
  {"say": "text"}  {"begin": "text"}                a message word by word; one that never completes
  {"deltas": {"n": N, "size": S, "pause": 0.0}}     a message of N deltas of S characters, one
                               every `pause` seconds; they begin with 0, 1, 2..., or with "stamp":
                               true with the time.monotonic() at which they were made
  {"ask": {"method": ..., "params": {...}}}         a question; goes on when it is answered
  {"wait_for_steer": true}     until a message has cut in; then says "You said: ..." of it

The file $CODEX_HOME/stand_in_app_server.json says what is done when a request comes, in place of
the answer: {METHOD: [STEP, ...]}; no steps, no answer. All steps of above may be used, and

  {"answer": true}             as always. Or {"answer": {"result": ...}}, {"answer": {"error": ...}}
  {"answer_big": N}            as always, but with N bytes more on the line
  {"answer_half": true}        its first half and no line feed
  {"answer_later": true}       after the next answer

Calls are recorded in $CODEX_HOME/stand_in.log, a JSON object a line: at every start `argv`, and but
for --version `pid`, `cwd`, `env`, `umask`, `time`; when a prompt was read `pid` and `prompt` (above 10,000 characters
`prompt_length` and `prompt_sha256` instead); what an app-server reads as `pid` and `read`.
"""
import binascii
import json
import os
import signal
import sys
import time

RUNS = os.path.join(os.path.dirname(os.path.realpath(__file__)), "codex-runs")
PROMPT_LIMIT = 1048576  # characters
FLAGS = ("--json", "--experimental-json", "--skip-git-repo-check")
VALUED = ("--model", "--sandbox", "--cd", "--output-schema", "--config", "-c", "--add-dir")
SANDBOXES = ("read-only", "workspace-write", "danger-full-access")


# Output: os.write alone, so that every event leaves at once and a signal handler may print too

def write_all(fd, data):
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def write_many(fd, size, block=b"x" * 65536):
    while size > 0:
        write_all(fd, block[:size])
        size -= len(block)


def write_err(text):
    try:
        write_all(2, text.encode("utf-8", "replace"))
    except OSError:
        pass


def append(path, text):
    """Append in one write, so that processes at the same time don't mix their lines."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, text.encode("utf-8", "backslashreplace"))
    os.close(fd)


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def print_event(event):
    if "type" in event:
        event = dict({"type": event["type"]}, **event)
    write_all(1, (compact(event) + "\n").encode("utf-8", "backslashreplace"))


def leave(status):
    """End now: with that exit status, or by that signal if it is negative."""
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def fail(message, status=1):
    write_err(message + "\n")
    leave(status)


# Command line

def usage_error(message, usage="codex exec [OPTIONS] [PROMPT] [COMMAND]"):
    fail("error: %s\n\nUsage: %s\n\nFor more information, try '--help'." % (message, usage), 2)


def parse(words, version):
    """Return the options of `exec` as a dictionary of lists, `resume` among them.

    As in Codex, --image takes every following word that is no option, `resume ID` too.
    """
    options = {name: [] for name in FLAGS + VALUED + ("--image", "resume")}
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        values = [value] if equals else []
        if options["resume"] and (name != "--image" or version < (0, 98)):
            usage_error("unexpected argument '%s' found" % name,
                        "codex exec resume [OPTIONS] [SESSION_ID] [PROMPT]")
        elif word in FLAGS:
            values = [True]
        elif name in VALUED or name == "--image" or word == "resume":
            while words and not words[0].startswith("-") and (not values or word == "--image"):
                values.append(words.pop(0))
            if not values:
                usage_error("a value is required for '%s' but none was supplied" % name)
        else:
            usage_error("unexpected argument '%s' found" % name)
        options[name] += values
    for value in options["--sandbox"]:
        if value not in SANDBOXES:
            usage_error("invalid value '%s' for '--sandbox <SANDBOX_MODE>'" % value)
    if not (options["--json"] or options["--experimental-json"]):
        usage_error("this stand-in prints events only: --json or --experimental-json is missing")
    return options


# Threads and rollouts

def new_thread_id():
    """A UUIDv7: 48 bits of milliseconds, then random ones."""
    number = int.from_bytes(os.urandom(10), "big") | int(time.time() * 1000) << 80
    number = number & ~(0xf << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    text = "%032x" % number
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def utc_now():
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + ".%03dZ" % (now % 1 * 1000)


class Run:
    """One run of `codex exec`: what its steps share."""

    def __init__(self, home, version, options):
        self.home = home
        self.version = version
        self.numbers = version_numbers(version)
        self.resumed = options["resume"][0] if options["resume"] else None
        self.directory = options["--cd"][-1] if options["--cd"] else os.getcwd()
        self.prompt = None
        self.rollout = None
        self.items = 0
        self.status = 0
        self.last_event = None
        self.parent = os.getppid()

    def emit(self, event):
        print_event(event)

    def read_prompt(self):
        data = b""
        while True:
            block = os.read(0, 1 << 20)
            if not block:
                break
            data += block
        self.take_prompt(data.decode("utf-8", "replace"))

    def take_prompt(self, prompt):
        self.prompt, data = prompt, prompt.encode("utf-8", "replace")
        entry = {"pid": os.getpid(), "prompt": self.prompt}
        if len(self.prompt) > 10000:
            import hashlib
            entry = {"pid": os.getpid(), "prompt_length": len(self.prompt),
                     "prompt_sha256": hashlib.sha256(data).hexdigest()}
        append(os.path.join(self.home, "stand_in.log"), json.dumps(entry) + "\n")

    def find_rollout(self, thread_id):
        """The path of the thread's rollout, whatever day it is of, or None."""
        for folder, _, names in os.walk(os.path.join(self.home, "sessions")):
            for name in names:
                if name.startswith("rollout-") and name.endswith("-%s.jsonl" % thread_id):
                    return os.path.join(folder, name)
        return None

    def thread_to_resume(self):
        """The id that this turn's thread has; ends the process as this version does without one."""
        if self.resumed and not self.find_rollout(self.resumed):
            if self.numbers >= (0, 100):
                fail("Error: thread/resume: thread/resume failed: no rollout found for thread id "
                     "%s (code -32600)" % self.resumed)
            return new_thread_id()
        return self.resumed or new_thread_id()

    def open_rollout(self, thread_id):
        """Append this turn's beginning to the thread's rollout, which is created if need be."""
        self.rollout = self.find_rollout(thread_id)
        if not self.rollout:
            folder = os.path.join(self.home, "sessions", time.strftime("%Y/%m/%d"))
            os.makedirs(folder, exist_ok=True)
            name = time.strftime("rollout-%Y-%m-%dT%H-%M-%S-") + thread_id + ".jsonl"
            self.rollout = os.path.join(folder, name)
            self.record("session_meta", id=thread_id, timestamp=utc_now(), cwd=self.directory,
                        originator="codex_exec", cli_version=self.version, source="exec")
        self.record("event_msg", type="task_started")
        if self.prompt is not None:
            self.record_message("user", "input_text", self.prompt)

    def record(self, kind, **payload):
        if self.rollout:
            line = compact({"timestamp": utc_now(), "type": kind, "payload": payload})
            append(self.rollout, line + "\n")

    def record_message(self, role, content_type, text):
        self.record("response_item", type="message", role=role,
                    content=[{"type": content_type, "text": text}])
        self.record("event_msg", type="user_message" if role == "user" else "agent_message",
                    message=text)

    def message(self, text):
        item = {"id": "item_%d" % self.items, "type": "agent_message", "text": text}
        self.items += 1
        return {"type": "item.completed", "item": item}

    def usage(self):
        if self.numbers < (0, 100):
            return {"input_tokens": 137, "cached_input_tokens": 7, "output_tokens": 11}
        return {"input_tokens": 137, "cached_input_tokens": 7, "cache_write_input_tokens": 0,
                "output_tokens": 11, "reasoning_output_tokens": 3}

    def on_sigint(self, signum, frame):
        if self.last_event:
            print_event(self.last_event)
        self.record("event_msg", type="turn_aborted", reason="interrupted")
        leave(1 if self.numbers >= (0, 100) else 0)


def ordinary_turn(run):
    write_err("Reading prompt from stdin...\n")
    if not run.prompt.strip():
        fail("No prompt provided via stdin.")
    thread_id = run.thread_to_resume()
    print_event({"type": "thread.started", "thread_id": thread_id})
    if len(run.prompt) > PROMPT_LIMIT and run.numbers >= (0, 100):
        fail("Error: the prompt exceeds the limit of %d characters" % PROMPT_LIMIT)
    run.open_rollout(thread_id)
    print_event({"type": "turn.started"})
    text = "You said: " + run.prompt[:200]
    run.record_message("assistant", "output_text", text)
    print_event(run.message(text))
    run.record("event_msg", type="task_complete", last_agent_message=text)
    print_event({"type": "turn.completed", "usage": run.usage()})


# Steps, each a function of the run and of what the script gives

def replay(run, name):
    def recorded(ending):
        with open(os.path.join(RUNS, name + ending), "rb") as file:
            return file.read()
    lines = recorded(".stdout.jsonl")
    write_err(recorded(".stderr.txt").decode())
    write_all(1, lines)
    if lines.startswith(b'{"type":"thread.started"'):
        run.open_rollout(json.loads(lines.split(b"\n", 1)[0])["thread_id"])
    run.status = json.loads(recorded(".run.json"))["exit_status"]


def thread(run, which):
    ids = {"new": new_thread_id, "resume": run.thread_to_resume}
    thread_id = ids[which]() if which in ids else which
    print_event({"type": "thread.started", "thread_id": thread_id})
    run.open_rollout(thread_id)


def many_bytes(run, spec):
    write_all(1, spec.get("prefix", "").encode())
    write_many(1, spec["n"])
    write_all(1, spec.get("suffix", "").encode())


def big(run, spec):
    kind = spec.get("type", "item.completed")
    event = {"type": kind, "text": ""}
    if kind.startswith("item."):
        event = dict(run.message(""), type=kind)
    head, tail = compact(event).split('"text":""')
    many_bytes(run, {"n": spec["size"], "prefix": head + '"text":"', "suffix": '"' + tail + "\n"})


def count(run, spec):
    for number in range(spec["n"]):
        text = str(number)
        padding = spec.get("size", 200) - len(compact(run.message(text))) - 2
        run.items -= 1  # the same item again, now with its padding
        run.emit(run.message(text + " " + "x" * padding))
        time.sleep(spec.get("pause", 0))


def complete(run, usage):
    run.emit({"type": "turn.completed", "usage": run.usage() if usage is True else usage})


def fail_turn(run, message):
    print_event({"type": "error", "message": message})
    print_event({"type": "turn.failed", "error": {"message": message}})
    leave(1)


def read_stdin(run, _):
    write_err("Reading prompt from stdin...\n")
    run.read_prompt()


def close_stdout(run, _):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # not os.close: the next open() would be fd 1


def wait_for(run, path):
    end = time.monotonic() + 120
    while not os.path.exists(path):
        if time.monotonic() > end or os.getppid() != run.parent:
            fail("stand_in_codex: waited in vain for %s" % path, 97)
        time.sleep(0.005)


def kill(run, name):
    os.kill(os.getpid(), getattr(signal, name))


def ignore(run, names):
    for name in names:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def on_sigint_print(run, event):
    run.last_event = event


def start_child(run, spec, work):
    """Fork a process, set up as `spec` says, that does `work(fd)`; return when `fd` is closed."""
    ready, fd = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if spec.get("session"):
                os.setsid()
            if spec.get("double_fork") and os.fork():
                os._exit(0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            ignore(run, spec.get("ignore", ()))
            null = os.open(os.devnull, os.O_RDWR)
            for target in (0, 1, 2) if spec.get("stdout") == "null" else (0,):
                os.dup2(null, target)
            note_pid(spec)
            if os.path.isdir(run.directory):
                os.chdir(run.directory)
            work(fd)
        except BaseException as error:
            os.write(fd, repr(error).encode())
        finally:
            os._exit(98)
    os.close(fd)
    if spec.get("double_fork"):
        os.waitpid(pid, 0)
    problem = os.read(ready, 1000)
    os.close(ready)
    if problem:
        fail("stand_in_codex: can't start %s: %s" % (spec.get("argv"), problem.decode()), 98)


def note_pid(spec):
    if "pidfile" in spec:
        append(spec["pidfile"], "%d\n" % os.getpid())


def spawn(run, spec):
    env = {} if spec.get("clean_env") else os.environ
    start_child(run, spec, lambda fd: os.execvpe(spec["argv"][0], spec["argv"], env))


def spawn_forks(run, spec):
    number, seconds = min(spec["n"], 2000), min(spec["seconds"], 20)

    def chain(fd):
        os.close(fd)
        end = time.monotonic() + seconds
        for _ in range(1, number):
            time.sleep(seconds / number)
            if time.monotonic() > end or os.fork():
                break
            note_pid(spec)
        os._exit(0)
    start_child(run, dict({"stdout": "null"}, **spec), chain)


STEPS = {
    "replay": replay,
    "thread": thread,
    "event": lambda run, event: run.emit(event),
    "line": lambda run, text: write_all(1, (text + "\n").encode()),
    "raw_base64": lambda run, text: write_all(1, binascii.a2b_base64(text)),
    "bytes": many_bytes,
    "big": big,
    "count": count,
    "complete": complete,
    "fail": fail_turn,
    "close_stdout": close_stdout,
    "stderr": lambda run, text: write_err(text + "\n"),
    "stderr_bytes": lambda run, size: write_many(2, size, (b"x" * 99 + b"\n") * 600),
    "rollout_line": lambda run, text: append(run.rollout, text + "\n"),
    "sleep": lambda run, seconds: time.sleep(min(seconds, 120)),
    "touch": lambda run, path: append(path, ""),
    "read_stdin": read_stdin,
    "wait_for": wait_for,
    "exit": lambda run, status: leave(status),
    "kill": kill,
    "ignore": ignore,
    "on_sigint_print": on_sigint_print,
    "spawn": spawn,
    "spawn_forks": spawn_forks,
}


def script_in(text, *names):
    """The steps in that text, by the first of those names that it has, or None if by none."""
    try:
        value = json.loads(text) if text.lstrip().startswith("{") else None
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    return next((value[name] for name in names if name in value), None)


def run_steps(run, steps, known=STEPS):
    for step in steps:
        if not isinstance(step, dict) or len(step) != 1 or not set(step) <= set(known):
            fail("stand_in_codex: unknown step: %s" % json.dumps(step), 98)
    for step in steps:
        for name, value in step.items():
            try:
                known[name](run, value)
            except BrokenPipeError:
                raise
            except Exception as error:
                fail("stand_in_codex: step %s: %r" % (json.dumps(step)[:1000], error), 98)


# The process

def version_numbers(version):
    return tuple(int(number) for number in version.split(".")[:2])


def read_text(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None


def record_call(home):
    umask = os.umask(0)
    os.umask(umask)
    call = {"argv": sys.argv[1:], "pid": os.getpid(), "cwd": os.getcwd(), "env": dict(os.environ),
            "umask": umask, "time": time.time()}
    append(os.path.join(home, "stand_in.log"), json.dumps(call) + "\n")


def main():
    home = os.environ.get("CODEX_HOME") or os.path.expanduser("~/.codex")
    if "CODEX_HOME" not in os.environ:
        os.makedirs(home, exist_ok=True)
    elif not os.path.isdir(home):
        fail("Error: CODEX_HOME points to \"%s\", but that path does not exist" % home)
    record_call(home)
    version = (os.environ.get("STAND_IN_CODEX_VERSION")
               or read_text(os.path.join(home, "stand_in_version")) or "0.169.0").strip()
    if sys.argv[-1] == "app-server":
        from stand_in_app_server import AppServer       # which takes longer to import
        words = sys.argv[1:-1] + ["--json"]
        AppServer(home, version, parse(words, version_numbers(version))).serve()
    if sys.argv[1:2] != ["exec"]:
        usage_error("this stand-in knows only --version, exec and app-server",
                    "codex [OPTIONS] [COMMAND]")
    run = Run(home, version, parse(sys.argv[2:], version_numbers(version)))
    signal.signal(signal.SIGINT, run.on_sigint)
    if not os.path.isdir(run.directory) and run.numbers >= (0, 98):
        fail("Error: No such file or directory (os error 2)")
    script = read_text(os.path.join(home, "stand_in.json"))
    if script is None:
        run.read_prompt()
        script = run.prompt
    steps = script_in(script, "stand_in")
    if steps is not None:
        run_steps(run, steps)
    elif run.prompt is None:
        fail("stand_in_codex: stand_in.json is no script", 98)
    else:
        ordinary_turn(run)
    leave(run.status)


def run_as_codex():
    try:
        main()
    except BrokenPipeError:
        fail("thread 'main' panicked: failed printing to stdout: Broken pipe (os error 32)", 101)
