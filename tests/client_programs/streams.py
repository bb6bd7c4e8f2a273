"""Python's clients, each as its own documentation uses it:  streams.py NAME URL [LAST EVENT'S ID]

The secret is in the variable SECRET; a message, as JSON, on standard input is sent with POST.
Every event is a line of JSON, [id, type, data], as soon as the client has it; the last line is
["end"].  Only the client itself is imported, which takes a while.
"""
import json
import os
import sys

NAME, URL, LAST_ID = (sys.argv[1:] + [""])[:3]
BODY = sys.stdin.buffer.read()
METHOD = "POST" if BODY else "GET"
HEADERS = {"X-Replicas-Engine-Secret": os.environ["SECRET"]}
if LAST_ID:
    HEADERS["Last-Event-ID"] = LAST_ID


def show(*event):
    print(json.dumps(event), flush=True)


class Lines:
    """For clients that leave reading the lines to the program."""

    def __init__(self):
        self.fields = {}

    def take(self, line):
        if line:
            name, _, value = line.partition(": ")
            self.fields[name] = value
        elif "data" in self.fields:
            show(self.fields["id"], self.fields["event"], self.fields["data"])
            self.fields = {}


def by_requests():
    import requests
    lines = Lines()
    response = requests.request(METHOD, URL, headers=HEADERS, data=BODY, stream=True)
    for line in response.iter_lines():
        lines.take(line.decode())


def by_requests_text():
    """As clients of 0.1.0 do; lines end at U+2028 and the like, too, then."""
    import requests
    lines = Lines()
    response = requests.request(METHOD, URL, headers=HEADERS, data=BODY, stream=True)
    for line in response.iter_lines(decode_unicode=True):
        lines.take(line)


def by_httpx_sse():
    import httpx
    import httpx_sse
    timeout = httpx.Timeout(5, read=60)         # it would give up after 5 s without an event
    with httpx.Client(timeout=timeout) as client:
        with httpx_sse.connect_sse(client, METHOD, URL, headers=HEADERS, content=BODY) as source:
            for event in source.iter_sse():
                show(event.id, event.event, event.data)


def by_aiohttp():
    import asyncio
    import aiohttp

    async def main():
        lines = Lines()
        # It would end a stream after 300 s, and refuse a line of more than 128 KiB.
        timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
        async with aiohttp.ClientSession(timeout=timeout, read_bufsize=2**24) as session:
            async with session.request(METHOD, URL, headers=HEADERS, data=BODY) as response:
                async for line in response.content:
                    lines.take(line.decode().rstrip("\n"))
    asyncio.run(main())


def by_sseclient():
    import sseclient
    for event in sseclient.SSEClient(URL, last_id=LAST_ID or None, headers=HEADERS):
        if not event.data:                      # it makes an event of a comment, too
            continue
        show(event.id, event.event, event.data)
        if event.event == "done":
            break                               # it would ask again every 3 s


def by_sseclient_py():
    sys.path.insert(0, os.path.join(sys.prefix, "sseclient-py"))    # it has the other one's name
    import requests
    import sseclient
    response = requests.request(METHOD, URL, headers=HEADERS, data=BODY, stream=True)
    for event in sseclient.SSEClient(response).events():
        show(event.id, event.event, event.data)


globals()["by_" + NAME]()
show("end")
