"""Requests a second, start and memory, each against the standard library's own."""

import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import harness

REQUEST = (b"GET /ping HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n"
           b"X-Replicas-Engine-Secret: " + harness.SECRET.encode() + b"\r\n\r\n")
SECONDS = 1.5

# http.server's own handler, with what it can be given: no delay, one write, keep-alive,
# room for the clients in its queue
STOCK = """
import http.server, json, socket, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    def do_GET(self):
        body = json.dumps({"message": "pong", "timestamp": time.strftime("%FT%TZ")}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer.request_queue_size = 1024
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
print(server.server_address[1], flush=True)
server.serve_forever()
"""
BARE = "import http.server, json, subprocess, threading"


def load(port, connections):
    """Requests a second that the server on `port` answers, one under way on each connection."""
    poll, clients = select.epoll(), {}
    for _ in range(connections):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        clients[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
        sock.sendall(REQUEST)
    done, begin = 0, time.monotonic()
    while time.monotonic() - begin < SECONDS:
        for fd, _ in poll.poll(1):
            assert b" 200 " in clients[fd].recv(65536)[:20]
            done += 1
            clients[fd].sendall(REQUEST)
    elapsed = time.monotonic() - begin
    for sock in clients.values():
        sock.close()
    return done / elapsed


def requests_per_second(engine):
    stock = subprocess.Popen([sys.executable, "-c", STOCK], stdout=subprocess.PIPE,
                             stderr=open(os.path.join(engine.folder, "stock.log"), "wb"))
    port = int(stock.stdout.readline())
    try:
        for connections, limit in ((1, 1.3), (16, 2.0), (64, 2.0)):
            ratios, rates = [], []
            for _ in range(5):
                ours, theirs = load(engine.port, connections), load(port, connections)
                ratios.append(ours / theirs)
                rates.append(ours)
            yield ("requests/s, %d connections (%.0f)" % (connections, statistics.median(rates)),
                   statistics.median(ratios), ">= %.1f" % limit, "http.server's handler")
    finally:
        stock.kill()
        stock.wait()
        stock.stdout.close()


def time_to_health(folder):
    engine = harness.Engine(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        engine.port = free.getsockname()[1]
    engine.env["PORT"] = str(engine.port)
    begin = time.monotonic()
    with open(engine.log_path, "wb") as log_file:
        process = subprocess.Popen(engine.program, env=engine.env, cwd=engine.folder,
                                   stderr=log_file)
    while True:
        try:
            with socket.create_connection(("127.0.0.1", engine.port)) as sock:
                sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
                if b" 200 " in sock.recv(1000):
                    break
        except OSError:
            pass
    elapsed = time.monotonic() - begin
    process.terminate()
    process.wait()
    return elapsed


def start():
    """From the start of the process to the first answer, against a Python that only imports."""
    ratios, times = [], []
    with tempfile.TemporaryDirectory() as folder:
        time_to_health(folder)              # which leaves the bytecode in the cache
    for _ in range(11):
        with tempfile.TemporaryDirectory() as folder:
            ours = time_to_health(folder)
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", BARE], check=True)
        ratios.append(ours / (time.monotonic() - begin))
        times.append(ours)
    yield ("start to first /health (%.0f ms)" % (statistics.median(times) * 1000),
           statistics.median(ratios), "<= 1.5", "python -c '%s'" % BARE)


def run():
    """(what, value, limit, baseline) of each measurement."""
    with tempfile.TemporaryDirectory() as folder:
        engine = harness.Engine(folder).start()
        try:
            yield from requests_per_second(engine)
        finally:
            engine.stop()
    yield from start()
