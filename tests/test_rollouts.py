"""Rollouts: finding a thread's file wherever it is, and reading it whatever is in it."""

import codecs
import collections
import contextlib
import datetime
import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import uuid

import pytest

import replicas_engine
import harness
from conftest import need
from harness import SECRET, script, wait_for
from replicas_engine import HistoryPage, JSONChecker, RolloutReader, Rollouts, json_line

THREAD = "019a1edf-b500-7731-b607-e9d22c1933a5"         # began on 2025-10-26 at 04:00 UTC
NAME = "rollout-2025-10-26T04-00-00-%s.jsonl" % THREAD
PLACE = os.path.join("sessions", "2025", "10", "26", NAME)
LINES = [b'{"n":%d}' % n for n in range(10)]
CONTENT = b"\n".join(LINES) + b"\n"


def write(path, data=CONTENT):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    return path


def append(path, data):
    with open(path, "ab") as file:
        file.write(data)


def take_thread(engine, thread_id=THREAD, place=PLACE, data=CONTENT):
    """Make it the engine's thread, with a rollout at `place` in CODEX_HOME; the rollout's path."""
    engine.send(script({"event": {"type": "thread.started", "thread_id": thread_id}},
                       {"complete": True}))
    assert engine.status()["thread_id"] == thread_id
    return write(os.path.join(engine.codex_home, place), data) if place else None


def answer(lines, cursor, thread_id=THREAD, more=False):
    """The bytes that GET /codex/history answers with."""
    return b'{"thread_id":"%b","events":[%b],"cursor":"%b.%d"%b}' % (
        thread_id.encode(), b",".join(lines), thread_id.encode(), cursor,
        b',"has_more":true' if more else b"")


def compress(path):
    """Compress a rollout as Codex does: with the suffix .zst, and the plain one is gone."""
    need("zstd")
    subprocess.run(["zstd", "-q", "--rm", path], check=True)
    return path + ".zst"


def memory(engine):
    """The most memory that the engine ever had, in MB."""
    return harness.status_of(engine.process.pid, "VmHWM") / 1024


def children(engine):
    return harness.children_of(engine.process.pid)


def open_rollouts(engine):
    """The rollouts that the engine has open."""
    return [path for path in harness.descriptors_of(engine.process.pid).values()
            if "rollout-" in path]


# What is JSON

DEEP = b"[" * 100 + b"]" * 100

JSON_LINES = [
    b'{"a":1}', b"{}", b"[]", b"null", b"true", b"0", b"-0.0e-7", b'""', b'"text"', DEEP,
    b'{"n":' + b"9" * 5000 + b"}",                      # Python refuses to make an int of it
    b"-" + b"1" * 400000, b"1e999999", b"0." + b"3" * 5000,
    b'{"id":1,"id":2,"id":{"id":3}}',
    b'"\\ud800"', b'"\\udfff\\ud800"', b'"\\u0000\\u2028\\"\\\\\\/\\b\\f\\n\\r\\t"',
    '"\u2028\u2029\u0085\x7f"'.encode(), '{"größe":"\U0001f600"}'.encode(), '"\ufeff"'.encode(),
    b'{ "spaces" :\t[ 1 ,\r2 ] }', b'"NaN"']

NO_JSON_LINES = [
    b"", b" ", b"\r", b"\t\r", b"\xef\xbb\xbf", b"NaN", b'{"a":NaN}', b"Infinity", b"-Infinity",
    b'{"a":-Infinity}', b"nul", b"True", b"'a'", b"01", b"1.", b".5", b"+1", b"-", b"1e", b"0x10",
    b"{", b"}", b"[1,]", b'{"a":1,}', b'{"a" 1}', b"{a:1}", b'{"a":1}{"b":2}', b'{"a":1} x',
    b'"half', b'"\\x"', b'"\\u12g4"', b'"\\', b'"tab\there"', b'"nul\0"', b"\0\0\0\0",
    b'"\xff"', b'"\xc3"', b'"\xed\xa0\x80"', b'"\xc0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe2\x82"',
    b'{"a":1}\xc3', "\u00a0{}".encode(), "{}\u2028".encode(), "\u0661".encode(), b"\x0c{}",
    b"[" * 200000, b"[" * 200000 + b"]" * 200000, b'{"a":' * 200000,
    b" \xef\xbb\xbf{}", b"\xef\xbb\xbf\xef\xbb\xbf{}"]


def shorten(line):
    return ascii(line[:30])


@pytest.mark.parametrize("line", JSON_LINES, ids=shorten)
def test_a_line_of_json_keeps_its_text(line):
    assert json_line(line) == line
    for around in (b"%b\r", b" \t%b ", codecs.BOM_UTF8 + b"%b", codecs.BOM_UTF8 + b" %b\t\r"):
        assert json_line(around % line) == line


@pytest.mark.parametrize("line", NO_JSON_LINES, ids=shorten)
def test_a_line_that_is_no_json_is_left_out(line):
    assert json_line(line) is None


def is_json(text, size):
    """What JSONChecker says of it, block by block."""
    checker = JSONChecker()
    try:
        for begin in range(0, len(text), size):
            checker.feed(text[begin:begin + size])
        return checker.is_complete()
    except ValueError:
        return False


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 1000, 65536])
def test_json_is_checked_across_blocks(size):
    for line in JSON_LINES:
        if len(line) < 1000 * size:
            assert is_json(line, size), line[:100]
            assert is_json(b" \t" + line + b"\r ", size)
    for line in NO_JSON_LINES:
        if len(line) < 1000 * size and not line.startswith(codecs.BOM_UTF8):
            assert not is_json(line, size), line[:100]


def test_the_checker_agrees_with_the_parser():
    """On JSON with a byte or a few changed, in blocks of any size."""
    source = random.Random(8259)
    seeds = [json.dumps(value, ensure_ascii=source.random() < 0.5).encode() for value in [
        {"a": [1, -2.5e-7, True, None], "é😀": {"": [[], {}, "\\\"\n\u2028"]}},
        [[[0, 10, 1e300], {"x": {"y": {"z": False}}}], "text", {"k": "v", "l": "w"}]]]
    verdicts = collections.Counter()
    for _ in range(6000):
        text = bytearray(source.choice(seeds))
        for _ in range(source.choice((0, 1, 1, 2))):
            place = source.randrange(len(text))
            text[place:place + source.randrange(2)] = source.choice(
                (b"", b"", b",", b'"', b"[", b"]", b"}", b"0", b"1", b".", b"e", b"-", b"\\", b" ",
                 b"\xc3", b"t", b"\t", b":"))
        expected = json_line(bytes(text)) is not None
        assert is_json(bytes(text), source.choice((1, 2, 3, 7, 20, 1000))) == expected, bytes(text)
        verdicts[expected] += 1
    assert min(verdicts.values()) > 600


def test_every_odd_line_through_the_engine(engine):
    lines = [line for pair in itertools.zip_longest(JSON_LINES, NO_JSON_LINES) for line in pair
             if line is not None]
    ends = itertools.cycle([b"\n", b"\r\n"])
    data = b"\xef\xbb\xbf" + b"".join(line + next(ends) for line in lines)
    take_thread(engine, data=data + b'{"half":')
    got = engine.get("/codex/history")
    assert got.body == answer(JSON_LINES, len(data))
    json.loads(got.body.decode(), parse_int=float)              # valid as a whole


def test_a_file_without_a_whole_line_of_json(engine):
    path = take_thread(engine)
    for data in (b"", b"\n", b"\r\n\n\n", b'{"half":', b'{"a":1}', b"x\n" * 300):
        write(path, data)
        for query in ("", "?tail=3", "?tail=0", "?limit=1", "?after=%s.0" % THREAD):
            got = engine.get("/codex/history" + query)
            assert (got.status, got.body) == (200, answer([], data.rfind(b"\n") + 1)), query


def test_a_half_written_line_comes_once_it_is_whole(engine):
    path = take_thread(engine, data=CONTENT + b'{"half":')
    assert engine.get("/codex/history").body == answer(LINES, len(CONTENT))
    after = "/codex/history?after=%s.%d" % (THREAD, len(CONTENT))
    assert engine.get(after).body == answer([], len(CONTENT))
    append(path, b"1}")                     # JSON by now, but is it all?
    assert engine.get(after).body == answer([], len(CONTENT))
    append(path, b"\n")
    assert engine.get(after).body == answer([b'{"half":1}'], len(CONTENT) + 11)


# Reading: every way through any file agrees with splitting it at once

def random_content(choice):
    lines = [choice([b'{"a":%d}', b"%d", b'"%d"', b"", b"\r", b"broken %d",
                     b'"' + b"x" * 50 + b'%d"', '"\u00e9\U0001f600%d"'.encode(),
                     b"\xef\xbb\xbf[%d]\r"]) for _ in range(12)]
    lines = [line % n if b"%d" in line else line for n, line in enumerate(lines)]
    return b"\n".join(lines) + choice([b"\n", b"", b'\n{"half":'])


def whole_lines(data):
    """[(where the line ends, its JSON text)] by the simplest means."""
    found, end = [], 0
    for line in data.split(b"\n")[:-1]:
        end += len(line) + 1
        text = line.decode("utf-8-sig").strip()
        with contextlib.suppress(ValueError):
            json.loads(text)
            found.append((end, text.encode()))
    return found


def read_page(path, tail=None, offset=0, limit=None):
    reader = RolloutReader(path)
    try:
        reader.unpack(10 ** 6)
        begin = offset if tail is None else reader.last_lines(tail)
        assert reader.is_line(begin)
        return json.loads(b"".join(HistoryPage("t", reader, begin, limit)).decode())
    finally:
        reader.close()


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "zst"])
@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_every_way_through_a_file(tmp_path, monkeypatch, size, compressed):
    monkeypatch.setattr(replicas_engine, "BLOCK_SIZE", size)
    source = random.Random(size)
    for number in range(2 if compressed else 10):
        data = random_content(source.choice)
        path = write(str(tmp_path / ("%d.jsonl" % number)), data)
        path = compress(path) if compressed else path
        lines = whole_lines(data)
        texts = [json.loads(text.decode()) for _, text in lines]
        end = data.rfind(b"\n") + 1

        page = read_page(path)
        assert page == {"thread_id": "t", "events": texts, "cursor": "t.%d" % end}
        for tail in range(0, len(texts) + 2, 3 if compressed else 1):
            page = read_page(path, tail=tail)
            assert page["events"] == texts[max(0, len(texts) - tail):]
            assert page["cursor"] == "t.%d" % end
        for limit in (1, 2, 5):
            events, page = [], {"cursor": "t.0", "has_more": True}
            while page.get("has_more"):
                page = read_page(path, offset=int(page["cursor"][2:]), limit=limit)
                assert len(page["events"]) == limit or "has_more" not in page
                events += page["events"]
            assert events == texts and page["cursor"] == "t.%d" % end
        starts = {0} | {index + 1 for index, byte in enumerate(data) if byte == 10}
        for offset in range(0, len(data) + 3, 11 if compressed else 1):
            reader = RolloutReader(path)
            reader.unpack(10 ** 6)
            assert reader.is_line(offset) == (offset in starts)
            reader.close()


# A big one

def test_a_big_rollout(engine):
    """Everything that issue 4 names, while it is being written and others ask for other things."""
    message = b'{"timestamp":"2025-10-26T04:00:00.000Z","payload":{"n":%d,"text":"%b"}}'
    lines = [message % (n, b"gr\xc3\xb6\xc3\x9fe \\n" * (n % 200)) for n in range(20000)]
    lines[9000] = message % (9000, b"x" * 3 * 1024 * 1024)
    half = b'{"timestamp":"2025-10-26'
    with_faults = list(lines)
    with_faults[15000:15000] = [lines[7][:40], b"", b"  ", b"\r"]
    data = b"\xef\xbb\xbf" + b"\r\n".join(with_faults[:10000]) + b"\r\n"
    data += b"\n".join(with_faults[10000:]) + b"\n"
    assert len(data) > 20e6                 # and see what memory it may take

    path = take_thread(engine, data=LINES[0] + b"\n")
    engine.get("/codex/history")
    before = memory(engine)
    write(path, data + half)
    connection, response = engine.open("GET", "/codex/history")
    body = response.read(100000)            # it is under way, and can't be further than its buffers
    append(path, b'T05:00:00.000Z"}\n' + b"\n".join(LINES) + b"\n")
    assert engine.get("/ping").status == 200
    assert engine.status()["session_file"] == path
    body += response.read()
    connection.close()
    assert memory(engine) - before < 10
    assert hashlib.sha256(body).digest() == hashlib.sha256(answer(lines, len(data))).digest()
    json.loads(body.decode())
    got = engine.get("/codex/history?after=%s.%d" % (THREAD, len(data)))
    assert got.json()["events"] == [{"timestamp": "2025-10-26T05:00:00.000Z"}] + [
        {"n": n} for n in range(10)]

    tail = engine.get("/codex/history?tail=11011").json()["events"]     # the long line is its first
    assert len(tail) == 11011 and tail[-1] == {"n": 9}
    packed = engine.request("GET", "/codex/history", headers={"Accept-Encoding": "gzip"})
    assert gzip.decompress(packed.body) == engine.get("/codex/history").body


def test_one_line_of_16_megabytes(engine):
    size = 16 * 1024 * 1024
    line = b'{"text":"%b"}' % (b"0123456789abcdef" * (size // 16))
    take_thread(engine, data=b'{"a":1}\n' + line + b'\n{"b":2}\n')
    expected = hashlib.sha256(answer([b'{"a":1}', line, b'{"b":2}'], len(line) + 17)).digest()
    assert hashlib.sha256(engine.get("/codex/history").body).digest() == expected
    got = engine.get("/codex/history?tail=2").body
    assert len(got) == len(answer([line, b'{"b":2}'], len(line) + 17)) and line in got


def big_content():
    return b'{"text":"%b"}\n' % (b"x" * 990) * 30000


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "zst"])
@pytest.mark.parametrize("way", ["close", "shut down"])
def test_a_client_that_stops_reading(make_engine, compressed, way):
    engine = make_engine(constants=harness.OPEN_TO_VIEW)
    path = take_thread(engine, data=big_content())
    path = compress(path) if compressed else path
    connection, response = engine.open("GET", "/codex/history")
    response.read(1000)
    before = memory(engine)
    for _ in range(20):                     # it hangs there, and nobody else notices
        assert engine.get("/ping").status == 200
    assert engine.get("/codex/history?tail=1").json()["events"] == [{"text": "x" * 990}]
    assert memory(engine) - before < 10
    if way == "close":
        connection.close()
        response.close()
        wait_for(lambda: not open_rollouts(engine) and not children(engine), "its end")
    assert engine.stop() == 0               # with the client still there, too
    connection.close()


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "zst"])
def test_nothing_is_left_open(make_engine, compressed):
    engine = make_engine(constants=harness.OPEN_TO_VIEW)
    path = take_thread(engine)
    if compressed:
        compress(path)
    tag = engine.get("/codex/history").headers["ETag"]
    for method in ("GET", "HEAD"):
        for query, status, headers in (
                ("", 200, {}), ("", 304, {"If-None-Match": tag}), ("?tail=2", 200, {}),
                ("?limit=1", 200, {}), ("?after=%s.8" % THREAD, 200, {}),
                ("?after=%s.7" % THREAD, 410, {}), ("?after=%s.99999" % THREAD, 410, {})):
            got = engine.request(method, "/codex/history" + query, headers=headers)
            assert got.status == status, query
            wait_for(lambda: not open_rollouts(engine) and not children(engine), "its end")


# Compressed

def test_a_compressed_rollout(engine):
    data = b"".join(b'{"n":%d,"text":"%b"}\n' % (n, b"x" * 200) for n in range(5000))
    path = take_thread(engine, data=data + b'{"half":')
    plain = {query: engine.get("/codex/history" + query).body
             for query in ("", "?tail=3", "?tail=4000", "?limit=10", "?tail=10&limit=3",
                           "?after=%s.0" % THREAD, "?after=%s.%d" % (THREAD, len(data)),
                           "?after=%s.%d" % (THREAD, data.index(b'{"n":4000')))}
    compress(path)
    assert engine.status()["session_file"] == path + ".zst"
    for query, expected in plain.items():
        assert engine.get("/codex/history" + query).body == expected, query


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python reads it without the program")
def test_without_the_program_zstd_the_error_says_what_to_install(make_engine):
    engine = make_engine(constants=harness.OPEN_TO_VIEW, PATH=os.path.dirname(sys.executable))
    path = compress(take_thread(engine))
    got = engine.get("/codex/history")
    assert got.status == 500
    assert "apt-get install zstd" in got.json()["details"] and path in got.json()["details"]
    assert engine.status()["session_file"] == path
    assert open_rollouts(engine) == []


@pytest.mark.parametrize("damage", ["cut off", "not zstd"])
def test_a_damaged_compressed_rollout_is_an_error(make_engine, damage):
    engine = make_engine(constants=harness.OPEN_TO_VIEW)
    source = random.Random(1)
    path = compress(take_thread(engine, data=b"".join(
        b'"%x"\n' % source.getrandbits(4000) for _ in range(1000))))
    if damage == "cut off":
        os.truncate(path, os.path.getsize(path) // 2)
    else:
        write(path, CONTENT)
    for query in ("", "?tail=2"):
        got = engine.get("/codex/history" + query)
        assert got.status == 500
        assert path in got.json()["details"]
    wait_for(lambda: not open_rollouts(engine) and not children(engine), "nothing to be left")
    assert engine.get("/ping").status == 200


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="this Python reads it without the program")
def test_the_program_zstd_does_not_get_the_secret(make_engine, tmp_path):
    program = tmp_path / "bin" / "zstd"
    write(str(program), b"#!/bin/sh\n/usr/bin/env > %b/seen\nexec /bin/cat\n"
          % str(tmp_path).encode())
    program.chmod(0o755)
    engine = make_engine(PATH="%s:%s" % (program.parent, os.path.dirname(sys.executable)))
    take_thread(engine, place=PLACE + ".zst")
    assert engine.get("/codex/history").body == answer(LINES, len(CONTENT))
    seen = (tmp_path / "seen").read_text()
    assert "REPLICAS_TURN=engine" in seen and SECRET not in seen


def bomb(path, size=2 ** 28):
    """A compressed rollout of one line that takes `size` bytes and is not JSON."""
    need("zstd")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        zeros = subprocess.Popen(["head", "-c", str(size), "/dev/zero"], stdout=subprocess.PIPE)
        subprocess.run(["zstd", "-q"], stdin=zeros.stdout, stdout=file, check=True)
        zeros.stdout.close()
        assert zeros.wait() == 0
    assert os.path.getsize(path) < size // 1000
    return path


def test_a_rollout_that_unpacks_to_more_than_is_allowed(make_engine):
    engine = make_engine(constants=harness.OPEN_TO_VIEW,
                         REPLICAS_ENGINE_MAX_HISTORY=str(20 * 1024 * 1024))
    take_thread(engine, place=None)
    engine.get("/codex/history")
    before = memory(engine)
    path = bomb(os.path.join(engine.codex_home, PLACE + ".zst"))
    for query in ("", "?tail=1", "?after=%s.0" % THREAD):
        got = engine.get("/codex/history" + query)
        assert got.status == 413 and set(got.json()) == {"error", "details"}
        assert "REPLICAS_ENGINE_MAX_HISTORY" in got.json()["details"]
        assert path in got.json()["details"]
        wait_for(lambda: not open_rollouts(engine) and not children(engine), "its end")
    assert memory(engine) - before < 10
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    assert engine.status()["session_file"] == path


def test_a_line_that_is_huge_costs_no_memory(make_engine):
    """Unpacked from a few kilobytes, and nothing in it is a line end."""
    engine = make_engine()
    take_thread(engine, place=None)
    engine.get("/codex/history")
    before = memory(engine)
    path = bomb(os.path.join(engine.codex_home, PLACE + ".zst"), 200 * 1024 * 1024)
    with open(path, "ab") as file:
        subprocess.run(["zstd", "-q"], input=b"\n" + CONTENT, stdout=file, check=True)
    end = 200 * 1024 * 1024 + 1 + len(CONTENT)
    for query in ("", "?tail=20"):
        assert engine.get("/codex/history" + query).body == answer(LINES, end)
    assert memory(engine) - before < 10


@pytest.mark.parametrize("line", [
    b"[" * 2000000, b"[" * 900 + b"[],{}," * 600000 + b"0" + b"]" * 900,
    b'{"a":[' * 300000, b"[" + b'"\\"",' * 600000 + b"1]", b"[" + b"1," * 2000000 + b"1]",
    b'"' + b"\\u00e9" * 700000, b"1" * 4000000], ids=shorten)
def test_a_line_that_is_nested_or_crowded_costs_no_memory(engine, line):
    take_thread(engine, data=CONTENT)
    engine.get("/codex/history")
    before = memory(engine)
    data = line + b"\n" + CONTENT
    write(os.path.join(engine.codex_home, PLACE), data)
    lines = [line] * (line[-1:] in b"]1") + LINES
    expected = hashlib.sha256(answer(lines, len(data))).digest()
    assert hashlib.sha256(engine.get("/codex/history").body).digest() == expected
    assert memory(engine) - before < 16


def small_disk(request, engine):
    """CODEX_HOME on a file system of 2 MB."""
    need("tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", engine.codex_home],
                   check=True)
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", engine.codex_home]))


def test_a_disk_that_fills_while_it_is_unpacked(request, make_engine):
    engine = make_engine(constants=harness.OPEN_TO_VIEW, start=False)
    small_disk(request, engine)
    engine.start()
    take_thread(engine, place=None)
    path = bomb(os.path.join(engine.codex_home, PLACE + ".zst"), 20 * 1024 * 1024)
    for _ in range(3):
        got = engine.get("/codex/history")
        assert got.status == 507 and "make room" in got.json()["details"]
        wait_for(lambda: not open_rollouts(engine) and not children(engine), "its end")
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    write(path)
    os.rename(path, path[:-len(".zst")])                # there is room again
    assert engine.get("/codex/history").body == answer(LINES, len(CONTENT))


@pytest.mark.parametrize("number, status", [
    (errno.EMFILE, 503), (errno.ENFILE, 503), (errno.ENOMEM, 503), (errno.EIO, 500)])
@pytest.mark.parametrize("call", ["listdir", "stat", "open", "pread"])
def test_what_cannot_be_looked_at_is_an_error_and_not_nothing(tmp_path, monkeypatch, call, number,
                                                              status):
    write(str(tmp_path / PLACE))
    settings = replicas_engine.Settings({"CODEX_HOME": str(tmp_path), "HOME": str(tmp_path)})
    request = replicas_engine.Request({"REQUEST_METHOD": "GET"})
    real = getattr(os, call)

    def failing(path, *args, **kwargs):
        if isinstance(path, int) or str(path).startswith(str(tmp_path / "sessions")):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    rollouts = Rollouts(settings.codex_home)
    if call not in ("listdir", "stat"):
        assert rollouts.find(THREAD)
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(replicas_engine.HTTPError) as caught:
        replicas_engine.history_response(request, rollouts, THREAD, settings.max_history)
    assert caught.value.status == status
    assert os.strerror(number) in caught.value.body["details"]
    if call in ("listdir", "stat"):
        with pytest.raises(replicas_engine.HTTPError):
            rollouts.find(THREAD)


def test_a_fifo_that_takes_the_place_of_a_rollout(tmp_path, monkeypatch):
    """It was a file when it was found: nothing waits for a writer."""
    path = write(str(tmp_path / PLACE))
    rollouts = Rollouts(str(tmp_path))
    found = rollouts.find

    def find_and_replace(thread_id):
        result = found(thread_id)
        if result:
            os.unlink(path)
            os.mkfifo(path)
        return result

    monkeypatch.setattr(rollouts, "find", find_and_replace)
    assert rollouts.open(THREAD) is None


# Finding

def uuid7(moment):
    milliseconds = int(moment.timestamp() * 1000)
    return str(uuid.UUID(int=milliseconds << 80 | 7 << 76 | random.getrandbits(74) & ~(3 << 62)
                         | 2 << 62))


def name_of(thread_id, moment):
    return moment.strftime("rollout-%Y-%m-%dT%H-%M-%S-") + thread_id + ".jsonl"


def test_twenty_thousand_rollouts(make_engine):
    engine = make_engine(start=False)
    begin = datetime.datetime(2023, 1, 1, tzinfo=datetime.timezone.utc)
    wanted, days = {}, set()
    for n in range(20000):
        moment = begin + datetime.timedelta(hours=n * 3 * 365 * 24 / 20000)
        thread_id = str(uuid.uuid4()) if n % 10 == 0 else uuid7(moment)
        folder = "archived_sessions" if n % 7 == 0 else moment.strftime("sessions/%Y/%m/%d")
        path = os.path.join(engine.codex_home, folder, name_of(thread_id, moment))
        if folder not in days:
            days.add(folder)
            os.makedirs(os.path.dirname(path))
        open(path, "wb").close()
        if n in (0, 1, 5, 10, 7777, 10000, 19993, 19999):
            wanted[thread_id] = path
    rollouts = Rollouts(engine.codex_home)
    for _ in range(2):
        for thread_id, path in wanted.items():
            assert rollouts.find(thread_id) == path
            assert rollouts.find(thread_id) == path
    assert rollouts.find(str(uuid.uuid4())) is None
    assert rollouts.find(uuid7(begin)) is None
    engine.start()
    for thread_id, path in wanted.items():
        take_thread(engine, thread_id, place=None)
        append(path, CONTENT)
        assert engine.status()["session_file"] == path
        assert engine.get("/codex/history").body == answer(LINES, len(CONTENT), thread_id)


def test_it_is_found_again_when_it_is_moved_or_compressed(engine):
    path = take_thread(engine)
    whole = answer(LINES, len(CONTENT))
    assert engine.get("/codex/history").body == whole
    compress(path)
    assert engine.get("/codex/history").body == whole
    assert engine.status()["session_file"] == path + ".zst"
    archived = os.path.join(engine.codex_home, "archived_sessions", NAME + ".zst")
    os.makedirs(os.path.dirname(archived))
    os.rename(path + ".zst", archived)
    assert engine.get("/codex/history").body == whole
    assert engine.status()["session_file"] == archived
    write(archived[:-len(".zst")], CONTENT + b"{}\n")       # taken up again: the plain one counts
    assert engine.status()["session_file"] == archived[:-len(".zst")]
    assert engine.get("/codex/history").json()["events"][-1] == {}
    os.unlink(archived)
    os.rename(archived[:-len(".zst")], path)
    cursor = "%s.%d" % (THREAD, len(CONTENT))
    assert engine.get("/codex/history?after=" + cursor).json()["events"] == [{}]
    assert engine.status()["session_file"] == path
    os.unlink(path)
    assert engine.status()["session_file"] is None
    assert engine.get("/codex/history").body == answer([], 0)
    assert engine.get("/codex/history?after=" + cursor).status == 410


def test_a_file_that_moves_just_when_it_is_opened(tmp_path, monkeypatch):
    """What `find` found is gone when it is opened: it is looked for again."""
    codex_home = str(tmp_path / "codex")
    path = write(os.path.join(codex_home, PLACE))
    archived = os.path.join(codex_home, "archived_sessions", NAME)
    rollouts = Rollouts(codex_home)
    found = rollouts.find

    def find_and_move(thread_id):
        result = found(thread_id)
        if os.path.exists(path):
            os.makedirs(os.path.dirname(archived))
            os.rename(path, archived)
        return result

    monkeypatch.setattr(rollouts, "find", find_and_move)
    reader = rollouts.open(THREAD)
    assert reader.path == archived
    reader.close()


def test_what_stands_in_the_way_is_passed_over(engine):
    home = engine.codex_home
    sessions = os.path.join(home, "sessions")
    path = take_thread(engine, place=os.path.join("sessions", "2019", "02", "03", NAME))
    write(os.path.join(sessions, "2099"), b"a file named like a year's folder")
    write(os.path.join(sessions, "2025", "11"), b"a file named like a month's folder")
    write(os.path.join(sessions, "2025", "10", "27"), b"a file named like a day's folder")
    write(os.path.join(home, "archived_sessions"), b"a file named like the archive")
    os.makedirs(os.path.join(sessions, "2025", "10", "26", NAME))
    os.makedirs(os.path.join(sessions, "2025", "10", "26", NAME + ".zst"))
    os.makedirs(os.path.join(sessions, "2025", "10", "25"))
    os.symlink("nowhere", os.path.join(sessions, "2025", "10", "25", NAME))
    os.symlink("nowhere", os.path.join(sessions, "2024"))
    os.symlink("loop", os.path.join(sessions, "loop"))
    os.makedirs(os.path.join(sessions, "2023", "01"))
    os.mkfifo(os.path.join(sessions, "2023", "01", "01"))
    os.makedirs(os.path.join(sessions, "2023", "02", "02"))
    os.mkfifo(os.path.join(sessions, "2023", "02", "02", NAME))
    closed = os.path.join(sessions, "2022")
    os.makedirs(os.path.join(closed, "01"))
    os.chmod(closed, 0)
    try:
        assert engine.status()["session_file"] == path
        assert engine.get("/codex/history").body == answer(LINES, len(CONTENT))
    finally:
        os.chmod(closed, 0o700)


def test_links_are_followed(engine, tmp_path):
    """Somebody's CODEX_HOME/sessions lies on another disk."""
    os.makedirs(str(tmp_path / "disk"))
    os.symlink(str(tmp_path / "disk"), os.path.join(engine.codex_home, "sessions"))
    path = take_thread(engine)
    assert engine.status()["session_file"] == path
    assert engine.get("/codex/history").body == answer(LINES, len(CONTENT))


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_rollout_that_may_not_be_read(engine):
    path = take_thread(engine)
    os.chmod(path, 0)
    got = engine.get("/codex/history")
    assert got.status == 500 and path in got.json()["details"]


@pytest.mark.parametrize("thread_id", ["a", "thread_1", "T-2", "2025-10-26T04-00-00-a", "x" * 128,
                                       "123e4567-e89b-42d3-a456-426614174000",
                                       "ffffffff-ffff-4fff-bfff-ffffffffffff",
                                       "00000000-0000-7000-8000-000000000000", THREAD.upper()])
def test_ids_of_any_kind_are_matched_whole(tmp_path, thread_id):
    rollouts = Rollouts(str(tmp_path))
    day = str(tmp_path / "sessions" / "2021" / "05" / "06")
    stamp = "rollout-2021-05-06T07-08-09-"
    for other in ("x" + thread_id, "x-" + thread_id, thread_id + "x", thread_id + "-x",
                  THREAD + "-" + thread_id, "2021-05-06T07-08-09-" + thread_id):
        write(os.path.join(day, stamp + other + ".jsonl"))
    for name in (thread_id + ".jsonl", "rollout-" + thread_id + ".jsonl", stamp + thread_id,
                 stamp + thread_id + ".jsonl.gz", stamp + thread_id + ".jsonl.zst.tmp",
                 "." + stamp + thread_id + ".jsonl", stamp + thread_id + ".jsonl\n",
                 stamp + thread_id.swapcase() + ".jsonl"):
        if thread_id.swapcase() != thread_id or name != stamp + thread_id + ".jsonl":
            write(os.path.join(day, name))
    assert rollouts.find(thread_id) is None
    path = write(os.path.join(day, stamp + thread_id + ".jsonl"))
    assert rollouts.find(thread_id) == path


def test_an_id_is_no_pattern(tmp_path):
    day = tmp_path / "sessions" / "2021" / "05" / "06"
    write(str(day / "rollout-2021-05-06T07-08-09-aXb.jsonl"))
    assert Rollouts(str(tmp_path)).find("a-b") is None
    assert Rollouts(str(tmp_path)).find("a_b") is None


@pytest.mark.parametrize("zone", ["XXX-14", "XXX+12"])
def test_in_any_time_zone(make_engine, zone):
    engine = make_engine(TZ=zone)
    engine.send("hello")
    status = engine.status()
    assert os.path.isfile(status["session_file"])
    assert status["session_file"].endswith("-%s.jsonl" % status["thread_id"])
    texts = [event["payload"].get("message") for event in engine.get("/codex/history").json()[
        "events"]]
    assert "hello" in texts and "You said: hello" in texts
    assert gzip.decompress(engine.request("GET", "/codex/history", headers={
        "Accept-Encoding": "gzip"}).body) == engine.get("/codex/history").body
