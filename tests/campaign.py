"""kill -9 at any moment, and a disk that fills up at any moment, for as long as one likes.

    python3 tests/campaign.py KILLS [FOLDER [SIZE]]

runs an engine in FOLDER (default: a temporary one), on a tmpfs of SIZE KiB if that is given, kills
it KILLS times, and says what it saw.  Its clients come back with Last-Event-ID, and send again with
the same Idempotency-Key what wasn't answered; whatever they saw must stay so to the end.
"""

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import harness  # noqa: E402
from harness import script, wait_for  # noqa: E402
from test_faults import Client, check_seen  # noqa: E402

KEPT = 90                                   # turns that may be read again: the engine keeps 100


class Campaign:
    def __init__(self, engine, seed, disk=None):
        self.engine = engine
        self.random = random.Random(seed)
        self.disk = disk                    # the folder of the small file system, or None
        self.seen = {}
        self.problem = None
        self.over = False
        self.messages = self.kills = self.fillings = self.rereads = 0

    def talk(self):
        """A client that sends one message after the other."""
        try:
            while not self.over:
                self.messages += 1
                count = self.random.choice((0, 3, 40, 400))
                message = script({"thread": "resume"}, {"count": {
                    "n": count, "size": self.random.choice((100, 1500)),
                    "pause": self.random.choice((0, 0.002))}}, {"complete": True},
                    {"event": {"type": "message.%d" % self.messages}})
                client = Client(self.engine, self.seen, "key %d" % self.messages, message)
                assert client.run(), (client.answers[-5:], client.turn, client.last)
                self.check(client, count)
        except BaseException as error:
            self.problem = error

    def check(self, client, count):
        """A turn is what Codex printed, from its beginning on, and its ending."""
        events = [event for number, event in self.seen.items()
                  if number.startswith("%d." % client.turn)]
        harness.check_stream(events)
        told = [int(event.json()["item"]["text"].split()[0]) for event in events
                if event.type == "item.completed"]
        assert told == list(range(len(told)))
        assert len(told) == count or events[-2].type == "turn.failed", (client.turn, len(told))

    def fill(self):
        """Leave next to no room on the disk, and give it back a moment later."""
        path = os.path.join(self.disk, "ballast")
        with open(path, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * self.random.choice((4096, 65536)))
        self.fillings += 1
        time.sleep(self.random.random() * 0.3)

    def free(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.disk, "ballast"))

    def run(self, kills):
        talker = threading.Thread(target=self.talk, daemon=True)
        talker.start()
        while self.kills < kills and not self.problem:
            # However slow the machine is, something comes.
            if self.random.random() < 0.5 or self.kills == kills - 1:
                known = len(self.seen)
                wait_for(lambda: len(self.seen) > known or self.problem)
            time.sleep(self.random.random() ** 2 * 0.5)
            if self.disk:
                self.fill()
            self.engine.kill()
            self.kills += 1
            if self.disk and self.random.random() < 0.5:
                self.free()                 # else it starts with a full disk
            self.engine.start()
            if self.disk:
                time.sleep(self.random.random() * 0.2)
                self.free()
            if not self.problem:
                self.reread()
        self.over = True
        talker.join(2 * harness.PATIENCE)
        if self.problem:
            raise self.problem
        assert not talker.is_alive()
        self.engine.restart()
        check_seen(self.engine, self.seen)
        return self

    def reread(self):
        """What was seen of some turns is what the engine has, and from any id on."""
        snapshot = dict(self.seen)
        newest = max((int(number.partition(".")[0]) for number in snapshot), default=0)
        turns = {int(number.partition(".")[0]) for number in snapshot}
        turns = [turn for turn in turns if turn > newest - KEPT]
        for turn in self.random.sample(sorted(turns), min(2, len(turns))) + turns[-1:]:
            mine = {number: event for number, event in snapshot.items()
                    if number.startswith("%d." % turn)}
            after = self.random.choice(sorted(mine))
            answer = self.engine.get("/codex/events?after=" + after)
            assert answer.status == 200 or mine[after].type == "done", (after, answer.status,
                                                                        answer.body)
            got = {event.id: event for event in answer.events()} if answer.status == 200 else {}
            first = int(after.partition(".")[2])
            for number, event in mine.items():
                if int(number.partition(".")[2]) > first:
                    assert got.get(number) == event, (number, event, got.get(number))
            self.rereads += 1


@contextlib.contextmanager
def tmpfs(path, size):
    """A file system of `size` KiB at `path`; OSError where that can't be."""
    os.makedirs(path, exist_ok=True)
    options = "size=%dk,mode=700" % size
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path],
                      stderr=subprocess.DEVNULL).returncode:
        raise OSError("a small tmpfs can't be mounted: that takes root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def run(folder, kills, seed, size=None):
    engine = harness.Engine(folder, PORT=str(harness.free_port()))      # between its lives, too
    with contextlib.ExitStack() as stack:
        if size:
            engine.state = engine.env["REPLICAS_ENGINE_STATE"] = stack.enter_context(
                tmpfs(os.path.join(folder, "small"), size))
        engine.start()
        stack.callback(engine.stop)
        return Campaign(engine, seed, engine.state if size else None).run(kills)


if __name__ == "__main__":
    begin, number = time.monotonic(), int(os.environ.get("SEED", time.time()))
    told = run(sys.argv[2] if sys.argv[2:] else tempfile.mkdtemp(), int(sys.argv[1]), number,
               int(sys.argv[3]) if sys.argv[3:] else None)
    print("seed %d: %d kills, %d full disks, %d messages, %d events, %d turns read again, %.0f s"
          % (number, told.kills, told.fillings, told.messages, len(told.seen), told.rereads,
             time.monotonic() - begin))
