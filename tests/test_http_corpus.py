"""Every request of http_corpus.py, as raw bytes, to a real engine."""

import re
import socket

import harness
import pytest
from http_corpus import MALFORMED, PING, VALID


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    engine = harness.Engine(tmp_path_factory.mktemp("corpus")).start()
    yield engine.port
    assert engine.stop() == 0
    assert "Traceback" not in engine.log()


def answers(data):
    """The answers in `data`: (status, head, body); fails where they are out of step.

    Only a body with Content-Length is expected; that of the answer to a HEAD is left out, which
    shows as an answer that begins where the body should.
    """
    found = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        match = re.match(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+\r\n", head)
        assert end and match, data
        length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
        assert bool(length) == (match.group(1) != b"204"), data
        length = int(length.group(1)) if length else 0
        if rest.startswith(b"HTTP/1.1 "):
            length = 0
        assert len(rest) >= length, data
        found.append((int(match.group(1)), head, rest[:length]))
        data = rest[length:]
    return found


def exchange(port, data):
    """Send it all, while the answers are read, and read on to their end."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=harness.PATIENCE) as sock:
        try:
            sock.sendall(data)
            while True:
                piece = sock.recv(65536)
                if not piece:
                    return answer
                answer += piece
        except ConnectionError:             # it was closed before it had read everything
            return answer


def test_corpus_is_large_enough():
    assert len(MALFORMED) >= 150 and len(VALID) >= 80


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(port, name):
    """One answer, no matter what follows, and that at once: a deadline would make it 408."""
    found = answers(exchange(port, MALFORMED[name] + PING))
    assert len(found) == 1, found
    status, head, _ = found[0]
    assert (400 <= status < 500 or status == 501) and status not in (401, 404, 405, 408), found
    assert b"\r\nConnection: close" in head and b"\r\nCache-Control: no-store" in head


@pytest.mark.parametrize("size", (1, 7))
def test_malformed_in_pieces(port, size):
    """The same, if it comes in pieces: what the first of them decide, the rest can't change."""
    for name, data in MALFORMED.items():
        if len(data) < 1000:
            with socket.create_connection(("127.0.0.1", port), timeout=harness.PATIENCE) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                answer = b""
                try:
                    for begin in range(0, len(data), size):
                        sock.sendall(data[begin:begin + size])
                    answer = sock.recv(65536)
                except ConnectionError:     # closed and lingered enough
                    pass
                found = answers(answer)
            assert [400 <= item[0] < 500 or item[0] == 501 for item in found] == [True], name


@pytest.mark.parametrize("name", [name for name in VALID if not name.endswith(", closes")])
def test_valid(port, name):
    """It is answered as it should be, and so is what follows on the connection."""
    data, status, part = VALID[name]
    last = PING.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    found = answers(exchange(port, data + PING + last))
    assert [item[0] for item in found] == [status] * (len(found) - 2) + [200, 200]
    assert len(found) == 2 + max(1, data.count(PING) if data.startswith(PING) else 1)
    assert part in found[0][2]
    assert b"Connection: close" not in found[0][1]
    assert all(b"pong" in item[2] for item in found[-2:])


@pytest.mark.parametrize("name", [name for name in VALID if name.endswith(", closes")])
def test_valid_and_last(port, name):
    """It is answered as it should be, and nothing that follows is."""
    data, status, part = VALID[name]
    found = answers(exchange(port, data + PING))
    assert [item[0] for item in found] == [status]
    assert part in found[0][2]
    assert b"\r\nConnection: close" in found[0][1]


@pytest.mark.parametrize("name", ["absolute-form", "chunked in 300", "trailers", "five CRLF before",
                                  "GET with a chunked body", "Content-Length"])
def test_valid_in_pieces(port, name):
    """Byte by byte; a body that nobody reads may then end the connection."""
    data, status, _ = VALID[name]
    with socket.create_connection(("127.0.0.1", port), timeout=harness.PATIENCE) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin in range(len(data)):
            sock.sendall(data[begin:begin + 1])
        assert answers(sock.recv(65536))[0][0] == status
