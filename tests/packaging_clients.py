"""Eight clients of an engine that is restarted meanwhile; prints what they met, as JSON.

    packaging_clients.py SECRET STOP_FILE

Six open a connection for each request, as curl does. Two keep theirs, and ask again once where it
was closed before an answer began, as every HTTP library does (RFC 9112, 9.3.1). They go on until
STOP_FILE exists."""

import http.client
import json
import os
import sys
import threading
import time

SECRET, STOP_FILE = sys.argv[1:]
HEADERS = {"X-Replicas-Engine-Secret": SECRET}
outcomes = []
longest = [0.0]


def ask(connection, path):
    connection.request("GET", path, headers=HEADERS)
    response = connection.getresponse()
    response.read()
    return response.status


def client(keep):
    connection = None
    n = 0
    while not os.path.exists(STOP_FILE):
        path = ("/ping", "/codex/status", "/health")[n % 3]
        n += 1
        start = time.monotonic()
        try:
            used = connection is not None
            if not used:
                connection = http.client.HTTPConnection("127.0.0.1", 3737, timeout=30)
            try:
                outcome = ask(connection, path)
            except (ConnectionError, http.client.BadStatusLine):
                if not used:
                    raise
                connection.close()
                connection = http.client.HTTPConnection("127.0.0.1", 3737, timeout=30)
                outcome = ask(connection, path)
        except Exception as error:
            outcome = repr(error)
            connection = None
        if not keep and connection is not None:
            connection.close()
            connection = None
        outcomes.append(outcome)
        longest[0] = max(longest[0], time.monotonic() - start)
        time.sleep(0.03)


threads = [threading.Thread(target=client, args=(n >= 6,)) for n in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
counts = {}
for outcome in outcomes:
    counts[str(outcome)] = counts.get(str(outcome), 0) + 1
print(json.dumps({"outcomes": counts, "longest": longest[0]}))
