"""The request parser against a second, naive reading of RFC 9112's grammar.

The naive reader below goes through a request byte by byte, without a regular expression, and was
written from the ABNF alone.  Hypothesis makes requests, broken ones and worse; both readers must
agree on whether a request is one, and on its method, path, query, fields, body and on where the
next one begins.  FUZZ_SECONDS says how long; FUZZ_COUNT names a file for the number of cases.
"""

import os
import random
import shutil
import tempfile
import time

import conftest
import pytest

import replicas_engine

SECONDS = float(os.environ.get("FUZZ_SECONDS", "8"))
ROUND = 50                          # requests between two looks at the clock
RELATIVES = 20                      # cases made of each


# The naive reader

class Refused(Exception):
    pass


def need(condition):
    if not condition:
        raise Refused


DIGITS = b"0123456789"
HEX = b"0123456789abcdefABCDEF"
ALPHA = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TCHAR = frozenset(b"!#$%&'*+-.^_`|~" + DIGITS + ALPHA)
SUB_DELIMS = b"!$&'()*+,;="
UNRESERVED = ALPHA + DIGITS + b"-._~"
BAD_TRAILERS = ("content-length", "transfer-encoding", "host", "authorization",
                "content-encoding", "content-type", "content-range", "trailer", "te",
                "connection", "expect", "x-replicas-engine-secret")


class Reader:
    """Reads from `data`, from `position` on; whatever is missing or wrong is refused."""

    def __init__(self, data):
        self.data = data
        self.position = 0

    def peek(self):
        return self.data[self.position] if self.position < len(self.data) else -1

    def next(self):
        byte = self.peek()
        need(byte >= 0)
        self.position += 1
        return byte

    def expect(self, text):
        for byte in text:
            need(self.next() == byte)

    def at(self, text):
        return self.data[self.position:self.position + len(text)] == text

    def while_in(self, allowed):
        begin = self.position
        while self.peek() >= 0 and self.peek() in allowed:
            self.position += 1
        return self.data[begin:self.position]

    def token(self):
        token = self.while_in(TCHAR)
        need(token)
        return token


def read_naively(data):
    """(method, path, query, fields, body, rest) of the first request, or None if it is none."""
    try:
        return naive_request(Reader(data))
    except Refused:
        return None


def naive_request(reader):
    while reader.at(b"\r\n"):
        reader.expect(b"\r\n")
    begin = reader.position
    method = reader.token().decode()
    reader.expect(b" ")
    target = reader.while_in(frozenset(range(0x21, 0x7f)))
    need(target)
    reader.expect(b" HTTP/1.")
    version = reader.next()
    need(version in DIGITS)
    version = "HTTP/1.0" if version == ord("0") else "HTTP/1.1"
    need(reader.position - begin <= replicas_engine.MAX_REQUEST_LINE)
    reader.expect(b"\r\n")
    lines = []
    while not reader.at(b"\r\n"):
        lines.append(naive_field(reader))
    reader.expect(b"\r\n")
    need(reader.position - begin <= replicas_engine.MAX_HEAD)
    need(len(lines) <= replicas_engine.MAX_FIELDS)
    fields = {}
    for name, value in lines:
        if "_" in name:
            continue
        need(not (name in fields and name in ("host", "content-length", "transfer-encoding")))
        fields[name] = fields[name] + "," + value if name in fields else value
    path, query = naive_target(method, target, fields.get("host"), version)
    for member in fields.get("expect", "").split(","):
        need(member.replace("\t", " ").strip(" ").lower() in ("", "100-continue"))
    body = naive_body(reader, fields, version)
    if "content-length" in fields:          # the engine gives the application a plain number
        fields["content-length"] = str(len(body))
    return method, path, query, fields, body, reader.data[reader.position:]


def naive_field(reader):
    name = reader.token().decode().lower()
    reader.expect(b":")
    value = reader.while_in(frozenset(b"\t" + bytes(range(0x20, 0x7f)) + bytes(range(0x80, 0x100))))
    reader.expect(b"\r\n")
    while value[:1] in (b" ", b"\t"):
        value = value[1:]
    while value[-1:] in (b" ", b"\t"):
        value = value[:-1]
    return name, "".join(chr(byte) for byte in value)


def naive_target(method, target, host, version):
    need(method != "CONNECT")
    need(host is not None or version == "HTTP/1.0")
    if host is not None:
        host = naive_authority(host.encode("latin-1"))
    if target == b"*":
        need(method == "OPTIONS")
        return b"", ""
    if target[:1] != b"/":
        need(target[:7].lower() == b"http://")
        end = 7
        while end < len(target) and target[end:end + 1] not in (b"/", b"?"):
            end += 1
        authority = naive_authority(target[7:end])
        need(authority[0] != "" and host in (None, authority))
        target = target[end:]
        if target == b"" and method == "OPTIONS":
            return b"", ""
        if target[:1] != b"/":
            target = b"/" + target
    path, question, query = target.partition(b"?")
    # What RFC 3986 doesn't allow in a query is sent by browsers as it is; but no fragment.
    need(all(0x21 <= byte <= 0x7e and byte != ord("#") for byte in query))
    return naive_pchars(path, b"/"), query.decode()


def naive_pchars(text, more):
    reader, decoded = Reader(text), []
    while reader.peek() >= 0:
        byte = reader.next()
        if byte == ord("%"):
            one, two = reader.next(), reader.next()
            need(one in HEX and two in HEX)
            byte = int(chr(one) + chr(two), 16)
        else:
            need(byte in UNRESERVED + SUB_DELIMS + b":@" + more)
        decoded.append(byte)
    return bytes(decoded)


def naive_authority(text):
    reader, host = Reader(text), ""
    if reader.peek() == ord("["):
        reader.next()
        address = reader.while_in(HEX + b":.")
        reader.expect(b"]")
        need(is_ipv6(address.decode()))
        host = "[%s]" % address.decode()
    else:
        while reader.peek() not in (-1, ord(":")):
            byte = reader.next()
            if byte == ord("%"):
                one, two = reader.next(), reader.next()
                need(one in HEX and two in HEX)
                host += "%" + chr(one) + chr(two)
            else:
                need(byte in UNRESERVED + SUB_DELIMS)
                host += chr(byte)
    port = b""
    if reader.peek() >= 0:
        reader.expect(b":")
        port = reader.while_in(DIGITS)
        need(reader.peek() < 0)
    number = naive_number(port, 10)
    need(number <= 65535)
    return host.lower(), number if port else 80


def naive_number(digits, base):
    """Digit by digit: int() has a limit."""
    number = 0
    for digit in digits.decode():
        number = min(number * base + int(digit, base), 10 ** 30)
    return number


def is_ipv6(text):
    """RFC 4291, 2.2: eight groups, one run of them as `::`, the last two perhaps as IPv4."""
    if text.count("::") > 1 or ":::" in text:
        return False
    head, gap, tail = text.partition("::")
    groups = head.split(":") if head else []
    behind = tail.split(":") if tail else []
    last = (behind if gap else groups)[-1:]
    if last and "." in last[0]:
        parts = last[0].split(".")
        if len(parts) != 4 or not all(
                1 <= len(part) <= 3 and all(c in "0123456789" for c in part) and int(part) <= 255
                and (part == "0" or part[0] != "0") for part in parts):
            return False
        (behind if gap else groups)[-1:] = ["0", "0"]
    if not all(1 <= len(group) <= 4 and "." not in group for group in groups + behind):
        return False
    return len(groups) + len(behind) <= 7 if gap else len(groups) == 8


def naive_body(reader, fields, version):
    length, coding = fields.get("content-length"), fields.get("transfer-encoding")
    if length is not None:
        need(length and all(c in "0123456789" for c in length))
        length = naive_number(length.encode(), 10)
        need(length < 10 ** 18)
    if coding is not None:
        need(length is None and version == "HTTP/1.1" and coding.lower() == "chunked")
        return naive_chunks(reader)
    return bytes(reader.next() for _ in range(length or 0))


def naive_chunks(reader):
    body, excess = b"", 0
    while True:
        begin = reader.position
        digits = reader.while_in(HEX)
        need(digits)
        naive_extensions(reader)
        reader.expect(b"\r\n")
        need(reader.position - begin <= replicas_engine.MAX_CHUNK_LINE)
        size = naive_number(digits, 16)
        need(size < 16 ** 16)
        excess = max(0, excess + reader.position - begin + 2 - 16 - 2 * size)
        need(excess <= replicas_engine.MAX_CHUNK_EXCESS)
        if size == 0:
            break
        need(size <= len(reader.data))
        body += bytes(reader.next() for _ in range(size))
        reader.expect(b"\r\n")
    begin = reader.position
    while not reader.at(b"\r\n"):
        name, _ = naive_field(reader)
        need(name not in BAD_TRAILERS)
        need(reader.position - begin <= replicas_engine.MAX_TRAILERS)
    reader.expect(b"\r\n")
    return body


def naive_extensions(reader):
    """*( BWS ";" BWS chunk-ext-name [ BWS "=" BWS chunk-ext-val ] )"""
    while not reader.at(b"\r"):
        reader.while_in(b" \t")
        reader.expect(b";")
        reader.while_in(b" \t")
        reader.token()
        behind = reader.position
        reader.while_in(b" \t")
        if reader.peek() != ord("="):
            reader.position = behind
            continue
        reader.next()
        reader.while_in(b" \t")
        if reader.peek() != ord('"'):
            reader.token()
            continue
        reader.next()
        while reader.peek() != ord('"'):
            byte = reader.next()
            if byte == ord("\\"):
                byte = reader.next()
            need(byte == 9 or 0x20 <= byte <= 0x7e or byte >= 0x80)
        reader.next()


# The engine's reader, without a socket

class Pieces(replicas_engine.Connection):
    """A connection on which these pieces come, and then its end."""

    def __init__(self, pieces):
        self.pieces = [piece for piece in pieces if piece]
        self.buffer = b""
        self.cut = False
        self.sock = None

    def receive(self, seconds):
        if not self.pieces:
            return False
        self.buffer += self.pieces.pop(0)
        return True

    def send(self, data):
        assert data == b"HTTP/1.1 100 Continue\r\n\r\n"


class Server:
    closing = False

    def environ_of(self, client, client_address, connection):
        return {}

    def register(self, handler):
        return False


def read_by_engine(pieces):
    handler = replicas_engine.WSGIRequestHandler(Pieces(pieces), ("127.0.0.1", 1), Server())
    try:
        head = handler.read_head()
        if head is None:
            return None
        environ = handler.environ_of(head)
        handler.open_body(environ)
        body = environ["wsgi.input"].read()
    except replicas_engine.BadRequest as error:
        assert error.status in (400, 408, 413, 414, 417, 431, 501)
        return None
    fields = {key[5:].replace("_", "-").lower(): value for key, value in environ.items()
              if key.startswith("HTTP_")}
    for key in ("CONTENT_LENGTH", "CONTENT_TYPE"):
        if key in environ:
            fields[key.replace("_", "-").lower()] = environ[key]
    return (environ["REQUEST_METHOD"], environ["PATH_INFO"].encode("latin-1"),
            environ["QUERY_STRING"], fields, body,
            handler.connection.buffer + b"".join(handler.connection.pieces))


def check(data, cuts=()):
    """Both readers agree on `data`, which comes cut at those places; whether it is a request."""
    edges = [0] + sorted(cut % (len(data) + 1) for cut in cuts) + [len(data)]
    pieces = [data[begin:end] for begin, end in zip(edges, edges[1:])]
    wanted = read_naively(data)
    assert read_by_engine(pieces) == wanted, (data, edges)
    return wanted is not None


# What is tried

FRAGMENTS = [
    b"GET", b"POST", b"OPTIONS", b"CONNECT", b"get", b"G", b" ", b"  ", b"\t", b"/", b"*", b"/ping",
    b"/a%20b?c=%41", b"%", b"%4", b"%zz", b"?", b"#", b"http://a", b"http://a:80/x", b"HTTP://A/",
    b"https://a/", b"http://", b"//a", b"@", b"a:b", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2",
    b"HTTP/2.0", b"http/1.1", b"HTTP/1.10", b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"\0", b"\x0b",
    b"\x7f", b"\x80", b"\xff", b":", b"Host: a\r\n", b"Host:\r\n", b"Host: [::1]:80\r\n",
    b"Host: [::1\r\n", b"Host: a,b\r\n", b"host: A:80\r\n", b"Host: a:99999\r\n", b"Host : a\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Content-Length: +5\r\n",
    b"Content-Length: 5,5\r\n", b"Content-Length: 05\r\n", b"Content-Length:\r\n",
    b"content-length:5\r\n", b"Content_Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"transfer-encoding:Chunked \r\n", b"Transfer-Encoding: gzip, chunked\r\n",
    b"Transfer-Encoding: \x0bchunked\r\n", b"Transfer-Encoding: chunked,\r\n",
    b"chunked, identity", b"gzip, chunked", b"xchunked", b"identity", b"\"chunked\"", b"chunked;a",
    b"[::1]", b"[::ffff:1.2.3.4]:80", b"a@b", b"1:2:3", b"x\r\n",
    b"Expect: 100-continue\r\n", b"Expect: x\r\n", b"Expect:,\t100-Continue ,\r\n",
    b"00000000000000000000", b"Host: a:00000080\r\n", b"http://a:0000080", b"http://a",
    b"1;" + b"a" * 4000 + b"\r\nb\r\n", b"X: y\r\n", b"X:\r\n", b" X: y\r\n", b"X-Y: \t",
    b"X_Y: 1\r\n", b": y\r\n", b"5\r\nhello\r\n", b"05;a=b\r\nhello\r\n", b"0\r\n", b"00\r\n",
    b"0\r\n\r\n", b"5", b"a", b"F\r\n", b"0x5\r\n", b"5 \r\n", b"5;\r\n",
    b'5;a="b\\"c"\r\nhello\r\n', b'5 ; a = "\xe4;\t"\r\nhello\r\n',
    b';a', b'="', b'"', b"\\", b"=", b";", b"hello", b"Te: x\r\n",
    b"Trailer-Field: 1\r\n", b"ffffffffffffffff\r\n", b"00000000000000005\r\n", b"-5\r\n", b"5\n",
    b"Content-Length: 1000000000000000000\r\n", b"X: " + b"a" * 5000, b"A: b\r\n" * 60,
    b"x" * 8180, b"\r\n" * 3]


def strategies(st):
    """Valid requests, and soups, as lists of their parts."""
    def text(alphabet, **sizes):
        return st.text(alphabet, **sizes).map(lambda value: value.encode("latin-1"))

    fragment = st.sampled_from(FRAGMENTS)
    soup = st.lists(st.one_of(fragment, st.binary(max_size=4)), max_size=25)
    start = st.tuples(
        st.sampled_from([b"", b"", b"\r\n", b"\r\n\r\n"]),
        st.sampled_from([b"GET", b"POST", b"OPTIONS", b"HEAD", b"!#$%&'*+-.^_`|~"]), st.just(b" "),
        st.one_of(text("/?:@!$&'()*+,;=-._~aZ09", max_size=9).map(lambda path: b"/" + path),
                  st.sampled_from([b"/%7e?%20", b"http://a", b"HTTP://A:80/b?c", b"//"])),
        st.just(b" "), st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.7"]), st.just(b"\r\n"),
        st.sampled_from([b"Host:", b"host:"]),
        st.sampled_from([b"a", b" a:80 ", b"\tA:080", b"a:"]), st.just(b"\r\n")).map(list)
    field = st.tuples(text("aX-_.!~09", min_size=1, max_size=5), st.just(b":"),
                      text(" \tabc,=\"\\\x80\xff", max_size=8), st.just(b"\r\n"))
    fields = st.lists(field, max_size=4).map(flat)
    extensions = st.lists(
        st.sampled_from([b";a", b" ; b\t=c", b';d="\\""', b';e="\xe4\t;" ; f']),
        max_size=2).map(flat)
    data = st.binary(min_size=1, max_size=20)
    chunk = st.builds(
        lambda size, data, extensions: [size % len(data), *extensions, b"\r\n", data, b"\r\n"],
        st.sampled_from([b"%x", b"%X", b"0%x", b"000%X"]), data, extensions)
    chunked = st.builds(
        lambda coding, chunks, last, extensions, trailers:
            [b"Transfer-Encoding:", coding, b"\r\n", b"\r\n", *flat(chunks), last, *extensions,
             b"\r\n", *trailers, b"\r\n"],
        st.sampled_from([b"chunked", b" Chunked\t"]), st.lists(chunk, max_size=4),
        st.sampled_from([b"0", b"00"]), extensions, fields)
    plain = data.map(
        lambda data: [b"Content-Length:", b" %d" % len(data), b"\r\n", b"\r\n", data])
    framed = st.one_of(chunked, plain, st.just([b"\r\n"]))
    request = st.tuples(start, fields, framed, soup).map(flat)
    return st.one_of(request, request, request, request, soup), st.integers(0, 2 ** 32)


def flat(lists):
    return [part for parts in lists
            for part in (parts if isinstance(parts, (list, tuple)) else [parts])]


def relatives(parts, seed):
    """The request and requests like it, and where they are cut on their way."""
    yield b"".join(parts), []
    yield b"".join(parts), range(len(b"".join(parts)))
    chance = random.Random(seed)
    for _ in range(RELATIVES):
        changed = list(parts)
        for _ in range(chance.choice((1, 1, 2, 3))):
            place = chance.randrange(len(changed) + 1)
            changed[place:place + 1] = spoil(changed[place:place + 1], chance)
        data = b"".join(changed)
        yield data, [chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 1, 5)))]


def spoil(part, chance):
    """Another part in its place, with another, or changed in a byte."""
    kind = chance.randrange(4)
    if kind < 2 or not part:
        return [chance.choice(FRAGMENTS)] + part[kind:]
    if kind == 2:
        return chance.choice(([], part * 2))
    data, place = part[0], chance.randrange(len(part[0]) + 1)
    byte = chance.choice((b"", bytes([chance.randrange(256)]), bytes([chance.randrange(256)]),
                          chance.choice((b" ", b"\t", b"\r", b"\n", b"\0", b"_", b"%", b","))))
    return [data[:place] + byte + data[place + chance.choice((0, 1)):]]


def test_naive_reader_reads():
    data = (b"\r\nPOST http://A/x%20y?z HTTP/1.1\r\nhost: a:80\r\nA: 1\r\na:\t2 \r\n"
            b"Transfer-Encoding: chunked\r\n\r\n3 ;x = \"y\\\"\"\r\nabc\r\n0\r\nT: 1\r\n\r\nnext")
    wanted = ("POST", b"/x y", "z", {"host": "a:80", "a": "1,2", "transfer-encoding": "chunked"},
              b"abc", b"next")
    assert read_naively(data) == wanted
    for cut in range(len(data)):
        check(data, [cut])
    check(data, range(len(data)))


@pytest.mark.parametrize("size", (-2, -1, 0, 1))
def test_limits_agree(size):
    for data in (
            b"GET /%b HTTP/1.1\r\nHost:\r\n\r\n" % (b"x" * (8192 - 14 + size)),
            b"GET / HTTP/1.1\r\nHost:\r\nX: %b\r\n\r\n" % (b"x" * (32768 - 30 + size)),
            b"GET / HTTP/1.1\r\nHost:\r\n%b\r\n" % (b"X: y\r\n" * (99 + size)),
            b"GET / HTTP/1.1\r\nHost:\r\nTransfer-Encoding: chunked\r\n\r\n1;%b\r\na\r\n0\r\n\r\n"
            % (b"x" * (4096 - 4 + size)),
            b"GET / HTTP/1.1\r\nHost:\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: 1\r\nB: %b\r\n"
            b"\r\n" % (b"x" * (8192 - 11 + size))):
        assert (read_naively(data) is None) == (size == 1), data[:100]
        check(data)
        check(data, range(0, len(data), 7))
        check(data, [data.index(b"\r\n") + 1])


def test_fuzz():
    hypothesis = conftest.need_module("hypothesis")
    home = tempfile.mkdtemp()
    try:
        hypothesis.configuration.set_hypothesis_home_dir(home)
        cases = fuzz(hypothesis, time.monotonic() + SECONDS)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if os.environ.get("FUZZ_COUNT"):
        with open(os.environ["FUZZ_COUNT"], "w") as file:
            file.write("%d cases, %d of them accepted\n" % cases)
    assert cases[0] >= ROUND and cases[1] > 0


def fuzz(hypothesis, deadline):
    """Rounds until the deadline: (cases, how many of them were requests)."""
    requests, seeds = strategies(hypothesis.strategies)
    counts = [0, 0]

    @hypothesis.settings(max_examples=ROUND, deadline=None, database=None, print_blob=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(requests, seeds)
    def one_round(parts, seed):
        for data, cuts in relatives(parts, seed):
            counts[0] += 1
            counts[1] += check(data, cuts)

    while True:
        one_round()
        if time.monotonic() >= deadline:
            return tuple(counts)
