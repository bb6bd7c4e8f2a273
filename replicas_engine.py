#!/usr/bin/env python3
"""The Replicas Engine: drive the Codex CLI on a workspace over HTTP.

The way through
    socket -> WSGIServer (a thread a connection) -> WSGIRequestHandler (the connection) -> Answer
           -> Application: secret, Router, handler -> Response -> Answer: bytes out
    POST /codex/send -> CodexRunner.send -> Turn -> CodexRun (a process) -> TurnLog (a file)
    GET /codex/events: any number of EventStreams, each at its own place in that file

A turn is a log: a file that holds the turn's server-sent events just as they go out.  One thread
appends to it; every reader, the POST that started the turn included, copies it from wherever it
stands and waits for more.  Taking up a stream again, replaying one after a crash, a slow client and
ten clients are all that one case.  What else is known of a turn, and which thread is the current
one, is read from the logs.

Who owns which state
    Conversation the turn in progress, the queue, the logs and idempotency keys of the turns.
    CodexRunner  is one, and adds what is done to it.
    Turn         one message: its log, its deadlines, its ending.  It belongs to the runner and not
                 to the request that started it.
    CodexRun     one Codex process and its pipes; a driver, Exec or AppServer, tells what its lines
                 mean.  A turn has one, or another where that one doesn't take the message.
    TurnLog      one turn's file: events come from the turn's thread alone, the ending from whoever
                 finishes the log, and everybody reads it.
    WSGIServer   its connections.  It knows nothing of Codex, nor the Application of sockets.
On disk, see StateDirectory.  `kill -9` loses nothing that a client has seen; a power cut loses the
last second of a running turn at most, and no ending.

The threads, and what each may touch
    main            signals, systemd and orphans; starts the others and waits for news
    log             standard error, which may block
    accept          new connections; starts one of the next for each
    connection      a client's socket; calls the Application, and so everything that has a lock
    reserve         the same, when no thread can be started for a connection
    problems        each minute: tries out what may keep turns from going well, and warns of it
    recovery        at the start: the turns that an earlier engine did not end
    webhook         tells a URL of the turns that are over
    sync            has the disk hold the running turn's log, every second
    turn N          turn N, its CodexRun and its log
    stop turn N     waits until turn N is to be stopped, then its processes
    codex PID       waits for the exit of that process
    stop            the end of it all, when a signal asks for it

The locks: the conversation's, a log's Condition and the server's guard state, each said where it is
made; none is taken while another one is held, nor held across a yield, a socket, a file or a
process.  Others let one thread at a time do something: open the state directory, start a process or
look who is an orphan, ask Codex for its version, try again with an ending, ring an alarm.

Read it from below to see how it is used, from above to see what it is made of: a name is defined
above its use.  The sections: Files and JSON, Logging, Settings, Requests and responses, Routing and
secret, Events, Turn log, Event stream and results, Processes, Control groups, A turn's processes,
Rollouts, History, Codex, Turn options, Driving Codex: exec, The app-server's items, Driving Codex:
app-server, Runs of Codex, A turn's progress and its stop, Turn, State directory, Conversation,
Webhook, CodexRunner, Problems, Application, HTTP grammar, Connection and bodies, Answer, Request
handler, WSGI server, systemd, Check, Command line.

Where to add: an endpoint, Application's table; a flag of Codex, codex_arguments for every turn, or
TURN_OPTIONS and AppServer._open_thread for one; a setting, ENGINE_SETTINGS and Settings; a reason
for a turn to end, STOP_MESSAGES, and Progress.deadlines or who calls CodexRunner.stop; a limit of
the HTTP server, the constants of HTTP grammar.
"""

import codecs
import collections
import contextlib
import ctypes
import email.utils
import errno
import faulthandler
import fcntl
import functools
import hashlib
import heapq
import hmac
import io
import itertools
import json
import logging
import os
import pwd
import queue
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from http import HTTPStatus
from http.server import ThreadingHTTPServer

__version__ = "0.3.0"


# ---------------------------------------------------------------------------------------------
# Files and JSON
# ---------------------------------------------------------------------------------------------
# What every section may use: files that may be something else than they seem, searching them block
# by block, and JSON that came from somebody else.  Whoever writes into the state directory or into
# CODEX_HOME may be the agent, so nothing here waits for a FIFO, follows a device or trusts a type.

READ_SIZE = 256 * 1024                     # bytes read at once from a pipe or a file
BLOCK_SIZE = 64 * 1024                     # bytes of a rollout that are read at once


@functools.lru_cache(maxsize=8)             # without it: 10 % fewer requests at 16 connections
def timestamp_of(milliseconds):
    """ISO 8601 for milliseconds since 1970."""
    return "%s.%03dZ" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000)),
                         milliseconds % 1000)


TIMESTAMP = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z")


def timestamp(seconds=None):
    """`seconds` since 1970 (default: now) in ISO 8601, UTC, with milliseconds and Z."""
    return timestamp_of(int((time.time() if seconds is None else seconds) * 1000))


SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)     # the machine's, which pass


def words_of(error):
    """What an exception says, for somebody who doesn't know Python."""
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    if isinstance(error, UnicodeDecodeError):
        return "byte %d is not UTF-8" % error.start
    if isinstance(error, (LookupError, TypeError, AttributeError)):     # a fault of ours
        return "%s: %s" % (type(error).__name__, error)
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    # What the ssl module and socket.create_server put around it
    return re.sub(r"^\[.*?\] | \(_ssl\.c:\d+\)$| \(while attempting .*", "", words)


def readable(fd, seconds=0):
    """Whether a read from the descriptor `fd`, or a file with one, would not block: now, or within
    so many seconds."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def write_all(fd, data):
    """Write all of `data`, however long it takes, whether or not `fd` blocks.  Raises OSError."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while data:
        try:
            data = data[os.write(fd, data):]
        except BlockingIOError:
            poll.poll()


def boot_id():
    """The id of the machine's boot, which changes with each (random(4)), or None."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def do_all(*steps):
    """Call each, in this order, whatever goes wrong in those before it; the last exception is
    raised."""
    with contextlib.ExitStack() as stack:   # which calls the last one first
        for step in reversed(steps):
            stack.callback(step)


def start_thread(name, target, *args):
    """Start a daemon thread, and return it."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    thread.start()
    return thread


def _snake(name):
    """snake_case for camelCase."""
    return re.sub("[A-Z]", lambda match: "_" + match.group().lower(), name)


PR_SET_DUMPABLE, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 4, 47, 4    # <linux/prctl.h>


def prctl(option, value):
    """prctl(2); False where the system has no such option."""
    try:
        return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0
    except (OSError, AttributeError):
        return False


def shut_out_others():
    """Let no other process of this user read our memory and environment, where the secret is.

    Under systemd that is so from the first moment, since the unit gives a capability that is good
    for nothing else: who hasn't got it may not look (ptrace(2)).  No child shall inherit it.
    """
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    prctl(PR_SET_DUMPABLE, 0)


# Of a path that leads nowhere, or to nothing of ours.  Other errors say nothing of what is there.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG)


def list_folder(folder):
    """The names in a folder; none if there is no such folder.  Raises OSError."""
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise


def is_regular(path):
    """Whether there is a regular file.  Raises OSError."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise


def open_regular(path, buffering=-1):
    """Open a regular file to read from it, whatever else may lie there.  Raises OSError, and
    ValueError if it is something else."""
    with contextlib.ExitStack() as stack:   # which closes it if it can't be looked at, either
        file = stack.enter_context(open(
            path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("%s is not a regular file" % path)
        stack.pop_all()
    return file


def try_flock(file, operation):
    """Whether the lock of an open file, flock(2), is ours now."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, operation | fcntl.LOCK_NB)
        return True
    return False


def flock_owner(file):
    """The pid of who has locked an open file with flock(2), or None (proc(5), locks)."""
    status = os.fstat(file.fileno())
    name = "%02x:%02x:%d" % (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    with contextlib.suppress(OSError), open("/proc/locks", encoding="ascii") as locks:
        for fields in map(str.split, locks):
            if fields[1] == "FLOCK" and fields[5] == name:
                return int(fields[4])
    return None


def delete_folder(path):
    """Delete a folder and what is in it, as far as that is possible."""
    with contextlib.suppress(RecursionError):           # by folders in folders, before Python 3.13
        shutil.rmtree(path, ignore_errors=True)


def write_synced(path, data):
    """Have the disk hold a file with `data`, for our user alone.  Raises OSError."""
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path):
    """Have the disk hold which files are in a directory.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def find_first(read, needle, begin):
    """Where `needle` first stands from `begin` on in what `read(offset, size)` gives, or -1; the
    end is where that gives b""."""
    window = b""
    while True:
        block = read(begin, BLOCK_SIZE)
        if not block:
            return -1
        window += block
        begin += len(block)
        found = window.find(needle)
        if found >= 0:
            return begin - len(window) + found
        window = window[max(0, len(window) - len(needle) + 1):]


def reader_of(file, base=0):
    """read(offset, size) for find_first and find_last, with offsets from `base` on."""
    return lambda offset, size: os.pread(file.fileno(), size, base + offset)


def find_last(read, needle, end):
    """Where `needle` stands last before `end` in what `read(offset, size)` gives, or -1."""
    window = b""
    while end > 0:
        begin = max(0, end - BLOCK_SIZE)
        window = read(begin, end - begin) + window[:len(needle) - 1]
        found = window.rfind(needle)
        if found >= 0:
            return begin + found
        end = begin
    return -1


def version_numbers(version):
    """A version's first two numbers, such as (0, 98), or None."""
    match = re.match(r"([0-9]+)\.([0-9]+)", version or "")
    return match and tuple(map(int, match.groups()))


def joined(pieces):
    """The bytes of the iterable `pieces` in fewer ones, of a block at least."""
    gathered, size = [], 0
    for piece in pieces:
        gathered.append(piece)
        size += len(piece)
        if size >= BLOCK_SIZE:
            yield b"".join(gathered)
            gathered, size = [], 0
    yield b"".join(gathered)


def check_utf8(data):
    """Raise UnicodeDecodeError unless the bytes are UTF-8.  It takes the memory of a block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for begin in range(0, len(data), BLOCK_SIZE):
        decoder.decode(data[begin:begin + BLOCK_SIZE])
    decoder.decode(b"", final=True)


def _refuse_constant(name):
    """NaN and the like, which Python would read."""
    raise ValueError("%s is not JSON (RFC 8259, section 6)" % name)


def _integer(digits):
    """An int; None for one of more than 300 digits, since Python 3.11 and newer refuse to read some
    of those, and no client means them."""
    return int(digits) if len(digits) <= 300 else None


json_value = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_integer)
# For what is passed on as text, and only looked into: there a float is as good and read faster.
json_text = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=float)


class JSONChecker:
    """Whether bytes that come block by block are a JSON text (RFC 8259).

    It takes the memory of a few blocks, where json.JSONDecoder takes up to 20 times the text's.
    """

    MAX_NESTING = 1000                      # brackets within brackets; RFC 8259, 9 allows a limit
    MAX_REST = len("-10.10e+10")            # bytes of what `_shortened` leaves, at most
    STRING_BEGIN = (rb'"[^"\\\x00-\x1f]*'
                    rb'(?:\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})[^"\\\x00-\x1f]*)*')
    PART_OF_STRING = re.compile(STRING_BEGIN)
    STRING = re.compile(STRING_BEGIN + b'"')
    UP_TO_PART_OF_STRING = re.compile(rb'(?:[^"]+|' + STRING_BEGIN + b'")*')
    SCALAR = re.compile(rb"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
    SCALAR_BYTES = b"-+.0123456789aeflnrstuE"
    ELEMENTS = re.compile(rb'(?<=[\[,])["0](?:,["0])+')
    MEMBERS = re.compile(rb'(?<=[{,])":["0](?:,":["0])+')
    CONTAINER = re.compile(rb'\[["0]?\]|\{(?:":["0])?\}')
    VALUE = b'0"[{'                         # how a value begins

    def __init__(self):
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.rest = b""                     # the beginning of a string or scalar, shortened
        self.nesting = b""                  # the brackets that are open, the innermost last
        self.expected = self.VALUE          # what may come next

    def feed(self, block):
        """Raises ValueError at what can't be JSON, however it goes on."""
        self.utf8.decode(block)
        data = self.rest + block
        whole = self.UP_TO_PART_OF_STRING.match(data).end()
        if whole == len(data):
            whole = len(data.rstrip(self.SCALAR_BYTES))
        self.rest = self._shortened(data[whole:])
        for token in self._outline(data[:whole]):
            self._accept(token)

    def is_complete(self):
        """Whether the text may end here.  Raises ValueError as `feed` does."""
        self.feed(b" ")                     # which ends a number
        return not self.rest and not self.expected

    def _shortened(self, rest):
        """A string or scalar without its end, and without what doesn't matter for its validity."""
        if rest.startswith(b'"'):
            rest = b'"' + rest[self.PART_OF_STRING.match(rest).end():]
        else:
            rest = re.sub(rb"([0-9]{2})[0-9]+", rb"\1", rest)
        if len(rest) > self.MAX_REST:
            raise ValueError("neither a string nor a number, true, false or null")
        return rest

    def _outline(self, data):
        """What matters of whole tokens: `"` for every string, 0 for every other scalar, and for
        several values in a row and a container that holds none as well, as long as that pays."""
        data = self.SCALAR.sub(b"0", self.STRING.sub(b'"', data)).translate(None, b" \t\r")
        size = 2 * len(data)
        while data and len(data) <= 0.8 * size:
            size = len(data)
            data = self.MEMBERS.sub(b'":0', self.ELEMENTS.sub(b"0", data))
            data = self.CONTAINER.sub(b"0", data)
        return map(bytes, zip(data))

    def _accept(self, token):
        """Check that the token may stand here, and note what may follow it."""
        if token not in self.expected or len(self.nesting) > self.MAX_NESTING:
            raise ValueError("%r where it can't stand" % token)
        is_key = token == b'"' and self.VALUE not in self.expected
        if token in b"[{":
            self.nesting += token
            self.expected = b"]" + self.VALUE if token == b"[" else b'"}'
        elif token == b",":
            self.expected = self.VALUE if self.nesting.endswith(b"[") else b'"'
        elif token == b":":
            self.expected = self.VALUE
        elif is_key:
            self.expected = b":"
        else:
            if token in b"]}":
                self.nesting = self.nesting[:-1]
            self.expected = {b"": b"", b"[": b",]", b"{": b",}"}[self.nesting[-1:]]


def json_object(text):
    """The object that the JSON `text` is.  Raises ValueError."""
    try:
        value = json_value.decode(text)
    except json.JSONDecodeError:
        raise ValueError("it is not JSON") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def json_bytes(value):
    """`value` as compact UTF-8 JSON; what UTF-8 can't carry is replaced."""
    return _encode(value).encode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------
# A line goes into a queue, and one thread writes it to standard error: that may be a journal, a
# pipe that nobody reads, or a terminal that was stopped, and none of these may hold up a turn.
# Under systemd a line begins with its priority (sd-daemon(3)), so that `journalctl -p warning`
# answers what went wrong; by hand it begins with the time.

logger = logging.getLogger("replicas-engine")
logger.propagate = False

SYSLOG_PRIORITIES = {logging.ERROR: "<3>", logging.WARNING: "<4>", logging.INFO: "<6>",
                     logging.DEBUG: "<7>"}                          # sd-daemon(3)
MAX_LINE = 4000                            # bytes
MAX_WAITING_LINES = 1000
FLUSH_TIMEOUT = 1.0                        # seconds
LOG_PAUSE = 0.005                          # seconds from a line to its being written, at least


class StderrHandler(logging.Handler):
    """One line a record on standard error, and no thread waits for whoever is behind that.

    `put` is called by every thread that logs, and leaves the line in `waiting`.  The thread "log",
    which alone writes, takes it from there.  It may be held up: a pipe is full, a terminal was
    stopped by Ctrl-S.  Then MAX_WAITING_LINES are kept for it; what comes after them is dropped
    and counted, like what could not be written at all (a full disk).
    """

    def __init__(self, journal):
        super().__init__()
        self.journal = journal
        self.waiting = queue.SimpleQueue()      # lines, and Events to set when it is their turn
        self.dropped = 0                        # lines since the last notice; about
        start_thread("log", self._write_lines)

    def handle(self, record):
        """What logging calls with a record, from any thread; the queue needs no lock of logging's.
        It never raises: whoever logs a failure has still to deal with it, on a machine that is
        perhaps out of everything."""
        text = str(record.msg)
        try:
            text = record.getMessage()
            if record.exc_info:             # a traceback reads the lines of the source
                text += "\n" + logging.Formatter().formatException(record.exc_info)
        except Exception as error:
            text += " (the rest can't be shown: %s)" % type(error).__name__
        self.put(record.levelno, text)

    def put(self, level, text):
        """Have `text` written soon, if there is room for it."""
        with contextlib.suppress(MemoryError):
            if self.waiting.qsize() < MAX_WAITING_LINES:
                self.waiting.put(self._line(level, text))
                return
        self.dropped += 1

    def _line(self, level, text):
        """The bytes of a line, or of several where the text has line ends."""
        prefix = SYSLOG_PRIORITIES[level] if self.journal else "%s %s " % (
            timestamp(), logging.getLevelName(level).lower())
        if "\n" in text or "\r" in text:
            text = text.replace("\r", " ").replace("\n", "\n" + prefix + "  ")
        return (prefix + text).encode("utf-8", "backslashreplace")[:MAX_LINE] + b"\n"

    def _write_lines(self):
        """The log thread."""
        while True:
            waiting = [self.waiting.get()]
            # Others may come: waking up for each costs 25 % of the requests of one connection.
            time.sleep(LOG_PAUSE)
            waiting += [self.waiting.get() for _ in range(self.waiting.qsize())]
            self._write([line for line in waiting if isinstance(line, bytes)])
            for event in waiting:
                if isinstance(event, threading.Event):
                    event.set()

    def _write(self, lines):
        """Write lines, however long it takes, or count those that can't be written."""
        dropped, self.dropped = self.dropped, 0
        notice = self._line(logging.WARNING, "(%d lines were dropped: standard error took no more)"
                            % dropped) if dropped else b""
        try:
            write_all(2, notice + b"".join(lines))
        except (OSError, MemoryError):      # there is nowhere to say so
            self.dropped += dropped + len(lines)

    def flush(self):
        """Wait until what was put is written, but no longer than FLUSH_TIMEOUT.  Python's logging
        calls it at the end of the process."""
        written = threading.Event()
        self.waiting.put(written)
        written.wait(FLUSH_TIMEOUT)


def log_uncaught(failure):
    """For threading.excepthook and sys.unraisablehook, which would write to sys.stderr and wait."""
    logger.error("an exception that nobody caught in %s", threading.current_thread().name,
                 exc_info=(failure.exc_type, failure.exc_value, failure.exc_traceback))


def start_logging():
    """Log to standard error."""
    status = os.fstat(2)                    # is it the journal's?  See systemd.exec(5)
    journal = os.environ.get("JOURNAL_STREAM") == "%d:%d" % (status.st_dev, status.st_ino)
    logger.handlers[:] = [StderrHandler(journal)]
    logger.setLevel(logging.INFO)


def log_request(level, text):
    """logger.log(level, text), but without a LogRecord: with one, an engine answers 10 % fewer
    requests at 16 connections (tests/bench)."""
    for handler in logger.handlers:
        if isinstance(handler, StderrHandler) and logger.isEnabledFor(level):
            handler.put(level, text)


# ---------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------
# Everything that the operator decides comes from the environment, and is read once.  What can't be
# used stops the start with status 2 and a line that says why; what is merely odd, a misspelt name
# for instance, is kept in `problems` and warned of, since a machine that doesn't start helps
# nobody.

SANDBOX_MODES = ("read-only", "workspace-write", "danger-full-access")
PREFIX = "REPLICAS_ENGINE_"
ENGINE_SETTINGS = tuple(PREFIX + name for name in (
    "SECRET", "SANDBOX", "MODEL", "IDLE_TIMEOUT", "TURN_TIMEOUT", "STATE", "MAX_BODY",
    "MAX_CONNECTIONS", "MAX_HISTORY", "DELTAS", "WEBHOOK_URL", "WEBHOOK_SECRET"))
KEYS = ("CODEX_API_KEY", "OPENAI_API_KEY")  # the first one counts
OTHER_SETTINGS = ("HOST", "PORT", "WORKSPACE_HOME", "CODEX_PATH", "CODEX_HOME", "OPENAI_BASE_URL",
                  *KEYS)
SETUP = "/usr/sbin/replicas-engine-setup"           # is there if the engine was installed


class SettingsError(ValueError):
    """A setting that can't be used; the message names it and says why."""


def shown(value):
    """A value as a log line can take it: on one line, and not too long."""
    return repr(value)[1:-1][:100]


def _home_of_user():
    """The home that the user database has for this process's user."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return "/"


def not_a_name(text):
    """Why `text` can't be the name of a model (or the like), or None if it can."""
    if not 1 <= len(text) <= 200:
        return "must be 1 to 200 characters long"
    if not all(character.isprintable() for character in text):
        return "has a character in it that can't be printed"
    return None


# ECMAScript's white space, the line end last
DOTENV_SPACE = ("\t\v\f \u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
                "\u200a\u2028\u2029\u202f\u205f\u3000\ufeff\n")
DOTENV_NAME = re.compile(r"[{0}]*(?:export[{0}]+)?([\w.-]+)(?:[{0}]*=|:[{0}])".format(DOTENV_SPACE),
                         re.ASCII)
DOTENV_FIRST = re.compile(r"[%s]*(['\"`]?)" % DOTENV_SPACE)
DOTENV_REST = re.compile(r"[%s]*(?:[#\n]|\Z)" % DOTENV_SPACE[:-1])
DOTENV_BARE = re.compile(r"[^#\n]*")
MAX_SKIPPED = 5                            # lines of it that the log names


def _quoted_end(text, begin):
    """Where the value ends whose quotation mark is at `begin`, or None: at the first such mark
    without a backslash before it, else the last with one, where nothing but a comment follows."""
    ends = []
    for mark in re.compile(text[begin]).finditer(text, begin + 1):
        ends.append(mark.end())
        if text[mark.start() - 1] != "\\":
            break
    return next((end for end in reversed(ends) if DOTENV_REST.match(text, end)), None)


def _dotenv_value(text, begin):
    """The value behind a name's `=`, and where it ends."""
    first, end = DOTENV_FIRST.match(text, begin), None
    if first.group(1):
        end = _quoted_end(text, first.start(1))
    if end is None:
        end = DOTENV_BARE.match(text, begin).end()
    value = text[begin:end].strip(DOTENV_SPACE)
    is_double = value.startswith('"')
    if len(value) > 1 and value[0] in "'\"`" and value[0] == value[-1]:
        value = value[1:-1]
    if is_double:
        value = value.replace("\\n", "\n").replace("\\r", "\r")
    return value, end


def parse_dotenv(text, skipped=None):
    """The variables of a `.env` file, read as 0.1.0's library reads it (dotenv 17.2.3, `LINE` in
    lib/main.js), but in linear time, and U+2028 and U+2029 are not line ends.

    A name may be followed by `=` or `: `.  A value may have one of three kinds of quotation marks
    around it, and line ends within; in double ones `\\n` and `\\r` count, and no other escape.
    To a list `skipped` go the numbers of lines that set nothing and are no comments: the first few.
    """
    text, env, position = re.sub("\r\n?", "\n", text), {}, 0
    skipped = [] if skipped is None else skipped
    while position < len(text):
        name = DOTENV_NAME.match(text, position)
        if name:
            env[name.group(1)], position = _dotenv_value(text, name.end())
        else:
            first = DOTENV_FIRST.match(text, position)
            position = first.end()
            begin = first.start(1)
            if text[begin:begin + 1] not in ("", "#") and len(skipped) < MAX_SKIPPED:
                skipped.append(text.count("\n", 0, position) + 1)
        position = (text.find("\n", position) + 1) or len(text)
    return env


def problem(what, remedy):
    """One of the things that `Problems` finds, as GET /codex/status shows it."""
    return {"problem": what, "details": remedy}


def unknown_names(env):
    """A problem for each variable that only looks like a setting."""
    import difflib                          # rarely needed, and not cheap
    found, names = [], {name[len(PREFIX):]: name for name in ENGINE_SETTINGS}
    names.update((name, name) for name in OTHER_SETTINGS)
    for name in sorted(env):
        if name.startswith(PREFIX) and name not in ENGINE_SETTINGS:
            near = difflib.get_close_matches(name[len(PREFIX):], names, 1, cutoff=0.7)
            found.append(problem("%s is not a setting" % shown(name), "set %s instead"
                                 % names[near[0]] if near else "README lists them"))
    return found


def read_dotenv():
    """The variables of the file .env in the working directory, and its problems."""
    try:
        with open_regular(".env") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read().decode("utf-8-sig", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return {}, []
    except (OSError, ValueError) as error:
        return {}, [problem("the file .env can't be read: %s" % words_of(error),
                            "mend or remove it")]
    skipped, problems = [], []
    env = parse_dotenv(text, skipped)
    if skipped:
        problems.append(problem("lines of the file .env set nothing: %s" % str(skipped)[1:-1],
                                "write NAME=value, or # in front of it"))
    if mode & 0o044:
        problems.append(problem("other users can read the file .env", "chmod 600 .env"))
    if env.get("REPLICAS_ENGINE_SECRET") and "REPLICAS_ENGINE_SECRET" not in os.environ:
        problems.append(problem("the agent can read REPLICAS_ENGINE_SECRET in the file .env",
                                "set it in the engine's environment"))
    return env, problems


class Settings:
    """What the operator decided, read once from the environment `env`.

    A variable that is set to nothing counts as not set.  Raises SettingsError.
    """

    def __init__(self, env, problems=()):
        # What can be used, but hardly as it is meant; Problems knows more that does not depend on
        # the settings alone.
        self.problems = [*problems, *unknown_names(env)]
        self.inherited = dict(env)          # for Codex, to which an empty variable may mean a lot
        self.env = {name: value for name, value in env.items() if value}
        get = self.env.get
        for name, value in env.items():
            if "\0" in name + value:
                raise SettingsError("%s has a NUL character in it" % shown(name))
        self.home = get("HOME") or _home_of_user()
        self.is_service = "STATE_DIRECTORY" in self.env and os.path.exists(SETUP)
        self.secret = self._secret("REPLICAS_ENGINE_SECRET")
        self.host = get("HOST")
        self.port = self._number("PORT", 3737, most=65535)
        self.development = get("NODE_ENV") == "development"
        self.workspace = self._path("WORKSPACE_HOME", get("HOME") or "/home/ubuntu")
        self.codex_path = get("CODEX_PATH") and self._path("CODEX_PATH", "")
        self.codex_home = self._path("CODEX_HOME", os.path.join(self.home, ".codex"))
        self.key_name = next((name for name in KEYS if get(name, "").strip()), None)
        self.key = get(self.key_name)       # for the model
        self.sandbox = self._sandbox()
        self.model = self._model()
        self.deltas = bool(self._number("REPLICAS_ENGINE_DELTAS", 0, most=1))
        self.idle_timeout = self._seconds("REPLICAS_ENGINE_IDLE_TIMEOUT", 1800)
        self.turn_timeout = self._seconds("REPLICAS_ENGINE_TURN_TIMEOUT", 0)
        self.state = self._path("REPLICAS_ENGINE_STATE", self._default_state())
        self.max_body = self._number("REPLICAS_ENGINE_MAX_BODY", 32 * 1024 * 1024, least=1)
        self.max_connections = self._number("REPLICAS_ENGINE_MAX_CONNECTIONS", 256, least=1)
        self.max_history = self._number("REPLICAS_ENGINE_MAX_HISTORY", 4 * 1024 ** 3, least=1)
        self.webhook_secret = self._secret("REPLICAS_ENGINE_WEBHOOK_SECRET")
        self.webhook_url = self._webhook_url()

    @classmethod
    def from_process(cls):
        """The settings of this process: `.env` in the working directory, then its environment."""
        env, problems = read_dotenv()
        env.update(os.environ)
        return cls(env, problems)

    def remedy(self, by_hand, options=""):
        """What to do: in words, or with the options of the installed service's setup."""
        return "sudo replicas-engine-setup" + options if self.is_service else by_hand

    def _secret(self, name):
        """A secret as bytes, as it comes in a header, or None."""
        secret = os.fsencode(self.env.get(name, "")).strip()
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", secret):
            raise SettingsError("%s has a control character in it, which no HTTP header can carry"
                                % name)
        return secret or None

    def _webhook_url(self):
        """Where to tell of turns that are over, as urllib.parse splits it, or None."""
        text = self.env.get("REPLICAS_ENGINE_WEBHOOK_URL", "").strip()
        if bool(text) != bool(self.webhook_secret):
            raise SettingsError("REPLICAS_ENGINE_WEBHOOK_URL and REPLICAS_ENGINE_WEBHOOK_SECRET "
                                "go together: set both or neither")
        try:
            url = urllib.parse.urlsplit(text)
            fit = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:
            fit = False
        if text and (not fit or "@" in url.netloc or not re.fullmatch(r"[!-~]+", text)):
            raise SettingsError("REPLICAS_ENGINE_WEBHOOK_URL is not the URL of an http or https "
                                "server, without user and blanks")
        return url if text else None

    def _number(self, name, default, least=0, most=2 ** 53):
        """A whole number within bounds."""
        text = self.env.get(name, str(default)).strip()
        if not re.fullmatch(r"[0-9]{1,16}", text) or not least <= int(text) <= most:
            raise SettingsError("%s=%s is not a whole number from %d to %d"
                                % (name, shown(text), least, most))
        return int(text)

    def _seconds(self, name, default):
        """A number of seconds, perhaps with a fraction."""
        text = self.env.get(name, str(default)).strip()
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            raise SettingsError("%s=%s is not a number of seconds" % (name, shown(text)))
        return float(text)

    def _path(self, name, default):
        """An absolute path; ~ is the home's."""
        path = self.env.get(name, default)
        if path == "~" or path.startswith("~/"):
            path = self.home + path[1:]
        try:
            return os.path.abspath(path)
        except FileNotFoundError:
            raise SettingsError("%s=%s can't be found: the working directory was deleted, and this "
                                "is relative to it" % (name, shown(path))) from None

    def _sandbox(self):
        """One of Codex's sandbox modes, or None: leave it to Codex's own configuration."""
        sandbox = self.env.get("REPLICAS_ENGINE_SANDBOX", "workspace-write")
        if sandbox not in SANDBOX_MODES + ("config",):
            raise SettingsError("REPLICAS_ENGINE_SANDBOX=%s is none of %s, config"
                                % (shown(sandbox), ", ".join(SANDBOX_MODES)))
        return None if sandbox == "config" else sandbox

    def _model(self):
        """The model, or None: Codex has one of its own."""
        model = self.env.get("REPLICAS_ENGINE_MODEL")
        fault = model and not_a_name(model)
        if fault:
            raise SettingsError("REPLICAS_ENGINE_MODEL %s" % fault)
        return model

    def _default_state(self):
        """Where state goes by itself: systemd's directory, else the user's."""
        systemd = self.env.get("STATE_DIRECTORY", "").split(":")[0]
        base = self.env.get("XDG_STATE_HOME", "")
        if not os.path.isabs(base):    # the XDG Base Directory Specification: ignore a relative one
            base = os.path.join(self.home, ".local", "state")
        return systemd or os.path.join(base, "replicas-engine")


# ---------------------------------------------------------------------------------------------
# Requests and responses
# ---------------------------------------------------------------------------------------------
# The application's side of HTTP: a Request is a view of a WSGI environ, a Response is what goes
# back, and an HTTPError is an answer that isn't what the client wanted, raised from wherever that
# turns out.

class Response:
    """A status code, header fields and a body: an iterable of bytes.

    Unless a field says otherwise no cache may store it: a shared one would hand it out without the
    secret (RFC 9111, 3.5 protects Authorization alone).
    """

    __slots__ = ("status", "headers", "body")

    def __init__(self, body, status=200, headers=()):
        self.status = status
        self.headers = list(headers)
        if not any(name == "Cache-Control" for name, _ in self.headers):
            self.headers.append(("Cache-Control", "no-store"))
        self.body = body


def json_response(value, status=200, headers=()):
    """A Response that is `value` as JSON."""
    body = json_bytes(value)
    return Response([body], status, [("Content-Type", "application/json"),
                                     ("Content-Length", str(len(body))), *headers])


class HTTPError(Exception):
    """An answer that isn't what the client wanted: `{"error": error, "details": details, ...}`."""

    def __init__(self, status, error, details=None, headers=(), **keys):
        super().__init__(status, error, details)
        self.status = status
        self.headers = list(headers)
        self.body = {"error": error}
        if details is not None:
            self.body["details"] = details
        self.body.update(keys)

    def __str__(self):
        return ": ".join(filter(None, (self.body["error"], self.body.get("details"))))

    def response(self):
        """The answer that it is."""
        return json_response(self.body, self.status, self.headers)

    def again(self):
        """A new one, to be raised in another thread: this one holds its stack's frames."""
        return HTTPError(self.status, headers=self.headers, **self.body)


def bad_parameter(name, problem):
    """The error for a parameter or key of the request that can't be used."""
    return HTTPError(400, "Invalid %s" % name, "%s %s" % (name, problem))


def unavailable(error, details):
    """The error for what can't be had now, a turn or a log; nothing was begun."""
    return HTTPError(503, error, details)


def not_startable(error):
    """The HTTPError that says which exception kept a turn from starting."""
    return error.again() if isinstance(error, HTTPError) else unavailable(
        "The turn can't be started", words_of(error))


REMEDIES = {                               # of an OSError's number; others depend on the case
    errno.ENOSPC: "make room there", errno.EDQUOT: "make room there",
    errno.EACCES: "let the engine's user in", errno.EPERM: "let the engine's user in",
    errno.EROFS: "let the engine write there, or name another place",
    **dict.fromkeys(SHORTAGES, "try again")}


def explanation(error, advice):
    """What an OSError says, of which file, and what to do: `advice` if its number doesn't tell."""
    path = "%s: " % os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    return "%s%s: %s" % (path, words_of(error), REMEDIES.get(error.errno, advice))


@contextlib.contextmanager
def explained(error, advice):
    """Within, an OSError becomes `unavailable`, with what to do."""
    try:
        yield
    except OSError as problem:
        raise unavailable(error, explanation(problem, advice)) from None


class Request:
    """A view of a WSGI environ (PEP 3333) and nothing else."""

    def __init__(self, environ):
        self.environ = environ
        self.method = environ["REQUEST_METHOD"]
        self.path = environ.get("PATH_INFO", "")
        self.body = b""

    def header(self, name):
        """The field's value, several lines joined with commas, or None."""
        return self.environ.get("HTTP_" + name.upper().replace("-", "_"))

    def query(self):
        """The query's parameters; a parameter given twice is an error."""
        pairs = urllib.parse.parse_qsl(self.environ.get("QUERY_STRING", ""), keep_blank_values=True)
        query = dict(pairs)
        if len(query) != len(pairs):
            raise HTTPError(400, "Invalid query", "a parameter is given more than once")
        return query

    def read_body(self, limit):
        """The whole body.  Raises HTTPError 413 above `limit` bytes, and 400 if it breaks off."""
        length = self.environ.get("CONTENT_LENGTH") or None
        if length is None and not self.environ.get("HTTP_TRANSFER_ENCODING"):
            return b""
        if (self.header("Content-Encoding") or "identity").strip().lower() != "identity":
            raise HTTPError(415, "Unsupported content coding", "send the body as it is, without "
                            "Content-Encoding", [("Accept-Encoding", "identity")])
        too_large = HTTPError(413, "Request body too large",
                              "the body may have at most %d bytes: see REPLICAS_ENGINE_MAX_BODY"
                              % limit)
        if length is not None and int(length) > limit:
            raise too_large
        try:
            body = self.environ["wsgi.input"].read(limit + 1 if length is None else int(length))
        except OSError as error:
            status = getattr(error, "status", 400)
            raise HTTPError(status, "The request body could not be read", str(error),
                            [("Retry-After", "5")] if status == 503 else [])
        if len(body) > limit:
            raise too_large
        if length is not None and len(body) < int(length):
            raise HTTPError(400, "The request body could not be read",
                            "it ended after %d of %s bytes" % (len(body), length))
        return body


def whole_number(query, name, least=0, most=10 ** 15 - 1):
    """The parameter `name` of a query as an int, or None if it isn't there."""
    if name not in query:
        return None
    text = query[name]
    if not re.fullmatch(r"[0-9]{1,15}", text) or not least <= int(text) <= most:
        raise bad_parameter(name, "must be a whole number from %d %s" % (
            least, "up" if most == 10 ** 15 - 1 else "to %d" % most))
    return int(text)


def prefers_async(request):
    """RFC 7240, 4.1: whether the client prefers an answer at once."""
    preferences = (request.header("Prefer") or "").split(",")
    return any(item.partition(";")[0].strip().lower() == "respond-async" for item in preferences)


def accepts_gzip(request):
    """RFC 9110, 12.5.3: whether Accept-Encoding names gzip (or *) with a weight above 0."""
    weights = {}
    for item in (request.header("Accept-Encoding") or "").split(","):
        coding, _, parameter = item.partition(";")
        weight = re.fullmatch(r"\s*q=([01](?:\.[0-9]{0,3})?)\s*", parameter, re.IGNORECASE)
        weights[coding.strip().lower()] = float(weight.group(1)) if weight else 1.0
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", 0.0))) > 0


def compress(pieces):
    """The bytes of the iterable `pieces` in gzip's format (RFC 1952), as a generator."""
    gzip = zlib.compressobj(1, zlib.DEFLATED, 31)
    for piece in pieces:
        data = gzip.compress(piece)
        if data:
            yield data
    yield gzip.flush()


# ---------------------------------------------------------------------------------------------
# Routing and secret
# ---------------------------------------------------------------------------------------------
# The secret is compared before a path is looked at, so that nobody without it learns what there is.

class Router:
    """Which handler answers which path and method.  HEAD goes wherever GET does; a path's last
    segment may be a number, N in the table."""

    def __init__(self, *routes):
        self.paths = {}
        for method, path, handler in routes:
            self.paths.setdefault(path, {})[method] = handler
            if method == "GET":
                self.paths[path]["HEAD"] = handler

    def _methods(self, path):
        """The methods of a path with their handlers, or None."""
        if path.endswith("/N"):             # in a request that is no number
            return None
        return self.paths.get(re.sub(r"/[0-9]{1,15}\Z", "/N", path))

    def handler(self, method, path):
        """Raises HTTPError 404 or 405 (RFC 9110, 15.5.5 and 15.5.6)."""
        methods = self._methods(path)
        if methods is None:
            near = re.sub("/+", "/", path).rstrip("/").lower()
            raise HTTPError(404, "Not found", "there is nothing at %s%s" % (
                path, ", but at %s" % near if near and self._methods(near) else ""))
        if method not in methods:
            allowed = ", ".join(sorted(methods))
            raise HTTPError(405, "Method not allowed", "%s allows %s" % (path, allowed),
                            [("Allow", allowed)])
        return methods[method]


HOW_TO_SHOW_THE_SECRET = ("send the engine's REPLICAS_ENGINE_SECRET, once, as "
                          "X-Replicas-Engine-Secret: … or Authorization: Bearer …")


def check_secret(request, secret):
    """Raise HTTPError unless `request` carries `secret` (bytes), compared in constant time.

    X-Replicas-Engine-Secret decides where it is given; else `Authorization: Bearer` (RFC 6750).
    A WSGI server joins a field that was sent twice with a comma, so it can't be right.
    """
    if secret is None:
        raise HTTPError(500, "Server configuration error: REPLICAS_ENGINE_SECRET not set")
    given = request.header("X-Replicas-Engine-Secret")
    if not given:
        scheme, _, token = (request.header("Authorization") or "").partition(" ")
        given = token.strip(" \t") if scheme.lower() == "bearer" else ""
    if not given:
        raise HTTPError(401, "Unauthorized: X-Replicas-Engine-Secret header required",
                        HOW_TO_SHOW_THE_SECRET, [("WWW-Authenticate", "Bearer")])
    if not hmac.compare_digest(given.encode("latin-1", "replace"), secret):
        raise HTTPError(401, "Unauthorized: Invalid secret", HOW_TO_SHOW_THE_SECRET,
                        [("WWW-Authenticate", "Bearer")])


# ---------------------------------------------------------------------------------------------
# Events
# ---------------------------------------------------------------------------------------------
# What a turn consists of, as Codex prints it and as clients get it: a type and JSON text, in one
# line of a text/event-stream (HTML standard, 9.2) each.  A turn's log is such a stream:
#
#     : {"turn":7,"started_at":"…","thread_id":"…","mark":"…",…}      the header, a comment
#
#     id: 7.1
#     event: thread.started
#     data: {"type":"thread.started","thread_id":"…"}
#
#     …
#     id: 7.9
#     event: done
#     data: {}
#
# An event's data has no line end of its own, so b"\n\nid: 7.5\n" stands in the file just once and
# finding an event is finding that.  When it came isn't written: the file was last modified when its
# last event was appended.

EVENT = b"id: %d.%d\nevent: %b\ndata: %b\n\n"
EVENT_HEAD = re.compile(rb"id: [0-9]{1,15}\.([0-9]{1,15})\nevent: ([A-Za-z0-9._/-]+)\ndata: ")
EVENT_TYPE = re.compile(r"[A-Za-z0-9._/-]+")
THREAD_ID = r"[0-9A-Za-z][0-9A-Za-z_-]{0,127}"
TERMINAL = ("turn.completed", "turn.failed")
DONE = (b"done", b"{}")
MAX_EVENT = 32 * 1024 * 1024               # bytes of an event's data
MAX_FAILURE_MESSAGE = 2000                 # characters of a turn.failed's message
# Why a turn was ended by the engine: the code in its turn.failed, and the message there.  `exited`
# and `not_started` have messages of their own.
STOP_MESSAGES = {
    "interrupted": "The turn was interrupted",
    "stalled": "The turn stalled: Codex made no progress for %g seconds, with no item in progress",
    "timeout": "The turn took longer than %g seconds",
    "cancelled": "The message was taken out of the queue",
    "shutdown": "The engine was shut down during the turn",
    "engine_restarted": "The engine ended unexpectedly during the turn and was started again",
}
NO_FAILURES = ("interrupted", "cancelled")  # what somebody wanted
NO_REASON = "Codex does not say why"        # where its turn.failed has no message


class NoSuchTurn(HTTPError):
    """The turn was never started, or is no longer kept."""

    def __init__(self, details):
        super().__init__(404, "No such turn", details)


def is_thread_id(value):
    """Whether it can be a thread's id."""
    return isinstance(value, str) and re.fullmatch(THREAD_ID, value) is not None


def thread_id_of(event):
    """The thread id that a thread.started event names, or None if it names none fit for use."""
    thread_id = event.get("thread_id")
    return thread_id if is_thread_id(thread_id) else None


def message_of(event):
    """The `message` of an event or an error, on one line; exec's was read as Latin-1."""
    message = event.get("message") if isinstance(event, dict) else None
    text = message if isinstance(message, str) else ""
    with contextlib.suppress(UnicodeError):
        text = text.encode("latin-1").decode()
    return " ".join(text.split())[:MAX_FAILURE_MESSAGE]


def failure(message, code):
    """The events that end a turn which Codex didn't end, in the form that Codex gives them."""
    return [(b"error", json_bytes({"type": "error", "message": message})),
            (b"turn.failed", json_bytes({"type": "turn.failed",
                                         "error": {"message": message, "code": code}}))]


def _parse_header(text):
    """The header's object.  Raises ValueError if it isn't one that an engine wrote."""
    header = json_object(text.decode())
    for key in ("started_at", "thread_id", "mark", "key", "fingerprint"):
        if not isinstance(header.get(key), (str, type(None))):
            raise ValueError("%s in its header is not a string" % key)
    return header


def _parse_event(frame):
    """(number, type, data) of an event's lines.  Raises ValueError."""
    head = EVENT_HEAD.match(frame)
    if not head:
        raise ValueError("it has an event that no engine wrote")
    data = frame[head.end():].rstrip(b"\n").decode("utf-8", "replace")
    return int(head.group(1)), head.group(2).decode(), data


def _thread_started(frame):
    """The thread id that an event's lines name if it is a thread.started, or None."""
    try:
        _, kind, data = _parse_event(frame)
        return thread_id_of(json_object(data)) if kind == "thread.started" else None
    except ValueError:
        return None


# ---------------------------------------------------------------------------------------------
# Turn log
# ---------------------------------------------------------------------------------------------
# What of a log is where, while its turn runs:
#
#     in the file      header | event | event | event | room for more, and for an ending (zeros)
#                             ^ start                 ^ size: readers see what lies before it
#     in memory        pending: events that the disk can't take; nobody has seen them
#
# The room is set aside on the disk before anything is written, so that a turn's ending can be
# written on a full disk too.  It goes when the log is finished; after a crash whoever opens the log
# finds its end by looking for the last blank line.
#
# A turn whose message waits in the queue has a log without events.  Its header has queued_at, and
# blanks behind it: they give room to the one that it gets when Codex was started.

MAX_HEADER = 64 * 1024                     # bytes
QUEUED_HEADER = 4 * 1024                   # bytes of a log that waits: one page of the cache, which
#                                            is written whole or not at all
ENDING_ROOM = 32 * 1024                    # bytes: two events with such a message, and `done`
ROOM_STEP = 64 * 1024                      # bytes that the disk is asked for at once
MAX_UNFINISHED = 2 * MAX_EVENT             # bytes behind the last event that a crash may leave
POWER_CUT_GAP = 1000000                    # numbers that are left out: see finish


class TurnLog:
    """The events of one turn in a file: one writer, any number of readers.

    An event is published when it is written, so that nobody knows of one that `kill -9` could take
    back; the ending is published when it is on the disk, so that a power cut can't either.
    """

    def __init__(self, path, header, start):
        self.path = path
        self.turn_id = int(os.path.basename(path)[:-len(".log")])
        self.header = header
        self.thread_id = header.get("thread_id")    # its own, else the one that it was to resume
        self.start = start          # where the first event begins: behind the header
        # Guards the next three, which change together, and is notified when they do.
        self.changed = threading.Condition()
        self.size = start           # bytes that are published
        self.last = 0               # the number of the last event published
        self.finished = False       # that was `done`
        self.left = False           # the engine ends, and the log doesn't
        self.has_ending = False     # when it was opened, it had all but `done`
        # The writer's own
        self.error = None           # why the disk takes no more, an OSError, or None
        self._fd = None
        self._room = 0              # bytes of the file that the disk has set aside
        self._gap = 0               # numbers to be left out before the next event: see finish
        self._littered = False      # behind `size` may be the beginning of what wasn't published
        self._synced = 0            # bytes that the disk holds for sure
        self._pending = []          # events that it could not take yet: pairs of type and data

    @classmethod
    def create(cls, path, header):
        """A new log with the given header.  Raises OSError, and then leaves no file behind."""
        first = b": " + json_bytes(header)
        if "queued_at" in header:
            first = first.ljust(QUEUED_HEADER - 2)
        first += b"\n\n"
        turn_log = cls(path, header, len(first))
        turn_log._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            turn_log._write(first, 0, ENDING_ROOM)
        except BaseException:
            turn_log.discard()
            raise
        return turn_log

    @classmethod
    def open(cls, path):
        """The log at `path` as an engine left it, without the event that it died in.

        Raises OSError, and ValueError if it is malformed: no event of it was ever sent then.
        """
        with open_regular(path) as file:
            first = file.readline(MAX_HEADER)
            if not first.startswith(b": {") or file.read(1) != b"\n":
                raise ValueError("it has no header")
            turn_log = cls(path, _parse_header(first[2:]), len(first) + 1)
            end = os.fstat(file.fileno()).st_size
            begin = max(turn_log.start - 2, end - MAX_UNFINISHED)
            found = find_last(reader_of(file, begin), b"\n\n", end - begin)
            if found < 0:
                raise ValueError("it has no end")
            turn_log.size = begin + found + 2
            if turn_log.size > turn_log.start:
                _, (turn_log.last, kind, _) = next(turn_log.backwards(file))
                turn_log.finished, turn_log.has_ending = kind == "done", kind in TERMINAL
                file.seek(turn_log.start)
                turn_log._find_thread(file.read(READ_SIZE))
        return turn_log

    def _find_thread(self, events):
        """Learn the thread from the first of these events."""
        self.thread_id = _thread_started(events.partition(b"\n\n")[0]) or self.thread_id

    @property
    def is_queued(self):
        """Whether its turn still waits."""
        return "queued_at" in self.header and not (self.finished or self.has_ending)

    # For the writer, one thread

    def begin(self, header):
        """Give a log that waited the header of a turn that runs, or its own again, and have the
        disk hold it, or a power cut would have it begun a second time.  Raises OSError."""
        first = b": " + json_bytes(header)
        if len(first) > self.start - 2:
            raise OSError(errno.EFBIG, "no room for its header", self.path)
        if self._fd is None:
            self._reopen()
        self._write(first.ljust(self.start - 2), 0, ENDING_ROOM)
        self.header, self.thread_id = header, header.get("thread_id")
        self.sync()

    def append(self, events):
        """Number, write and publish `events`, pairs of a type and its data (both bytes); False if
        the disk can't take them now: then they wait for `flush`."""
        self._pending += events
        return self.flush()

    def flush(self):
        """Write and publish what is pending; False while the disk can't take it, see `error`."""
        if not self._pending:
            return True
        try:
            data = self._encode(self._pending)
            self._write(data, self.size, ENDING_ROOM)
        except (OSError, MemoryError) as error:
            self._failed(error)
            return False
        self.error = None
        if not self.last:
            self._find_thread(data[:READ_SIZE])     # a longer event is no thread.started
        count, self._pending = len(self._pending), []
        self._publish(len(data), count)
        return True

    def drop_pending(self):
        """Forget what the disk can't take: the types of those events."""
        kinds, self._pending = [kind for kind, _ in self._pending], []
        return kinds

    def finish(self, ending, before_publishing):
        """Write the events `ending` and `done`, all or nothing; publish them when the disk has them
        (or has lost them, which the log says) and the callable was called.  Raises OSError where
        they can't be written; then it may be tried again.

        Where the machine went down in the turn, clients may have seen events that were not on the
        disk yet.  Their numbers are never given again: POWER_CUT_GAP of them are left out.
        """
        try:
            if self._fd is None:
                self._reopen()
            data = self._encode(ending + [DONE])
            if self._littered:
                self._clear()
            self._write(data, self.size)
        except (OSError, MemoryError) as error:
            self._failed(error)
            raise self.error from None
        with contextlib.suppress(OSError):      # zeros stay behind it, or the time isn't exact
            os.ftruncate(self._fd, self.size + len(data))
            now = time.time_ns()    # started_at's clock: the kernel's for files is some ms behind
            os.utime(self._fd, ns=(now, now))
        self.sync()
        self._close()
        self.error = None
        try:
            before_publishing()
        finally:
            self._publish(len(data), self._gap + len(ending) + 1, finished=True)

    def _failed(self, error):
        """Note why it can't be written, and say so once, not with every try."""
        if isinstance(error, MemoryError):
            error = OSError(errno.ENOMEM, words_of(error))
        if self.error is None:
            logger.error("turn %d: its log can't be written: %s", self.turn_id, words_of(error))
        self.error, self._littered = error, True

    def _reopen(self):
        """Become the writer of a log that was found.  Raises OSError."""
        self._gap = 0 if self.header.get("boot") in (None, boot_id()) else POWER_CUT_GAP
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
        self._littered = True       # with the event that broke off

    def _clear(self):
        """Put zeros behind the last event: the file is not cut, since the room would be lost."""
        end = os.fstat(self._fd).st_size
        for offset in range(self.size, end, READ_SIZE):
            os.pwrite(self._fd, bytes(min(READ_SIZE, end - offset)), offset)
        self._littered = False

    def _close(self):
        """Stop being its writer."""
        with contextlib.suppress(OSError):      # whatever it says, the descriptor is closed
            os.close(self._fd)
        self._fd = None

    def sync(self, created=False):
        """Have the disk hold what was written, so that it outlives the machine too; and the file's
        name if it was `created`."""
        try:
            os.fsync(self._fd)
            if created:
                sync_directory(os.path.dirname(self.path))
        except (OSError, MemoryError) as error:
            self._may_be_lost(error)

    def _may_be_lost(self, error):
        """Say that the disk has not taken what was written."""
        logger.error("turn %d: its log may not outlive a power cut: %s", self.turn_id,
                     words_of(error))

    def sync_new(self):
        """From the sync thread: `sync` if there is something new."""
        fd, size = self._fd, self.size
        if fd is not None and size > self._synced:
            self._synced = size
            try:
                os.fdatasync(fd)
            except OSError as error:            # the kernel says it once only: fsync(2)
                if self._fd == fd:          # else the log was just finished
                    self._may_be_lost(error)

    def leave(self):
        """Let whoever waits for it go: the engine ends."""
        with self.changed:
            self.left = True
            self.changed.notify_all()
        if self._fd is not None:
            self._close()

    def discard(self):
        """Delete it, or else make it none: its turn never was."""
        try:
            os.unlink(self.path)
        except (OSError, MemoryError):
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
        self._close()

    def _encode(self, events):
        """The bytes of events, numbered from the next one on."""
        return b"".join([EVENT % (self.turn_id, number, kind, data) for number, (kind, data)
                         in enumerate(events, self.last + self._gap + 1)])

    def _write(self, data, offset, spare=0):
        """Write `data` at `offset`, with `spare` bytes of room behind it.  Raises OSError."""
        end = offset + len(data) + spare
        if end > self._room:
            self._room = self._set_aside(end)
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[written:], offset + written

    def _set_aside(self, end):
        """Have the disk set aside room up to `end`, or some more; up to where it did."""
        for room in (end + ROOM_STEP, end):
            try:
                os.posix_fallocate(self._fd, self._room, room - self._room)
                return room
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):     # this file system can't
                    return self._room
                if room == end:
                    raise

    def _publish(self, size, count, finished=False):
        """Let readers see so many bytes and events more."""
        with self.changed:
            self.size += size
            self.last += count
            self.finished = finished
            self.changed.notify_all()

    # For readers, from any thread

    def open_file(self):
        """The file, to read from.  Raises HTTPError: NoSuchTurn if it is no longer kept."""
        with self._explained():
            return open_regular(self.path, buffering=0)

    @contextlib.contextmanager
    def reading(self):
        """The open file, within; what goes wrong there is an HTTPError."""
        with self._explained(), self.open_file() as file:
            yield file

    @contextlib.contextmanager
    def _explained(self):
        """Within, what keeps the file from being read becomes an HTTPError: it is gone, or broken,
        or the disk is."""
        with explained("The turn's log can't be read", "see its disk"):
            try:
                yield
            except FileNotFoundError:
                raise NoSuchTurn("turn %d is no longer kept" % self.turn_id) from None
            except ValueError as error:
                raise NoSuchTurn("turn %d's log is broken: %s" % (self.turn_id, error)) from None

    def read(self, file, offset, limit):
        """Up to `limit` bytes of the open `file` from `offset` on; b"" at the end of what is
        published.  Raises OSError."""
        end = min(offset + limit, self.size)
        if end <= offset:                   # most often so for a reader: no need to ask the kernel
            return b""
        data = os.pread(file.fileno(), end - offset, offset)
        if not data:
            raise OSError(errno.EIO, "somebody has cut the log", self.path)
        return data

    def wait(self, offset, timeout):
        """Wait until there is more than `offset` bytes or the end, `timeout` seconds at most."""
        with self.changed:
            if self.size <= offset and not (self.finished or self.left):
                self.changed.wait(timeout)

    def wait_for_end(self, timeout):
        """Wait until the log is finished, `timeout` seconds at most."""
        with self.changed:
            self.changed.wait_for(lambda: self.finished or self.left, timeout)

    def offset_after(self, number):
        """Where the event behind event `number` begins (0: the first), or None: no such event.
        Raises HTTPError."""
        with self.changed:
            size, last = self.size, self.last
        if number == 0:
            return self.start
        if number >= last:
            return size if number == last else None
        with self.reading() as file:
            needle = b"\n\nid: %d.%d\n" % (self.turn_id, number + 1)
            found = find_first(reader_of(file), needle, self.start - 2)
            if found < 0:       # its number is in the gap that a power cut left before the ending
                for begin, event in self.backwards(file):
                    if event[0] <= number:
                        break
                    found = begin - 2
        return found + 2

    def backwards(self, file):
        """(offset, (number, type, data)) of the events in the open `file`, the last one first.
        Raises OSError and ValueError."""
        with self.changed:
            end = self.size
        while end > self.start:
            floor = max(self.start - 2, end - MAX_UNFINISHED)
            found = find_last(reader_of(file, floor), b"\n\nid: ", end - floor)
            if found < 0:
                raise ValueError("it has an event that is too large")
            begin = floor + found + 2
            yield begin, _parse_event(os.pread(file.fileno(), end - begin, begin))
            end = begin


# ---------------------------------------------------------------------------------------------
# Event stream and results
# ---------------------------------------------------------------------------------------------

EVENT_STREAM = "text/event-stream; charset=utf-8"
STREAM_SIZE = 32 * 1024                    # bytes read at once for a reader; there may be hundreds
KEEP_ALIVE_INTERVAL = 15.0                 # seconds without an event until a comment is sent
MAX_FINAL_MESSAGE = 256 * 1024             # bytes of UTF-8 that a turn's result holds of it
FIRST_WITH_USAGE_OF_THREAD = (0, 98)       # of Codex: `usage` was the turn's own before
CLIENT_CHECK_INTERVAL = 1.0                # seconds between two looks whether the client is there


def _event_id(name, text):
    """(turn, number) of an event's id such as 7.4.  Raises HTTPError 400 that names the
    parameter."""
    match = re.fullmatch(r"([1-9][0-9]{0,14})\.([0-9]{1,15})", text)
    if not match:
        raise bad_parameter(name, "must be the id of an event, such as 7.4")
    return int(match.group(1)), int(match.group(2))


class EventStream:
    """A WSGI body: a log's bytes from `offset` on, live until the turn is done.

    It yields b"" at least every CLIENT_CHECK_INTERVAL seconds while it waits, so that a server
    can look after its client, and a comment every KEEP_ALIVE_INTERVAL seconds, the first at once
    when there is nothing to send yet: that brings the response's head to the client.  Another one
    goes out once when the client `may_be_gone`: one that closed and one that only ended its half
    look alike until something is sent.

    With `next_log` it goes on: that is called with a turn's id and seconds to wait, and gives the
    TurnLog of the turn behind it, or None if there is none yet.  Then `turn_log` may be None, too.
    """

    def __init__(self, turn_log, offset, may_be_gone=lambda: False, next_log=None):
        """Raises HTTPError as TurnLog.open_file does."""
        self.log = turn_log
        self.may_be_gone = may_be_gone
        self.next_log = next_log
        self.has_probed = False
        self.turn_id = 0                    # of the last turn that is done, while there is no log
        self.offset = offset
        self.next_comment = 0.0
        self.file = turn_log and turn_log.open_file()

    def __iter__(self):
        return self

    def __next__(self):
        """Events, or a comment, or b"" after a while without either."""
        data = self._read()
        if data is None and self.next_comment:      # at first a comment goes out at once
            self._wait()
            data = self._read()
        now = time.monotonic()
        if data:
            self.next_comment = now + KEEP_ALIVE_INTERVAL
            return data
        probing = not self.has_probed and self.may_be_gone()
        if probing or now >= self.next_comment:
            self.has_probed = self.has_probed or probing
            self.next_comment = now + KEEP_ALIVE_INTERVAL
            return b": keep-alive\n\n"
        return b""

    def _read(self):
        """What there is to send, or None if there is nothing yet.  A stream that can't go on ends
        without `done`, so that its client comes back."""
        if self.log is None:
            return None
        over = self.log.finished or self.log.left   # looked at first: no event comes after it
        try:
            data = self.log.read(self.file, self.offset, STREAM_SIZE)
        except (OSError, MemoryError) as error:
            logger.error("turn %d: a stream ends early: its log can't be read: %s",
                         self.log.turn_id, words_of(error))
            raise StopIteration from None
        if data:
            self.offset += len(data)
            return data
        if over and (self.next_log is None or self.log.left):
            raise StopIteration
        if over:
            self.turn_id, self.log = self.log.turn_id, None
            self.file.close()
        return None

    def _wait(self):
        """Wait for an event or a turn, CLIENT_CHECK_INTERVAL at most."""
        if self.log:
            self.log.wait(self.offset, CLIENT_CHECK_INTERVAL)
            return
        try:
            turn_log = self.next_log(self.turn_id, CLIENT_CHECK_INTERVAL)
            if turn_log:
                self.file, self.offset = turn_log.open_file(), turn_log.start
                self.log = turn_log
        except (HTTPError, OSError, MemoryError):   # the engine ends, or the log can't be read
            raise StopIteration from None

    def close(self):
        """For the server, when it is done with the stream (PEP 3333)."""
        if self.file:
            self.file.close()


def check_room_for_stream(request):
    """Raise HTTPError 503 where the server has none: see WSGIServer."""
    if request.environ.get("replicas_engine.crowded"):
        raise HTTPError(503, "Too many connections are open", "the last ones are not for streams "
                        "or waiting: see REPLICAS_ENGINE_MAX_CONNECTIONS", [("Retry-After", "5")])


def turn_mark(turn_log):
    """What tells a turn from one with the same id in another state directory."""
    return hashlib.sha256(str(turn_log.header.get("mark")).encode()).hexdigest()[:16]


def event_stream(request, turn_log, offset, next_log=None):
    """The response with a turn's stream from `offset` on; see EventStream.  Raises HTTPError."""
    may_be_gone = request.environ.get("replicas_engine.may_be_gone", lambda: False)
    # The charset is for clients that else read text as ISO-8859-1 (Python's requests); no-transform
    # keeps the compression of Express, Next.js and the like from holding the events back.
    return Response(EventStream(turn_log, offset, may_be_gone, next_log), 200, [
        ("Content-Type", EVENT_STREAM),
        ("Cache-Control", "no-cache, no-transform"), ("X-Accel-Buffering", "no")] + ([
            ("X-Replicas-Turn-Id", str(turn_log.turn_id)),
            ("X-Replicas-Turn-Mark", turn_mark(turn_log))] if turn_log else []))


def _outcome(kind, event):
    """The `status` of a turn that ended with `event` of that type, one of TERMINAL."""
    if kind == "turn.completed":
        return "completed"
    error = event.get("error")
    interrupted = isinstance(error, dict) and error.get("code") == "interrupted"
    return "interrupted" if interrupted else "failed"


def turn_summary(turn_log, file=None):
    """What `GET /codex/status` says of the turn; `file` is its open log.  Raises HTTPError."""
    if file is None:
        with turn_log.reading() as file:
            return turn_summary(turn_log, file)
    with turn_log.changed:
        last, finished = turn_log.last, turn_log.finished
    modified = timestamp(os.fstat(file.fileno()).st_mtime)
    summary = {"id": turn_log.turn_id, "status": "queued" if turn_log.is_queued else "running",
               "started_at": turn_log.header.get("started_at"),
               "finished_at": modified if finished else None,
               "last_event_at": modified if last else None,
               "last_event_id": "%d.%d" % (turn_log.turn_id, last) if last else None,
               "usage": None, "error": None}
    error = turn_log.error
    if error:                               # there is an ending, perhaps, but nobody has seen it
        summary["error"] = {"message": "The turn's log can't be written: %s" % words_of(error)}
    for _, (_, kind, data) in itertools.islice(turn_log.backwards(file), 2):    # the last is `done`
        if kind in TERMINAL:
            event = json_object(data)
            usage, summary["error"] = event.get("usage"), event.get("error")
            summary["usage"] = usage if isinstance(usage, dict) else None
            summary["status"] = _outcome(kind, event) if finished else "running"
            break
    return summary


def final_message(turn_log, file):
    """The text of the last agent_message in the open log, or None."""
    for _, (_, kind, data) in turn_log.backwards(file):
        if kind == "item.completed" and '"agent_message"' in data:
            item = json_object(data).get("item")
            if isinstance(item, dict) and item.get("type") == "agent_message":
                return item["text"] if isinstance(item.get("text"), str) else None
    return None


def turn_result(turn_log, with_message):
    """What `GET /codex/turns` says of a turn, but for `turn_usage`.  Raises HTTPError."""
    with turn_log.reading() as file:
        result = turn_summary(turn_log, file)
        message = final_message(turn_log, file) if with_message and turn_log.finished else None
    del result["last_event_at"]
    result["thread_id"] = turn_log.thread_id
    if with_message:
        result["final_message"] = message
    data = (message or "").encode("utf-8", "replace")
    if len(data) > MAX_FINAL_MESSAGE:
        result["final_message"] = data[:MAX_FINAL_MESSAGE].decode("utf-8", "ignore")
        result["final_message_truncated"] = True
    return result


def own_usage(turn_log, usage, before):
    """What a turn used of its own, where Codex said `usage` of it, and `before` of the turn before
    on its thread; None where that isn't known."""
    version = version_numbers(turn_log.header.get("version"))
    if usage is None or version is None:
        return None
    began_thread = turn_log.header.get("thread_id") != turn_log.thread_id
    if began_thread or version < FIRST_WITH_USAGE_OF_THREAD:
        return usage
    return before and {key: count - before.get(key, 0) for key, count in usage.items()
                       if isinstance(count, int) and isinstance(before.get(key, 0), int)}


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------
# A child of ours must be known before it is seen among the processes, and waited for by whoever
# started it and nobody else: hence Child and start_process.  Orphans of the turns become our
# children (the engine is their subreaper, prctl(2)) and are reaped here, lest they fill the process
# table.  All others are looked at in /proc (proc(5)).  A look that fails is an OSError: who can't
# see doesn't see that nobody is there.

MARK = "REPLICAS_TURN"                     # the variable; its value is the turn's random mark
RLIMIT_RTTIME = 15                         # <asm-generic/resource.h>; in microseconds
PR_SET_CHILD_SUBREAPER = 36                # <linux/prctl.h>
MAX_COMMAND = 200                          # characters of a command line that are told

# Guards what follows; held while a child of ours is started, so that it is known when it is seen,
# while orphans are reaped, and while the process table is looked at for a turn's processes.
_starting = threading.Lock()
_own_children = set()                      # pids that somebody else waits for
_reaped = 0                                # how many orphans were
_spare = []                                # a descriptor to be given up for a look

NOFILE_LIMITS = resource.getrlimit(resource.RLIMIT_NOFILE)     # what this process began with


def reap_orphans():
    """Wait for the dead among the processes that became ours because we are their subreaper; how
    many those were in all.  Takes no descriptor and doesn't look into /proc."""
    global _reaped
    with _starting, contextlib.suppress(ChildProcessError):
        while True:
            dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if dead is None:
                break
            _reaped += 1
            if dead.si_pid in _own_children:
                break                       # Child.wait will see to those who may be behind it
            os.waitpid(dead.si_pid, 0)
    return _reaped


class Child(subprocess.Popen):
    """A process that the engine started and waits for; nobody else may reap it."""

    def wait(self, timeout=None):
        """As Popen.wait; then the pid may be given to another."""
        status = super().wait(timeout)
        with _starting:
            _own_children.discard(self.pid)
        reap_orphans()
        return status


def _start_child(argv, options):
    """Popen with pipes of our own: where it can't make one, it leaves its others open."""
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        streams = {}
        for name in [name for name in options if options[name] == subprocess.PIPE]:
            mine, its = os.pipe()[::-1] if name == "stdin" else os.pipe()
            theirs.callback(os.close, its)
            streams[name] = ours.enter_context(open(mine, "wb" if name == "stdin" else "rb", 0))
            options[name] = its
        child = Child(argv, start_new_session=True, **options)
        ours.pop_all()
    vars(child).update(streams)
    return child


def start_process(argv, processes=None, **options):
    """Start a Child in a session of its own; where it is a turn's Codex, `processes` are the
    TurnProcesses that begin with it.  Raises OSError and ValueError as Popen does."""
    with _starting:
        child = _start_child(argv, options)
        _own_children.add(child.pid)
    with contextlib.suppress(OSError):      # ours was raised; select(2) needs small descriptors
        resource.prlimit(child.pid, resource.RLIMIT_NOFILE, NOFILE_LIMITS)
    if processes:
        try:
            processes.begin(child)
        except BaseException:
            with child:
                child.kill()
            raise
    return child


def kill_children():
    """Kill what is left of the processes that we started."""
    for pid in list(_own_children):
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


Process = collections.namedtuple("Process", "parent group session state started_ticks")


def _with_spare(call, path):
    """call(path), if need be with the descriptor that is kept for this.  Raises OSError."""
    try:
        if not _spare:
            _spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        return call(path)
    except OSError as error:
        if error.errno != errno.EMFILE or not _spare:
            raise
        os.close(_spare.pop())
        return call(path)


def _look(call, path):
    """call(path), or None if there is no such file any more, or not for us.  Raises OSError if that
    can't be told."""
    try:
        return _with_spare(call, path)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def _read(path):
    """What a file has now."""
    with open(path, "rb", buffering=0) as file:
        return file.read()


def process(pid):
    """The Process that has the pid now, from /proc/<pid>/stat (proc(5)), or None if none is seen.
    Its `started_ticks` tell it from others with the same pid: clock ticks since the machine's
    boot.  Raises OSError."""
    line = _look(_read, "/proc/%d/stat" % pid)
    if not line:
        return None
    fields = line[line.rindex(b")") + 2:].split()
    return Process(int(fields[1]), int(fields[2]), int(fields[3]), fields[0], int(fields[19]))


def processes():
    """(pid, Process) of all that are seen.  Raises OSError."""
    for name in reversed(_look(os.listdir, "/proc") or ()):  # the newest may be gone the soonest
        entry = process(int(name)) if name.isdigit() else None
        if entry:
            yield int(name), entry


def lives(pid, entry):
    """Whether it is no zombie: a process whose first thread has ended only looks like one."""
    return (entry.state not in (b"Z", b"X")
            or len(_look(os.listdir, "/proc/%d/task" % pid) or ()) > 1)


def limit_of(mark):
    """The RLIMIT_RTTIME that marks the processes of the turn with that mark, and limits nothing:
    36,000 years and more."""
    return 1 << 60 | int(hashlib.sha256(mark.encode()).hexdigest()[:15], 16)


def marks_for(mark):
    """What marks_of() tells of a process that has all marks of the turn with that mark."""
    return {mark, str(limit_of(mark))}


def marks_of(pid):
    """The marks of a process: those in the environment with which it was started, and its hard
    limit, which it can't get rid of unless it wants to."""
    environment = b"\0" + (_look(_read, "/proc/%d/environ" % pid) or b"")
    limits = _look(_read, "/proc/%d/limits" % pid) or b""
    return {value.decode("ascii", "replace")
            for value in re.findall(b"\0" + MARK.encode() + b"=([^\0]*)", environment)
            + re.findall(br"Max realtime timeout +\S+ +([0-9]+)", limits)}


def command_of(pid):
    """The beginning of its command line, or None."""
    words = (_look(_read, "/proc/%d/cmdline" % pid) or b"").rstrip(b"\0").split(b"\0")
    return b" ".join(words).decode("utf-8", "replace")[:MAX_COMMAND] or None


# ---------------------------------------------------------------------------------------------
# Control groups
# ---------------------------------------------------------------------------------------------
# Version 2 of them, cgroups(7).  Where the service manager delegates its control group to us (in
# the unit: Delegate=yes), every turn has one of its own below that.  Whatever its processes do,
# their children are in it too, and the kernel kills and counts them all at once.
#
# To put a process in takes some 10 ms, for the kernel waits for all processors.  A real Codex takes
# longer to ask for its prompt.

CGROUP_TREES = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")     # the latter on hybrid machines


def _is_delegated(folder):
    """As systemd says it: to root by an attribute, to others by giving it away."""
    if os.geteuid() != 0:
        return os.stat(folder).st_uid == os.geteuid()
    return os.getxattr(folder, "trusted.delegate") == b"1"


def delegated_cgroup():
    """The folder of our own control group, if it is for us to divide, or None."""
    with contextlib.suppress(OSError):
        for line in (_look(_read, "/proc/self/cgroup") or b"").splitlines():
            for tree in CGROUP_TREES if line.startswith(b"0::/") else ():
                folder = (tree + os.fsdecode(line[3:])).rstrip("/")
                if b"%d" % os.getpid() in (_look(_read, folder + "/cgroup.procs") or b"").split():
                    return folder if _is_delegated(folder) else None
    return None


class ControlGroup:
    """A turn's control group: a folder below our own."""

    PREFIX = "replicas-turn-"

    def __init__(self, folder):
        self.folder = folder

    @classmethod
    def make(cls, turn_id, mark):
        """A new one, or None where that is not for us."""
        parent = delegated_cgroup()
        if parent is None:
            return None
        folder = "%s/%s%d-%s" % (parent, cls.PREFIX, turn_id, mark)
        try:
            os.mkdir(folder)
        except FileExistsError:             # the turn's first Codex was in it
            pass
        except OSError:
            return None
        return cls(folder)

    @classmethod
    def saved(cls, folder, mark):
        """The one that a log tells of, if it is that turn's and still there, or None."""
        pattern = r"/sys/fs/cgroup/(?:[^/]+/)*%s[0-9]+-%s" % (cls.PREFIX, re.escape(mark))
        if (isinstance(folder, str) and re.fullmatch(pattern, folder)
                and os.path.normpath(folder) == folder and os.path.isdir(folder)):
            return cls(folder)
        return None

    def _write(self, name, text):
        """Write to one of the group's files.  Raises OSError."""
        fd = _with_spare(functools.partial(os.open, flags=os.O_WRONLY | os.O_CLOEXEC),
                         os.path.join(self.folder, name))       # not open(), which would create it
        try:
            os.write(fd, text)
        finally:
            os.close(fd)

    def add(self, pid):
        """Put a process in, and what it has started already: a script may be quick.  Raises OSError
        if it doesn't go."""
        self._write("cgroup.procs", b"%d" % pid)
        for thread in _look(os.listdir, "/proc/%d/task" % pid) or ():
            children = _look(_read, "/proc/%d/task/%s/children" % (pid, thread)) or b""
            for child in map(int, children.split()):
                with contextlib.suppress(ProcessLookupError):
                    self.add(child)

    def pids(self):
        """Of what lives in it and in the groups that this has made below.  Raises OSError."""
        found = set()
        for folder in [self.folder] + [path for path, _, _ in os.walk(self.folder)][1:]:
            with contextlib.suppress(OSError):      # a threaded one: its domain tells them
                found.update(map(int, (_look(_read, folder + "/cgroup.procs") or b"").split()))
        return found

    def is_empty(self):
        """Whether nothing lives in it any more.  Raises OSError."""
        events = _look(_read, self.folder + "/cgroup.events")
        return b"populated 0" in events.splitlines() if events is not None else (
            not os.path.isdir(self.folder))

    def kill(self):
        """SIGKILL to all at once.  Raises OSError."""
        try:
            self._write("cgroup.kill", b"1")
        except FileNotFoundError:           # before Linux 5.14: lest they fork meanwhile
            with contextlib.suppress(OSError):
                self._write("cgroup.freeze", b"1")
            for pid in self.pids():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                self._write("cgroup.freeze", b"0")

    @classmethod
    def all_in(cls, parent):
        """Those of all turns in a folder."""
        return [cls(os.path.join(parent, name)) for name in list_folder(parent)
                if name.startswith(cls.PREFIX)]

    def remove(self):
        """Remove it, unless something lives in it."""
        for folder, _, _ in os.walk(self.folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


# ---------------------------------------------------------------------------------------------
# A turn's processes
# ---------------------------------------------------------------------------------------------
# Which are they?  Where the turn has a control group, the kernel tells.  Elsewhere there is no one
# thing that does: Codex gives every command a session of its own (0.98 and newer) or none (0.50),
# and whatever loses its parent leaves the tree.  Three things together do.  The engine is the
# subreaper of its descendants (prctl(2)): while it lives, an orphan that is younger than Codex is
# its child and the turn's, but for those of earlier turns.  No session is shared by two turns.  And
# all descendants inherit a variable, unless they drop it, and a limit that means nothing but which
# turn it is: by these a later engine finds them, and this one tells the turns apart.
#
# Over is what the kernel says is over: Codex was waited for, the control group isn't populated, or
# a look shows nobody and every known process group answers ESRCH.

INTERRUPT_PATIENCE = 3.0                   # seconds that Codex has to write its ending down
TERMINATE_PATIENCE = 1.0                   # seconds that all the rest has before SIGKILL
KILL_PATIENCE = 5.0                        # seconds in which the kernel is expected to do it
PROCESS_POLL = 0.02                        # seconds between two looks

_marks = set()                             # of the turns that this engine ran


def _wait(condition, patience):
    """Look until `condition()` or for `patience` seconds.  Nothing tells when a process that is not
    our child has ended, so this polls; a look that fails is followed by another."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(PROCESS_POLL)


class TurnProcesses:
    """Everything that one turn started, in whatever process group or session it sits.

    Made before Codex, which start_process() then begins, or from what an engine that has ended
    wrote down: then Codex is not our child, and only what it was and the mark tell.
    """

    def __init__(self, mark, pid=None, started_ticks=None):
        self.mark = mark
        self._own_marks = marks_for(mark)   # of which its processes have one at least
        self.cgroup = None                  # the ControlGroup, where there is one
        self.child = None                   # Codex, if it is ours
        self.pid = pid                      # Codex's
        self.started_ticks = started_ticks  # Codex's; None if that is unknown
        self._seen = {(pid, started_ticks)}     # once a turn's, always its
        self._groups = set()                # process groups of its that there are
        self._sessions = set()              # of its that there were
        self._older_sessions = set()        # that have a process which is older than Codex

    @classmethod
    def create(cls, turn_id, mark):
        """Those of a turn whose Codex is still to be started."""
        turn = cls(mark)
        turn.cgroup = ControlGroup.make(turn_id, mark)
        return turn

    def begin(self, child):
        """`child` is the turn's Codex, which has no prompt yet.  Raises OSError."""
        with contextlib.suppress(OSError):  # ours is lower: the variable must do
            resource.prlimit(child.pid, RLIMIT_RTTIME, (limit_of(self.mark),) * 2)
        if self.cgroup:
            try:
                self.cgroup.add(child.pid)
            except OSError as error:
                logger.warning("a turn goes without a control group: %s", words_of(error))
                self.cgroup.remove()
                self.cgroup = None
        entry = process(child.pid)
        with _starting:
            _marks.update(self._own_marks)
        self.child, self.pid = child, child.pid
        self.started_ticks = entry.started_ticks if entry else None
        self._groups.add(child.pid)
        self._sessions.add(child.pid)

    def saved(self):
        """What from_saved() and its_engine() need: an object for JSON.  Raises OSError."""
        engine = process(os.getpid())
        return {"mark": self.mark, "boot": boot_id(),
                "engine": {"pid": os.getpid(), "started": engine and engine.started_ticks},
                "cgroup": self.cgroup and self.cgroup.folder,
                "codex": {"pid": self.pid, "started": self.started_ticks}}

    @staticmethod
    def its_engine(saved):
        """The pid of the engine that wrote down what saved() gave, if it lives, or None.  Raises
        OSError."""
        engine = saved.get("engine")
        pid = engine.get("pid") if isinstance(engine, dict) else None
        if type(pid) is not int or saved.get("boot") != (boot_id() or "unknown"):
            return None
        entry = process(pid)
        is_it = entry and entry.started_ticks == engine.get("started") and lives(pid, entry)
        return pid if is_it else None

    @classmethod
    def from_saved(cls, saved):
        """Those of a turn that another engine ran, from an object that holds what saved() gave.
        Raises ValueError if it isn't what an engine writes, and OSError."""
        mark, codex = saved.get("mark"), saved.get("codex")
        if not (isinstance(mark, str) and mark and isinstance(codex, dict)):
            raise ValueError("it doesn't tell the turn's processes")
        pid, started_ticks = codex.get("pid"), codex.get("started")
        for number in (pid, started_ticks):
            if number is not None and not (type(number) is int and 0 < number < 1 << 62):
                raise ValueError("it doesn't tell which process was Codex")
        # Pids are given again, after a boot at the same ticks, too.
        known = pid is not None and saved.get("boot") == (boot_id() or "unknown")
        turn = cls(mark, pid, started_ticks) if known else cls(mark)
        turn.cgroup = ControlGroup.saved(saved.get("cgroup"), mark)
        return turn

    # Looking

    def is_codex_there(self):
        """Whether the turn's Codex lives; False only if that is sure.  Raises OSError."""
        if self.child:
            return self.child.poll() is None
        if self.pid is None:
            return False
        entry = process(self.pid)
        if entry:
            return entry.started_ticks == self.started_ticks and lives(self.pid, entry)
        try:
            os.kill(self.pid, 0)            # it may be there and hidden, if it is our user's
        except (OSError, OverflowError):
            return False
        return True

    def find(self, kill=False):
        """The pids of the turn's living processes.  Raises OSError if they can't be told.

        `kill`: each gets SIGKILL at sight and then once more with its group.  In a chain of forks
        it would be another one a moment later.
        """
        if self.cgroup:
            return self._find_in_cgroup()
        table, found = {}, set()
        with _starting:
            self._groups = {group for group in self._groups if self._signal(group, 0)}
            for pid, entry in processes():
                table[pid] = entry
                if kill and self._has(pid, entry):
                    found.add(pid)
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            if os.getpid() not in table:
                raise FileNotFoundError(errno.ENOENT, "it doesn't show the processes", "/proc")
            self._older_sessions |= {entry.session for entry in table.values()
                                     if entry.started_ticks < (self.started_ticks or 0)}
            found |= {pid for pid, entry in table.items() if self._has(pid, entry)}
        self._add_descendants(table, found)
        if os.getpid() in found:
            raise ValueError("the turn's processes are said to be the engine's own")
        found = {pid for pid in found if lives(pid, table[pid])}
        self._seen |= {(pid, table[pid].started_ticks) for pid in found}
        self._sessions |= {table[pid].session for pid in found}
        self._groups |= {table[pid].group for pid in found} - {0, 1, os.getpgrp()}
        if kill:
            self._signal_groups(signal.SIGKILL)
        # Where a group exists and none of its processes is seen, they are hidden from us.
        return found | self._groups - {entry.group for entry in table.values()}

    def _find_in_cgroup(self):
        """Those that the kernel counts to the turn."""
        found = self.cgroup.pids()
        if os.getpid() in found:
            raise ValueError("the turn's processes are said to be the engine's own")
        for pid in found:
            with contextlib.suppress(OSError):
                self._groups.add(os.getpgid(pid))
        return found

    def _add_descendants(self, table, found):
        """Add to `found` whatever descends from it in the table."""
        children = collections.defaultdict(set)
        for pid, entry in table.items():
            children[entry.parent].add(pid)
        unvisited = list(found)
        if self.child and self.child.poll() is None:
            unvisited.append(self.pid)      # it may be hidden itself
        while unvisited:
            new = children[unvisited.pop()] - found
            found |= new
            unvisited += new

    def _has(self, pid, entry):
        """Whether a process is the turn's, going by what it is itself."""
        if (pid, entry.started_ticks) in self._seen or entry.session in self._sessions:
            return True
        if entry.started_ticks < (self.started_ticks or 0):
            return False
        if not self.child:
            return bool(self._own_marks & marks_of(pid))
        if entry.parent != os.getpid() or pid in _own_children:
            return False
        marks = marks_of(pid)
        # Process 1 is the parent of all that a container loses: there only a mark tells.
        return bool(self._own_marks & marks) or (
            os.getpid() != 1 and not marks & _marks and entry.session not in self._older_sessions)

    # Stopping

    def stop(self):
        """Stop them all, politely first; what could not be stopped, [{"pid": …, "command": …}].

        SIGINT goes to Codex alone, which (0.98 and newer) ends its command and notes in the
        rollout that the turn was aborted; then SIGTERM and at last SIGKILL go to whatever is left.
        Raises OSError if it can't be told whether anything is left, ValueError if it would be us.
        """
        try:
            self.find()
        except OSError:
            if not self.child:
                raise
        self._signal_codex(signal.SIGINT)
        _wait(lambda: not self.is_codex_there(), INTERRUPT_PATIENCE)
        self._signal_groups(signal.SIGTERM)
        if (_wait(self._is_over, TERMINATE_PATIENCE)
                or _wait(lambda: self._is_over(kill=True), KILL_PATIENCE)):
            return []
        left = self.find() | ({self.pid} if self.is_codex_there() else set())
        if not left and not self._is_over():
            raise BlockingIOError(errno.EAGAIN, "it can't be told whether the turn is over")
        return [{"pid": pid, "command": command_of(pid)} for pid in sorted(left)]

    def kill_codex(self):
        """Kill Codex, and nothing that it started."""
        self._signal_codex(signal.SIGKILL)

    def _signal_codex(self, number):
        """Signal Codex, and where that is a script that waits for the real one, that one too: what
        is in its process group and has the same standard output, or doesn't let us see it."""
        if not self.is_codex_there() or not (self.child or process(self.pid)):
            return
        codexes = {self.pid}
        with contextlib.suppress(OSError):
            stdout = self._stdout_of(self.pid)
            codexes |= {pid for pid, entry in processes()
                        if entry.group == self.pid and self._stdout_of(pid) in (stdout, None)}
        for pid in codexes:
            with contextlib.suppress(OSError):
                os.kill(pid, number)

    @staticmethod
    def _stdout_of(pid):
        """What a process has as standard output; None where we may not look, "" where it is
        gone."""
        try:
            return os.readlink("/proc/%d/fd/1" % pid)
        except OSError as error:
            return None if isinstance(error, PermissionError) else ""

    def _is_over(self, kill=False):
        """Whether nothing is left: nobody was seen, and nobody died unseen, for he may have left a
        child that is younger than the look at the processes."""
        if kill:
            self._signal_groups(signal.SIGKILL)     # also if the look fails
        there, before = self.is_codex_there(), reap_orphans()
        if self.cgroup:
            if kill:
                self.cgroup.kill()
            return not there and self.cgroup.is_empty()
        return not self.find(kill) and not there and reap_orphans() == before

    def _signal_groups(self, number):
        """Signal every process group that the turn is known to have."""
        for group in self._groups:
            self._signal(group, number)

    @staticmethod
    def _signal(group, number):
        """Signal a process group; whether there is one."""
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return False
        except PermissionError:             # somebody else's, sudo's perhaps
            pass
        return True

    def discard(self):
        """The turn has ended: what is left of it stays, and control groups without a process go.
        Raises OSError."""
        if self.cgroup:
            for cgroup in ControlGroup.all_in(os.path.dirname(self.cgroup.folder)):
                cgroup.remove()


def end_leftovers():
    """Where we are a service in a control group of its own, ask what turns left running to end, and
    give it TERMINATE_PATIENCE: the service manager kills it next."""
    parent = delegated_cgroup() if "NOTIFY_SOCKET" in os.environ else None
    if parent is None or (_look(_read, parent + "/cgroup.procs") or b"").split() != [
            b"%d" % os.getpid()]:
        return
    cgroups = ControlGroup.all_in(parent)
    for pid in set().union(*(cgroup.pids() for cgroup in cgroups)):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)
    _wait(lambda: all([cgroup.is_empty() for cgroup in cgroups]), TERMINATE_PATIENCE)


# ---------------------------------------------------------------------------------------------
# Rollouts
# ---------------------------------------------------------------------------------------------
# Codex keeps a thread in $CODEX_HOME/sessions/YYYY/MM/DD/rollout-<local time>-<thread id>.jsonl,
# or later in archived_sessions/, and may compress it to ….jsonl.zst (Codex 0.169).
#
# A rollout may have any size, and so may each of its lines; the engine's memory holds one block.
# A line that fits into it is parsed by the standard library, a longer one by JSONChecker.

def existing_rollout(plain):
    """The path of the rollout `plain`, or that of its compressed form, or None."""
    return next(filter(is_regular, (plain, plain + ".zst")), None)


def begun_at(thread_id):
    """When a thread began, by its id, in seconds since the epoch: a UUIDv7 begins with its creation
    time in ms (RFC 9562, 5.7).  None for another one."""
    match = re.match(r"([0-9a-f]{8})-([0-9a-f]{4})-7", thread_id, re.IGNORECASE)
    return match and int(match.group(1) + match.group(2), 16) / 1000


def json_line(line):
    """The JSON text (RFC 8259) of a line, or None if the line isn't JSON: without the CR of a
    CRLF, a byte order mark and blanks around it."""
    text = (line[3:] if line.startswith(codecs.BOM_UTF8) else line).strip(b" \t\r")
    try:
        json_text.decode(text.decode())
    except (ValueError, RecursionError):
        return None
    return text


def decompressed_by_program(path, packed):
    """The text that the program zstd makes of `packed`, in blocks.  Raises OSError, and
    HTTPError 500 where there is no such program."""
    program = shutil.which("zstd")
    if program is None:
        raise HTTPError(500, "The rollout is compressed",
                        "%s: install the program zstd (apt-get install zstd) to read it" % path)
    # No variable but the mark: the agent may look into its environment, and gets no secret there.
    child = start_process([program, "-dcq", "-M128MB"], stdin=packed, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, env={MARK: "engine"})
    with child.stdout:
        try:
            yield from iter(lambda: child.stdout.read(BLOCK_SIZE), b"")
        except BaseException:
            child.kill()
            raise
        finally:
            exit_status = child.wait()
    if exit_status:
        raise OSError(errno.EIO, "zstd can't decompress it: exit status %d" % exit_status, path)


def decompressed(path, packed):
    """The text of the open compressed rollout `packed`, which is the one at `path`, in blocks; in
    at most some 128 MiB of memory, whatever the file asks for.  Raises OSError, and HTTPError 500
    where there is nothing to decompress it with."""
    try:
        from compression import zstd                        # Python 3.14 and newer
    except ImportError:
        yield from decompressed_by_program(path, packed)
        return
    window = {zstd.DecompressionParameter.window_log_max: 27}
    try:
        with zstd.open(packed, options=window) as text:
            yield from iter(lambda: text.read(BLOCK_SIZE), b"")
    except (EOFError, zstd.ZstdError) as error:
        raise OSError(errno.EIO, str(error), path) from None


ROLLOUT_PROBLEMS = {                       # an error's number: status, what to do
    errno.ENOSPC: (507, "make room where CODEX_HOME lies: a compressed rollout is unpacked there"),
    errno.EDQUOT: (507, "make room where CODEX_HOME lies: a compressed rollout is unpacked there"),
    **dict.fromkeys(SHORTAGES, (503, "try again"))}


@contextlib.contextmanager
def readable_rollout(thread_id):
    """Within, an OSError becomes an HTTPError that says whose fault it is."""
    try:
        yield
    except OSError as error:
        status, advice = ROLLOUT_PROBLEMS.get(error.errno, (500, "see its file system"))
        raise HTTPError(status, "The rollout can't be read", "%s: %s: %s" % (
            error.filename or "the rollout of " + thread_id, error.strerror, advice)) from None


class RolloutReader:
    """The lines of one rollout, read from any place on.

    Places are offsets in bytes in the uncompressed text.  `end` is where its whole lines end: a
    last line without LF is still being written, and left out.  All methods raise OSError.
    """

    def __init__(self, path):
        self.path = path
        self.file = open_regular(path, buffering=0)
        self.end = 0

    def unpack(self, max_size):
        """Make the text ready to be read.  A compressed one goes into a file without a name in the
        same folder: so it need not fit into memory, and is known to be whole before it is sent.
        Raises HTTPError 413 if it has more than `max_size` bytes."""
        if self.path.endswith(".zst"):
            import tempfile                 # seldom needed, and not cheap
            with self.file as packed, contextlib.closing(decompressed(self.path, packed)) as blocks:
                self.file = tempfile.TemporaryFile(dir=os.path.dirname(self.path), buffering=0)
                for block in blocks:
                    max_size -= len(block)
                    if max_size < 0:
                        raise HTTPError(413, "The rollout is too large",
                                        "%s unpacks to more than REPLICAS_ENGINE_MAX_HISTORY allows"
                                        % self.path)
                    write_all(self.file.fileno(), block)
        self.end = os.fstat(self.file.fileno()).st_size
        self.end = find_last(self.read, b"\n", self.end) + 1

    def read(self, offset, size):
        """The `size` bytes at `offset`, or what is left of them before `end`."""
        size = min(size, self.end - offset)
        data = os.pread(self.file.fileno(), size, offset)
        if len(data) < size:
            raise OSError(errno.EIO, "it became shorter while it was read", self.path)
        return data

    def is_line(self, offset):
        """Whether a line begins, or the last one ends, at `offset`."""
        return offset == 0 or offset <= self.end and self.read(offset - 1, 1) == b"\n"

    def last_lines(self, count):
        """Where the last `count` lines of JSON begin."""
        end = self.end
        while count and end:
            begin = find_last(self.read, b"\n", max(0, end - BLOCK_SIZE)) + 1
            places = [place for place, _ in self.json_lines(begin, end)]
            if len(places) >= count:
                return places[-count]
            count -= len(places)
            end = begin
        return end

    def json_lines(self, begin, end):
        """Where it begins, and its JSON text in pieces, of each line that is JSON; `begin` and
        `end` are places where lines do."""
        while begin < end:
            data = self.read(begin, min(BLOCK_SIZE, end - begin))
            size = data.rfind(b"\n") + 1
            if not size:
                line_end = find_first(self.read, b"\n", begin + len(data))
                if self._is_json(begin, line_end):
                    yield begin, self._blocks(begin, line_end)
                begin = line_end + 1
                continue
            for line in data[:size - 1].split(b"\n"):
                text = json_line(line)
                if text is not None:
                    yield begin, (text,)
                begin += len(line) + 1

    def _is_json(self, begin, end):
        """Whether a line that is longer than a block is JSON."""
        checker = JSONChecker()
        try:
            for block in self._blocks(begin, end):
                checker.feed(block)
            return checker.is_complete()
        except ValueError:
            return False

    def _blocks(self, begin, end):
        """A line that is longer than a block, without the CR of a CRLF and a byte order mark."""
        if self.read(begin, 3) == codecs.BOM_UTF8:
            begin += 3
        if self.read(end - 1, 1) == b"\r":
            end -= 1
        for offset in range(begin, end, BLOCK_SIZE):
            yield self.read(offset, min(BLOCK_SIZE, end - offset))

    def close(self):
        """Give the file up."""
        self.file.close()


# Its groups: the name when it isn't compressed, the day, the thread's id
ROLLOUT_NAME = re.compile(r"(rollout-(\d{4}-\d\d-\d\d)T\d\d-\d\d-\d\d-(%s)\.jsonl)(?:\.zst)?"
                          % THREAD_ID)
MAX_ROLLOUT_HEAD = 1024 * 1024             # bytes in which a thread's first message is looked for
MAX_FIRST_MESSAGE = 2000                   # characters


def user_message(payload):
    """The text of a user's message that a rollout's line has as its payload, or None."""
    if payload.get("type") == "user_message":               # until 0.98
        return payload["message"]
    item = payload["item"]                                  # 0.169
    return item["type"] == "UserMessage" and "".join(
        part.get("text", "") for part in item["content"]) or None


def first_message(file):
    """The beginning of the user's first message in an open rollout, behind its first line, or None.
    """
    for line in iter(lambda: file.readline(MAX_ROLLOUT_HEAD), b""):
        if b'"user_message"' in line or b'"UserMessage"' in line:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                text = user_message(json_object(line.decode())["payload"])
                if isinstance(text, str):
                    return text[:MAX_FIRST_MESSAGE]
        if file.tell() > MAX_ROLLOUT_HEAD:
            break
    return None


def thread_summary(thread_id, path):
    """What GET /codex/threads says of the thread with that rollout.  Raises OSError, and ValueError
    if it isn't one that Codex wrote."""
    with open_regular(path) as file:
        begun = begun_at(thread_id)
        summary = {"thread_id": thread_id, "created_at": begun and timestamp(begun),
                   "updated_at": timestamp(os.fstat(file.fileno()).st_mtime),
                   "session_file": path, "first_message": None}
        if not path.endswith(".zst"):       # what is in those is not worth a process each
            meta = json_object(file.readline(MAX_ROLLOUT_HEAD).decode())
            if meta.get("type") != "session_meta":
                raise ValueError("its first line is another one")
            written = meta.get("timestamp")
            if isinstance(written, str) and TIMESTAMP.fullmatch(written):
                summary["created_at"] = written
            summary["first_message"] = first_message(file)
    return summary


class Rollouts:
    """Finds the threads' rollout files under `codex_home`, and finds them again when moved."""

    def __init__(self, codex_home):
        self.sessions = os.path.join(codex_home, "sessions")
        self.archive = os.path.join(codex_home, "archived_sessions")
        self._found = (None, None)              # (thread id, path without .zst) of the last one

    def open(self, thread_id):
        """A RolloutReader of the thread's rollout, or None if there is no file.  Raises OSError."""
        while True:
            path = self.find(thread_id)
            with contextlib.suppress(FileNotFoundError, ValueError):    # moved this moment
                return path and RolloutReader(path)

    def find(self, thread_id):
        """The path of the thread's rollout, or None.  Raises HTTPError if it can't be told."""
        found_id, plain = self._found
        with readable_rollout(thread_id):
            return (found_id == thread_id and existing_rollout(plain)) or self._search(thread_id)

    def _search(self, thread_id):
        """Look for the thread's file wherever Codex may have put it."""
        # Twice among the days: it may be taken out of the archive meanwhile.
        for folder in itertools.chain(self._days(), [self.archive], self._days()):
            for name in list_folder(folder):
                match = thread_id in name and ROLLOUT_NAME.fullmatch(name)  # the first is cheap
                if match and match.group(3) == thread_id:
                    plain = os.path.join(folder, match.group(1))
                    if existing_rollout(plain):
                        self._found = (thread_id, plain)
                        return existing_rollout(plain)
        return None

    def find_known(self, thread_id):
        """The path of the thread's rollout.  Raises HTTPError 404 if Codex has none here."""
        path = self.find(thread_id)
        if path is None:
            raise HTTPError(404, "No such thread", "Codex has no rollout of %s here: see "
                            "GET /codex/threads" % thread_id)
        return path

    def threads(self, limit, before=None):
        """The summaries of at most `limit` threads, the newest first, of those that began before
        the thread `before`.  What can't be read is left out.  Raises HTTPError 404."""
        end = before and os.path.basename(self.find_known(before))
        last_day, found = end and ROLLOUT_NAME.fullmatch(end).group(2), {}
        days = (day for day in self._days()     # a rollout's name begins with that of its folder
                if end is None or day[-len("2026/01/31"):].replace("/", "-") <= last_day)
        archived = self._names([self.archive])
        for name, path in heapq.merge(self._names(days), archived, reverse=True):
            thread_id = ROLLOUT_NAME.fullmatch(name).group(3)
            if len(found) == limit:
                break
            if thread_id not in found and (end is None or name < end and thread_id != before):
                with contextlib.suppress(OSError, ValueError, RecursionError):
                    found[thread_id] = thread_summary(thread_id, path)
        return list(found.values())

    @staticmethod
    def _names(folders):
        """(name, path) of the rollouts in the folders, the last name of each first."""
        for folder in folders:
            for name in sorted(filter(ROLLOUT_NAME.fullmatch, list_folder(folder)), reverse=True):
                yield name, os.path.join(folder, name)

    def _days(self):
        """The folders of all days, the last one first."""
        for year in sorted(list_folder(self.sessions), reverse=True):
            for month in sorted(list_folder(os.path.join(self.sessions, year)), reverse=True):
                days = os.path.join(self.sessions, year, month)
                for day in sorted(list_folder(days), reverse=True):
                    yield os.path.join(days, day)


# ---------------------------------------------------------------------------------------------
# History
# ---------------------------------------------------------------------------------------------

class HistoryPage:
    """A WSGI body: the answer of `GET /codex/history`, from the line at `begin` on.

    `limit` is the largest number of lines, or None; `coding` is called with the body's pieces.
    """

    def __init__(self, thread_id, reader, begin, limit, coding=iter):
        self.thread_id = thread_id
        self.reader = reader
        self.begin = begin
        self.limit = limit
        self.coding = coding

    def __iter__(self):
        return self.coding(joined(self._pieces()))

    def _pieces(self):
        """The answer in small pieces: the head, the lines and commas, the cursor."""
        yield b'{"thread_id":%b,"events":[' % json_bytes(self.thread_id)
        end = {"cursor": "%s.%d" % (self.thread_id, self.reader.end)}
        lines = self.reader.json_lines(self.begin, self.reader.end)
        for count, (place, pieces) in enumerate(lines):
            if count == self.limit:
                end = {"cursor": "%s.%d" % (self.thread_id, place), "has_more": True}
                break
            if count:
                yield b","
            yield from pieces
        yield b"]," + json_bytes(end)[1:]

    def close(self):
        """For the server, when it is done with the page (PEP 3333)."""
        self.reader.close()


def cursor_is_gone(why):
    """The error for a cursor that the history can't go on from."""
    return HTTPError(410, "Cursor is gone", "after %s: read the history from its beginning" % why)


def history_query(query, thread_id):
    """(tail, limit, offset) of `GET /codex/history`: two numbers of lines or None, and the place
    that `after` names.  Raises HTTPError 400 or 410."""
    tail, limit = whole_number(query, "tail"), whole_number(query, "limit", least=1)
    if "after" not in query:
        return tail, limit, 0
    if tail is not None:
        raise bad_parameter("tail", "and after exclude each other")
    match = re.fullmatch(r"(%s)\.([0-9]{1,15})" % THREAD_ID, query["after"])
    if not match:
        raise bad_parameter("after", "must be a cursor that GET /codex/history gave")
    if match.group(1) != thread_id:
        raise cursor_is_gone("is of another thread")
    return None, limit, int(match.group(2))


def entity_tag(reader, request):
    """A weak validator (RFC 9110, 8.8.1), since what is sent may be compressed."""
    query = request.environ.get("QUERY_STRING", "")
    status = os.fstat(reader.file.fileno())
    identity = "%s %s %d %d %d" % (reader.path, query, status.st_ino, status.st_size,
                                   status.st_mtime_ns)
    return 'W/"%s"' % hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def matches(condition, tag):
    """RFC 9110, 13.1.2: whether If-None-Match names the entity tag, compared weakly."""
    if condition is None:
        return False
    tags = re.findall(r'(?:W/)?("[^"]*")', condition)
    return condition.strip() == "*" or tag[len("W/"):] in tags


def history_response(request, rollouts, thread_id, max_size):
    """The answer to `GET /codex/history` while `thread_id` is the current thread, or None; a
    compressed rollout may have at most `max_size` bytes."""
    tail, limit, offset = history_query(request.query(), thread_id)
    if thread_id is None:
        return json_response({"message": "No active thread", "thread_id": None, "events": []})
    with readable_rollout(thread_id), contextlib.ExitStack() as stack:
        reader = rollouts.open(thread_id)
        if reader is None and offset:
            raise cursor_is_gone("is beyond the end")
        if reader is None:
            return json_response({"thread_id": thread_id, "events": [],
                                  "cursor": "%s.0" % thread_id})
        stack.callback(reader.close)
        headers = [("Content-Type", "application/json"), ("Vary", "Accept-Encoding"),
                   ("Cache-Control", "private, no-cache"), ("ETag", entity_tag(reader, request))]
        if matches(request.header("If-None-Match"), headers[-1][1]):
            return Response([], 304, headers[1:])
        reader.unpack(max_size)
        begin = offset if tail is None else reader.last_lines(tail)
        if not reader.is_line(begin):
            raise cursor_is_gone("is not a place in this thread's history")
        coding = iter
        if accepts_gzip(request):
            headers.append(("Content-Encoding", "gzip"))
            coding = compress
        stack.pop_all()                     # its text is still to be sent
        return Response(HistoryPage(thread_id, reader, begin, limit, coding), 200, headers)


# ---------------------------------------------------------------------------------------------
# Codex: finding it, its arguments, its environment
# ---------------------------------------------------------------------------------------------

# systemd.exec(5), "Environment Variables Set on Processes", and sd_notify(3), sd_listen_fds(3)
SYSTEMD_VARIABLES = frozenset("""
    CACHE_DIRECTORY CONFIGURATION_DIRECTORY CREDENTIALS_DIRECTORY EXIT_CODE EXIT_STATUS FDSTORE
    INVOCATION_ID JOURNAL_STREAM LISTEN_FDNAMES LISTEN_FDS LISTEN_PID LISTEN_PIDFDID
    LOGS_DIRECTORY MAINPID MANAGERPID MANAGERPIDFDID MEMORY_PRESSURE_WATCH MEMORY_PRESSURE_WRITE
    MONITOR_EXIT_CODE MONITOR_EXIT_STATUS MONITOR_INVOCATION_ID MONITOR_SERVICE_RESULT
    MONITOR_UNIT NOTIFY_SOCKET PIDFILE REMOTE_ADDR REMOTE_PORT RUNTIME_DIRECTORY SERVICE_RESULT
    STATE_DIRECTORY SYSTEMD_EXEC_PID TRIGGER_PATH TRIGGER_TIMER_MONOTONIC_USEC
    TRIGGER_TIMER_REALTIME_USEC TRIGGER_UNIT WATCHDOG_PID WATCHDOG_USEC""".split())
LISTENING_VARIABLES = frozenset(("HOST", "PORT"))   # the engine's: an agent's server wants its own

# Where npm, and what manages Node versions, put the programs of globally installed packages.
GLOBAL_PLACES = ("/usr/local/bin", "/usr/bin", "~/.npm-global/bin", "~/.local/bin", "~/.volta/bin",
                 "~/.bun/bin", "~/.local/share/pnpm", "/opt/nodejs/bin", "/snap/bin")
NODE_VERSIONS = ("~/.nvm/versions/node", "~/.local/share/fnm/node-versions",
                 "/usr/local/n/versions")

# Mount points that the sandbox of Codex 0.169 makes while a command runs, and leaves when Codex is
# stopped meanwhile; an empty .git keeps git from cloning into the workspace.
SANDBOX_MOUNTS = (".git", ".agents", ".aws", ".codex")

PLATFORMS = {"x86_64": ("x86_64-unknown-linux-musl", "codex-linux-x64"),
             "aarch64": ("aarch64-unknown-linux-musl", "codex-linux-arm64")}

VERSION_PATIENCE = 5.0                     # seconds that `codex --version` may take

HOW_TO_INSTALL = ("install it with `npm install -g @openai/codex`, "
                  "or set CODEX_PATH to the program")


class Codex:
    """A Codex CLI: the `program` to run, the folder of programs that it wants on its PATH, or None,
    and its `version`, such as "0.169.0", where it was asked."""

    def __init__(self, program, path_folder=None):
        self.program = program
        self.path_folder = path_folder
        self.version = None


def is_program(path):
    """Whether there is an executable file."""
    return os.path.isfile(path) and os.access(path, os.X_OK)


def native_codex(program):
    """The Codex behind npm's wrapper script `program` (a real path), or None.

    The wrapper is a Node script that costs 44 MB a turn and, killed, orphans the real process.
    Up to 0.98 the binary lies in the package itself, later in an optional dependency.
    """
    triple, dependency = PLATFORMS.get(os.uname().machine, (None, None))
    package = os.path.dirname(os.path.dirname(program))
    if triple is None or not program.endswith(".js"):
        return None
    vendors, folder = [os.path.join(package, "vendor")], package
    while folder != os.path.dirname(folder):            # as Node resolves a package's dependency
        vendors.append(os.path.join(folder, "node_modules", "@openai", dependency, "vendor"))
        folder = os.path.dirname(folder)
    for vendor in vendors:
        for binary, programs in (("bin/codex", "codex-path"), ("codex/codex", "path")):
            native = os.path.join(vendor, triple, binary)
            if is_program(native):
                return Codex(native, os.path.join(vendor, triple, programs))
    return None


def codex_environment(settings, codex, mark, with_key=True):
    """The environment for a Codex process: ours without what is the engine's or systemd's.

    CODEX_API_KEY is the only variable with a key that Codex reads (0.50 to 0.169).
    """
    own = SYSTEMD_VARIABLES | LISTENING_VARIABLES
    env = {name: value for name, value in settings.inherited.items()
           if name not in own and not name.startswith("REPLICAS_ENGINE_")}
    if not with_key:
        for name in KEYS:
            env.pop(name, None)
    elif settings.key:
        env["CODEX_API_KEY"] = settings.key
    env["CODEX_HOME"] = settings.codex_home
    env["HOME"] = settings.home
    env[MARK] = mark
    if codex.path_folder:
        env["PATH"] = codex.path_folder + os.pathsep + (env.get("PATH") or os.defpath)
    return env


def config_argument(key, value):
    """`--config key=value` with `value`, a string or a boolean, quoted as TOML."""
    return ["--config", "%s=%s" % (key, json.dumps(value, ensure_ascii=False)
                                   .replace("\x7f", "\\u007f"))]


def base_url_arguments(settings):
    """What tells Codex of another API: 0.50 and 0.98 take the variable, 0.169 only this."""
    url = settings.env.get("OPENAI_BASE_URL")
    return config_argument("openai_base_url", url) if url else []


def codex_arguments(settings, codex, options, thread_id):
    """The command line of a turn: every option goes before `resume`, an image behind it."""
    resume = ["resume", thread_id] if thread_id else []
    images = [word for path in options.images for word in ("--image", path)]
    return [codex.program, "exec", "--json", "--skip-git-repo-check", "--cd", settings.workspace,
            *base_url_arguments(settings), *options.arguments, *resume, *images]


class CodexFinder:
    """Finds the Codex CLI anew whenever it is asked, since it may be installed or updated while the
    engine runs, and remembers the version of the last one."""

    def __init__(self, settings):
        self.settings = settings
        self._version = (None, None)        # which file it is of, and what that said
        self._asking = threading.Lock()     # one thread at a time asks for it

    def find(self):
        """The Codex to run.  Raises HTTPError 503 with what to do."""
        chosen = self.settings.codex_path
        if chosen and not is_program(chosen):
            raise unavailable("Codex CLI not found",
                              "CODEX_PATH=%s is not an executable file" % chosen)
        program = chosen or shutil.which("codex", path=self.settings.env.get("PATH", os.defpath))
        with explained("Codex CLI can't be looked for", "try again, or set CODEX_PATH"):
            program = program or next(filter(is_program, self._global_places()), None)
        if program is None:
            raise unavailable("Codex CLI not found", HOW_TO_INSTALL)
        return native_codex(os.path.realpath(program)) or Codex(os.path.abspath(program))

    def _global_places(self):
        """Where npm and its like put a program that is installed for everybody."""
        for folder in GLOBAL_PLACES:
            yield os.path.join(self._expand(folder), "codex")
        for folder in map(self._expand, NODE_VERSIONS):
            for version in sorted(list_folder(folder), reverse=True):
                yield os.path.join(folder, version, "bin", "codex")
                yield os.path.join(folder, version, "installation", "bin", "codex")

    def _expand(self, folder):
        """A path with the home of the engine's user in place of ~."""
        return self.settings.home + folder[1:] if folder.startswith("~") else folder

    def version(self, codex):
        """What `codex --version` says, such as "0.169.0", or None if it doesn't."""
        try:
            identity = self._identity(codex)
            with self._asking:
                if self._version[0] != identity:    # None is remembered: it may have cost seconds
                    self._version = (identity, self._ask_version(codex))
                return self._version[1]
        except OSError:
            return None

    def ask_again(self):
        """Ask a Codex that didn't say its version: the machine may have been busy.  Whoever needs
        the version meanwhile does not wait."""
        with contextlib.suppress(HTTPError, OSError):
            codex = self.find()
            unsaid = (self._identity(codex), None)
            if self._version == unsaid:
                version = self._ask_version(codex)
                with self._asking:
                    if self._version == unsaid:
                        self._version = (unsaid[0], version)

    @staticmethod
    def _identity(codex):
        """What tells a Codex from an upgraded one.  Raises OSError."""
        file = os.stat(codex.program)
        return codex.program, file.st_ino, file.st_size, file.st_mtime_ns

    def _ask_version(self, codex):
        """Run `codex --version`: what it says, or None."""
        child = start_process([codex.program, "--version"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env=codex_environment(self.settings, codex, "engine"))
        with child:
            answered = readable(child.stdout, VERSION_PATIENCE)
            output = os.read(child.stdout.fileno(), 1000) if answered else b""
            os.killpg(child.pid, signal.SIGKILL)    # it may be a script that waits for another
        match = re.search(rb"(?im)(?:codex.*?\bv?|^v?)([0-9]+\.[0-9]+\.[0-9]+[-+.0-9A-Z]*)", output)
        return match.group(1).decode() if match else None


# ---------------------------------------------------------------------------------------------
# Turn options
# ---------------------------------------------------------------------------------------------
# What POST /codex/send takes beside the message: TURN_OPTIONS, below.  A check gets the value and
# the settings and returns what goes to Codex, or raises ValueError with what is wrong with it.

# What Codex 0.50 can't do: of 60 turns with an image, in every form of the command line, 48 hung.
FIRST_WITH_IMAGES = (0, 98)
FIRST_LIVE = (0, 98)                       # of the app-server's protocol that we speak
FIRST_TO_EXCLUDE_TURNS = (0, 151)          # in it; some before refuse a request that wants it
FIRST_TO_CUT_IN = (0, 162)                 # at once; before, an interrupt may lose the message
MAX_IMAGES = 100                           # of a turn; the command line has to hold their names
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra",
                     "persistent")
# The first version of Codex that knows it, where not every one does.  From 0.138 on Codex takes any
# word, and hands one that it doesn't know on to the model.
FIRST_WITH_EFFORT = {"none": (0, 58), "xhigh": (0, 59), "max": (0, 138), "ultra": (0, 143),
                     "persistent": (0, 151)}
IMAGE_TYPES = ((rb"\x89PNG\r\n\x1a\n", "png"), (rb"\xff\xd8\xff", "jpg"),
               (rb"GIF8[79]a", "gif"), (rb"RIFF....WEBP", "webp"))


# Something that Codex takes only as a file, which is there while its turn runs
TurnFile = collections.namedtuple("TurnFile", "name data")


def _write_turn_file(word, folder):
    """A word of the command line: a TurnFile becomes its path in `folder`."""
    if not isinstance(word, TurnFile):
        return word
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, word.name)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(word.data)
    return path


def _name(value, settings):
    """The name of a model, as it is."""
    if not isinstance(value, str):
        raise ValueError("must be a string")
    problem = not_a_name(value)
    if problem:
        raise ValueError(problem)
    return value


def _one_of(*values):
    """A check that lets only those words through."""
    def accept(value, settings):
        if value not in values or not isinstance(value, str):
            raise ValueError("must be one of %s" % ", ".join(values))
        return value
    return accept


def _boolean(value, settings):
    """true or false, as it is."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _schema(value, settings):
    """A JSON Schema, which Codex takes as a file."""
    if not isinstance(value, dict):
        raise ValueError("must be an object: a JSON Schema")
    try:
        text = json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError("has a number beyond all bounds, or is nested too deeply") from None
    return TurnFile("schema.json", text.encode())


def _image_of_url(url, settings):
    """The bytes in a data: URL (RFC 2397)."""
    head, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/[a-z0-9.+-]+;base64", head, re.IGNORECASE):
        raise ValueError("must begin with data:image/<type>;base64,")
    try:
        from base64 import b64decode        # wanted by few turns
        return b64decode(data, validate=True)
    except ValueError:
        raise ValueError("is not base64 (RFC 4648, 4)") from None


def _image_of_path(path, settings):
    """The bytes of a file in the workspace; a link must not lead out of it."""
    if "\0" in path or not 1 <= len(path) <= 4096:      # PATH_MAX, <linux/limits.h>
        raise ValueError("is not a path")
    workspace = os.path.realpath(settings.workspace)
    real = os.path.realpath(os.path.join(workspace, path))
    if os.path.commonpath((workspace, real)) != workspace:
        raise ValueError("lies outside the workspace")
    try:
        with open_regular(real) as file:
            return file.read(settings.max_body + 1)
    except ValueError:
        raise ValueError("is not a regular file") from None


def _image(image, settings):
    """The bytes of an image that is given by path or URL, and the type that they say it has."""
    if re.match(r"[a-z]+://", image, re.IGNORECASE):
        raise ValueError("must be a path in the workspace, or a data: URL")
    try:
        read = _image_of_url if image[:5].lower() == "data:" else _image_of_path
        data = read(image, settings)
    except OSError as error:
        raise ValueError(error.strerror) from None
    for pattern, kind in IMAGE_TYPES:
        if re.match(pattern, data, re.DOTALL):
            return data, kind
    raise ValueError("is not a PNG, JPEG, GIF or WebP image")


def _images(value, settings):
    """The images as files: Codex takes no URL, and would take a path anywhere on the machine."""
    if not isinstance(value, list) or not all(isinstance(image, str) for image in value):
        raise ValueError("must be a list of paths and data: URLs")
    if len(value) > MAX_IMAGES:
        raise ValueError("must be at most %d" % MAX_IMAGES)
    if value and "," in settings.state:         # where Codex would split the files' names, silently
        raise ValueError("need a state directory without a comma: see REPLICAS_ENGINE_STATE")
    files, room = [], settings.max_body         # bytes that they may still have together
    for number, image in enumerate(value, 1):
        try:
            data, kind = _image(image, settings)
            room -= len(data)
            if room < 0:
                raise ValueError("makes more than %d bytes" % settings.max_body)
        except ValueError as error:
            raise ValueError("number %d: %s" % (number, error)) from None
        files.append(TurnFile("image-%d.%s" % (number, kind), data))
    return files


def _thread(value, settings):
    """The id of a thread to go on with, or None for a new one."""
    if value is not None and not is_thread_id(value):
        raise ValueError("must be the id of a thread, or null")
    return value


def _web_search(value):
    """Web search on or off, in words that every version understands."""
    # 0.50 knows tools.web_search; newer versions know web_search, and pass over the other one.
    return (config_argument("tools.web_search", value)
            + config_argument("web_search", "live" if value else "disabled"))


# A key of the request; (value, settings) -> what goes to Codex; what goes to Codex -> words of its
# command line; what goes to Codex -> the first version that can do it, or None for every one.
TurnOption = collections.namedtuple("TurnOption", "key check arguments since",
                                    defaults=[lambda value: [], lambda value: None])
TURN_OPTIONS = (
    TurnOption("model", _name, lambda model: ["--model=" + model]),
    TurnOption("reasoning_effort", _one_of(*REASONING_EFFORTS),
               lambda effort: config_argument("model_reasoning_effort", effort),
               FIRST_WITH_EFFORT.get),
    TurnOption("sandbox_mode", _one_of(*SANDBOX_MODES), lambda mode: ["--sandbox", mode]),
    TurnOption("network_access", _boolean,
               lambda on: config_argument("sandbox_workspace_write.network_access", on)),
    TurnOption("web_search", _boolean, _web_search),
    TurnOption("output_schema", _schema, lambda file: ["--output-schema", file]),
    TurnOption("deltas", _boolean, since=lambda on: FIRST_LIVE if on else None),
    TurnOption("thread_id", _thread),
    TurnOption("when_busy", _one_of("reject", "queue", "steer")),
    TurnOption("images", _images, lambda files: files,
               lambda files: FIRST_WITH_IMAGES if files else None),
)


class TurnOptions:
    """The message of one turn, and its options as Codex's arguments, TurnFiles still among them;
    `images` has the images' files alone.

    Raises HTTPError 400 that names the key whose value can't be used.
    """

    def __init__(self, body, settings):
        self.body = body
        self.message = body.get("message")
        defaults = {"model": settings.model, "sandbox_mode": settings.sandbox,
                    "deltas": settings.deltas}
        self.arguments, self.images, self.since, self.values = [], [], {}, {}
        for option in TURN_OPTIONS:
            value = body.get(option.key, defaults.get(option.key))
            if value is None and option.key not in body:
                continue
            try:
                checked = option.check(value, settings)
            except ValueError as error:
                raise bad_parameter(option.key, str(error)) from None
            self.values[option.key] = checked
            words = self.images if option.key == "images" else self.arguments
            words.extend(option.arguments(checked))
            if option.key in body and option.since(checked):
                self.since[option.key] = option.since(checked)

    @property
    def when_busy(self):
        """What to do with the message while a turn is in progress."""
        return self.values.get("when_busy", "reject")

    def thread_id(self, current):
        """The thread to go on with, where `current` is the current one."""
        return self.values.get("thread_id", current)

    def saved(self):
        """A body that makes the same options later, though an image's file may be gone: bytes."""
        from base64 import b64encode        # wanted by few turns
        urls = ["data:image/%s;base64,%s" % (file.name.rpartition(".")[2],
                                             b64encode(file.data).decode())
                for file in self.images]
        return json.dumps(dict(self.body, images=urls)).encode()

    def is_live(self, version):
        """Whether the turn goes through the app-server of a Codex of that version, or None."""
        return bool(self.values.get("deltas")) and version is not None and version >= FIRST_LIVE

    def write_files(self, folder):
        """Put every TurnFile into `folder`, which is made if need be, and its path in its place."""
        self.arguments = [_write_turn_file(word, folder) for word in self.arguments]
        self.images = [_write_turn_file(word, folder) for word in self.images]


# ---------------------------------------------------------------------------------------------
# Driving Codex: exec
# ---------------------------------------------------------------------------------------------
# A driver says what to run, what to write to it, and which events the lines are that it prints.  It
# knows nothing of processes, logs and deadlines; it has one run of Codex, and is made anew for
# another.

def _well_formed(text):
    """`text` with lone surrogates, which JSON can carry and UTF-8 can't, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Steer:
    """A message that is to cut into a running turn.  Whether it did is decided once."""

    def __init__(self, message):
        self.message = _well_formed(message)
        self.offset = None                  # in the turn's log, where its event comes or behind it
        self.refusal = None                 # why it didn't cut in, once it is answered
        self.answered = threading.Event()
        self.settled = threading.Event()    # and what follows from the answer is noted

    def answer(self, refusal=None):
        """It has cut in, or was refused for that reason."""
        self.refusal = refusal
        self.answered.set()


TOO_LATE = "the turn ended before it: send it as a message of its own"
TOO_OLD = "Codex before %d.%d may lose a message that cuts in" % FIRST_TO_CUT_IN


class Steers:
    """The messages that are to cut into a turn, between their senders and the turn's thread."""

    def __init__(self, lock):
        self.lock = lock                    # the conversation's; guards the next
        self.waiting = queue.SimpleQueue()  # of Steers; None once the turn takes no more

    def put(self, steer):
        """Have a Steer answered, once the turn's alarm is rung; to be called with the lock."""
        if self.waiting is not None:
            self.waiting.put(steer)
        else:
            steer.answer(TOO_LATE)

    def pass_on(self, run, log, is_over):
        """Hand on what is to cut in, when Codex has begun with the turn's own message."""
        while run.driver.begun and not self.waiting.empty():
            steer = self.waiting.get()
            steer.offset = log.size
            if is_over:
                steer.answer(TOO_LATE)
            else:
                run.send(run.driver.steer(steer))

    def close(self, run):
        """No message cuts into this turn any more; its CodexRun, if there was one, answers none."""
        with self.lock:
            waiting, self.waiting = self.waiting, None
        while not waiting.empty():
            waiting.get().answer(TOO_LATE)
        for steer in run.driver.steers.values() if run else ():
            steer.answer("Codex ended before it answered: see GET /codex/history for whether the "
                         "message is in the thread")


class Refused(Exception):
    """The app-server doesn't take the turn, or speaks a protocol that we don't know; nothing was
    begun."""


class Exec:
    """A turn by way of `codex exec`: the message goes in, and every line that comes is an event.

    `arguments` is the command line.  What every driver has: `accepted`, whether the turn was begun;
    `begun`, whether its first events have come; `over`, whether nothing more is to be written, so
    that standard input is closed; `ended_at`, when the turn ended, while its last events still wait
    (by time.monotonic); `steers`, those that wait for an answer; `pending_since` and `flush` for
    events that wait to be joined, `finish` for those that wait for the exit.
    """

    accepted = begun = True
    over = True                             # but for the message
    needs_key = True                        # in its environment
    pending_since = ended_at = None
    steers = {}

    def __init__(self, settings, codex, options, thread_id, message):
        self.arguments = codex_arguments(settings, codex, options, thread_id)
        self._message = _well_formed(message).encode()

    def input(self):
        """What to write at the start."""
        return self._message

    def lines(self, line):
        """The events in a line of standard output, (type, data, value) each, the first two bytes;
        and what to write.  Raises ValueError if it isn't one that a client can get."""
        if not line.isascii():
            try:
                check_utf8(line)
            except UnicodeDecodeError:
                line = line.decode("utf-8", "replace").encode()
                if len(line) > MAX_EVENT:
                    raise ValueError("too long with its bytes replaced") from None
        try:
            value = json_text.decode(line.decode("latin-1"))    # a byte a character
            fit = EVENT_TYPE.fullmatch(value["type"]) and value["type"] != "done"   # that is ours
        except (TypeError, KeyError, RecursionError):
            fit = False
        if not fit:
            raise ValueError("not an event")
        # A CR can but be white space there, and would be a line end in an event stream.
        return [(value["type"].encode(), line.replace(b"\r", b" "), value)], b""

    def interrupt(self):
        """What to write to have the turn interrupted: that can't be asked."""
        return b""

    def steer(self, steer):
        """What to write to have a Steer cut in: nothing, and it is answered."""
        steer.answer("the turn in progress isn't live: start turns with \"deltas\": true")
        return b""

    def finish(self):
        """No event waits for the exit."""
        return []


# ---------------------------------------------------------------------------------------------
# The app-server's items
# ---------------------------------------------------------------------------------------------
# What the app-server tells of a thing that Codex does, in the words of exec.

# A notification with a delta: the type of its item, and where its text goes.
DELTAS = {"item/agentMessage/delta": ("agent_message", "text_delta"),
          "item/reasoning/summaryTextDelta": ("reasoning", "text_delta"),
          "item/commandExecution/outputDelta": ("command_execution", "output_delta")}
# Items that exec says nothing of.
SILENT = {"userMessage", "hookPrompt", "functionCallOutput", "plan", "dynamicToolCall",
          "subAgentActivity", "imageView", "sleep", "imageGeneration", "enteredReviewMode",
          "exitedReviewMode", "contextCompaction"}


def _change(change):
    """A changed file, without its diff."""
    return {"path": change["path"], "kind": change["kind"]["type"]}


def _mcp_result(result):
    """An MCP tool's result, or None."""
    return result and {"content": result["content"],
                       "structured_content": result.get("structuredContent")}


def _search(action):
    """What was searched for: keys without a value are left out."""
    action = {key: value for key, value in (action or {}).items() if value is not None}
    return dict(action, type=_snake(action.get("type", "other")))


def _agents(states):
    """The states of agents, by their threads."""
    return {thread_id: dict(state, status=_snake(state["status"]))
            for thread_id, state in states.items()}


# The items that exec tells of: their type there, and how it has what isn't just called otherwise.
# Of the first two it tells at their end only.
AT_THEIR_END = ("agentMessage", "reasoning")
ITEMS = {
    "agentMessage": ("agent_message", {"text": str}),
    "reasoning": ("reasoning", {"summary": "\n".join}),
    "commandExecution": ("command_execution", {
        "command": str, "aggregatedOutput": lambda output: output or "", "exitCode": None,
        "status": _snake}),
    "fileChange": ("file_change", {
        "changes": lambda changes: list(map(_change, changes)),
        "status": lambda status: "failed" if status == "declined" else _snake(status)}),
    "mcpToolCall": ("mcp_tool_call", {
        "server": None, "tool": None, "arguments": None, "result": _mcp_result, "error": None,
        "status": _snake}),
    "webSearch": ("web_search", {"query": None, "action": _search}),
    "collabAgentToolCall": ("collab_tool_call", {
        "tool": _snake, "senderThreadId": None, "receiverThreadIds": None, "prompt": None,
        "agentsStates": _agents, "status": _snake}),
}


def _exec_item(item, number):
    """An item of the app-server's as exec prints it."""
    kind, fields = ITEMS.get(item["type"]) or (
        _snake(item["type"]), dict.fromkeys(key for key in item if key not in ("id", "type")))
    told = {"id": number, "type": kind}
    for key, convert in fields.items():
        value = item.get(key)
        told["text" if key == "summary" else _snake(key)] = convert(value) if convert else value
    return told


def _event(kind, **fields):
    """An event of that type: (type, data, value)."""
    value = dict(type=kind, **fields)
    return kind.encode(), json_bytes(value), value


def _with_details(error):
    """An error's message, with its details in brackets."""
    details = error.get("additionalDetails")
    return "%s (%s)" % (error["message"], details) if details else error["message"]


def _request(number, method, **params):
    """A request's line; what is None isn't set, and left out."""
    params = {key: value for key, value in params.items() if value is not None}
    return json_bytes({"id": number, "method": method, "params": params}) + b"\n"


# ---------------------------------------------------------------------------------------------
# Driving Codex: app-server
# ---------------------------------------------------------------------------------------------
# JSON-RPC over stdio, an object a line, which tells of a turn while it goes on.  Only methods and
# notifications are used that are stable and the same in 0.98 and 0.169.

DELTA_PAUSE = 0.05                         # seconds between two events with deltas, at least, but
MAX_JOINED = 4 * 1024                      # for so many bytes, or another event that goes out
MAX_DELTAS = 8 * 1024 * 1024               # bytes of a turn's deltas, which then end

# Ids of requests; a steer's is above STEER
INITIALIZE, LOGIN, CONFIG, THREAD, TURN, INTERRUPT, STEER = range(1, 8)


def _provider(config):
    """The name of the model provider in Codex's configuration, as config/read gives it; in 0.98 it
    may have profiles."""
    profile = (config.get("profiles") or {}).get(config.get("profile")) or {}
    return profile.get("model_provider") or config.get("model_provider") or "openai"


class AppServer:
    """A turn by way of `codex app-server`.

    `accepted` is whether the turn was begun: before that nothing has come of the message, and it
    may take another way.  `over` is whether it has ended: standard input is to be closed then.
    """

    needs_key = False                       # in its environment, where the agent would see it

    def __init__(self, settings, codex, options, thread_id, message):
        self._key = settings.key
        self.arguments = [codex.program, *base_url_arguments(settings)]
        if self._key:                       # it is written nowhere; without a key it hides a login
            self.arguments += config_argument("cli_auth_credentials_store", "ephemeral")
        self.arguments.append("app-server")
        self.thread_id = thread_id
        self.turn_id = None
        self.begun = False
        self.over = False
        self.ended_at = None
        self.steers = {}                    # id of the request -> Steer
        self.pending_since = None           # since when DELTA_PAUSE runs, if deltas wait for it
        self._workspace = settings.workspace
        self._options = options
        self._message = _well_formed(message)
        self._version = version_numbers(codex.version) or ()
        # The answer to a resume may be the whole thread, 18 MB, and says nothing new.
        self._unread = (b'{"method":"codex/event/',) + (
            (b'{"id":%d,"result":' % THREAD,) if thread_id else ())
        self._early = []                    # events that wait for the first
        self._asked = {INITIALIZE, LOGIN, CONFIG, THREAD, TURN}     # and not yet answered
        self._interrupted = False
        self._last_id = STEER
        self._items = {}                    # that are in progress: id -> number, once it is told
        self._told = 0                      # items
        self._todo = None                   # the todo list's item
        self._usage = {"input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 0}
        self._deltas = {}                   # that wait: (item's id, type, key) -> texts
        self._joined = 0                    # bytes of them
        self._room = MAX_DELTAS
        self._part = None                   # the last delta's part of a reasoning's summary
        self._flushed_at = float("-inf")    # of time.monotonic
        self._ending = []                   # waits for the steers' answers

    # What to write

    @property
    def accepted(self):
        """Whether the app-server has begun the turn."""
        return self.turn_id is not None

    def input(self):
        """What to write at the start; more comes from `lines`."""
        start = _request(INITIALIZE, "initialize", clientInfo={
            "name": "replicas_engine", "title": "Replicas Engine", "version": "1"})
        start += b'{"method":"initialized"}\n'
        if self._key:           # 0.169 often fails a thread/start that comes before the answer
            return start + _request(LOGIN, "account/login/start", type="apiKey", apiKey=self._key)
        return start + self._open_thread()

    def _open_thread(self):
        """Start the thread, or resume it.

        A resume that names neither model nor effort nor provider takes those of the thread's turn
        before, in 0.169; with a provider, Codex has its own.
        """
        values = self._options.values
        if self.thread_id is None:
            return _request(THREAD, "thread/start", **self._thread_params())
        if values.get("model") or values.get("reasoning_effort"):
            return self._resume()
        return _request(CONFIG, "config/read", cwd=self._workspace)

    def _thread_params(self):
        """What starting and resuming a thread have in common."""
        values = self._options.values
        config = {"model_reasoning_effort": values.get("reasoning_effort"),
                  "sandbox_workspace_write.network_access": values.get("network_access"),
                  "web_search": {True: "live", False: "disabled"}.get(values.get("web_search"))}
        config = {key: value for key, value in config.items() if value is not None}
        return dict(cwd=self._workspace, approvalPolicy="never", model=values.get("model"),
                    sandbox=values.get("sandbox_mode"), config=config or None)

    def _resume(self, provider=None):
        """Resume the thread and start the turn at once, as its id is known."""
        return _request(THREAD, "thread/resume", threadId=self.thread_id, modelProvider=provider,
                        excludeTurns=self._version >= FIRST_TO_EXCLUDE_TURNS or None,
                        **self._thread_params()) + self._start_turn()

    def _start_turn(self):
        """The request that starts the turn: images first, as exec has them."""
        schema = self._options.values.get("output_schema")
        return _request(TURN, "turn/start", threadId=self.thread_id, input=[
            *({"type": "localImage", "path": path} for path in self._options.images),
            {"type": "text", "text": self._message}],
            outputSchema=schema and json.loads(schema.data))

    def interrupt(self):
        """What to write to have the turn interrupted: nothing where that can't be asked (any more),
        as 0.98 never answers a second time.  `over` tells when it is."""
        if self._interrupted or self.over or not self.accepted:
            return b""
        self._interrupted = True
        return _request(INTERRUPT, "turn/interrupt", threadId=self.thread_id, turnId=self.turn_id)

    def steer(self, steer):
        """What to write to have a Steer cut in, once the turn is accepted; then `turn.steered`
        comes, or not, and the Steer is answered."""
        if self._ending or self.over or self._version < FIRST_TO_CUT_IN:
            steer.answer(TOO_OLD if self._version < FIRST_TO_CUT_IN else TOO_LATE)
            return b""
        self._last_id += 1
        self.steers[self._last_id] = steer
        return _request(self._last_id, "turn/steer", threadId=self.thread_id,
                        expectedTurnId=self.turn_id,
                        input=[{"type": "text", "text": steer.message}])

    # What is read

    def lines(self, line):
        """Take a line of standard output: its events, (type, data, value) each, and what to write.

        Raises Refused before the turn was accepted, and then ValueError if it isn't what we know.
        """
        if self.over or line.startswith(self._unread):
            return [], b""
        try:
            message = json_value.decode(line.decode("utf-8", "replace"))
            if "method" not in message:
                events, answer = self._answered(message["id"], message)
            elif "id" in message:           # the turn would wait for ever
                events, answer = [], json_bytes({"id": message["id"], "error": {
                    "code": -32601, "message": "not supported"}}) + b"\n"
            else:
                events = self._notified(message["method"], message.get("params") or {})
                answer = b""
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise (ValueError if self.accepted else Refused)(
                "the app-server printed %d bytes that we don't know" % len(line)) from None
        return events, answer

    def finish(self):
        """The events that are held back, once Codex has exited."""
        ending, self._ending = self._ending, []
        return self.flush() + ending

    def _answered(self, number, message):
        """An answer to one of our requests: events, and what to write."""
        if number in self.steers:
            return self._steer_answered(self.steers.pop(number), message.get("error")), b""
        if number not in self._asked:
            return [], b""
        self._asked.discard(number)
        if "error" in message and not self.accepted:
            raise Refused(message["error"]["message"])
        if number == LOGIN:
            return [], self._open_thread()
        if number == CONFIG:
            return [], self._resume(_provider(message["result"]["config"]))
        if number == THREAD and self.thread_id is None:
            self.thread_id = str(message["result"]["thread"]["id"])
            return [], self._start_turn()
        return self._accept(message["result"]["turn"]) if number == TURN else [], b""

    def _accept(self, turn):
        """The turn has begun: now its first event may go out."""
        if self.accepted:
            return []
        self.turn_id = turn["id"]
        return [_event("thread.started", thread_id=self.thread_id)] + self._early

    def _steer_answered(self, steer, error):
        """Whether a message has cut in."""
        steer.answer("Codex refuses it: %s" % message_of(error)[:200] if error else None)
        events = [] if error else self.flush() + [_event("turn.steered", message=steer.message)]
        return events + self._end([])

    def _end(self, ending):
        """Give out the turn's ending when no message can come into it any more."""
        self._ending += ending
        if self.steers and self._ending:
            self.ended_at = self.ended_at or time.monotonic()
        if self.steers or not self._ending:
            return []
        self.over = True
        return self.finish()

    def _notified(self, method, params):
        """The events that a notification makes."""
        thread_id = params.get("threadId")
        if thread_id and self.thread_id and thread_id != self.thread_id:    # of an agent's agent
            return []
        if method in DELTAS:
            return self._delta(*DELTAS[method], params)
        if method not in self.TAKERS:
            return []
        return self.flush() + self.TAKERS[method](self, params)

    # Notifications

    def _turn_started(self, params):
        """It may come before the answer to turn/start."""
        events = self._accept(params["turn"]) + [_event("turn.started")]
        self.begun = True
        return events

    def _number(self, item_id):
        """The item's number, by the order in which they are told."""
        if self._items.get(item_id) is None:
            self._items[item_id] = "item_%d" % self._told
            self._told += 1
        return self._items[item_id]

    def _item_started(self, params):
        """exec tells of those alone that take time."""
        item = params["item"]
        if item["type"] in SILENT:
            return []
        self._items[item["id"]] = None
        if item["type"] in AT_THEIR_END:
            return []
        return [_event("item.started", item=_exec_item(item, self._number(item["id"])))]

    def _item_completed(self, params):
        """The item as a whole: what its deltas were a preview of."""
        item = params["item"]
        if item["type"] in SILENT:
            return []
        told = _exec_item(item, None)
        events = []
        if item["type"] != "reasoning" or told["text"].strip():
            told["id"] = self._number(item["id"])
            events = [_event("item.completed", item=told)]
        self._items.pop(item["id"], None)
        return events

    def _plan_updated(self, params):
        """The plan is an item that exec calls a todo list."""
        kind = "item.updated" if self._todo else "item.started"
        number = self._todo["id"] if self._todo else self._number("the todo list")
        self._todo = {"id": number, "type": "todo_list", "items": [
            {"text": step["step"], "completed": step["status"] == "completed"}
            for step in params["plan"]]}
        return [_event(kind, item=self._todo)]

    def _usage_updated(self, params):
        """Tokens used by the thread, for the end."""
        total = params["tokenUsage"]["total"]
        self._usage = {_snake(key): total[key] for key in total if key != "totalTokens"}
        return []

    def _error(self, params):
        """Codex tries again, or the turn is about to fail."""
        return [_event("error", message=_with_details(params["error"]))]

    def _warning(self, params):
        """An item of its own in exec; after thread.started, if it comes before."""
        message = params.get("message") or params["summary"]
        item = {"id": self._number("a warning"), "type": "error", "message": message}
        del self._items["a warning"]
        events = [_event("item.completed", item=item)]
        if self.accepted:
            return events
        self._early += events
        return []

    def _turn_completed(self, params):
        """The end, as exec prints it."""
        turn = params["turn"]
        if turn["id"] != self.turn_id:
            return []
        events = [_event("item.completed", item=self._todo)] if self._todo else []
        if turn["status"] == "completed":
            return self._end(events + [_event("turn.completed", usage=self._usage)])
        error = turn.get("error") or {"message": "The turn was %s" % turn["status"]}
        return self._end(events + [_event("turn.failed", error={"message": _with_details(error)})])

    TAKERS = {"turn/started": _turn_started, "item/started": _item_started,
              "item/completed": _item_completed, "turn/plan/updated": _plan_updated,
              "thread/tokenUsage/updated": _usage_updated, "error": _error,
              "warning": _warning, "deprecationNotice": _warning,
              "turn/completed": _turn_completed}

    # Deltas

    def _delta(self, kind, key, params):
        """Keep a piece of an item until it is time for the next event with such."""
        item_id, text = params["itemId"], params["delta"]
        part = (item_id, params.get("summaryIndex"))
        if part[1] is not None:
            if self._part and self._part != part and self._part[0] == item_id:
                text = "\n" + text          # as the item's text will have it
            self._part = part
        size = len(text.encode("utf-8", "replace"))
        self._room -= size
        if self._room < 0 or item_id not in self._items:
            return []
        self._deltas.setdefault((item_id, kind, key), []).append(text)
        self._joined += size
        if self._joined >= MAX_JOINED or time.monotonic() - self._flushed_at >= DELTA_PAUSE:
            return self.flush()
        self.pending_since = self._flushed_at
        return []

    def flush(self):
        """The events with the deltas that wait: to be called DELTA_PAUSE after `pending_since`."""
        if not self._deltas:
            return []
        deltas, self._deltas, self._joined = self._deltas, {}, 0
        self._flushed_at, self.pending_since = time.monotonic(), None
        return [_event("item.delta", item={
            "id": self._number(item_id), "type": kind, key: "".join(texts)})
            for (item_id, kind, key), texts in deltas.items()]


# ---------------------------------------------------------------------------------------------
# Runs of Codex
# ---------------------------------------------------------------------------------------------
# A run is one process and its three pipes, read and written by one selector in the turn's thread.
# It knows lines and bytes, and asks its driver what they mean.  Nothing in it waits for the disk:
# when the log can't be written, the turn has it stop reading, Codex blocks in its next write, and
# memory stays what it is.

MAX_STDERR_TAIL = 8 * 1024                 # bytes of Codex's stderr that are kept
MAX_LOGGED_SKIPS = 5                       # skipped lines of a run that get a log line each
# What Codex 0.50, 0.98 and 0.169 say of a rollout that is gone, and of one without its beginning,
# as a power cut may leave it.
UNKNOWN_THREAD = re.compile(
    rb"no rollout found|(?:thread|session|conversation)[^\n]{0,99} not found|empty session file"
    rb"|failed to parse (?:thread|conversation) ID"
    rb"|rollout at [^\n]{1,4200} (?:is empty|does not start with session metadata)",
    re.IGNORECASE)


class Alarm:
    """Wakes a thread that waits in a selector for `fd`, the end of a pipe, from any other."""

    def __init__(self):
        self.fd, self._into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()       # it is rung or closed, by one thread at a time

    def ring(self):
        """Wake the thread; nothing if the alarm is closed."""
        with self._lock, contextlib.suppress(OSError):      # it rings already
            if self._into is not None:      # else it is closed
                os.write(self._into, b"!")

    def clear(self):
        """For the thread that was woken: be ready to be rung again."""
        return os.read(self.fd, 4096)

    def close(self):
        """Give the pipe up."""
        with self._lock:
            for fd in (self.fd, self._into) if self.fd is not None else ():
                with contextlib.suppress(OSError):      # whatever it says, it is closed
                    os.close(fd)
            self.fd = self._into = None


def _signal_name(number):
    """SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal %d" % number


class CodexRun:
    """One process of Codex, its pipes and what comes out of them, from its start to its end.

    It belongs to the turn's thread.  Raises OSError, ValueError and RuntimeError where the process
    or the thread that waits for it can't be started; then nothing is left of it.
    """

    def __init__(self, driver, settings, codex, processes, alarm):
        """`alarm` is the Alarm that tells when the process has exited."""
        self.driver = driver
        self.processes = processes
        self.alarm = alarm
        self.exited = threading.Event()
        self.events = []                    # that came and were not taken yet
        self.stderr = b""                   # its end
        self.skipped = 0                    # lines that were no events
        self.refused = None                 # why this driver can't be used, if it can't
        self._input = bytearray(driver.input())     # that is still to be written
        self._line = bytearray()            # a line whose end is still to come
        self._too_long = False              # its beginning was thrown away
        self.child = start_process(
            driver.arguments, processes, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, bufsize=0, cwd=settings.workspace,
            env=codex_environment(settings, codex, processes.mark, driver.needs_key))
        self.streams = (self.child.stdin, self.child.stdout, self.child.stderr)
        self._selector = None
        try:
            self._wire()
        except BaseException:
            self.child.kill()
            self.child.wait()
            self.close()
            raise

    def _wire(self):
        """Have the pipes and the exit told to the turn's thread."""
        self._selector = selectors.DefaultSelector()
        for stream in self.streams:
            os.set_blocking(stream.fileno(), False)
        self._selector.register(self.alarm.fd, selectors.EVENT_READ, self.alarm.clear)
        self._selector.register(self.child.stdin, selectors.EVENT_WRITE, self._write_input)
        self._selector.register(self.child.stdout, selectors.EVENT_READ, self._read_stdout)
        self._selector.register(self.child.stderr, selectors.EVENT_READ, self._read_stderr)
        start_thread("codex %d" % self.child.pid, self._await_exit)

    def _await_exit(self):
        """A thread that waits for the exit, since no file descriptor tells it before Python 3.9."""
        self.child.wait()
        self.exited.set()
        self.alarm.ring()

    def exchange(self, seconds):
        """Write and read what can be, and wait for that or the alarm `seconds` at most."""
        driver = self.driver
        if driver.pending_since is not None:
            seconds = min(seconds, max(0, driver.pending_since + DELTA_PAUSE - time.monotonic()))
        for key, _ in self._selector.select(seconds):
            if not key.data():
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
        if (driver.pending_since is not None
                and time.monotonic() >= driver.pending_since + DELTA_PAUSE):
            self.events += driver.flush()

    def hold_back(self, holding):
        """Read no events while `holding`, so that Codex waits and memory doesn't fill; whether that
        is a change."""
        stdout = self.child.stdout
        if stdout.closed or holding == (stdout not in self._selector.get_map()):
            return False
        if holding:
            self._selector.unregister(stdout)
        else:
            self._selector.register(stdout, selectors.EVENT_READ, self._read_stdout)
        return True

    def take_events(self):
        """What has come since the last call: (type, data, value) each."""
        events, self.events = self.events, []
        return events

    def withhold(self):
        """Give Codex no prompt: it is going to be stopped."""
        self._input.clear()
        self._selector.unregister(self.child.stdin)

    def send(self, data):
        """Write to Codex, now or when the pipe takes it."""
        self._input += data
        stdin = self.child.stdin
        if not stdin.closed and stdin not in self._selector.get_map():
            self._selector.register(stdin, selectors.EVENT_WRITE, self._write_input)

    def _write_input(self):
        """Write as much as the pipe takes; False when nothing more will be written."""
        try:
            with memoryview(self._input) as view:
                written = os.write(self.child.stdin.fileno(), view[:READ_SIZE])
        except BlockingIOError:
            return True
        except OSError:                     # Codex doesn't want it: its exit will tell
            return False
        del self._input[:written]
        if not self._input and not self.driver.over:
            self._selector.unregister(self.child.stdin)     # until there is more
            return True
        return len(self._input) > 0

    def _read_stderr(self):
        """Keep the end of what Codex complains of: an unread pipe would block it."""
        try:
            data = os.read(self.child.stderr.fileno(), READ_SIZE)
        except BlockingIOError:
            return True
        self.stderr = (self.stderr + data)[-MAX_STDERR_TAIL:]
        return bool(data)

    def _read_stdout(self):
        """Take whole lines; False at the end of the stream."""
        try:
            data = os.read(self.child.stdout.fileno(), READ_SIZE)
        except BlockingIOError:
            return True
        lines = data.split(b"\n")
        self._line += lines[0]              # of a bytearray: linear, however small the pieces
        if len(lines) > 1:
            lines[0] = bytes(self._line)
            self._line = bytearray(lines.pop())
            for line in lines:
                self._take_line(line.strip(b" \t\r"))
        if len(self._line) > MAX_EVENT:
            self._line, self._too_long = bytearray(), True
        return bool(data)

    def _take_line(self, line):
        """Let the driver say which events a line is."""
        too_long, self._too_long = self._too_long or len(line) > MAX_EVENT, False
        try:
            if too_long:
                raise ValueError("longer than %d bytes" % MAX_EVENT)
            if line and not self.refused:
                events, answer = self.driver.lines(line)
                self.events += events
                if answer or self.driver.over:      # which closes standard input
                    self.send(answer)
        except Refused as error:
            self.refused = str(error)
        except ValueError as error:
            self.skip(error if too_long else "not an event: %d bytes" % len(line))

    def skip(self, reason):
        """Say that a line goes to no client: the first ones, lest they fill the journal."""
        self.skipped += 1
        if self.skipped <= MAX_LOGGED_SKIPS:
            logger.warning("codex %d: skipped a line: %s", self.child.pid, reason)

    def drain(self):
        """Read what is in the pipes, and no more: a process that Codex left may hold them open.
        Then the last line counts, even without an LF."""
        for stream, read in ((self.child.stdout, self._read_stdout),
                             (self.child.stderr, self._read_stderr)):
            for _ in range(64):             # the largest pipe has 1 MiB: pipe(7)
                if stream.closed or not readable(stream) or not read():
                    break
        self._take_line(bytes(self._line).strip(b" \t\r"))
        self._line = bytearray()
        self.events += self.driver.finish()

    def how_it_ended(self):
        """In words for a turn's failure."""
        status = self.child.returncode
        if status is None:
            return "could not be stopped"
        if status < 0:
            return "was killed by %s" % _signal_name(-status)
        return "exited with status %d" % status

    def says_unknown_thread(self):
        """Whether it failed since it doesn't know the thread that it was to resume."""
        return self.child.returncode and UNKNOWN_THREAD.search(self.stderr)

    def last_words(self):
        """The end of what it printed to standard error."""
        text = self.stderr.decode("utf-8", "replace")
        return text.replace("Reading prompt from stdin...", "").strip()

    def close(self):
        """Give up the descriptors; the process may still be there."""
        for opened in (self._selector, *self.streams):
            if opened:
                opened.close()


# ---------------------------------------------------------------------------------------------
# A turn's progress and its stop
# ---------------------------------------------------------------------------------------------
# What a turn's thread asks when it has nothing to relay: for how long may Codex be silent?  And
# whoever stops the turn for it, since that takes seconds, in which Codex's last words want reading.

ACCEPT_PATIENCE = 30.0                     # seconds that an app-server has to take a turn
EXIT_PATIENCE = 10.0                       # seconds from Codex's last event to its exit, at most


class Progress:
    """What a turn's events tell: what is under way, how Codex ended the turn, and until when the
    next one has to come."""

    def __init__(self, settings):
        self.settings = settings
        self.items = set()                  # ids of the items in progress
        self.terminal = None                # the type of the event with which Codex ended it
        self.complaint = None               # what Codex's last `error` said, if nothing came after
        # Moments of time.monotonic: from when the turn's time-out counts, when the last event was
        # that was progress, and when the terminal one
        self.timed_from = self.last_at = self.ended_at = time.monotonic()

    def begin(self):
        """All time-outs count from now on: the turn begins, or a paused machine goes on."""
        self.timed_from = time.monotonic()
        self.start_anew()

    def start_anew(self):
        """Begin to wait now: until now it was not Codex that kept us waiting."""
        self.last_at = self.ended_at = time.monotonic()

    def learn(self, kind, event):
        """Learn from the next event."""
        if kind == "error":                 # no progress: Codex tries again, perhaps for ever
            self.complaint = message_of(event)
            return
        self.last_at, self.complaint = time.monotonic(), None
        item = event.get("item")
        if isinstance(item, dict) and item.get("type") != "todo_list":  # which is no work itself
            if kind == "item.started":      # while a command runs, Codex may be silent for long
                self.items.add(str(item.get("id")))
            elif kind == "item.completed":
                self.items.discard(str(item.get("id")))
        if kind in TERMINAL:
            self.terminal, self.ended_at = kind, self.last_at
            if kind == "turn.failed":
                self.complaint = message_of(event.get("error")) or NO_REASON

    def deadlines(self, run, is_unwanted, holding):
        """What Codex has to do by when: pairs of a moment of time.monotonic and the code of what
        happens else, None where Codex has only to exit.  It is unwanted when the turn is stopped;
        `holding`: it waits for our disk."""
        driver = run.driver
        ended_at = driver.ended_at or self.terminal and self.ended_at
        if ended_at:
            if not run.exited.is_set():     # else it is our disk that is waited for
                yield ended_at + (INTERRUPT_PATIENCE if is_unwanted else EXIT_PATIENCE), None
        elif self.settings.turn_timeout:
            yield self.timed_from + self.settings.turn_timeout, "timeout"
        if self.settings.idle_timeout and not (self.items or self.terminal or holding):
            yield self.last_at + self.settings.idle_timeout, "stalled"
        if not driver.accepted:
            yield self.last_at + ACCEPT_PATIENCE, "refused"

    def why_it_failed(self, code, run, log_error, trouble):
        """What happened, and the last words of who can say why."""
        if trouble:
            message, words = "The engine failed in this turn, and Codex was stopped", trouble
        elif code == "exited":
            message = "Codex %s before the turn was completed" % run.how_it_ended()
            words = run.last_words()
        elif code == "stalled" and log_error:
            message, words = "The turn's log can't be written", words_of(log_error)
        else:
            seconds = {"stalled": self.settings.idle_timeout, "timeout": self.settings.turn_timeout}
            message = STOP_MESSAGES[code] % ((seconds[code],) if code in seconds else ())
            words = self.complaint if code == "stalled" else None
        room = MAX_FAILURE_MESSAGE - len(message) - 2
        return "%s: %s" % (message, words[-room:]) if words else message


class Stopper:
    """Stops what belongs to a turn, when it is told to, in a thread of its own.

    That is there from the turn's start, since there may be too many threads when it is needed; it
    ends with the turn.
    """

    def __init__(self, turn_id, alarm):
        self.turn_id = turn_id
        self.alarm = alarm                  # to ring when it is done
        self.is_stopping = False
        self.stopped = threading.Event()    # whatever could be stopped was
        self.left = []                      # what could not, as TurnProcesses.stop says
        self._orders = queue.SimpleQueue()  # the TurnProcesses to stop, or None to end without
        self._is_there = False

    def start(self):
        """Have it wait for an order.  Raises RuntimeError if there are too many threads."""
        if not self._is_there:              # the turn's start may be tried again
            start_thread("stop turn %d" % self.turn_id, self._stop_when_told)
            self._is_there = True

    def order(self, turn_processes):
        """Have it begin, once."""
        if not self.is_stopping:
            self.is_stopping = True
            self._orders.put(turn_processes)

    def close(self):
        """Let its thread go."""
        self._orders.put(None)

    def stop(self, turn_processes):
        """Stop them now, in the caller's thread."""
        try:
            self.left = turn_processes.stop()
        except Exception as error:          # it can't look: what it doesn't see may be there
            logger.error("turn %d: what is left of it can't be seen: %s", self.turn_id,
                         words_of(error))
            self.left = [{"pid": turn_processes.pid, "command": None}]

    def check(self):
        """Raise HTTPError 500 that names what could not be stopped."""
        if self.left:
            raise HTTPError(500, "Not everything of the turn could be stopped",
                            turn_id=self.turn_id, processes=self.left)

    def _stop_when_told(self):
        """The thread."""
        turn_processes = self._orders.get()
        if turn_processes:
            self.stop(turn_processes)
        self.stopped.set()
        self.alarm.ring()


# ---------------------------------------------------------------------------------------------
# Turn
# ---------------------------------------------------------------------------------------------
# A turn's life: its thread starts a run of Codex, writes the log's header, and relays what Codex
# prints until it exits or is stopped.  Then another may start, and readers see the ending.

ASK_PATIENCE = 1.0                         # seconds that Codex has to interrupt a turn by itself
DISK_PATIENCE = 1.0                        # seconds between two tries to write to a full disk
LOOK_INTERVAL = 5.0                        # seconds between two looks at the deadlines, at most
PAUSE = 5.0                                # seconds that a look is late when the machine was paused


class Turn:
    """One message to Codex and all that comes of it: its log, its deadlines, its ending.

    It is run by a thread of its own, in which a CodexRun does the work.  Another one takes over
    where the app-server doesn't take the message, or where Codex doesn't know the thread any more:
    then it goes to a new one.  `ready` is set once Codex was started, or could not be (then
    `problem` is the HTTPError); `over` when nothing more is done for it: Codex has exited or can't
    be killed, and the log is finished or left to the sync thread.  One that waits in the queue is
    `ready` with its log; its options are on the disk.
    """

    def __init__(self, runner, turn_id, options=None, log=None):
        self.runner = runner
        self.settings = runner.settings
        self.id = turn_id
        self.options = options
        self.mark = log.header.get("mark") if log else os.urandom(16).hex()
        self.folder = runner.state.path_of(turn_id, "files")
        # For everybody
        self.ready = threading.Event()
        if log:
            self.ready.set()
        self.over = threading.Event()
        self.problem = None
        self.log = log
        self.stop_code = None               # why it is being stopped; the runner's lock guards this
        self.is_begun = False               # Codex may have the prompt; guarded likewise
        self.alarm = Alarm()                # rung when there is something to look at
        self.steers = Steers(runner.lock)
        # Its own thread's
        self.thread_id = None               # the one to resume
        self.codex = None
        self.run = None                     # the CodexRun
        self.queued_header = None           # its log's, where it has waited
        self.absent = ()                    # of SANDBOX_MOUNTS, before the turn
        self.progress = Progress(self.settings)
        self.trouble = None                 # what went wrong in the engine itself
        self.stopper = Stopper(turn_id, self.alarm)
        # Moments of time.monotonic
        self.started_at = time.monotonic()
        self.first_try = None               # to start it, where that failed and it waits on
        self._asked_until = 0.0             # Codex was asked to end the turn, and has until then
        self._look_by = 0.0                 # when the next look at the deadlines is due

    # For any thread but its own

    def start(self):
        """Run it in a thread of its own; `ready` and `over` are set whatever comes."""
        try:
            start_thread("turn %d" % self.id, self._main)
        except (RuntimeError, MemoryError) as error:        # there are too many threads
            self._not_started(error)

    def end_unstarted(self, message=STOP_MESSAGES["cancelled"], code="cancelled",
                      before_publishing=lambda: None):
        """End it without a run of Codex: it has only waited.  Without its message it never runs,
        should the disk not take the ending."""
        try:
            self.runner.state.delete_message(self.id)
            self.runner.finish_log(self.log, failure(message, code), before_publishing)
        finally:
            self.be_over()

    def log_once_started(self):
        """Its log, once Codex was started or the message waits.  Raises HTTPError."""
        self.ready.wait()
        if self.problem:
            raise self.problem.again()
        return self.log

    # Its own thread, in the order in which things happen

    def _main(self):
        """The turn's thread, from its start to its end."""
        try:
            self._start()
        except Exception as error:          # whatever it is, nobody may wait for this turn for ever
            self._not_started(error)
            return
        try:
            self._begin()
            self._relay()
            if not (self.stop_code or self.run.driver.accepted):
                self._relay_again(self.thread_id, "codex app-server doesn't take the turn, so exec "
                                  "does: %s" % (self.run.refused or self.run.how_it_ended()))
            if (self.thread_id and not (self.log.last or self.stop_code)    # nothing has come of it
                    and self.run.says_unknown_thread()):
                self._relay_again(None, "Codex doesn't know thread %s any more: the message goes "
                                  "to a new one" % self.thread_id)
        except Exception as error:          # whatever it is, no reason to leave Codex running
            logger.exception("turn %d: the engine failed", self.id)
            self.trouble = words_of(error)
            self.stopper.order(self.run.processes)
            self.stopper.stopped.wait()
        finally:
            self._end()

    def _start(self):
        """Start Codex, which does nothing before it has its prompt, and then the log."""
        self.absent = ()
        if self.log:                        # it has waited
            self.queued_header = self.log.header
            self.started_at = time.monotonic()
            self.progress.begin()
            self.options = self._read_message()
        self.thread_id = self.options.thread_id(self.runner.thread_id)
        self.codex = self.runner.prepare(self.options)
        with explained("Codex's home can't be made", "see CODEX_HOME"):
            os.makedirs(self.settings.codex_home, mode=0o700, exist_ok=True)
        with explained("The turn's files can't be written", "see REPLICAS_ENGINE_STATE"):
            self.options.write_files(self.folder)
        mounts = [os.path.join(self.settings.workspace, name) for name in SANDBOX_MOUNTS]
        self.absent = [path for path in mounts if not os.path.lexists(path)]
        self.stopper.start()
        with explained("Codex can't be started", "see CODEX_PATH, and what its first line names"):
            self._launch(self.thread_id, self.options.is_live(version_numbers(self.codex.version)))
        with explained("The turn's log can't be written", "see REPLICAS_ENGINE_STATE"):
            self.log = self.runner.create_log(self)
        self.runner.begin(self)

    def _read_message(self):
        """The TurnOptions of a message that has waited.  Raises HTTPError."""
        with explained("The message can't be read", "is the disk in order?"):
            try:
                return TurnOptions(self.runner.state.load_message(self.id), self.settings)
            except (FileNotFoundError, ValueError) as error:
                raise HTTPError(410, "The message can't be read", "%s: send it again"
                                % words_of(error)) from None

    def _begin(self):
        """Let Codex have its prompt: from now on the message is sent, whatever goes wrong."""
        try:
            if self.is_begun:
                self.run.exchange(0)
            else:
                self.run.withhold()
        finally:
            self.log.sync(created=True)
            self.runner.started(self)
            self.ready.set()
        logger.info("turn %d started: %s, codex pid %d", self.id,
                    "thread %s" % self.thread_id if self.thread_id else "new thread",
                    self.run.child.pid)

    def header(self):
        """The log's header: what is known of the turn before its first event."""
        if self.run is None:
            return {"turn": self.id, "queued_at": timestamp(), "mark": self.mark}
        return {"turn": self.id, "started_at": timestamp(), "thread_id": self.thread_id,
                "version": self.codex.version, **self.run.processes.saved()}

    def _launch(self, thread_id, live):
        """Start Codex on the thread, or on a new one."""
        driver = (AppServer if live else Exec)(
            self.settings, self.codex, self.options, thread_id, self.options.message)
        self.run = CodexRun(driver, self.settings, self.codex,
                            TurnProcesses.create(self.id, self.mark), self.alarm)
        self.progress.start_anew()
        self._look_by = time.monotonic()

    def _relay_again(self, thread_id, why):
        """Have another run of Codex take the message, of which the last one took nothing."""
        logger.warning("turn %d: %s", self.id, why)
        self.stop_run()                     # it may hold the thread, or have the message after all
        if self.run.exited.is_set() and not self.stop_code:
            self._launch(thread_id, live=False)
            self._relay()

    def stop_run(self):
        """Stop a run that has taken nothing of the message, if there is one."""
        if self.run:
            self.stopper.stop(self.run.processes)
            self.run.close()                # one that could not be stopped may end by that
            self.run.exited.wait(KILL_PATIENCE if self.stopper.left else None)

    def _not_started(self, error):
        """Nothing was begun: clean up, and let whoever waits know why."""
        problem, waited = not_startable(error), self.ready.is_set()
        if waited and self.runner.put_back(self, problem):
            return
        if waited:                          # there is a log, which will say it
            code = self.stop_code or "not_started"
            self.progress.terminal = "turn.failed" if code == "not_started" else None
            end = (lambda: self.end_unstarted(STOP_MESSAGES.get(
                code, str(problem)[:MAX_FAILURE_MESSAGE]), code, self._release), self._release)
        else:
            self.problem = problem
            end = (lambda: self.runner.not_started(self), self.ready.set, self.be_over)
        do_all(lambda: self.runner.could_not_start(self, problem, waited), self.stop_run,
               lambda: self.steers.close(self.run), self.leave, *end)

    def _relay(self):
        """Let Codex have its prompt and publish what it prints, until it has exited and all of that
        is in the log, or the turn was stopped."""
        run, drained = self.run, False
        while not (self.stopper.stopped.is_set() or run.refused):
            if run.exited.is_set() and not drained:
                drained = True
                self._drain()
            if self.log.flush() and drained:
                break
            self._hold_back(self.log.error is not None)
            if self.stop_code:
                self._stop()
            self._exchange()
            self.steers.pass_on(run, self.log, self.stop_code or self.progress.terminal)
        if not drained:
            self._drain()
        if self.stopper.is_stopping:
            self.stopper.stopped.wait()

    def _drain(self):
        """Publish what Codex printed last."""
        self.run.drain()
        self._publish(self.run.take_events())

    def _exchange(self):
        """Read, write and wait until the next look.  A pause of the machine counts for nothing."""
        now = time.monotonic()
        if now > self._look_by + PAUSE:     # wherever it caught us
            logger.warning("turn %d: the engine stood still for %d s: its time-outs begin anew",
                           self.id, now - self._look_by)
            self.progress.begin()
        seconds = self._next_look(now)
        self._look_by = now + seconds
        self.run.exchange(seconds)
        self._publish(self.run.take_events())

    def _hold_back(self, holding):
        """While the disk takes nothing, Codex waits; what doesn't pass by itself ends the turn."""
        if self.run.hold_back(holding) and not holding:
            self.progress.start_anew()
        if holding and self.log.error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
            self.runner.stop(self, "stalled")

    def _stop(self):
        """Have the stopper begin, when Codex was asked and had its time; not if the turn has ended
        by itself and that is in the log."""
        if self.stopper.is_stopping or self.progress.terminal and self.log.flush():
            return
        request, now = self.run.driver.interrupt(), time.monotonic()
        if request:
            self.run.send(request)
            self._asked_until = now + ASK_PATIENCE
        if now >= self._asked_until or self.run.driver.over:
            self.stopper.order(self.run.processes)

    def _next_look(self, now):
        """Seconds until the next deadline; what is past its deadline is stopped."""
        holding = self.log.error is not None
        waits = [DISK_PATIENCE if holding else LOOK_INTERVAL]
        if self.stopper.is_stopping:
            return waits[0]
        if self._asked_until and not self.progress.terminal:
            return min(waits[0], max(0.0, self._asked_until - now))
        for deadline, code in self.progress.deadlines(self.run, self.stop_code, holding):
            if now >= deadline:
                self._too_late(code)
                return 0 if code else waits[0]
            waits.append(deadline - now)
        return min(waits)

    def _too_late(self, code):
        """A deadline has passed; the code says which, None that of Codex's exit."""
        if code is None:                    # the turn has ended by itself: what it left may stay
            logger.warning("turn %d: Codex doesn't exit and is killed", self.id)
            self.run.processes.kill_codex()
        elif code == "refused":
            self.run.refused = "no answer for %g seconds" % ACCEPT_PATIENCE
        else:
            self.runner.stop(self, code)

    def _publish(self, events):
        """Append the events to the log, but for those that aren't for the clients."""
        wanted = []
        for kind, data, value in events:
            if self.progress.terminal:
                self.run.skip("it came after the turn's end")
            # Where we stop the turn, we say why ourselves.
            elif not (kind == b"turn.failed" and self.stop_code):
                self.progress.learn(kind.decode(), value)
                wanted.append((kind, data))
        if wanted:
            self.log.append(wanted)

    # Its end

    def _end(self):
        """Give the log its ending and let the next turn start, whatever goes wrong on the way."""
        do_all(self.ready.set, self._give_up_pending, lambda: self.steers.close(self.run),
               self.leave, self._finish_log, self._await_exit, self.be_over, self._release,
               reap_orphans, self.runner.prune)

    def _give_up_pending(self):
        """Nobody gets the events that the log could not take, nor an end that was among them."""
        dropped = self.log.drop_pending()
        if dropped:
            logger.error("turn %d: %d events are lost: its log can't be written: %s", self.id,
                         len(dropped), words_of(self.log.error))
            self.progress.terminal = None

    def _finish_log(self):
        """Give the log what Codex did not give, and say how the turn went."""
        code, ending = self.stop_code or "exited", []
        if not self.progress.terminal:
            self.progress.complaint = self.progress.why_it_failed(
                code, self.run, self.log.error, self.trouble)
            ending = failure(self.progress.complaint, code)
        failed = self.progress.terminal == "turn.failed" or bool(ending) and code not in NO_FAILURES
        if failed or self.progress.terminal:    # else it was interrupted
            self.runner.last_failure = "turn %d failed: %s" % (
                self.id, self.progress.complaint) if failed else None
        self.runner.finish_log(self.log, ending, self._release_unless_codex_lives)
        logger.log(logging.WARNING if failed else logging.INFO,
                   "turn %d ended: %s, %d events, %.1f s%s", self.id,
                   self.progress.terminal or code,
                   self.log.last, time.monotonic() - self.started_at,
                   ": %s" % self.progress.complaint if failed else "")

    def _release_unless_codex_lives(self):
        """Let the next turn start, if this one's Codex is gone."""
        if self.run.exited.is_set():
            self._release()

    def _await_exit(self):
        """No other turn starts while a Codex of this one lives."""
        if not self.run.exited.is_set():
            self.be_over()
            self.run.exited.wait()

    def _release(self):
        """Let the next turn start."""
        self.runner.release(self)

    def leave(self):
        """Nothing of the turn stays but its log, and what it did in the workspace."""
        if self.run:
            self.run.close()
        delete_folder(self.folder)
        for path in () if self.progress.terminal else self.absent:
            with contextlib.suppress(OSError):          # not there, or not empty
                os.rmdir(path)

    def be_over(self):
        """Tell whoever waits for the end, and let the stopper go."""
        if not self.over.is_set():
            self.over.set()
            self.stopper.close()
            self.alarm.close()


# ---------------------------------------------------------------------------------------------
# State directory
# ---------------------------------------------------------------------------------------------

MAX_KEPT_TURNS = 100
MAX_KEPT_BYTES = 256 * 1024 * 1024
SYNC_INTERVAL = 1.0                        # seconds that a power cut may take of a turn's events
RELEASE_PATIENCE = 1.0                     # seconds that what a killed engine forked may live
MAX_ID_GAP = 10 ** 9                       # no engine leaves more turns out; a forged log may
ALIEN = (errno.EISDIR, errno.ENXIO, errno.ELOOP)        # a folder, a socket, a link to itself


class StateInUse(Exception):
    """Another engine works with the state directory."""


def when_released(take):
    """What take() returns, tried for RELEASE_PATIENCE while another one has what it takes.

    A child that an engine had just forked when it was killed has the engine's lock and listening
    sockets until it is another program.  Raises what take() raises.
    """
    deadline = time.monotonic() + RELEASE_PATIENCE
    while True:
        try:
            return take()
        except (StateInUse, OSError) as error:
            is_taken = isinstance(error, StateInUse) or error.errno == errno.EADDRINUSE
            if not is_taken or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


def set_aside(path, reason):
    """Give a broken or alien file, or whatever it is, another name.  Raises OSError."""
    logger.error("%s is set aside: %s", path, reason)
    aside = path + ".broken"
    while os.path.lexists(aside):
        aside += ".broken"
    os.rename(path, aside)


def make_way(path):
    """Set aside what lies where a file belongs and is none.  Raises OSError."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        set_aside(path, "it is not a regular file")


def make_folder(path):
    """Have a folder there, with those above it.  Raises OSError."""
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except FileExistsError:                 # it may be that it couldn't be looked at
        try:
            if stat.S_ISDIR(os.stat(path).st_mode):
                return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):      # a link to nowhere
                raise
        set_aside(path, "it is not a folder")
        os.makedirs(path, mode=0o700)


class StateDirectory:
    """What outlives the engine, in the directory REPLICAS_ENGINE_STATE:

        lock            locked while an engine works with the directory
        turns/7.log     a kept turn, see TurnLog
        turns/7.told    the webhook knows of the turns up to this one
        turns/7.reset   the thread was reset when turn 7 was the newest: that is behind it
        turns/7.files/  what Codex takes as a file only, while turn 7 runs
        turns/7.message what the client sent, if it has to wait, until turn 7 is over

    Replicas-engine 0.2.0 kept the thread in thread.json.  Its id goes into a .reset, which says by
    that what the thread is until there is a turn behind it.

    What is broken, or no regular file, costs only itself: it gets .broken behind its name.
    """

    NAME = re.compile(r"(0|[1-9][0-9]{0,14})\.(log|reset|message|told)((?:\.broken)*)")

    def __init__(self, path):
        self.path = path
        self.turns = os.path.join(path, "turns")
        self._lock_file = None
        self._taking = threading.Lock()     # one thread at a time takes it

    def open(self):
        """Make it, and keep every other engine out of it.  Raises OSError and StateInUse."""
        self._take()
        for name in list_folder(self.turns):
            if name.endswith(".files"):
                delete_folder(os.path.join(self.turns, name))

    def _take(self):
        """Have the directory there, and its lock.  Raises OSError and StateInUse."""
        os.makedirs(self.path, mode=0o700, exist_ok=True)
        os.chmod(self.path, 0o700)
        lock = os.path.join(self.path, "lock")
        make_way(lock)
        file = open(lock, "ab")
        try:
            when_released(lambda: self._lock(file))
            make_folder(self.turns)
        except BaseException:
            file.close()
            raise
        old, self._lock_file = self._lock_file, file
        if old:                             # the lock of a directory that was deleted
            old.close()

    def _lock(self, file):
        if not try_flock(file, fcntl.LOCK_EX):
            raise StateInUse(self._engine_with(file))

    def _make_turns(self):
        """Have the folder of turns there; where somebody has deleted the directory, with a lock, or
        another engine could work with it.  Raises OSError and StateInUse."""
        with self._taking:
            if not self.is_ours():
                self._take()
        make_folder(self.turns)

    def close(self):
        """Let another engine have the directory."""
        self._lock_file.close()

    def is_ours(self):
        """Whether it is still the directory that was opened."""
        try:
            return os.path.samestat(os.stat(os.path.join(self.path, "lock")),
                                    os.fstat(self._lock_file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError):       # who knows; or the engine ends, and has closed it
            return True

    def _engine_with(self, lock):
        """Whose that lock is, in words."""
        owner = flock_owner(lock)
        return "another engine is running with the state directory %s%s" % (
            self.path, ", pid %d" % owner if owner else "")

    def engine(self):
        """What engine works with it, in words, or None.

        For a moment it holds the lock, and an engine that starts then waits: but /proc/locks, which
        would not need that, doesn't know the files of some file systems (btrfs).
        """
        with contextlib.suppress(OSError, ValueError), (
                open_regular(os.path.join(self.path, "lock"))) as file:
            return None if try_flock(file, fcntl.LOCK_SH) else self._engine_with(file)
        return None

    def path_of(self, turn_id, kind):
        """Where that is of a turn: its log, files, message, reset or told."""
        return os.path.join(self.turns, "%d.%s" % (turn_id, kind))

    def _entries(self, kind, broken=False):
        """(turn id, path) of the files of that kind, by turn; of those set aside if `broken`.
        Raises OSError: what can't be looked at is not empty."""
        names = filter(None, map(self.NAME.fullmatch, os.listdir(self.turns)))
        return sorted((int(name.group(1)), os.path.join(self.turns, name.group()))
                      for name in names if name.group(2) == kind and bool(name.group(3)) == broken)

    def turn_ids(self):
        """The ids of the kept turns, oldest first."""
        return [turn_id for turn_id, _ in self._entries("log")]

    def create_log(self, turn_id, header):
        """The log of a new turn.  Raises OSError."""
        self._make_turns()
        path = self.path_of(turn_id, "log")
        if os.path.lexists(path):
            set_aside(path, "it lies where the log of a new turn belongs")
        return TurnLog.create(path, header)

    def create_queued(self, turn_id, message, header):
        """The log of a turn that waits, and its message (bytes) beside it, both on the disk.
        Raises OSError."""
        self._make_turns()
        path = self.path_of(turn_id, "message")
        make_way(path)
        try:
            write_synced(path, message)
            turn_log = self.create_log(turn_id, header)
        except BaseException:
            self.delete_message(turn_id)
            raise
        turn_log.sync(created=True)
        return turn_log

    def load_message(self, turn_id):
        """The object that the client sent.  Raises OSError, and ValueError if it is broken."""
        with open_regular(self.path_of(turn_id, "message")) as file:
            return json_object(file.read().decode())

    def has_message(self, turn_id):
        """Whether one is there for the next engine."""
        return os.path.lexists(self.path_of(turn_id, "message"))

    def delete_message(self, turn_id):
        """It isn't needed any more, if there is one."""
        with contextlib.suppress(OSError):
            os.unlink(self.path_of(turn_id, "message"))

    def delete_messages(self, wanted):
        """Delete those of turns that aren't in `wanted`: an engine ended while it wrote them.  What
        had a log, which is broken, is set aside with it."""
        broken = {turn_id for turn_id, _ in self._entries("log", broken=True)}
        for turn_id, path in self._entries("message"):
            if turn_id in broken - wanted:
                with contextlib.suppress(OSError):
                    set_aside(path, "the log of its turn is broken")
            elif turn_id not in wanted:
                self.delete_message(turn_id)

    def load_logs(self):
        """The logs that can be read, oldest first, and the newest turn's id, readable or not."""
        logs, newest = [], 0
        for turn_id, path in sorted(self._entries("log") + self._entries("log", broken=True)):
            is_whole = path.endswith(".log")
            try:
                if turn_id > newest + MAX_ID_GAP:
                    raise ValueError("its number is too high")
                newest = turn_id            # also if it can't be read: no id is given twice
                if is_whole:
                    logs.append(TurnLog.open(path))
            except (OSError, ValueError) as error:
                if is_whole:
                    self.pass_over(path, error)
        return logs, newest

    @staticmethod
    def pass_over(path, error):
        """Leave a file alone that can't be read now; one that never can is set aside.  Raises the
        OSError if it isn't about the file, or somebody has but to let the engine read it: without
        what a turn's log says, a message could run twice and a Codex run on."""
        if getattr(error, "errno", None) in (*SHORTAGES, errno.EACCES, errno.EPERM):
            raise error
        if isinstance(error, OSError) and error.errno not in ALIEN:
            logger.error("%s is passed over: %s", path, words_of(error))
            return
        with contextlib.suppress(OSError):
            set_aside(path, words_of(error))

    def load_reset(self, newest):
        """(turn id, thread id): what the thread is until there is a turn behind that one."""
        self._take_over_thread(newest)
        for turn_id, path in reversed(self._entries("reset")):
            try:
                if turn_id > newest + MAX_ID_GAP:
                    raise ValueError("its number is too high")
                with open_regular(path) as file:
                    thread_id = file.read(1000).decode("ascii", "replace")
                return turn_id, thread_id if is_thread_id(thread_id) else None
            except (OSError, ValueError) as error:
                self.pass_over(path, error)
        return 0, None

    def _take_over_thread(self, newest):
        """Put the thread of 0.2.0 behind the newest turn, once."""
        path = os.path.join(self.path, "thread.json")
        try:
            with open_regular(path) as file:
                thread_id = thread_id_of(json_object(file.read(READ_SIZE).decode()))
            self.write_reset(newest, thread_id)
            os.unlink(path)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            self.pass_over(path, error)

    def write_reset(self, turn_id, thread_id=None):
        """Note what the thread is behind that turn.  Raises OSError."""
        self._write_mark(self.path_of(turn_id, "reset"), (thread_id or "").encode())

    def _write_mark(self, path, text=b""):
        """Have the disk hold a small file.  Raises OSError."""
        self._make_turns()
        make_way(path)
        write_synced(path, text)
        sync_directory(self.turns)

    def told(self):
        """The newest turn that the webhook knows of, or None.  Raises OSError."""
        marks = self._entries("told")
        return marks[-1][0] if marks else None

    def write_told(self, turn_id):
        """Note that the webhook knows of the turns up to that one, or of none (None).  Raises
        OSError."""
        old = self._entries("told")
        if turn_id is not None:
            self._write_mark(self.path_of(turn_id, "told"))
        for number, path in old:
            if number != turn_id:
                self._delete(path)

    def delete_old(self, may_delete):
        """Delete the oldest turns above MAX_KEPT_TURNS and MAX_KEPT_BYTES, but for the newest and
        those for which `may_delete(turn id)` is false; and resets that are behind us."""
        logs = [*self._entries("log")[::-1], *self._entries("log", broken=True)[::-1],
                *self._entries("message", broken=True)[::-1]]
        newest = max(turn_id for turn_id, _ in logs) if logs else 0
        size = 0
        for count, (turn_id, path) in enumerate(logs, 1):
            with contextlib.suppress(FileNotFoundError):    # deleted by another turn's end
                size += os.lstat(path).st_blocks * 512
                if (turn_id != newest and (count > MAX_KEPT_TURNS or size > MAX_KEPT_BYTES)
                        and may_delete(turn_id)):
                    self._delete(path)
        for _, path in self._entries("reset")[:-1]:
            self._delete(path)

    @staticmethod
    def _delete(path):
        """Delete whatever it is, or say why not."""
        try:
            os.unlink(path)
        except IsADirectoryError:
            delete_folder(path)
        except OSError as error:
            logger.error("%s can't be deleted: %s", path, words_of(error))


# ---------------------------------------------------------------------------------------------
# Conversation
# ---------------------------------------------------------------------------------------------
# The state that all turns share, and the questions about it: the current thread, the turn in
# progress, those that wait, the logs of all that are kept.  It changes under one lock, which is
# never held while anything is waited for.  What happens to it is CodexRunner's, below.

MAX_QUEUED = 32                            # messages


class Conversation:
    """The turns: the one in progress, those that wait and those that were.

    The thread is the newest turn's, unless a reset is behind it.  A turn is known by its Turn while
    it is in progress or waits, by its TurnLog while that isn't finished, and else by its file.
    """

    def __init__(self, settings):
        self.settings = settings
        self.state = StateDirectory(settings.state)
        self.recovered = threading.Event()  # what an earlier engine left is in order
        self.wake_webhook = lambda: None    # to be called when a turn may be over
        # Guards what follows; never held while anything is waited for.
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)       # there is a new log, or the engine ends
        self.current = None                 # the Turn in progress, its start and its end included
        self.queue = {}                     # id -> Turn that waits, the next one first; it isn't
        #                                     ready while its message is put on the disk
        self.latest = 0                     # the id of the newest turn
        self.logged = 0                     # the id of the newest turn that has a log
        self.newest_log = None              # the TurnLog of the newest turn that was started
        self.reset_at = (0, None)           # (turn id, thread id): what the thread is up to a turn
        self.logs = {}                      # id -> TurnLog of the turns whose log isn't finished
        self.unfinished = {}                # id -> the ending that such a log could not take
        self.last_failure = None            # why a turn failed, until one succeeds
        self._finishing = threading.Lock()  # one thread at a time tries again with those
        self.keys = {}                      # Idempotency-Key -> (turn id, body's fingerprint)
        self.steers = {}                    # Idempotency-Key -> Steer that isn't answered yet
        self.closing = False

    def _load_turns(self):
        """Read what is in the state directory; returns the logs of turns that were cut short.
        Raises OSError."""
        logs, newest = self.state.load_logs()
        self.reset_at = self.state.load_reset(newest)
        self.latest = max(newest, self.reset_at[0])     # that turn's log may have been lost
        self.logged = newest
        for turn_log in logs:
            if turn_log.header.get("key"):
                self.keys[turn_log.header["key"]] = (turn_log.turn_id,
                                                     turn_log.header.get("fingerprint"))
        started = [turn_log for turn_log in logs if "queued_at" not in turn_log.header]
        self.newest_log = started[-1] if started else None
        unfinished = [turn_log for turn_log in logs if not turn_log.finished]
        self.logs = {turn_log.turn_id: turn_log for turn_log in unfinished}
        self.queue = {turn_log.turn_id: Turn(self, turn_log.turn_id, log=turn_log)
                      for turn_log in unfinished if turn_log.is_queued}
        # Those of logs that can't be read now are for another engine.
        unread = set(self.state.turn_ids()) - {turn_log.turn_id for turn_log in logs}
        self.state.delete_messages({*self.queue, *unread})
        return [turn_log for turn_log in unfinished if not turn_log.is_queued]

    # What the API asks for, from any thread

    @property
    def thread_id(self):
        """The current thread, or None."""
        with self.lock:
            return self._thread()

    def running(self):
        """The id of the turn in progress, or None."""
        with self.lock:
            return self.current.id if self.current else None

    def waiting(self):
        """The Turns whose messages wait, the next one first."""
        with self.lock:
            return [turn for turn in self.queue.values() if turn.ready.is_set()]

    def turn_log(self, turn_id=None):
        """The log of a kept turn, by default of the newest.

        Raises HTTPError 404, 503, and what kept Codex from starting if it was just about to.
        """
        is_newest = turn_id is None
        with self.lock:
            turn_id = self._newest() if is_newest else turn_id
            turn_log = self.logs.get(turn_id)
            turn = self._in_progress(turn_id)
        if turn:
            turn.ready.wait()
            if turn.problem and is_newest:      # it never was: another one is the newest now
                return self.turn_log()
            return turn.log_once_started()
        if turn_log:
            self.recovered.wait()           # with its ending, or as far as there is one
            return turn_log
        with explained("The turn's log can't be read", "see its disk"):
            try:
                turn_log = TurnLog.open(self.state.path_of(turn_id, "log"))
            except (FileNotFoundError, ValueError):
                raise NoSuchTurn("turn %d was never started, or is no longer kept" % turn_id
                                 if self.latest else "there was no turn yet") from None
        if not turn_log.finished:           # and nobody is going to write it
            raise unavailable("The turn's log could not be read when the engine started",
                              "restart the engine, which gives it its ending")
        return turn_log

    def first_unfinished(self):
        """The id of the first turn that isn't over, or of the one that comes next."""
        with self.lock:
            current = [self.current.id] if self.current else []
            return min([*current, *self.queue, *self.logs], default=self.latest + 1)

    def next_log(self, turn_id, seconds):
        """The log of the first kept turn behind that one, or None if none comes in `seconds`.
        Raises HTTPError 503 when the engine ends."""
        with self.lock:
            self.changed.wait_for(lambda: self.logged > turn_id or self.closing, seconds)
            if self.closing and self.logged <= turn_id:
                raise unavailable("The engine is shutting down", "come back in some seconds")
            coming = {turn.id: turn for turn in (self.current, *self.queue.values()) if turn}
        with explained("The turns can't be listed", "come back"):
            ids = sorted({*coming, *self.state.turn_ids()})
        for wanted in filter(lambda kept: kept > turn_id, ids):
            turn = coming.get(wanted)       # one behind it may have its log earlier
            if turn and not turn.ready.wait(seconds):
                return None
            if not (turn and turn.problem):
                with contextlib.suppress(NoSuchTurn):
                    return self.turn_log(wanted)
        with self.lock:
            if self.logged > turn_id:       # that was deleted again: wait for another
                self.changed.wait(seconds)
        return None

    def results(self, wanted, with_message=False):
        """The results of the kept turns `wanted`, a list of ids, newest first.  Raises HTTPError.
        """
        usages, results = {}, []            # thread id -> the usage of its turn before, or None
        for turn_id in self.state.turn_ids():
            if turn_id > max(wanted, default=0):
                break
            try:
                turn_log = self.turn_log(turn_id)
                result = turn_result(turn_log, with_message and turn_id in wanted)
            except NoSuchTurn:
                continue
            except HTTPError:               # it can't be read, which costs itself alone
                if wanted == [turn_id]:
                    raise
                usages.clear()
                continue
            usage, thread_id = result["usage"], turn_log.thread_id
            result["turn_usage"] = own_usage(turn_log, usage, usages.get(thread_id))
            usages[thread_id] = usage
            if turn_id in wanted:
                results.insert(0, result)
        return results

    def replay(self, key, fingerprint):
        """The TurnLog of the turn that `key` started, or None.  Raises HTTPError 422 and 503."""
        self.recovered.wait()
        with self.lock:
            steer = self.steers.get(key)
        if steer:
            steer.settled.wait()
        with self.lock:
            turn_id, known = self.keys.get(key, (None, fingerprint))
            turn = self._in_progress(turn_id)
        if known != fingerprint:
            raise HTTPError(422, "Idempotency-Key was used with another request",
                            "turn %d was started with this key and another body: "
                            "use a new key for every message" % turn_id)
        if turn_id is None:
            return None
        try:
            return turn.log_once_started() if turn else self.turn_log(turn_id)
        except NoSuchTurn:                  # pruned this moment, or somebody has deleted it
            with self.lock:
                self._forget_keys(turn_id)
            return None

    # For whoever holds the lock

    def _thread(self):
        """The current thread: the newest turn's, unless a reset is behind it."""
        turn_id, thread_id = self.reset_at
        if self.newest_log and self.newest_log.turn_id > turn_id:
            return self.newest_log.thread_id
        return thread_id

    def _newest(self):
        """The id of the newest turn that was started, or 0."""
        if self.current:
            return self.current.id
        return self.newest_log.turn_id if self.newest_log else 0

    def _in_progress(self, turn_id):
        """The Turn with the id, if it is the one in progress or waits."""
        if self.current and self.current.id == turn_id:
            return self.current
        return self.queue.get(turn_id)

    def _check_open(self):
        """Raise HTTPError 503 when what waits is left to the next engine."""
        if self.closing:
            raise HTTPError(503, "The engine is shutting down", "send it again in some seconds",
                            [("Retry-After", "5")])

    def _new_turn(self, options, key, fingerprint):
        """A Turn, the one in progress or in the queue.  Raises HTTPError and OSError."""
        self._check_open()
        busy = self.current or next(iter(self.queue.values()), None)
        if busy and options.when_busy != "queue":
            raise HTTPError(409, "A turn is already in progress",
                            "wait for its end, follow it with GET /codex/events, stop it with "
                            "POST /codex/interrupt, or send with when_busy", turn_id=busy.id)
        if len(self.queue) >= MAX_QUEUED:
            raise HTTPError(429, "The queue is full", "%d messages wait: send it again when a turn "
                            "is over, or see DELETE /codex/queue" % MAX_QUEUED)
        turn = Turn(self, self.latest + 1, options)
        self.latest = turn.id
        if key is not None:
            self.keys[key] = (turn.id, fingerprint)
        if busy:
            self.queue[turn.id] = turn
        else:
            self.current = turn
        return turn

    def _withdraw(self, turn):
        """The turn never was: no id, no key."""
        if self.latest == turn.id:          # else another one waits behind it
            self.latest -= 1
        self.reset_at = (min(self.reset_at[0], self.latest), self.reset_at[1])
        self._forget_keys(turn.id)

    def _wait_again(self, turn):
        """The turn in progress waits before all others: it could not be started."""
        self.queue = {turn.id: turn, **self.queue}
        self.current = None

    def _forget_thread(self):
        """The next turn begins a new one."""
        self.reset_at = (self.latest, None)

    def _has_log(self, turn, started=False):
        """A turn has a log that isn't finished; whoever waits for one goes on."""
        if started:
            self.newest_log = turn.log
        self.logs[turn.id] = turn.log
        self.logged = max(self.logged, turn.id)
        self.changed.notify_all()

    def _forget_keys(self, turn_id):
        """The turn's key may be used again."""
        self.keys = {key: value for key, value in self.keys.items() if value[0] != turn_id}

    # The logs' headers and endings, for a turn's thread and for who recovers

    def _with_key(self, turn, header):
        """A log's header with the turn's key."""
        with self.lock:
            for key, (turn_id, fingerprint) in self.keys.items():
                if turn_id == turn.id:
                    header.update(key=key, fingerprint=fingerprint)
        return header

    def finish_log(self, turn_log, ending, before_publishing=lambda: None):
        """Give a log its ending, now or when the disk takes it."""
        try:
            turn_log.finish(ending, before_publishing)
        except OSError as error:
            if turn_log.turn_id not in self.unfinished:
                logger.error("turn %d: its ending can't be written to %s: %s; it is tried again "
                             "every second", turn_log.turn_id, self.settings.state,
                             explanation(error, "see its disk"))
            with self.lock:
                self.unfinished[turn_log.turn_id] = ending
        else:
            with self.lock:
                self.logs.pop(turn_log.turn_id, None)
                self.unfinished.pop(turn_log.turn_id, None)
            self.state.delete_message(turn_log.turn_id)
            self.wake_webhook()

    def _finish_left(self):
        """Write the endings that a log could not take.  Raises HTTPError 503."""
        with self._finishing:
            with self.lock:
                left = [(self.logs[turn_id], ending) for turn_id, ending in self.unfinished.items()]
            for turn_log, ending in left:
                self.finish_log(turn_log, ending)
        if self.unfinished:
            raise unavailable("The ending of an earlier turn can't be written",
                              "GET /codex/status, or the engine's log, says why")

    def unwritten(self):
        """The problems of the endings that a log could not take."""
        with self.lock:                     # the error goes when the disk takes it, at any moment
            errors = [(turn_id, self.logs[turn_id].error) for turn_id in self.unfinished]
        return [problem("the ending of turn %d can't be written" % turn_id,
                        explanation(error, "see the disk of REPLICAS_ENGINE_STATE"))
                for turn_id, error in errors if error]

    def could_not_start(self, turn, problem, waited):
        """Say so; and keep it as a failure, unless who sent the message has to mend it, or somebody
        wanted the turn to end."""
        why = "%s could not be started: %s" % ("turn %d" % turn.id if waited else "a turn", problem)
        is_ours = waited or problem.status >= 500
        logger.log(logging.ERROR if is_ours else logging.INFO, "%s", why)
        if is_ours and not turn.stop_code:
            self.last_failure = why

    def recall_failure(self):
        """For the status line: why a turn failed, if none has succeeded since."""
        with contextlib.suppress(OSError):
            for turn_id in reversed(self.state.turn_ids()):
                with contextlib.suppress(HTTPError, OSError, ValueError):
                    summary = turn_summary(TurnLog.open(self.state.path_of(turn_id, "log")))
                    error = summary["error"]
                    if summary["status"] == "failed" and not (
                            isinstance(error, dict) and error.get("code") in NO_FAILURES):
                        self.last_failure = "turn %d failed: %s" % (
                            turn_id, message_of(error) or NO_REASON)
                    if summary["status"] == "completed" or self.last_failure:
                        return

    def prune(self):
        """Delete what is no longer kept."""
        try:
            self.state.delete_old(self._forget_turn)
        except OSError as error:
            logger.error("old turns can't be deleted: %s", words_of(error))

    def _forget_turn(self, turn_id):
        """Whether the turn's log may be deleted; its key is then forgotten."""
        with self.lock:
            if turn_id in self.logs or self.newest_log and turn_id == self.newest_log.turn_id:
                return False                # the thread is read from the newest that was started
            self._forget_keys(turn_id)
            return True


# ---------------------------------------------------------------------------------------------
# Webhook
# ---------------------------------------------------------------------------------------------
# One thread, which tells a URL of one finished turn after the other, each until it is taken.  What
# was told is a mark beside the turns' logs; all else is read from them.

WEBHOOK_PATIENCE = 10.0                    # seconds that a try may take
WEBHOOK_PAUSE, WEBHOOK_FACTOR = 1.0, 5     # seconds until a second try, and how the pause grows
MAX_WEBHOOK_PAUSE = 900.0                  # seconds
MAX_WEBHOOK = 512 * 1024                   # bytes of a body


def webhook_body(result):
    """The body that tells of a turn: `result` as GET /codex/turns/N has it, cut to MAX_WEBHOOK."""
    result = dict(result)
    while True:
        body = json_bytes({"event": "turn.finished", "turn": result})
        message = result.get("final_message")
        if len(body) <= MAX_WEBHOOK:
            return body
        if message:                         # of control characters, for instance, six bytes each
            result.update(final_message=message[:len(message) // 2], final_message_truncated=True)
        else:                               # Codex said a lot else
            result.update(usage=None, turn_usage=None,
                          error=result["error"] and {"message": message_of(result["error"])})


class Webhook:
    """Tells REPLICAS_ENGINE_WEBHOOK_URL of the turns that are over, in their order."""

    def __init__(self, runner):
        self.runner = runner
        self.url = runner.settings.webhook_url
        self.secret = runner.settings.webhook_secret
        self.wake = threading.Event()       # there may be something to tell
        self.last_error = None              # why the last try failed, if it did
        self._closed = threading.Event()

    def start(self):
        """Begin, with the turns that end from now on if there was no webhook before, or the mark is
        of a state directory that was emptied."""
        try:
            told = self.runner.state.told()
            if told is None or told > self.runner.latest:
                self.runner.state.write_told(self.runner.first_unfinished() - 1)
        except OSError as error:
            logger.error("the webhook's mark can't be written: %s", words_of(error))
        start_thread("webhook", self._run)

    def close(self):
        """Begin no other try."""
        self._closed.set()
        self.wake.set()

    def pending(self):
        """The ids of the turns that are over and to be told, the next one first.  Raises OSError.
        """
        first, told = self.runner.first_unfinished(), self.runner.state.told() or 0
        return [turn_id for turn_id in self.runner.state.turn_ids() if told < turn_id < first]

    def status(self):
        """What GET /codex/status says of it."""
        with contextlib.suppress(OSError):
            return {"pending": len(self.pending()), "last_error": self.last_error}
        return {"pending": None, "last_error": self.last_error}

    def _run(self):
        """The thread: one turn after the other."""
        failures = 0
        while not self._closed.is_set():
            self.wake.clear()
            try:
                told = self._tell_next()
                failures, self.last_error = 0, None
            except Exception as error:      # whatever it is, it is tried again
                told, self.last_error = False, words_of(error)
                pause = min(WEBHOOK_PAUSE * WEBHOOK_FACTOR ** min(failures, 9), MAX_WEBHOOK_PAUSE)
                failures += 1
                logger.warning("the webhook could not be told of a turn: %s; again in %g s",
                               self.last_error, pause)
                self._closed.wait(pause)
                continue
            if not told:
                self.wake.wait()

    def _tell_next(self):
        """Tell of the next turn; False if there is none.  Raises all kinds of exceptions."""
        pending = self.pending()
        if not pending:
            return False
        with contextlib.suppress(NoSuchTurn):   # it is no longer kept
            turn_log = self.runner.turn_log(pending[0])
            for result in self.runner.results([turn_log.turn_id], with_message=True):
                self._post(webhook_body(result), "%s.%d" % (turn_mark(turn_log), turn_log.turn_id))
        self.runner.state.write_told(pending[0])
        return True

    def _post(self, body, key):
        """One try.  Raises OSError, ValueError and HTTPException."""
        import http.client                  # most engines have no webhook
        url = self.url
        if url.scheme == "https":
            import ssl
            connection = http.client.HTTPSConnection(
                url.hostname, url.port, timeout=WEBHOOK_PATIENCE,
                context=ssl.create_default_context())
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port,
                                                    timeout=WEBHOOK_PATIENCE)
        too_late = threading.Event()
        timer = threading.Timer(WEBHOOK_PATIENCE, self._give_up, (connection, too_late))
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            self._check_time(too_late)      # until now there may have been nothing to cut
            target = (url.path or "/") + ("?" + url.query if url.query else "")
            connection.request("POST", target, body, {
                "Content-Type": "application/json", "Idempotency-Key": key,
                "User-Agent": "replicas-engine/%s" % __version__,
                "X-Replicas-Signature": "sha256=%s" % hmac.new(
                    self.secret, body, hashlib.sha256).hexdigest()})
            status = connection.getresponse().status
            self._check_time(too_late)      # what there was of a head passes for a whole one
        finally:
            timer.cancel()
            connection.close()
        if not 200 <= status < 300:         # a redirect isn't followed
            raise ValueError("it answered %d" % status)

    @staticmethod
    def _check_time(too_late):
        """Raise TimeoutError if the try was given up."""
        if too_late.is_set():
            raise TimeoutError("it takes longer than %g s" % WEBHOOK_PATIENCE)

    @staticmethod
    def _give_up(connection, too_late):
        """End a try that takes too long in all, if it has come as far as to be connected."""
        too_late.set()
        if connection.sock:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)


# ---------------------------------------------------------------------------------------------
# CodexRunner
# ---------------------------------------------------------------------------------------------
# What is done to the conversation: what the API orders, and what a turn's thread reports.  What
# takes time happens in the turn's own thread or in the request's, before the lock or after it.

START_PATIENCE = 60.0                      # seconds that a message waits on for Codex to start


class CodexRunner(Conversation):
    """What happens to the conversation: turns start, wait, are stopped and end."""

    def __init__(self, settings):
        super().__init__(settings)
        self.rollouts = Rollouts(settings.codex_home)
        self.finder = CodexFinder(settings)
        self.started_at = timestamp()
        self.on_change = lambda: None       # called when a turn has begun or ended
        self.webhook = Webhook(self) if settings.webhook_url else None
        if self.webhook:
            self.wake_webhook = self.webhook.wake.set
        self._closed = threading.Event()
        self._ordering = threading.Lock()   # held while the queue or the thread is being changed

    # Starting with the process

    def open(self, once_taken=lambda: None):
        """Take the state directory, call `once_taken` and put in order what was left there.

        Raises OSError, StateInUse and what that raises.  Processes of a turn that outlived its
        engine are stopped in a thread; no turn starts before that is done.
        """
        self.state.open()
        try:
            once_taken()
            self._load()
        except BaseException:
            self.state.close()
            raise

    def _load(self):
        """Begin with what is in the state directory.  Raises OSError."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        broken = self._load_turns()
        if self.webhook:                    # what is ended now is news
            self.webhook.start()
        elif self.state.told() is not None:     # when there is one again, it begins anew
            self.state.write_told(None)
        start_thread("recovery", self._recover, broken)
        start_thread("sync", self._sync_logs)

    def _recover(self, broken):
        """The recovery thread: end what an earlier engine did not, one turn after the other."""
        do_all(*(functools.partial(self._end_broken, turn_log) for turn_log in broken),
               self.recall_failure, self._tell, self.recovered.set, self.prune, self.start_next)

    def _end_broken(self, turn_log):
        """Stop what is left of a turn that was cut short, and give its log an ending."""
        logger.warning("turn %d was cut short by the engine's end", turn_log.turn_id)
        try:
            other = TurnProcesses.its_engine(turn_log.header)
            if other:
                logger.error("turn %d: the engine with pid %d runs it: the state directory is a "
                             "copy of that one's", turn_log.turn_id, other)
            left = not other and "queued_at" not in turn_log.header and TurnProcesses.from_saved(
                turn_log.header).stop()
            if left:
                logger.error("turn %d: this can't be stopped: %s", turn_log.turn_id, ", ".join(
                    "pid %d (%s)" % (each["pid"], each["command"]) for each in left))
        except (OSError, ValueError) as error:
            logger.error("turn %d: its processes can't be stopped: %s", turn_log.turn_id,
                         words_of(error))
        self.finish_log(turn_log, [] if turn_log.has_ending else failure(
            STOP_MESSAGES["engine_restarted"], "engine_restarted"))

    def _sync_logs(self):
        """The sync thread: a power cut takes a second of a turn at most, and an ending that the
        disk could not take gets there a second after it can."""
        clock = time.time() - time.monotonic()
        while True:
            time.sleep(SYNC_INTERVAL)       # by the monotonic clock, in every Python
            if self._closed.is_set():
                return
            try:
                before, clock = clock, time.time() - time.monotonic()
                if clock < before - SYNC_INTERVAL:
                    self._wake_all()
                turn = self.current
                if turn and turn.log:
                    turn.log.sync_new()
                with contextlib.suppress(HTTPError):
                    self._finish_left()
                if self.queue:              # one that couldn't start, or behind an ending
                    self.start_next()
            except Exception:               # whatever it is, the next second is another one
                logger.exception("the sync thread failed")

    def _wake_all(self):
        """Have whoever waits look anew at how long: the machine's clock was set back, by which the
        oldest Pythons (3.8, and 3.9 of Debian 11) end a wait, sem_timedwait(3)."""
        with self.lock:
            self.changed.notify_all()
            logs = list(self.logs.values())
        for turn_log in logs:
            with turn_log.changed:
                turn_log.changed.notify_all()

    # What the API asks for, from any thread

    def send(self, options, key=None, fingerprint=None):
        """Start a turn with the message, or do what its `when_busy` says, or find the turn that
        `key` belongs to: its TurnLog, and where in it the message cut in, or None.

        Raises HTTPError 404 (no such thread), 409 (a turn is in progress), 422 (the key belongs to
        another body), 429 (the queue is full), 503, and 400 for what this Codex can't do.
        """
        while True:
            known = self.replay(key, fingerprint)
            if known:
                return known, None
            if options.thread_id(None):
                self.rollouts.find_known(options.thread_id(None))
            with explained("The turn can't be started", "send it again"), self.lock:
                if key in self.keys or key in self.steers:      # just now
                    continue
                if self.current and options.when_busy == "steer":
                    turn, steer = self.current, self._steer(options, key)
                else:
                    turn, steer = self._new_turn(options, key, fingerprint), None
                waits = turn.id in self.queue
            if steer:
                offset = self._await_steer(turn, steer, key, fingerprint)
                return turn.log, offset     # which the turn has by now
            if waits:
                self._enqueue(turn)
            else:
                turn.start()
            return turn.log_once_started(), None

    def _await_steer(self, turn, steer, key, fingerprint):
        """Where in the turn's log the Steer's event comes.  Raises HTTPError 409."""
        turn.alarm.ring()
        steer.answered.wait()
        with self.lock:
            if key is not None:
                del self.steers[key]
                if not steer.refusal:
                    self.keys[key] = (turn.id, fingerprint)
        steer.settled.set()
        if steer.refusal:
            raise HTTPError(409, "The message did not reach the turn in progress", steer.refusal,
                            turn_id=turn.id)
        return steer.offset

    def _enqueue(self, turn):
        """Put a message that waits on the disk, before anybody is told that it does."""
        log = problem = None
        try:
            with explained("The message can't be queued", "see REPLICAS_ENGINE_STATE"):
                log = self.state.create_queued(turn.id, turn.options.saved(),
                                               self._with_key(turn, turn.header()))
        except Exception as error:          # whatever it is, nobody may wait for it for ever
            problem = not_startable(error)
        with self.lock:
            turn.log, turn.problem, turn.options = log, problem, None
            if log:
                self._has_log(turn)
            else:
                self._forget_keys(turn.id)
            if problem or turn.stop_code:
                del self.queue[turn.id]
            turn.ready.set()
        if problem:
            turn.be_over()
        elif turn.stop_code:                # it was taken out meanwhile
            turn.end_unstarted()
        self.start_next()

    def start_next(self):
        """Let the first message that waits have its turn, if it is time, and the disk has taken the
        endings of those before it."""
        self.wake_webhook()
        with self.lock:
            turn = next(iter(self.queue.values()), None)
            if not (turn and turn.ready.is_set() and self.recovered.is_set()) or (
                    self.current or self.closing or self.unfinished):
                return
            self.current = self.queue.pop(turn.id)
        turn.start()

    def cancel(self, turn_id=None):
        """Take that turn's message, or every one, out of the queue: how many that were.  Their
        turns have an ending then, or a kill -9 could have the next engine start them.  Raises
        HTTPError 503 where the disk has neither taken the ending nor let go of the message."""
        self.recovered.wait()
        with self._ordering:
            with self.lock:
                self._check_open()
                waiting, others, count = self._take_out(turn_id)
            for turn in waiting:
                turn.end_unstarted()
        self.start_next()
        for turn in others:
            turn.over.wait()
        with self.lock:
            unfinished = [self.logs[each] for each in self.unfinished if turn_id in (None, each)]
        if any(each.is_queued and self.state.has_message(each.turn_id) for each in unfinished):
            raise unavailable("The disk has not let go of the message",
                              "it doesn't run unless the engine restarts before that: GET "
                              "/codex/status, or the engine's log, says why")
        return count

    def interrupt(self):
        """Stop the turn in progress; its id when nothing of it is left, None if there was none.
        Raises HTTPError 500 that says what could not be stopped, and 503 when it is left to the
        next engine."""
        turn = self._stop_current("interrupted")
        if turn:
            turn.stopper.check()
            with self.lock:
                if turn.id in self.queue:   # the engine ends before Codex got the message
                    self._check_open()
        return turn.id if turn and not turn.problem and turn.progress.terminal is None else None

    def reset(self):
        """Stop the turn in progress, empty the queue and forget the thread.  Raises HTTPError 503,
        and 500 as `interrupt` does, when the thread is forgotten."""
        with self._ordering:
            turn = self._stop_current("interrupted", forget=True)
            try:
                self.state.write_reset(self.reset_at[0])
            except OSError as error:
                raise unavailable("The reset could not be written down",
                                  "%s, and reset again: the thread is forgotten until the engine "
                                  "restarts" % explanation(error, "see its disk")) from None
        if turn:
            turn.stopper.check()

    def close(self):
        """Take no more turns and give the one in progress its ending; what it ran is stopped."""
        with self.lock:
            self.closing = True
            self.changed.notify_all()
        self._stop_current("shutdown")
        with contextlib.suppress(HTTPError):
            self._finish_left()
        self._closed.set()
        if self.webhook:
            self.webhook.close()
        with self.lock:
            queued = list(self.queue.values())
        for turn in queued:                 # no other engine gets the directory before that
            turn.ready.wait()
        for turn in self.waiting():
            turn.log.leave()
            turn.be_over()
        with self._ordering:                # nor before an order is written down
            self.state.close()

    def stop(self, turn, code):
        """Begin to stop a turn; the first reason is the one that counts."""
        with self.lock:
            turn.stop_code = turn.stop_code or code
        turn.alarm.ring()

    def _stop_current(self, code, forget=False):
        """Stop the turn in progress and wait for its end: the Turn, or None if there was none.  To
        `forget` is to empty the queue and leave the thread."""
        self.recovered.wait()
        waiting = others = ()
        with self.lock:
            turn = self.current
            if forget:
                self._check_open()
                self._forget_thread()
                waiting, others, _ = self._take_out()
            if turn:
                turn.stop_code = turn.stop_code or code
        if turn:
            turn.alarm.ring()
        for each in waiting:
            each.end_unstarted()
        for each in filter(None, (turn, *others)):
            each.over.wait()
        return turn

    # For whoever holds the lock

    def _steer(self, options, key):
        """A Steer of the turn in progress.  Raises HTTPError 409."""
        if options.images:
            raise HTTPError(409, "A turn is already in progress", "images can't cut into it",
                            turn_id=self.current.id)
        steer = Steer(options.message)
        if key is not None:
            self.steers[key] = steer
        self.current.steers.put(steer)
        return steer

    def _take_out(self, turn_id=None):
        """Take a turn, or every one, out of the queue: those to be ended; the others, which are
        ended by who is writing them, or just starts them; and how many were not taken before."""
        turns = list(self.queue.values())
        if self.current and self.current.ready.is_set() and not self.current.is_begun:
            turns.append(self.current)      # it has waited, and Codex has not got its message yet
        turns = [turn for turn in turns if turn_id in (None, turn.id)
                 and turn.stop_code in (None, "cancelled")]
        count = sum(turn.stop_code is None for turn in turns)
        waiting = [turn for turn in turns if turn.ready.is_set() and turn is not self.current]
        for turn in turns:
            turn.stop_code = "cancelled"
        for turn in waiting:
            del self.queue[turn.id]
        return waiting, [turn for turn in turns if turn not in waiting], count

    # For a turn's thread, as the turn goes on

    def prepare(self, options):
        """The Codex for a turn with the options.  Raises HTTPError 503 and 400."""
        codex = self.finder.find()
        if not os.path.isdir(self.settings.workspace):
            raise unavailable("The workspace directory is missing",
                              "%s is not a directory: make it, or set WORKSPACE_HOME"
                              % self.settings.workspace)
        codex.version = self.finder.version(codex)
        for key, since in options.since.items():
            if (version_numbers(codex.version) or since) < since:
                raise bad_parameter(key, "is beyond Codex %s: it takes %d.%d or newer"
                                    % (codex.version, *since))
        self._finish_left()
        with self.lock:
            self._check_open()
        return codex

    def create_log(self, turn):
        """The turn's TurnLog, now that its Codex is there.  Raises OSError."""
        header = self._with_key(turn, turn.header())
        if turn.log:
            turn.log.begin(header)
            return turn.log
        return self.state.create_log(turn.id, header)

    def begin(self, turn):
        """Codex is there, and may have the message unless the turn is stopped.  Raises HTTPError
        503."""
        with self.lock:
            self._check_open()
            turn.is_begun = not turn.stop_code

    def started(self, turn):
        """Codex has its prompt, and the turn is on the disk."""
        with self.lock:
            self._has_log(turn, started=True)
        self._tell()

    def not_started(self, turn):
        """The turn never was: no log, no id, no key."""
        if turn.log:
            turn.log.discard()
        with self.lock:
            self.current = None
            self._withdraw(turn)
        self._tell()
        self.start_next()

    def put_back(self, turn, problem):
        """Have a message wait on that could not be started, if that may pass; whether it does."""
        try:
            return problem.status == 503 and self._put_back(turn, problem)
        except Exception:                   # whatever it is, nobody may wait for it for ever
            return self.current is not turn

    def _put_back(self, turn, problem):
        """Unless it is to be stopped, or was tried for long enough."""
        turn.stop_run()
        turn.leave()
        if turn.log.header is not turn.queued_header:
            turn.log.begin(turn.queued_header)
        turn.run = None
        now, steers = time.monotonic(), Steers(self.lock)
        with self.lock:
            is_first, turn.first_try = turn.first_try is None, turn.first_try or now
            is_last = self.closing          # looked at here: else it may run again by then
            if turn.stop_code not in (None, "shutdown") or (
                    not is_last and now > turn.first_try + START_PATIENCE):
                return False
            steers, turn.steers = turn.steers, steers
            self._wait_again(turn)          # the sync thread starts it, or the next engine
        steers.close(None)
        if is_last:
            turn.be_over()
        elif is_first:
            logger.warning("turn %d can't be started; for %d s it is tried again: %s",
                           turn.id, START_PATIENCE, problem)
        return True

    def release(self, turn):
        """The turn in progress is as good as over: another may start."""
        with contextlib.suppress(OSError, MemoryError):     # the turn's ending is on the disk
            if turn.run and self.current is turn:
                turn.run.processes.discard()
        with self.lock:
            if self.current is not turn:
                return
            self.current = None
        self._tell()
        self.start_next()

    def _tell(self):
        """Call on_change."""
        with contextlib.suppress(OSError, MemoryError):     # systemd's status line is late
            self.on_change()


# ---------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------
# Codex succeeds silently without its sandbox, and a turn without a key fails after half a minute:
# so what can be known beforehand is looked at here, in one place, for the log, for --check and for
# the status.  Whoever looks changes nothing: a directory that is missing is made by who needs it.
# What takes a process of its own, and seconds on a machine that is busy, is tried out by the thread
# "problems" alone, but for a Codex whose version nobody has asked yet.

SETTINGS_FILE = "/etc/replicas-engine/settings.env"
MIN_SECRET = 16                            # bytes
MIN_ROOM = 1024 * 1024                     # bytes that a disk has when it isn't full
SANDBOX_TRIAL = "unshare --user --net --map-root-user true".split()
BWRAP_TRIAL = "bwrap --unshare-user --unshare-net --ro-bind / / --dev /dev true".split()
TRIAL_PATIENCE = 5.0                       # seconds


def try_sandbox(before=None):
    """Why what Codex's sandbox is made of can't be had here, or None; where it can't be found out
    now, what was so `before`."""
    try:
        child = start_process(BWRAP_TRIAL if shutil.which("bwrap") else SANDBOX_TRIAL,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE)
    except OSError:
        return before                       # there is no such program, or no room for it
    with child:
        try:
            said = child.communicate(timeout=TRIAL_PATIENCE)[1].decode("utf-8", "replace").strip()
        except subprocess.TimeoutExpired:
            child.kill()
            return before
    if child.returncode == -signal.SIGKILL:     # we killed it: the engine ends
        return before
    return (said or "status %d" % child.returncode) if child.returncode else None


def is_below(path, folder):
    """Whether a path lies in a folder, links followed."""
    return (os.path.realpath(path) + os.sep).startswith(os.path.realpath(folder) + os.sep)


def is_missing(path):
    """Whether nothing is there; False also if that can't be said."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def is_full(folder):
    """Whether the disk under a folder is; False if that can't be said."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return (disk.f_blocks > 0 and disk.f_bavail * disk.f_frsize < MIN_ROOM
            or disk.f_files > 0 == disk.f_favail)


NO_LOGIN = ("auth_mode", "last_refresh")    # what auth.json has beside keys and tokens


class Problems:
    """What keeps turns from starting or ending well: for --check, for the log's warnings and for
    GET /codex/status.  `state` is the running engine's StateDirectory.

    Each `_look_at_...` returns what there is, for who wants to know, and a list of problems.
    """

    def __init__(self, settings, finder, state=None):
        self.settings = settings
        self.finder = finder
        self.state = state
        self.sandbox_error = None           # what `try_out` found

    def try_out(self):
        """Start what has to be started to know more; it may take seconds."""
        self.finder.ask_again()
        if self.settings.sandbox != "danger-full-access":
            self.sandbox_error = try_sandbox(self.sandbox_error)

    def find(self):
        """The problems that there are: [{"problem": what, "details": what to do}].

        It starts no process, but for a `codex --version` if nobody has asked that Codex yet.
        """
        return [found for _, _, problems in self.look() for found in problems]

    def look(self):
        """(subject, what there is, its problems) of everything that a turn needs."""
        settings = self.settings
        return [("codex", *self._look_at_codex()), ("key", *self._look_at_key()),
                ("secret", *self._look_at_secret()),
                ("workspace", *self._look_at_folder(
                    settings.workspace, "WORKSPACE_HOME", settings.sandbox != "read-only")),
                ("codex home", *self._look_at_folder(settings.codex_home, "CODEX_HOME",
                                                     is_made=True)),
                ("state", *self._look_at_state()),
                ("settings", *self._look_at_settings()), ("sandbox", *self._look_at_sandbox())]

    def _look_at_codex(self):
        """The Codex that would be run."""
        try:
            codex = self.finder.find()
        except HTTPError as error:
            return "", [problem(error.body["error"], error.body["details"])]
        version = self.finder.version(codex)
        if version is None:
            return "", [problem("%s does not say its version" % codex.program,
                                "set CODEX_PATH to Codex, or install it anew")]
        return "%s, version %s" % (codex.program, version), []

    def _look_at_key(self):
        """What Codex shows to its API."""
        if self.settings.key_name:
            return self.settings.key_name, []
        path = os.path.join(self.settings.codex_home, "auth.json")
        try:
            with open_regular(path) as file:
                login = json_object(file.read(READ_SIZE).decode())
                if any(value for name, value in login.items() if name not in NO_LOGIN):
                    return "the login in %s" % path, []
            found = "there is no login in it"
        except (OSError, ValueError) as error:
            found = words_of(error)
        return "", [problem("Codex has no key and no login", "set OPENAI_API_KEY or CODEX_API_KEY, "
                            "or log in with `codex login` (%s: %s)" % (path, found))]

    def _look_at_secret(self):
        """What clients show to the engine."""
        length = len(self.settings.secret or "")
        if not length:
            return "", [problem("REPLICAS_ENGINE_SECRET is not set: only /health is answered",
                                self.settings.remedy("set REPLICAS_ENGINE_SECRET"))]
        if length < MIN_SECRET:
            return "", [problem("REPLICAS_ENGINE_SECRET can be guessed: it has %d characters"
                                % length, self.settings.remedy("choose one of %d or more"
                                                               % MIN_SECRET, " --secret -"))]
        return "REPLICAS_ENGINE_SECRET is set", []

    def _look_at_folder(self, path, name, is_written=True, is_made=False):
        """A directory that has to be there, or `is_made` when it is needed; and mostly written."""
        temporary, there = self.settings.inherited.get("TMPDIR") or "/tmp", path
        while is_made and is_missing(there):
            there = os.path.dirname(there)
        remedy = self.settings.remedy("make it, or set %s" % name)
        try:
            is_folder = stat.S_ISDIR(os.stat(there).st_mode)
            is_read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        except OSError as error:
            what, remedy = words_of(error), REMEDIES.get(error.errno, remedy)
        else:
            if not is_folder:
                what = "this is not a directory"
                remedy = self.settings.remedy("set %s to one" % name)
            elif is_written and not os.access(there, os.W_OK | os.X_OK):
                what = "it can't be " + ("written" if there == path else "made in " + there)
                if is_read_only:            # as what a service's unit doesn't let it write is, too
                    remedy = self.settings.remedy("its file system is read-only: mount it anew, or "
                                                  "set %s" % name)
                else:
                    remedy = ("sudo chown %d %s, if it is to be the engine's user's; else set %s"
                              if there == path else "sudo install -d -m 700 -o %d %s, or set %s"
                              ) % (os.geteuid(), path, name)
            elif is_written and is_full(there):
                what, remedy = "the disk is full", "make room"
            elif name != "WORKSPACE_HOME" and is_below(path, temporary):
                # The agent may write there, and Codex can't make its sandbox from there.
                what = "it lies below %s" % temporary
                remedy = self.settings.remedy("set %s to a place elsewhere" % name)
            else:
                return path, []
        return path, [problem("%s=%s: %s" % (name, path, what), remedy)]

    def _look_at_state(self):
        """The state directory, and what the engine has in it."""
        name = "REPLICAS_ENGINE_STATE"
        if self.state and not self.state.is_ours():
            return self.state.path, [problem(
                "%s=%s: it was deleted or replaced while the engine ran: another engine could start"
                % (name, self.state.path), self.settings.remedy("restart the engine"))]
        path = self.settings.state
        if is_missing(path) and path in self.settings.env.get("STATE_DIRECTORY", "").split(":"):
            return path, []                 # of a service that never ran: systemd makes it
        path, problems = self._look_at_folder(path, name, is_made=True)
        if problems:
            return path, problems
        for part in (path, os.path.join(path, "lock"), os.path.join(path, "turns")):
            with contextlib.suppress(OSError):
                if os.geteuid() not in (0, os.stat(part).st_uid) or not os.access(
                        part, os.R_OK | os.W_OK | os.X_OK * os.path.isdir(part)):
                    problems = [problem("%s=%s: not all of it is the engine's" % (name, path),
                                        "sudo chown -R {0} {1}/ && sudo chmod -R u+rwX {1}/".format(
                                            os.geteuid(), path))]
        return path, problems

    def _look_at_settings(self):
        """What was odd about the settings when they were read, and who may read them."""
        problems = list(self.settings.problems)
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:                    # as in a container, where it may be meant so
            if self.settings.is_service:
                problems.append(problem("the service's user, with the id %d, is unknown here"
                                        % os.getuid(), "sudo replicas-engine-setup --user NAME"))
        with contextlib.suppress(OSError):
            status = os.stat(SETTINGS_FILE)
            if self.settings.is_service and (status.st_uid or status.st_mode & 0o077):
                problems.append(problem("others than root can read or change %s" % SETTINGS_FILE,
                                        "sudo replicas-engine-setup"))
        return "they can be used", problems

    def _look_at_sandbox(self):
        """What Codex's sandbox is made of, as `try_out` found it."""
        if self.sandbox_error:
            return "", [problem("Codex's sandbox can't be made here: %s" % self.sandbox_error,
                                self.settings.remedy("see README, or set REPLICAS_ENGINE_SANDBOX="
                                                     "danger-full-access", " --allow-sandbox"))]
        return self.settings.sandbox or "as Codex's own configuration says", []


# ---------------------------------------------------------------------------------------------
# Application
# ---------------------------------------------------------------------------------------------
# One table of routes and a method for each that has more than a line.  Here is what HTTP says of a
# turn; what a turn is stands above.  It runs under any WSGI server with threads; ours tells it more
# by two keys of the environ, `replicas_engine.may_be_gone` and `replicas_engine.crowded`.

MAX_HEALTH_BODY = 64 * 1024                # bytes that a client without the secret may send
MAX_WAIT = 300                             # seconds that a request for a result may wait
WARNING_INTERVAL = 60.0                    # seconds between two warnings of refused secrets
DEFAULT_THREADS, MAX_THREADS = 50, 1000    # of an answer


class Application:
    """The HTTP API as a WSGI application (PEP 3333), for any WSGI server with threads.

    Nothing is read or opened before the first request, or before `open`.
    """

    def __init__(self, settings=None):
        self.settings = settings
        self.runner = None
        self.problems = None                # see Problems
        self._opening = threading.Lock()    # one thread takes the state directory
        self._next_warning = 0.0            # of a refused secret, by time.monotonic
        self.router = Router(
            ("GET", "/health", lambda request: json_response({"status": "ok",
                                                              "timestamp": timestamp()})),
            ("GET", "/ping", lambda request: json_response({"message": "pong",
                                                            "timestamp": timestamp()})),
            ("POST", "/codex/send", self.send),
            ("GET", "/codex/events", self.events),
            ("GET", "/codex/turns", self.turns),
            ("GET", "/codex/turns/N", self.turn),
            ("GET", "/codex/threads", self.threads),
            ("GET", "/codex/queue", self.queue),
            ("DELETE", "/codex/queue", self.cancel),
            ("DELETE", "/codex/queue/N", self.cancel),
            ("POST", "/codex/interrupt", self.interrupt),
            ("GET", "/codex/history", self.history),
            ("GET", "/codex/status", self.status),
            ("POST", "/codex/reset", self.reset),
            # OPTIONS * (RFC 9110, 9.3.7), which has no path
            ("OPTIONS", "", lambda request: Response([], 204, [
                ("Allow", "DELETE, GET, HEAD, OPTIONS, POST")])),
        )

    def open(self, once_taken=lambda: None):
        """Read the settings and open a CodexRunner, if that wasn't done before: see there."""
        with self._opening:
            if self.runner is None:
                shut_out_others()
                self.settings = self.settings or Settings.from_process()
                if not logger.handlers:
                    start_logging()
                if self.settings.development:
                    logger.setLevel(logging.DEBUG)
                runner = CodexRunner(self.settings)
                runner.open(once_taken)
                self.problems = Problems(self.settings, runner.finder, runner.state)
                self.runner = runner

    def admits(self, environ):
        """Whether the request shows the secret, and so is answered before others."""
        try:
            check_secret(Request(environ), self.settings.secret)
        except HTTPError:
            return False
        return True

    def __call__(self, environ, start_response):
        """One request (PEP 3333): whatever happens, there is an answer."""
        request = Request(environ)
        try:
            response = self._respond(request)
        except HTTPError as error:
            self._warn_of(error, request)
            response = error.response()
        except (OSError, MemoryError) as error:
            logger.exception("%s %s failed", request.method, request.path)
            response = unavailable("The machine is out of order or of room",
                                   words_of(error)).response()
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            response = json_response({"error": "Internal server error",
                                      "details": "the engine's log says more"}, 500)
        status = "%d %s" % (response.status, HTTPStatus(response.status).phrase)
        start_response(status, response.headers)
        if request.method != "HEAD":
            return response.body
        if hasattr(response.body, "close"):
            response.body.close()
        return []

    def _warn_of(self, error, request):
        """A line for what the engine could not do; and for who has no secret one a minute, lest who
        guesses fills the journal."""
        now = time.monotonic()
        if error.status in (500, 507) and self.settings and self.settings.secret:
            logger.warning("%s %s: %s", request.method, request.path, error)
        elif error.status == 401 and now >= self._next_warning:
            self._next_warning = now + WARNING_INTERVAL
            logger.warning("a request from %s was refused: %s; others within %d s are not logged "
                           "like this", request.environ.get("REMOTE_ADDR") or "a Unix socket",
                           error.body["error"], WARNING_INTERVAL)

    def _respond(self, request):
        """The Response: secret, route, whole body, handler, in this order."""
        if request.path == "/health" and request.method in ("GET", "HEAD"):
            request.read_body(MAX_HEALTH_BODY)
            return self.router.handler(request.method, request.path)(request)
        if self.runner is None:
            self.open()
        check_secret(request, self.settings.secret)
        handler = self.router.handler(request.method, request.path)
        request.body = request.read_body(self.settings.max_body)    # whole, or nothing is done
        return handler(request)

    # POST /codex/send

    def send(self, request):
        """Start a turn, or find the one that the key started."""
        body, fingerprint = self._message(request.body)
        message = body.get("message")
        if not isinstance(message, str) or not message.strip():
            raise HTTPError(400, "Message is required and must be a string",
                            "it is blank" if isinstance(message, str) and message else None)
        # Who queues a message may have both: a preference in general, and a stream here.
        streams = not prefers_async(request) or (
            body.get("when_busy") == "queue"
            and "text/event-stream" in (request.header("Accept") or "").lower())
        if streams:
            check_room_for_stream(request)
        key = request.header("Idempotency-Key")
        if key is not None and not 1 <= len(key) <= 255:
            raise bad_parameter("Idempotency-Key", "must be 1 to 255 characters long")
        turn_log = self.runner.replay(key, fingerprint)     # whose image may be gone by now
        offset = None
        if turn_log is None:
            turn_log, offset = self.runner.send(TurnOptions(body, self.settings), key, fingerprint)
        try:
            if streams:
                response = event_stream(request, turn_log, offset or turn_log.start)
            else:
                response = json_response(self._accepted(turn_log, offset), 202,
                                         [("Preference-Applied", "respond-async")])
        except HTTPError as error:          # which must not read as if nothing had been started
            raise HTTPError(error.status, error.body["error"], "turn %d was started, see GET "
                            "/codex/events: %s" % (turn_log.turn_id, error.body["details"]),
                            turn_id=turn_log.turn_id) from None
        response.headers += self._ignored_keys(body, offset is not None)
        return response

    def _accepted(self, turn_log, offset):
        """What is said at once of a message; `offset` is where it cut in, or None."""
        if offset is not None:
            return {"turn_id": turn_log.turn_id, "status": "steered"}
        summary = {"turn_id": turn_log.turn_id, "thread_id": turn_log.thread_id,
                   "status": turn_summary(turn_log)["status"]}
        waiting = [turn.id for turn in self.runner.waiting()]
        if turn_log.turn_id in waiting:
            summary.update(thread_id=self.runner.thread_id, status="queued",
                           position=waiting.index(turn_log.turn_id) + 1)
        elif summary["status"] == "queued":     # its turn has come this moment
            summary["status"] = "running"
        return summary

    @staticmethod
    def _ignored_keys(body, is_steered):
        """A header that names the body's keys that mean nothing: one may be misspelt."""
        unknown = set(body) - {"message", "when_busy"} - (
            {option.key for option in TURN_OPTIONS} if not is_steered else set())
        names = [urllib.parse.quote(name[:64], safe="", errors="replace") or '""'
                 for name in sorted(unknown)[:20]]
        return [("X-Replicas-Ignored-Keys", ", ".join(names)[:1000])] if names else []

    @staticmethod
    def _message(body):
        """The body's object, and a fingerprint that an equal one has, too."""
        try:
            value = json_value.decode(body.decode("utf-8-sig"))
            fingerprint = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        except (ValueError, RecursionError) as error:
            raise HTTPError(400, "Failed to process message",
                            "the body is not JSON: %s" % words_of(error)) from None
        if not isinstance(value, dict):
            raise HTTPError(400, "Failed to process message", "the body is no JSON object")
        return value, fingerprint

    # GET /codex/events

    def events(self, request):
        """A turn's stream from where the client was."""
        check_room_for_stream(request)
        query = request.query()
        name = "after" if "after" in query else "Last-Event-ID"
        position = query.get("after", request.header("Last-Event-ID"))
        turn_id, number = _event_id(name, position) if position else (None, 0)
        wanted = whole_number(query, "turn")
        if wanted is not None:
            if turn_id not in (None, wanted):
                raise bad_parameter(name, "%s is of another turn than turn=%d" % (position, wanted))
            turn_id = wanted
        follows = bool(whole_number(query, "follow", most=1))
        next_log = self.runner.next_log if follows else None
        try:
            turn_log = self.runner.turn_log(turn_id)
        except NoSuchTurn:
            if turn_id is None and follows:
                return event_stream(request, None, 0, next_log)
            raise
        offset = turn_log.offset_after(number)
        if offset is None:
            raise bad_parameter(name, "%s names an event that turn %d does not have"
                                % (position, turn_log.turn_id))
        if turn_log.finished and number == turn_log.last and not follows:
            return Response([], 204, [("Content-Type", EVENT_STREAM)])     # httpx-sse asks for it
        return event_stream(request, turn_log, offset, next_log)

    # GET /codex/turns and GET /codex/turns/N

    def turns(self, request):
        """The kept turns, newest first."""
        query = request.query()
        before = whole_number(query, "before", least=1)
        with explained("The turns can't be listed", "see REPLICAS_ENGINE_STATE"):
            ids = [turn_id for turn_id in self.runner.state.turn_ids()
                   if before is None or turn_id < before]
        limit = whole_number(query, "limit", least=1)
        return json_response({"turns": self.runner.results(ids[-limit:] if limit else ids)})

    def turn(self, request):
        """One turn's result, perhaps when it is over."""
        turn_id = int(request.path.rpartition("/")[2])
        seconds = whole_number(request.query(), "wait", most=MAX_WAIT) or 0
        if seconds:
            check_room_for_stream(request)
        self.runner.turn_log(turn_id).wait_for_end(seconds)
        for result in self.runner.results([turn_id], with_message=True):
            return json_response(result)
        raise NoSuchTurn("turn %d is no longer kept" % turn_id)

    # GET /codex/threads

    def threads(self, request):
        """Codex's threads on this machine, newest first."""
        query = request.query()
        limit = whole_number(query, "limit", least=1, most=MAX_THREADS) or DEFAULT_THREADS
        before = query.get("before")
        if before is not None and not is_thread_id(before):
            raise bad_parameter("before", "must be the id of a thread")
        return json_response({"threads": self.runner.rollouts.threads(limit, before)})

    # GET and DELETE /codex/queue, DELETE /codex/queue/N

    def queue(self, request):
        """The messages that wait, the next one first."""
        return Response(self._queued(self.runner.waiting()), 200,
                        [("Content-Type", "application/json")])

    def _queued(self, turns):
        """The answer in pieces: 32 messages of 32 MiB are a lot of memory."""
        begin = b'{"turns":['
        for position, turn in enumerate(turns, 1):
            try:
                message = self.runner.state.load_message(turn.id).get("message")
            except (FileNotFoundError, ValueError):     # it has begun, or never will
                continue
            yield begin + json_bytes({"turn_id": turn.id, "position": position, "message": message,
                                      "queued_at": turn.log.header.get("queued_at")})
            begin = b","
        yield (b"" if begin == b"," else begin) + b"]}"

    def cancel(self, request):
        """Take a message, or every one, out of the queue."""
        last = request.path.rpartition("/")[2]
        turn_id = int(last) if last.isdecimal() else None
        count = self.runner.cancel(turn_id)
        if turn_id is not None and not count:
            raise HTTPError(404, "Not in the queue", "turn %d doesn't wait: see GET /codex/queue, "
                            "and POST /codex/interrupt for the turn in progress" % turn_id)
        return json_response({"success": True, "cancelled": count})

    # POST /codex/interrupt

    def interrupt(self, request):
        """Stop the turn in progress."""
        waiting = len(self.runner.waiting())
        turn_id = self.runner.interrupt()
        answer = {"success": True, "interrupted": turn_id is not None, "turn_id": turn_id}
        return json_response(dict(answer, queued=waiting) if waiting else answer)

    # GET /codex/history

    def history(self, request):
        """The thread's rollout."""
        return history_response(request, self.runner.rollouts, self.runner.thread_id,
                                self.settings.max_history)

    # GET /codex/status

    def status(self, request):
        """How everything is, at once."""
        runner = self.runner
        thread_id = runner.thread_id
        status = {
            "has_active_thread": thread_id is not None,
            "thread_id": thread_id,
            "session_file": runner.rollouts.find(thread_id) if thread_id else None,
            "working_directory": self.settings.workspace,
            "turn": self._turn(),
            "codex": self._codex(),
            "engine": {"version": __version__, "started_at": runner.started_at},
            "problems": self.problems.find() + runner.unwritten()}
        if runner.webhook:
            status["webhook"] = runner.webhook.status()
        return json_response(status)

    def _turn(self):
        """The newest turn, or None."""
        try:
            return turn_summary(self.runner.turn_log())
        except HTTPError:                   # there is none, or it can't be read
            return None

    def _codex(self):
        """The Codex that the next turn would run, or None."""
        try:
            codex = self.runner.finder.find()
        except HTTPError:
            return None
        return {"path": codex.program, "version": self.runner.finder.version(codex)}

    # POST /codex/reset

    def reset(self, request):
        """Stop the turn in progress and forget the thread."""
        self.runner.reset()
        return json_response({"message": "Thread reset successfully", "success": True})


application = Application()


# ---------------------------------------------------------------------------------------------
# HTTP grammar
# ---------------------------------------------------------------------------------------------
# Instead of http.server's handler, which lets through what RFC 9112 forbids, writes a response in
# several packets and has no deadlines.  Section numbers are RFC 9112's unless they name another.
#
# This section is about text alone: what a request's head may be, and the environ that it makes.

MAX_REQUEST_LINE = 8 * 1024                # bytes, above it 414
MAX_HEAD = 32 * 1024                       # bytes of request line and fields, above it 431
MAX_FIELDS = 100                           # above it 431
MAX_CHUNK_LINE = 4 * 1024                  # bytes of a chunk's size with its extensions
MAX_CHUNK_EXCESS = 16 * 1024               # bytes by which chunks' framing may outweigh their data
MAX_TRAILERS = 8 * 1024                    # bytes of a chunked body's trailer section
IDLE_TIMEOUT = 75.0                        # seconds between two requests
HEAD_TIMEOUT = 10.0                        # seconds from a head's first byte to its last
BODY_GRACE, BODY_RATE = 20.0, 4096         # a body may take 20 s, and 1 s more per 4 KiB received
SEND_TIMEOUT = 40.0                        # seconds in which the client takes not one byte more
VANISHED_TIMEOUT = 45.0                    # seconds in which he acknowledges nothing, nor takes it
PROBE_AFTER, PROBE_INTERVAL = 30, 5        # seconds of silence until the kernel asks if he is there
LINGER_TIMEOUT, LINGER_PAUSE = 60.0, 10.0  # seconds of reading behind a last answer; between bytes
MAX_SPARE_CONNECTIONS = 32                 # above the limit, for who is always answered
SPARE_TIMEOUT = 2.0                        # seconds in which their request must be there
FIRST_BYTE_TIMEOUT = 1.0                   # seconds that a new connection has at the server's end
REFUSAL_TIME = 0.5                         # seconds before the server's end to refuse the rest in
RESERVE_THREADS = 2                        # that serve when no other can be started
BUFFER_SIZE = 16 * 1024

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                                 # RFC 9110, 5.6.2
VALUE = rb"[\t\x20-\x7e\x80-\xff]*"                                     # RFC 9110, 5.5
QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'   # 5.6.4
PCHAR = rb"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})"            # RFC 3986, 3.3
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")   # 3
PARTIAL_REQUEST_LINE = re.compile(
    TOKEN + rb"(?: (?:[\x21-\x7e]+(?: (?:[HTP/0-9.]+\r?)?)?)?)?")
EMPTY_LINES = re.compile(rb"(?:\r\n)*")                                # 2.2
FIELDS = re.compile(rb"(?:" + TOKEN + rb":" + VALUE + rb"\r\n)*")       # 5
FIELD = re.compile(rb"(" + TOKEN + rb"):(" + VALUE + rb")\r\n")
# A query may have every visible character but "#" in it: browsers and Node send most of those that
# RFC 3986 forbids as they are, a lone "%" too, and other servers don't mind.
ORIGIN_FORM = re.compile(rb"(|/(?:" + PCHAR + rb"|/)*)"                 # 3.2.1
                         rb"(?:\?([!\"$-~]*))?")
ABSOLUTE_FORM = re.compile(rb"http://([^/?]+)(.*)", re.IGNORECASE)      # 3.2.2
HOST = re.compile(rb"(\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)"
                  rb"(?::([0-9]*))?")                                   # RFC 9110, 7.2
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]+)(?:[ \t]*;[ \t]*" + TOKEN + rb"(?:[ \t]*=[ \t]*(?:"
                        + TOKEN + rb"|" + QUOTED + rb"))?)*")           # 7.1
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
TRAILER = re.compile(rb"|(" + TOKEN + rb"):" + VALUE)
NOTHING = re.compile(rb"")
SINGLE_FIELDS = frozenset(("HTTP_HOST", "CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING"))
# Fields that an application must not send: PEP 3333; RFC 9110, 7.6.1
HOP_BY_HOP = frozenset(("connection", "keep-alive", "te", "trailer", "transfer-encoding",
                        "upgrade"))
# Fields that a trailer must not carry, lest anyone merges them into the head: RFC 9110, 6.5.1
NO_TRAILERS = frozenset((b"content-length", b"transfer-encoding", b"host", b"authorization",
                         b"content-encoding", b"content-type", b"content-range", b"trailer", b"te",
                         b"connection", b"expect", b"x-replicas-engine-secret"))


class BadRequest(OSError):
    """A request that can't be read; an OSError, so that it may come out of wsgi.input too."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


def too_many():
    """The refusal of a connection beyond the limit."""
    return BadRequest(503, "too many connections are open: see REPLICAS_ENGINE_MAX_CONNECTIONS")


def malformed_target():
    """The refusal of a request target."""
    return BadRequest(400, "the request target is malformed (RFC 9112, 3.2)")


def parse_request_line(line):
    """(method, target, minor version) of a request line (3).  Raises BadRequest."""
    if len(line) > MAX_REQUEST_LINE:
        raise BadRequest(414, "the request line is longer than %d bytes" % MAX_REQUEST_LINE)
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise BadRequest(400, "the request line is malformed (RFC 9112, 3)")
    method, target, major, minor = match.groups()
    if major != b"1":
        raise BadRequest(400, "the protocol is not HTTP/1.1 or HTTP/1.0")
    return method.decode(), target, min(int(minor), 1)      # RFC 9110, 2.5: 1.2 is as good as 1.1


def check_partial_head(head, checked):
    """Refuse at once what can't become a head any more.  Raises BadRequest.

    The first `checked` bytes were looked at before: a head may come byte by byte.
    """
    end = head.find(b"\r\n", 0, MAX_REQUEST_LINE + 2)
    if end >= checked:
        parse_request_line(head[:end])
    elif end < 0 and len(head) - head.endswith(b"\r") > MAX_REQUEST_LINE:
        raise BadRequest(414, "the request line is longer than %d bytes" % MAX_REQUEST_LINE)
    elif end < 0 and not PARTIAL_REQUEST_LINE.fullmatch(head):
        raise BadRequest(400, "the request line is malformed (RFC 9112, 3)")
    if len(head) >= MAX_HEAD:
        raise BadRequest(431, "the head is larger than %d bytes" % MAX_HEAD)
    if BARE_LINE_END.search(head, checked):
        raise BadRequest(400, "a line does not end in CRLF (RFC 9112, 2.2)")


def environ_key(name):
    """The environ's key for a field name (PEP 3333), or None.

    A name with an underscore has none: it would be taken for the one with a hyphen.
    """
    key = name.decode().upper().replace("-", "_")
    if b"_" in name:
        return None
    return key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else "HTTP_" + key


def add_fields(environ, fields):
    """Put the field lines (5) into the environ.  Raises BadRequest."""
    if not FIELDS.fullmatch(fields):
        raise BadRequest(400, "a field line is malformed (RFC 9112, 5)")
    pairs = FIELD.findall(fields)
    if len(pairs) > MAX_FIELDS:
        raise BadRequest(431, "there are more than %d fields" % MAX_FIELDS)
    for name, value in pairs:
        key = environ_key(name)
        value = value.strip(b" \t").decode("latin-1")
        if key in environ:
            if key in SINGLE_FIELDS:
                raise BadRequest(400, "the field %s is given twice" % name.decode())
            value = environ[key] + "," + value              # RFC 9110, 5.3
        if key is not None:
            environ[key] = value


def check_host(value):
    """(host, port) of a Host field or an authority.  Raises BadRequest."""
    match = HOST.fullmatch(value)
    host, port = match.groups() if match else (None, None)
    port = int(port.lstrip(b"0")[:6] or 0) if port else 80      # six digits are too many anyhow
    try:
        if host and host.startswith(b"["):
            socket.inet_pton(socket.AF_INET6, host[1:-1].decode())
    except OSError:
        match = None
    if not match or port > 65535:
        raise BadRequest(400, "the Host is malformed (RFC 9110, 7.2)")
    return host.lower(), port


def origin_form(method, target, host):
    """The origin-form of a target in another form; empty for `*` (3.2.4), since in PEP 3333 a path
    is empty or begins with a slash.  Raises BadRequest."""
    if target == b"*" and method == "OPTIONS":
        return b""
    match = ABSOLUTE_FORM.fullmatch(target)
    if not match:
        raise malformed_target()
    authority = check_host(match.group(1))
    if not authority[0] or (host is not None and host != authority):
        raise BadRequest(400, "the request target and Host differ (RFC 9112, 3.2.2)")
    rest = match.group(2)
    if not rest and method == "OPTIONS":
        return b""
    return rest if rest.startswith(b"/") else b"/" + rest


def parse_head(head, environ):
    """Put a request's line and fields into the environ, but for its body.  Raises BadRequest."""
    line, _, fields = head.partition(b"\r\n")
    environ["REQUEST_METHOD"], target, version = parse_request_line(line)
    environ["SERVER_PROTOCOL"] = "HTTP/1.%d" % version
    add_fields(environ, fields)
    if environ["REQUEST_METHOD"] == "CONNECT":
        raise BadRequest(501, "CONNECT is not implemented")
    host = environ.get("HTTP_HOST")
    if host is None and version > 0:
        raise BadRequest(400, "the Host field is missing (RFC 9112, 3.2)")
    host = check_host(host.encode("latin-1")) if host is not None else None
    if not target.startswith(b"/"):
        target = origin_form(environ["REQUEST_METHOD"], target, host)
    match = ORIGIN_FORM.fullmatch(target)
    if not match:
        raise malformed_target()
    path, query = match.groups()
    if b"%" in path:
        path = urllib.parse.unquote_to_bytes(path)
    environ["PATH_INFO"] = path.decode("latin-1")
    environ["QUERY_STRING"] = query.decode("latin-1") if query else ""


def wants_close(environ):
    """Whether the client wants the connection closed behind the answer (9.3)."""
    connection = environ.get("HTTP_CONNECTION")
    tokens = [t.strip(" \t") for t in connection.lower().split(",")] if connection else ()
    return "close" in tokens or (environ["SERVER_PROTOCOL"] == "HTTP/1.0"
                                 and "keep-alive" not in tokens)


def parse_framing(environ):
    """(length, expects_continue): the bytes of the body (6.3), None if it is chunked, and whether
    the client waits for `100 Continue`.  Raises BadRequest."""
    is_old = environ["SERVER_PROTOCOL"] == "HTTP/1.0"
    length, coding = environ.get("CONTENT_LENGTH"), environ.get("HTTP_TRANSFER_ENCODING")
    if length is not None:
        if not re.fullmatch(r"[0-9]+", length):
            raise BadRequest(400, "Content-Length is malformed (RFC 9110, 8.6)")
        # Without zeros, for the application too: Python reads no number of 5,000 digits.
        length = environ["CONTENT_LENGTH"] = length.lstrip("0") or "0"
        if len(length) > 18:
            raise BadRequest(413, "Content-Length is larger than any body")
    if coding is not None:
        if length is not None or is_old:
            raise BadRequest(400, "Transfer-Encoding must not come with Content-Length, "
                                  "nor in HTTP/1.0 (RFC 9112, 6.1)")
        if coding.lower() != "chunked":
            raise BadRequest(501, "the only transfer coding that is implemented is chunked")
    expect = environ.get("HTTP_EXPECT")
    if expect:                              # a list, perhaps with empty elements: RFC 9110, 5.6.1.2
        expect = {member.strip(" \t") for member in expect.lower().split(",")} - {""}
        if expect - {"100-continue"}:
            raise BadRequest(417, "the only expectation that is implemented is 100-continue")
    return None if coding else int(length or 0), bool(expect) and not is_old


# ---------------------------------------------------------------------------------------------
# Connection and bodies
# ---------------------------------------------------------------------------------------------
# Time limits on a socket are the kernel's (SO_RCVTIMEO, SO_SNDTIMEO): with Python's own, which need
# a poll a call, there are 13 % fewer requests at 16 connections.  They hold for one call: whoever
# reads in several of them lowers the limit to what is left of the deadline.

class Disconnected(ConnectionError):
    """The client is gone, or has been too slow to be waited for."""


def _timeval(seconds):
    """struct timeval, for setsockopt; 0 would mean no limit."""
    microseconds = max(1, int(seconds * 1000000))
    return struct.pack("ll", microseconds // 1000000, microseconds % 1000000)


class Connection:
    """A client's socket with a buffer in front, and deadlines."""

    def __init__(self, sock):
        self.sock = sock
        self.buffer = b""
        self.evicted = False                # it makes room for another: set by the accept loop
        self.cut = False                    # nothing more is received, since the server ends
        self._limit = None
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(SEND_TIMEOUT))

    def receive(self, seconds):
        """Add what comes to the buffer; False if nothing comes any more.

        Raises TimeoutError, and BadRequest when another connection needs the room.
        """
        if seconds != self._limit:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))
            self._limit = seconds
        try:
            data = self.sock.recv(BUFFER_SIZE)
        except BlockingIOError:
            raise TimeoutError from None
        if self.evicted:
            raise too_many()
        self.buffer = self.buffer + data if self.buffer else data
        return bool(data)

    def broke_off(self, part):
        """The refusal of a request that ends within its `part`: who has ended it?"""
        if self.cut:
            return BadRequest(503, "the engine is shutting down: send it again in some seconds")
        return BadRequest(400, "the connection was closed within the %s" % part)

    def take(self, size):
        """Up to `size` bytes out of the buffer."""
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def send(self, data):
        """Raises Disconnected, also when the client takes nothing for SEND_TIMEOUT."""
        try:
            self.sock.sendall(data)
        except OSError as error:
            with contextlib.suppress(OSError):      # it may have been closed
                # Closing is a reset then: the kernel would keep what the client doesn't take.
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise Disconnected(str(error)) from None

    def has_hung_up(self):
        """Whether the client has gone (True), or only ended what it sends (None).

        A client that closed and one that ended its half look alike until something is sent.
        """
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        for _, event in poll.poll(0):
            if event & (select.POLLERR | select.POLLHUP):
                return True
            try:
                return False if self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) else None
            except BlockingIOError:
                return False
            except OSError:
                return True
        return False

    def may_be_gone(self):
        """Whether the client has ended what it sends: see has_hung_up."""
        return self.has_hung_up() is None

    def linger(self):
        """Close our half and read on for a while: closing with something unread would reset the
        connection, and might take our last answer from the client (9.6).

        Many a client reads it only when everything is sent, so they get about as much time as
        for nothing at all.  Who has read it and closes is let go at once.
        """
        deadline = time.monotonic() + LINGER_TIMEOUT
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline and self.receive(LINGER_PAUSE):
                self.buffer = b""


class RequestBody(io.RawIOBase):
    """The body of one request, without its framing (6): what wsgi.input reads from.

    `length` is Content-Length, or None for a chunked body.  Whoever asks first is the one for whom
    `100 Continue` is sent, if the client waits for it (RFC 9110, 10.1.1).
    """

    def __init__(self, connection, length, expects_continue):
        self.connection = connection
        self.chunked = length is None
        self.left = length or 0             # bytes of the body, or of the current chunk
        self.expects_continue = expects_continue
        self.complete = length == 0
        self.broken = False                 # what follows in the connection can't be told
        self.waits = True                   # or takes only what is there already
        self._excess = 0                    # bytes of the chunks' framing beyond what is usual
        self._begin = None                  # when it first waited, by time.monotonic
        self._received = 0                  # bytes since then, for its deadline

    def readable(self):
        """io.RawIOBase asks."""
        return True

    def readinto(self, target):
        """As io.RawIOBase has it: bytes of the body, 0 at its end.  Raises BadRequest and
        OSError."""
        try:
            if self.chunked and not self.left and not self.complete:
                self._next_chunk()
            if self.complete:
                return 0
            if not self.connection.buffer:
                self._receive()
            data = self.connection.take(min(len(target), self.left))
            target[:len(data)] = data
            self.left -= len(data)
            if self.chunked and not self.left:
                self._line(2, NOTHING)      # the CRLF behind a chunk's data
        except OSError:
            self.broken = True
            raise
        self.complete = not self.chunked and not self.left
        return len(data)

    def skip(self):
        """Read, for nobody, as much as is there already: perhaps the connection stays in step."""
        self.waits = False
        with contextlib.suppress(OSError):
            while not self.broken and self.readinto(bytearray(BUFFER_SIZE)):
                pass

    def _next_chunk(self):
        """Read a chunk's size, and the trailers behind the last one (7.1)."""
        match = self._line(MAX_CHUNK_LINE, CHUNK_LINE)
        size = match.group(1).lstrip(b"0") or b"0"
        if len(size) > 16:
            raise BadRequest(413, "a chunk is larger than any body")
        self.left = int(size, 16)
        # A byte a chunk is fine, 4,000 bytes of extensions for each aren't (CVE-2023-39326).
        framing = len(match.group()) + 4            # with the CRLFs behind it and the data
        self._excess = max(0, self._excess + framing - 16 - 2 * self.left)
        if self._excess > MAX_CHUNK_EXCESS:
            raise BadRequest(400, "the chunks carry too little for their extensions")
        if self.left == 0:
            self._trailers()
            self.complete = True

    def _trailers(self):
        """Read the trailer section (7.1.2); nobody is told what it says."""
        size = 0
        while True:
            match = self._line(MAX_TRAILERS, TRAILER)
            if match.group(1) is None:
                return
            size += len(match.group()) + 2
            if size > MAX_TRAILERS:
                raise BadRequest(431, "the trailer section is larger than %d bytes" % MAX_TRAILERS)
            if match.group(1).lower() in NO_TRAILERS:
                raise BadRequest(400, "a trailer field must not be %s" % match.group(1).decode())

    def _line(self, limit, pattern):
        """The next line, without its CRLF, as a match of `pattern`."""
        while True:
            end = self.connection.buffer.find(b"\n", 0, limit)
            if end >= 0 or len(self.connection.buffer) >= limit:
                break
            self._receive()
        line = self.connection.take(end + 1)
        match = pattern.fullmatch(line[:-2]) if line.endswith(b"\r\n") else None
        if not match:
            raise BadRequest(400, "a chunk of the body is malformed (RFC 9112, 7.1)")
        return match

    def _receive(self):
        """Wait for more of the body, as long as its sender may take."""
        if not self.waits:
            raise BlockingIOError
        now = time.monotonic()
        if self._begin is None:
            self._begin = now
            if self.expects_continue and not self.connection.buffer:
                self.connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = self._begin + BODY_GRACE + self._received / BODY_RATE
        before = len(self.connection.buffer)
        try:
            if now >= deadline:
                raise TimeoutError
            if not self.connection.receive(deadline - now):
                raise self.connection.broke_off("body")
        except TimeoutError:
            raise BadRequest(408, "the body came too slowly") from None
        self._received += len(self.connection.buffer) - before


# ---------------------------------------------------------------------------------------------
# Answer
# ---------------------------------------------------------------------------------------------
# From the application's start_response to the last byte.  Whether the connection can go on is
# settled with the head, since that must say so: it can't if the body has no length and no chunks,
# or if something of the request is still unread, which would be taken for the next one.

@functools.lru_cache(maxsize=8)             # without it: 15 % fewer requests at 16 connections
def http_date(seconds):
    """Whole seconds since 1970 as RFC 9110, 5.6.7 has it."""
    return email.utils.formatdate(seconds, usegmt=True)


def response_head(status_line, fields):
    """A response's head (4), its empty line included.  Raises ValueError for a line end in it."""
    lines = ["HTTP/1.1 %s\r\nDate: %s\r\nServer: replicas-engine\r\n"
             % (status_line, http_date(int(time.time())))]
    lines += ["%s: %s\r\n" % field for field in fields]
    head = "".join(lines)
    expected = len(lines) + 2
    if head.count("\n") != expected or head.count("\r") != expected or "\0" in head:
        raise ValueError("a response field has a line end in it")
    return head.encode("latin-1") + b"\r\n"


def refusal(error, is_head):
    """The whole answer to what isn't a request, or not to be answered; the connection ends behind
    it.  `is_head`: it was a HEAD, whose answer has no body (RFC 9110, 9.3.2)."""
    phrase = HTTPStatus(error.status).phrase
    body = json_bytes({"error": phrase, "details": str(error)})
    fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body))),
              ("Cache-Control", "no-store")]
    if error.status == 503:
        fields.append(("Retry-After", "5"))
    fields.append(("Connection", "close"))
    head = response_head("%d %s" % (error.status, phrase), fields)
    return head if is_head else head + body


class Answer:
    """One answer of the application, from start_response to its last byte (PEP 3333).

    `closes` says when the head is made whether the connection ends behind the answer.
    """

    def __init__(self, connection, environ, request_body, closes):
        self.connection = connection
        self.request_body = request_body    # the RequestBody, or None
        self.version = int(environ["SERVER_PROTOCOL"] != "HTTP/1.0")
        self.is_head = environ["REQUEST_METHOD"] == "HEAD"
        self.closes = closes
        self.closed = False                 # what that said
        self.status_line = None             # such as "200 OK", and the fields: the application's
        self.fields = None
        self.length = None                  # of the body, as the application says
        self.head_sent = False
        self.chunked = False                # settled with the head, as is the next
        self.left = None                    # bytes of the body that are still to come, or None

    def start_response(self, status_line, fields, exc_info=None):
        """The application's side of PEP 3333: what the head will say."""
        if exc_info is not None:
            try:
                if self.head_sent:
                    raise exc_info[1].with_traceback(exc_info[2])
            finally:
                exc_info = None             # PEP 3333: avoid a circular reference
        elif self.fields is not None:
            raise AssertionError("start_response was called twice")
        length = None
        for name, value in fields:
            name = name.lower()
            if name == "content-length":
                if length is not None:
                    raise ValueError("Content-Length is given twice")
                length = int(value)
            elif name in HOP_BY_HOP:
                raise ValueError("%s is not for the application to send" % name)
        self.status_line, self.fields, self.length = status_line, fields, length
        return self.write

    def send(self, result):
        """Send what the application returned: a short answer in one packet, a stream in chunks."""
        if isinstance(result, (list, tuple)) and len(result) <= 1 and not self.head_sent:
            self._send_whole(result[0] if result else b"")
            return
        for data in result:
            if data:
                self.write(data)
            elif self.connection.has_hung_up():     # the application waits: is anybody there?
                raise Disconnected("closed by the client")
        self._end_body()

    def _send_whole(self, body):
        """Send head and body in one packet."""
        if self.request_body:
            self.request_body.skip()
        if self.length is None and not self.is_head:
            self.length = len(body)
            self.fields.append(("Content-Length", str(len(body))))
        elif self.length != len(body) and not self._is_bodiless():
            raise ValueError("the body does not have the length that its head says")
        head = self._head()
        self.connection.send(head if self._is_bodiless() else head + body)

    def write(self, data):
        """Send a piece of the body, the first with the head before it."""
        head = b"" if self.head_sent else self._head()
        if self._is_bodiless():
            data = b""
        elif self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
        elif self.left is not None:
            self.left -= len(data)
            if self.left < 0:               # it would be taken for the next response
                raise ValueError("the body is longer than its head says")
        self.connection.send(head + data)

    def _end_body(self):
        """Send what marks the end of a body."""
        head = b"" if self.head_sent else self._head()
        self.connection.send(head + b"0\r\n\r\n" if self.chunked else head)
        if self.left:
            raise ValueError("the body is shorter than its head says")

    def _is_bodiless(self):
        """Whether no body goes out, whatever the application returns."""
        return self.is_head or self.status_line[:3] in ("204", "304")   # 6.3

    def _head(self):
        """The head; settles how the body ends, and whether the connection stays."""
        bodiless, fields = self._is_bodiless(), list(self.fields)
        self.left = None if bodiless else self.length
        self.chunked = self.version > 0 and not bodiless and self.length is None
        if bodiless and not self.is_head:   # RFC 9110, 8.6
            fields = [field for field in fields if field[0].lower() != "content-length"]
        # 6.3: in HTTP/1.0 the end of the body is that of the connection; 9.3: what is left of a
        # request's body is no request
        self.closed = (self.closes() or not (bodiless or self.chunked or self.length is not None)
                       or not (self.request_body is None or self.request_body.complete))
        if self.chunked:
            fields.append(("Transfer-Encoding", "chunked"))
        if self.closed:
            fields.append(("Connection", "close"))
        elif self.version == 0:
            fields.append(("Connection", "keep-alive"))
        head = response_head(self.status_line, fields)
        self.head_sent = True
        return head


# ---------------------------------------------------------------------------------------------
# Request handler
# ---------------------------------------------------------------------------------------------
# A thread's view of its connection: it reads a head, has it answered, and begins anew.  Every wait
# has a deadline, and whoever keeps us waiting beyond it is refused; what the server wants to know
# of a connection meanwhile (idle, admitted) are plain attributes, which it reads without waiting.
#
# A connection is idle, reads a head, makes its environ, lets the application answer, and is idle
# again.  It ends behind an answer whose head says so (9.6), when what comes is no request, when
# nothing comes in time, when it has to make room for another, and with the server.  A new one has
# its first request answered then, if that is on its way: unlike who has had an answer here (9.3.1),
# its client does not expect to have to send it again.

class WSGIRequestHandler:
    """One connection: its requests become environs for the application, one after the other."""

    def __init__(self, connection, client_address, server):
        self.server = server
        self.connection = connection
        self.client = str(client_address[0]) if client_address else ""      # a Unix socket has none
        self.base_environ = server.environ_of(self.client, client_address, self.connection)
        self.last_head = (None, None)       # and its environ: without, 25 % fewer requests
        self.begun_at = 0.0                 # when the request was there, by time.perf_counter
        self.closing = False                # nothing is read behind the request
        # The server looks at these, and doesn't wait
        self.idle = False                   # between two requests, or behind the last
        self.new_until = time.monotonic() + FIRST_BYTE_TIMEOUT      # or its first request
        self.admitted = False               # it has shown that it may always enter
        self.spare = server.register(self)  # it is beyond the limit

    # A connection's life, in the order in which it happens

    def run(self):
        """Serve the connection until one side ends it."""
        try:
            while not self.closing:
                self.handle_one_request()
        except OSError:                     # the client, or the way to it, is gone
            return
        self.idle = True
        self.connection.linger()

    def handle_one_request(self):
        """Read a request and answer it.  Raises OSError when the connection is of no more use."""
        head = None
        try:
            head = self.read_head()
            if head is None:
                raise Disconnected
            self.new_until = 0.0
            self.begun_at = time.perf_counter()
            environ = self.environ_of(head)
            self.admitted = self.admitted or self.server.admits(environ)
            if self.spare and not (self.admitted or environ["PATH_INFO"] in self.server.always):
                raise too_many()
            body = self.open_body(environ)
        except BadRequest as error:
            self.refuse(error, (head or self.connection.buffer).startswith(b"HEAD "))
            return
        if self.spare:
            environ["replicas_engine.crowded"] = True
        self.run_application(environ, body)

    def read_head(self):
        """The next request's line and fields with their CRLFs, or None if there is none."""
        connection, searched, begun = self.connection, 0, False
        begin = time.monotonic()
        # None is IDLE_TIMEOUT from now, which the socket has already.
        deadline = begin + SPARE_TIMEOUT if self.spare else None
        while True:
            if connection.buffer.startswith(b"\r\n"):       # 2.2: empty lines before a request
                connection.take(EMPTY_LINES.match(connection.buffer).end())
            end = connection.buffer.find(b"\r\n\r\n", searched)
            if 0 <= end <= MAX_HEAD - 4:
                return connection.take(end + 4)[:-2]
            if connection.buffer not in (b"", b"\r"):       # more than empty lines
                check_partial_head(connection.buffer, searched)
                if not begun and not self.spare:
                    deadline = time.monotonic() + HEAD_TIMEOUT
                begun = True
            searched = max(0, len(connection.buffer) - 3)
            if not self.await_bytes(deadline, begun):
                return None
            deadline = deadline or begin + IDLE_TIMEOUT

    def await_bytes(self, deadline, begun):
        """More bytes, by the deadline if there is one; False if no request has begun."""
        limit = IDLE_TIMEOUT
        self.idle = not (begun or self.spare)       # if so, shut_down may end it
        if deadline:
            limit = deadline - time.monotonic()
        try:
            if limit < 0 and not begun:     # empty lines may come without a pause, and for ever
                raise TimeoutError
            if self.connection.receive(limit):
                self.idle = False
                return True
            reason = self.connection.broke_off("head")
        except TimeoutError:
            reason = BadRequest(408, "the head was not complete in time")
        if self.spare:
            raise too_many()
        if begun:
            raise reason
        return False

    def environ_of(self, head):
        """The environ of a request's head, without its body.  Raises BadRequest."""
        if head != self.last_head[0]:       # a client's next head is often its last one again
            environ = self.base_environ.copy()
            parse_head(head, environ)
            self.last_head = (head, environ)
        return self.last_head[1].copy()

    def open_body(self, environ):
        """Put the request's body into the environ; its RequestBody, or None if it has none."""
        length, expects_continue = parse_framing(environ)
        body = None if length == 0 else RequestBody(self.connection, length, expects_continue)
        environ["wsgi.input"] = io.BufferedReader(body, BUFFER_SIZE) if body else io.BytesIO()
        return body

    def run_application(self, environ, body):
        """Have the application answer; what it does wrong is answered with 500 if it still can
        be."""
        answer = Answer(self.connection, environ, body,
                        lambda: (wants_close(environ) or self.server.closing or self.spare
                                 or self.connection.evicted))
        outcome = "-"
        try:
            result = self.server.application(environ, answer.start_response)
            try:
                answer.send(result)
            finally:
                if hasattr(result, "close"):
                    result.close()
            outcome = answer.status_line[:3]
            self.closing = answer.closed
        except Disconnected:
            outcome = "%s, client gone" % (answer.status_line or "")[:3]
            raise
        except Exception as error:
            logger.exception("the application failed")
            self.closing = True
            if not answer.head_sent:
                status = 503 if isinstance(error, (OSError, MemoryError)) else 500
                self.refuse(BadRequest(status, "the engine's log says more"), answer.is_head)
        finally:
            self.log_request(environ, outcome)

    def refuse(self, error, is_head):
        """Answer what isn't a request, and close the connection."""
        self.closing = True
        self.connection.send(refusal(error, is_head))
        logger.info("refused a request: %d %s, from %s", error.status, error,
                    self.client or "a Unix socket")

    def log_request(self, environ, outcome):
        """One line a request; those of health checks only in development."""
        path = environ["PATH_INFO"]
        level = (logging.DEBUG if path in self.server.always and outcome == "200"
                 else logging.INFO)
        log_request(level, "%s %s %s %.1f ms, from %s" % (
            environ["REQUEST_METHOD"], path if path.isprintable() else shown(path), outcome,
            (time.perf_counter() - self.begun_at) * 1000, self.client or "a Unix socket"))


# ---------------------------------------------------------------------------------------------
# WSGI server
# ---------------------------------------------------------------------------------------------
# The accept loop is the one thread that may never wait for a client.  It counts the connections,
# lets the oldest silent one go when there are too many, and has a thread serve each.

def prepare_listener(listener):
    """Set what the accepted sockets inherit (tcp(7)): no Nagle; and whoever vanished without a word
    is noticed after VANISHED_TIMEOUT, by probes if there is nothing to send.

    The kernel counts one who only takes nothing as gone, too, and sends no reset.  SEND_TIMEOUT is
    shorter, so that he learns it from us.
    """
    listener.setblocking(False)
    if listener.family != socket.AF_UNIX:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_NODELAY, 1), (socket.TCP_KEEPIDLE, PROBE_AFTER),
                              (socket.TCP_KEEPINTVL, PROBE_INTERVAL),
                              (socket.TCP_USER_TIMEOUT, int(VANISHED_TIMEOUT * 1000))):
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


class WSGIServer(ThreadingHTTPServer):
    """Serves a WSGI application on listening sockets, a thread a connection.

    `max_connections` may be open.  Above that the oldest makes room of those that have not shown
    yet that `admits(environ)` is true of them, else of those that are between two requests.  If
    there is none, MAX_SPARE_CONNECTIONS more are taken, the newest first, and answered if that is
    true, or the path is in `always`.  For these the environ has `replicas_engine.crowded`: no
    endless answer should be given.  Where no thread can be started, connections are treated as if
    they were beyond the limit, and RESERVE_THREADS that exist already see to them.
    """

    def __init__(self, listeners, application, max_connections, always=(),
                 admits=lambda environ: False):
        name = listeners[0].getsockname()
        super().__init__(name, WSGIRequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listeners[0]
        self.server_address = name if isinstance(name, tuple) else ("localhost", 0)    # AF_UNIX
        self.application = application
        self.max_connections = max_connections
        self.always = frozenset(always)
        self.admits = admits
        self.closing = False
        self.looks = 0                      # how often the accept loop came by
        self._accept_errno = None           # what accept failed with, and goes on to
        # Guards the two below, and is notified when a connection has ended.  Taken by the accept
        # loop and by each connection's thread at its beginning and its end.
        self._changed = threading.Condition()
        self._connections = {}              # socket -> its handler, or None before it has one
        self._spare = {}
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._ready = select.epoll()        # tells which listener has somebody waiting
        for listener in listeners:
            prepare_listener(listener)
            self._ready.register(listener, select.EPOLLIN)
        self._reserve = queue.LifoQueue()   # connections for which there was no thread
        for _ in range(RESERVE_THREADS):
            start_thread("reserve", self._serve_reserve)
        self._environ = {
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr,
            "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False,
            "wsgi.input_terminated": True, "SCRIPT_NAME": "", "GATEWAY_INTERFACE": "CGI/1.1",
            "SERVER_SOFTWARE": "replicas-engine/" + __version__,
            "SERVER_NAME": self.server_address[0], "SERVER_PORT": str(self.server_address[1])}

    # Called by the handlers

    def environ_of(self, client, client_address, connection):
        """What all environs of a connection have; `replicas_engine.may_be_gone` is a function that
        tells whether the client has ended what it sends, and perhaps gone: see EventStream."""
        return {**self._environ, "REMOTE_ADDR": client,
                "REMOTE_PORT": str(client_address[1]) if client else "",
                "replicas_engine.may_be_gone": connection.may_be_gone}

    def register(self, handler):
        """A handler has begun; whether it is beyond the limit."""
        with self._changed:
            sock = handler.connection.sock
            for connections in (self._connections, self._spare):
                if sock in connections:
                    connections[sock] = handler
                    break
            else:
                handler.connection.evicted = True
            return sock not in self._connections

    # Called by the accept loop

    def fileno(self):
        """socketserver waits for this to be readable."""
        return self._ready.fileno()

    def service_actions(self):
        """socketserver calls it once a round."""
        self.looks += 1

    def get_request(self):
        """Accept a connection; socketserver passes an OSError over."""
        try:
            (fd, _), *_ = self._ready.poll(0) or [(self.socket.fileno(), 0)]
            accepted = self._listeners[fd].accept()
            self._accept_errno = None
            return accepted
        except (BlockingIOError, ConnectionError):      # it has gone again
            raise
        except OSError as error:
            if error.errno != self._accept_errno:
                logger.error("connections can't be accepted: %s", words_of(error))
            self._accept_errno = error.errno
            with self._changed:
                oldest = self._evict(self._connections)
            self._wake(oldest)
            time.sleep(0.1)                 # they stay in the queue: don't spin
            raise

    def process_request(self, request, client_address):
        """Have a thread serve a connection: a new one, or one in reserve."""
        if not self._enter(request, self._connections, self.max_connections):
            self._enter(request, self._spare, MAX_SPARE_CONNECTIONS)
        try:
            start_thread("connection", self.process_request_thread, request, client_address)
        except RuntimeError as error:
            logger.error("no thread could be started for a connection: %s", words_of(error))
            with self._changed:
                self._connections.pop(request, None)
                self._spare.pop(request, None)
            self._enter(request, self._spare, RESERVE_THREADS)
            self._reserve.put((request, client_address))

    def _enter(self, request, connections, limit):
        """Count a connection among `connections`.  If they are `limit` already, one of them makes
        room; if none can, return False."""
        with self._changed:
            oldest = self._evict(connections) if len(connections) >= limit else None
            if oldest is None and len(connections) >= limit:
                return False
            connections[request] = None
        self._wake(oldest)
        return True

    def _evict(self, connections):
        """Take out of `connections` the oldest that has not shown that it may always enter, else
        that is idle, else of the spare ones any: its socket, or None.  To be called with the lock.
        """
        handlers = connections.items()
        oldest = next(itertools.chain(
            (sock for sock, handler in handlers if not (handler and handler.admitted)),
            (sock for sock, handler in handlers if handler and handler.idle),
            connections if connections is self._spare else ()), None)
        if oldest and connections[oldest]:
            connections[oldest].connection.evicted = True
        connections.pop(oldest, None)
        return oldest

    def _wake(self, sock):
        """Let the thread of a connection see that nothing more comes."""
        if sock:
            with contextlib.suppress(OSError):      # it may have been closed meanwhile
                sock.shutdown(socket.SHUT_RD)

    def _serve_reserve(self):
        """A thread in reserve: one connection after the other."""
        for connection in iter(self._reserve.get, None):
            self.process_request_thread(*connection)

    def finish_request(self, request, client_address):
        """In the thread of a connection: its life."""
        WSGIRequestHandler(Connection(request), client_address, self).run()

    def shutdown_request(self, request):
        """In the thread of a connection: its end."""
        self.close_request(request)
        with self._changed:
            self._connections.pop(request, None)
            self._spare.pop(request, None)
            self._changed.notify_all()

    def handle_error(self, request, client_address):
        """In the thread of a connection: a bug, which costs the connection alone."""
        logger.exception("a connection failed")

    # Ending

    def announce_end(self):
        """Answers say from now on that their connection ends behind them."""
        self.closing = True

    def shut_down(self, timeout, keep_queue=False):
        """Take no more connections and wait for the answers under way, `timeout` seconds at most.

        Who waits in a socket's queue is still served, unless `keep_queue`: somebody else, who
        has the socket too, will see to them.
        """
        self.shutdown()
        self.announce_end()
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):
                while not keep_queue:       # until nobody waits there
                    self.process_request(*listener.accept())
            listener.close()                # who comes now is refused, or served by somebody else
        deadline = time.monotonic() + timeout
        while True:
            now = time.monotonic()
            with self._changed:
                ended = [(sock, handler) for connections in (self._connections, self._spare)
                         for sock, handler in connections.items() if handler and (
                             handler.idle and handler.new_until < now
                             or now > deadline - REFUSAL_TIME)]
            for sock, handler in ended:     # who still sends behind his last answer is reset
                handler.connection.cut = True
                self._wake(sock)
            with self._changed:
                left = deadline - time.monotonic()
                if not (self._connections or self._spare) or left <= 0:
                    break
                self._changed.wait(min(0.1, left))
        with contextlib.suppress(queue.Empty):
            while True:                     # who had to make room before there was a thread for him
                self.close_request(self._reserve.get_nowait()[0])
        for _ in range(RESERVE_THREADS):
            self._reserve.put(None)
        self._ready.close()


def listen_at_path(path):
    """A listening Unix socket in place of one that nobody listens on.  Raises OSError.

    Every user of the machine may connect, as to a port: a proxy is another one than the engine's.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.setblocking(False)        # it would wait for room in a full queue
                if probe.connect_ex(path) == errno.ECONNREFUSED:
                    os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def unix_path(host):
    """The path in `unix:` and a path, or None."""
    return host[len("unix:"):] if host and host.startswith("unix:") else None


def listen(host, port):
    """Listening sockets; by default one for every interface, IPv4 and IPv6.  Raises OSError.

    `host` may be `unix:` and a path, or a name, of which every address is listened on.
    """
    if unix_path(host):
        return [listen_at_path(unix_path(host))]
    if host in (None, "::") and socket.has_dualstack_ipv6():
        return [socket.create_server(("", port), family=socket.AF_INET6, backlog=1024,
                                     dualstack_ipv6=True)]
    listeners, problem = [], None
    for family, _, _, _, address in dict.fromkeys(socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)):
        if listeners:                       # the same port, if it was to be any
            address = (address[0], listeners[0].getsockname()[1], *address[2:])
        try:
            listeners.append(socket.create_server(address, family=family, backlog=1024))
        except OSError as error:
            problem = error
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break                       # else the machine hasn't all of localhost's addresses
    else:
        if listeners:
            return listeners
    for listener in listeners:
        listener.close()
    raise problem


def listen_problem(settings, error):
    """The problem that kept `listen` from listening where the settings say."""
    path, place = unix_path(settings.host), "HOST=%s" % (settings.host or "")
    is_taken = error.errno in (errno.EADDRINUSE, errno.EACCES) and not path
    remedy = "set %s to another" % ("PORT" if is_taken else "HOST")
    return problem("%s can't be used: %s" % (
        place if path else "%s, PORT=%d" % (place, settings.port), words_of(error)),
        "try again" if error.errno in SHORTAGES else remedy)


# ---------------------------------------------------------------------------------------------
# systemd
# ---------------------------------------------------------------------------------------------

NOTIFY_TIMEOUT = 2.0                       # seconds


def notify(message):
    """sd_notify(3): tell systemd, if it started us and takes the message within NOTIFY_TIMEOUT."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_TIMEOUT)
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(message.encode("utf-8", "replace"))


def systemd_listeners():
    """The listening sockets that systemd passed us (sd_listen_fds(3)), if any.  Raises OSError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    listeners = [socket.socket(fileno=3 + n) for n in range(int(os.environ.get("LISTEN_FDS", 0)))]
    for listener in listeners:
        listener.set_inheritable(False)
    return listeners


def systemd_address():
    """(host, port) of the installed service's socket as systemd says it, or None."""
    try:
        said = subprocess.run(["systemctl", "show", "--property=Listen", "replicas-engine.socket"],
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"Listen=\[?([^ ]*?)\]?:([0-9]+) \(Stream\)", said.decode())
    return match and (match.group(1), int(match.group(2)))


def address_text(address):
    """In words where a socket with the address listens."""
    if not isinstance(address, tuple):
        return "unix:%s" % os.fsdecode(address)
    words = {"::": "every interface", "0.0.0.0": "every IPv4 interface"}
    return "port %d of %s" % (address[1], words.get(address[0], address[0]))


def socket_problems(settings, address):
    """The problem of systemd's socket, if its address isn't what HOST and PORT say."""
    if isinstance(address, tuple):
        hosts = []
        with contextlib.suppress(OSError):
            hosts = [info[4][0] for info in socket.getaddrinfo(settings.host or "::", None)]
        fits = {"HOST=%s" % (settings.host or ""): address[0] in hosts,
                "PORT=%d" % settings.port: address[1] == settings.port}
    else:
        fits = {"HOST=%s" % (settings.host or ""): address_text(address) == settings.host}
    wrong = [text for text, fit in fits.items() if not fit]
    return [problem("%s passed over: systemd's socket is %s" % (
        " and ".join(wrong) + (" are" if len(wrong) > 1 else " is"), address_text(address)),
        settings.remedy("make them agree"))] if wrong else []


# ---------------------------------------------------------------------------------------------
# Check
# ---------------------------------------------------------------------------------------------

def check_port(settings):
    """What there is where the engine listens, and the problems of that."""
    address = systemd_address() if settings.is_service else None
    if address:
        return "systemd's socket is %s" % address_text(address), socket_problems(settings, address)
    path, in_use = unix_path(settings.host), StateDirectory(settings.state).engine()
    place = settings.host if path else str(settings.port)
    try:
        for listener in listen(settings.host, settings.port):
            listener.close()
        if path:
            os.unlink(path)
        return "%s is free" % place, [problem(
            in_use, "stop it, or set REPLICAS_ENGINE_STATE to another")] if in_use else []
    except OSError as error:
        problems = [listen_problem(settings, error)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) if path else (
            socket.create_connection((settings.host or "127.0.0.1", settings.port), 2)) as sock:
        sock.settimeout(2)
        if path:
            sock.connect(path)
        sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        if in_use and b"Server: replicas-engine" in sock.makefile("rb").read(4096):
            return "an engine answers on %s" % place, []
    return "", problems


def check(settings):
    """Say whether everything is there that a turn needs; the exit status, 0 or 1."""
    problems, is_well = Problems(settings, CodexFinder(settings)), True
    problems.try_out()
    for subject, there_is, found in problems.look() + [("port", *check_port(settings))]:
        if not found:
            print("ok      %s: %s" % (subject, there_is))
        for each in found:
            print("MISSING %s: %s; %s" % (subject, each["problem"], each["details"]))
            is_well = False
    return 0 if is_well else 1


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------
# The process as a whole: the main thread waits in `watch` for signals and news, and everything else
# runs in threads that are there before they are needed.

CLOSE_TIMEOUT = 3.0                        # seconds that answers have to be finished at the end
PROBLEMS_INTERVAL = 60.0                   # seconds between two looks for problems
WAKE_INTERVAL = 1.0                        # seconds between two wake-ups of the main thread
HANG_LIMIT = 30                            # its wake-ups without a look of the accept loop
CPU_HANG_LIMIT = 60                        # processor seconds without a wake-up


class Inbox:
    """What the main thread waits for: the numbers of signals, and those below from other threads.

    It is a pipe (signal.set_wakeup_fd), since the kernel may hand a signal to any thread, and then
    nothing else wakes the main one.
    """

    TURN_CHANGED, STOPPED = 100, 101        # beside the numbers of signals
    STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self):
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in self.STOP_SIGNALS + (signal.SIGCHLD,):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:   # nohup
                signal.signal(number, lambda number, frame: None)

    def put(self, number):
        """From any thread: wake the main one."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._write_end, bytes([number]))

    def get(self, seconds):
        """What has come, each number once; nothing after so many seconds."""
        return set(os.read(self._read_end, 65536)) if readable(self._read_end, seconds) else set()


def status_line(app):
    """A line on how the engine is, for `systemctl status`."""
    if app.settings.secret is None:
        return "REPLICAS_ENGINE_SECRET is not set: nothing but /health is answered"
    running, trouble = app.runner.running(), app.runner.last_failure
    try:
        app.runner.finder.find()
    except HTTPError as error:
        trouble = str(error)
    return "; ".join(filter(None, ("Running turn %d" % running if running else "Idle", trouble)))


class HangWatch:
    """Ends a process that hangs, with a traceback of every thread, for systemd to start it anew.

    It has no clock: after a pause of the machine (a frozen or restored VM) every time limit would
    be over, and nothing hung.  It counts wake-ups of the main thread and processor time, neither
    of which goes on in a pause.
    """

    def __init__(self, server):
        self.server = server
        self.looks = None
        self.idle_wake_ups = 0
        # Dump all threads' stacks to standard error, then do as the signal does: end the process.
        faulthandler.register(signal.SIGPROF, all_threads=True, chain=True)
        self.wake_up(idle=False)

    def wake_up(self, idle):
        """To be called whenever the main thread wakes up; `idle`: because of WAKE_INTERVAL."""
        # The alarm for code that keeps Python's lock and with it this thread from running: it can
        # but be computing.
        signal.setitimer(signal.ITIMER_PROF, CPU_HANG_LIMIT)
        self.idle_wake_ups = self.idle_wake_ups + idle if self.looks == self.server.looks else 0
        self.looks = self.server.looks
        if self.idle_wake_ups >= HANG_LIMIT:
            logger.error("the accept loop hangs: the engine ends itself")
            logging.shutdown()
            signal.raise_signal(signal.SIGPROF)


def watch(inbox, server, app, stop):
    """The main thread's work: set the Event `stop` when told to stop, and return when everything
    has; a second demand is obeyed at once.  Meanwhile reap orphans and keep systemd informed.

    What fails in here must not end the engine.
    """
    hang_watch = HangWatch(server)
    while True:
        news = inbox.get(WAKE_INTERVAL)
        if Inbox.STOPPED in news:
            return
        demand = news.intersection(Inbox.STOP_SIGNALS)
        if demand and stop.is_set():
            logger.warning("stopped at once")
            logging.shutdown()              # write that
            os._exit(128 + demand.pop())
        if demand:
            stop.set()
            logger.info("stopping")
            notify("STOPPING=1")
        if not stop.is_set():
            hang_watch.wake_up(idle=not news)
        try:
            if "WATCHDOG_USEC" in os.environ:       # the unit asks for none, but its owner may
                notify("WATCHDOG=1")
            if signal.SIGCHLD in news:
                reap_orphans()
            if Inbox.TURN_CHANGED in news and not stop.is_set():
                notify("STATUS=" + status_line(app))
        except Exception:
            logger.exception("the main thread could not do all of its work")


def watch_problems(problems, stop):
    """The problems thread: one warning for each, when it comes up."""
    known = []
    while True:
        try:
            problems.try_out()
            known, before = problems.find(), known
            for found in known:
                if found not in before:
                    logger.warning("%s: %s", found["problem"], found["details"])
        except Exception as error:          # a minute later the machine may have what it takes
            logger.warning("problems can't be looked for: %s", words_of(error))
        if stop.wait(PROBLEMS_INTERVAL):
            return


def end_watcher(thread):
    """End what `watch_problems` still tries out in its thread."""
    while thread.is_alive():
        kill_children()
        thread.join(0.1)


def stop_when_told(stop, inbox, *closers):
    """Wait for the Event `stop`, call each of the closers, and say so to the main thread."""
    stop.wait()
    for close in closers:
        try:
            close()
        except Exception:
            logger.exception("the end is not in order")
    inbox.put(Inbox.STOPPED)


# What may be otherwise in a minute: worth another start
PASSING = SHORTAGES + (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EADDRINUSE,
                       errno.EADDRNOTAVAIL, socket.EAI_AGAIN)


def listen_or_exit(settings, inherited):
    """The sockets that were inherited, else those that the settings ask for; ends the process where
    they can't be had."""
    try:
        return inherited or when_released(lambda: listen(settings.host, settings.port))
    except OSError as error:
        logger.error("%(problem)s; %(details)s", listen_problem(settings, error))
        sys.exit(1 if error.errno in PASSING else 2)


def open_application(app, once_taken):
    """None, or the exit status when the state directory can't be taken; see CodexRunner.open."""
    try:
        app.open(once_taken)
    except StateInUse as error:
        logger.error("%s", error)
        return 1
    except OSError as error:
        logger.error("REPLICAS_ENGINE_STATE=%s can't be used: %s", app.settings.state,
                     explanation(error, "see its file system"))
        return 1 if error.errno in PASSING else 2


def serve(settings):
    """Run the engine until SIGTERM, SIGINT or SIGHUP; the exit status."""
    inbox = Inbox()
    app = Application(settings)
    inherited, listeners = systemd_listeners(), []
    # Only who has the state directory listens, or two that start at once could take each other's
    # Unix socket; and before that is read, for then what waits in the queue begins.
    failed = open_application(app, lambda: listeners.extend(listen_or_exit(settings, inherited)))
    if failed:
        return failed
    server = WSGIServer(listeners, app, settings.max_connections, always=("/health",),
                        admits=app.admits)
    start_thread("accept", server.serve_forever)
    logger.info("replicas-engine %s is listening on %s, pid %d", __version__,
                " and ".join(address_text(listener.getsockname()) for listener in listeners),
                os.getpid())
    # Of systemd's sockets, one has to be where HOST and PORT say: the one that fits best counts.
    settings.problems += min((socket_problems(settings, listener.getsockname())
                              for listener in inherited), key=len, default=[])
    stop = threading.Event()
    watcher = start_thread("problems", watch_problems, app.problems, stop)
    # It is there from the start: later the machine may have no thread left to give.
    start_thread("stop", stop_when_told, stop, inbox, server.announce_end, app.runner.close,
                 end_leftovers,
                 functools.partial(server.shut_down, CLOSE_TIMEOUT, keep_queue=bool(inherited)),
                 functools.partial(end_watcher, watcher))
    app.runner.on_change = lambda: inbox.put(Inbox.TURN_CHANGED)
    notify("READY=1\nSTATUS=" + status_line(app))
    watch(inbox, server, app, stop)
    logger.info("stopped")
    return 0


def parse_command_line(arguments):
    """The options; ends the process for --help, --version and mistakes."""
    import argparse                         # not needed by the service, and not cheap
    parser = argparse.ArgumentParser(
        prog="replicas_engine.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Drive the Codex CLI on this machine over HTTP.",
        epilog="Without options it serves.  Settings are environment variables, or lines of a "
               "file .env in\nthe working directory: REPLICAS_ENGINE_SECRET, PORT, WORKSPACE_HOME, "
               "CODEX_PATH and more;\nREADME.md lists them all.")
    parser.add_argument("--check", action="store_true",
                        help="say whether everything is there that a turn needs, and exit 0 or 1")
    parser.add_argument("--version", action="version", version="replicas-engine " + __version__)
    return parser.parse_args(arguments)


def main(arguments):
    """The command line; the exit status."""
    shut_out_others()
    for fd in range(3):                     # lest a socket or a file becomes standard error
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)
    if sys.stdout:                          # a path may have what its encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.pthread_sigmask(signal.SIG_SETMASK, ())      # whoever started us may have blocked some
    start_logging()
    faulthandler.enable()                   # a traceback of what crashes Python itself
    threading.excepthook = sys.unraisablehook = log_uncaught
    with contextlib.suppress(OSError, ValueError):      # a connection is a descriptor, or two
        resource.setrlimit(resource.RLIMIT_NOFILE, 2 * NOFILE_LIMITS[1:])
    options = parse_command_line(arguments) if arguments else None
    try:
        settings = Settings.from_process()
    except SettingsError as error:
        if options and options.check:
            print("MISSING settings: %s" % error)
            return 1
        logger.error("%s", error)
        return 2
    return check(settings) if options and options.check else serve(settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
