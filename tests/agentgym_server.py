"""An HTTP server with AgentGym's protocol, which replays recorded conversations per environment and dialect.

Every conversation is one task: the answers to reset and to each action, in the protocol's format. The server checks the
fields of requests, so a client that omits one gets the same error as from the real servers.

    python tests/agentgym_server.py NAME PORT HOST       serves there, and logs the requests to stderr
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# name: (observation of reset, [(action, observation, reward, done)]); of SciWorld, the score instead of the reward
TALKS: dict[str, tuple[str, list[tuple[str, str, float, bool]]]] = {
    "alfworld": (
        "You are in a room. Your task is to: put a mug in desk.",
        [("look", "Nothing happens.", 0.0, False), ("move mug 1 to desk 1", "You move the mug 1.", 1.0, True)],
    ),
    "webshop": (
        "WebShop [SEP] Instruction: find me red shoes",
        [("search[red shoes]", "Page 1 [SEP] B01", 0.0, False), ("click[Buy Now]", "Thank you", 0.6667, True)],
    ),
    "sciworld": (
        "This room is called the kitchen.",
        [
            ("look around", "A kitchen.", 0.0, False),
            ("focus on stove", "Done.", 75.0, False),
            ("wait", "Won.", 100.0, True),
            ("focus on sink", "Done.", -100.0, True),
        ],
    ),
    "babyai": (
        "Your goal: go to the red ball",
        [("turn left", "You turned left.", 0.0, False), ("go to ball", "The task is completed.", 0.86, True)],
    ),
    "textcraft": (
        "Goal: craft stick.",
        [("inventory", "Inventory: []", 0.0, False), ("craft 4 stick", "Crafted", 1.0, True)],
    ),
    "searchqa": (
        "Answer the question: capital of France?",
        [
            ("<search>France</search>", "<information>Paris</information>", 0.0, False),
            ("<answer>Rome</answer>", "", 0.0, False),
            ("<answer>Paris</answer>", "", 1.0, True),
        ],
    ),
}
ID_KEY = {"webshop": "env_idx", "searchqa": "env_idx"}
TASK_KEY = {"alfworld": "game", "webshop": "session_id", "searchqa": "id"}


@dataclass
class State:
    """A server's recorded requests, and its faults."""

    name: str
    dialect: str
    fail: dict[str, list[Any]] = field(default_factory=dict)
    """path -> the faulty answers to the next requests: a status, (status, body), "hang", "drop" or "garbage"."""
    calls: Counter[str] = field(default_factory=Counter)
    open: dict[int, tuple[int, int]] = field(default_factory=dict)
    """environment -> (task, steps taken)"""
    scores: dict[int, float] = field(default_factory=dict)
    """environment -> SciWorld's score so far"""
    made: int = 0
    first_id: int = field(default_factory=functools.partial(next, itertools.count(0, 1000)))
    """The first environment's id. No two servers share ids: an environment of an earlier test that is collected late is
    closed at its address, which may be the address of this server by then."""
    release: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def do_GET(self) -> None:
        if not self._misbehaves():
            healthy = self.path == "/health" and self.state.dialect == "B"
            self._send(200 if healthy else 404, {"status": "ok"} if healthy else {"detail": "Not Found"})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        if self._misbehaves():
            return
        body = json.loads(raw) if raw else None
        with self.state.lock:
            status, answer = self._answer(body)
        self._send(status, answer)

    def _misbehaves(self) -> bool:
        with self.state.lock:
            self.state.calls[self.path] += 1
            planned = self.state.fail.get(self.path) or []
            what = planned.pop(0) if planned else None
        if what is None:
            return False
        if what == "hang":
            self.state.release.wait(30)
        if what in ("drop", "hang"):
            self.close_connection = True
        elif what == "garbage":
            self._raw(200, b"<html>proxy</html>")
        else:
            status, body = what if isinstance(what, tuple) else (what, {"detail": "planned"})
            self._send(status, body)
        return True

    def _answer(self, body: Any) -> tuple[int, Any]:
        state, b = self.state, self.state.dialect == "B"
        name, key = state.name, "env_id" if b else ID_KEY.get(state.name, "id")
        if self.path == "/create":
            return self._create(body)
        if self.path == "/close" and name == "alfworld" and not b:
            return 404, {"detail": "Not Found"}
        if not isinstance(body, dict) or key not in body:
            return 422, {"detail": [{"loc": ["body", key], "msg": "field required"}]}
        env = body[key]
        if env not in state.open:
            if b:
                return 404, {"error": {"code": "env_not_found", "message": f"no env {env}", "retryable": False}}
            return (500, None) if name == "searchqa" else (200, {"error": f"env {env} does not exist"})
        if self.path == "/close":
            del state.open[env]
            return 200, {"closed": True}
        if self.path == "/reset":
            task_key = "task_id" if b else TASK_KEY.get(name, "data_idx")
            if task_key not in body or (name == "alfworld" and body.get("world_type") != "Text"):
                return 422, {"detail": "field required"}
            state.open[env], state.scores[env] = (body[task_key], 0), 0.0
            return 200, self._reset(env)
        return 200, self._step(env, body["action"])

    def _create(self, body: Any) -> tuple[int, Any]:
        state = self.state
        needs = {"searchqa": {"id"}, "textcraft": set()}.get(state.name)
        if state.dialect == "A" and needs is not None and (not isinstance(body, dict) or not needs <= set(body)):
            return 422, {"detail": "field required"}
        env = state.first_id + state.made
        state.made += 1
        state.open[env] = (0, 0)
        if state.dialect == "B":
            return 200, {"env_id": env}
        if state.name in ("webshop", "searchqa"):
            return 200, env
        return 200, {"id": env} | ({"observation": "", "done": False, "reward": 0} if state.name == "textcraft" else {})

    def _reset(self, env: int) -> Any:
        name, first = self.state.name, TALKS[self.state.name][0]
        actions = ["look", "move mug 1 to desk 1"]
        if self.state.dialect == "B":
            return {"observation": first, "info": {"available_actions": actions} if name == "alfworld" else {}}
        shapes: dict[str, Any] = {
            "alfworld": {"id": env, "observation": first, "available_actions": actions, "task_type": "put"},
            "webshop": [first, None],
            "searchqa": first,
            "sciworld": {
                "task_name": "boil",
                "var_num": 1,
                "task_description": "Boil water.",
                "observation": first,
                "reward": 0,
                "score": 0,
                "deleted": False,
                "done": False,
            },
            "babyai": {"observation": first, "reward": 0.0, "score": 0.0, "done": False},
        }
        return shapes.get(name, {"observation": first, "reward": 0, "done": False})

    def _step(self, env: int, action: str) -> Any:
        name = self.state.name
        task, taken = self.state.open[env]
        self.state.open[env] = (task, taken + 1)
        found = [t for t in TALKS[name][1] if t[0] == action]
        observation, reward, done = found[0][1:] if found else ("Nothing happens.", 0.0, False)
        extra = {"available_actions": ["look"]} if name == "alfworld" else {}
        if self.state.dialect == "B":
            return {"observation": observation, "reward": reward, "done": done, "info": extra}
        if name == "sciworld":  # its reward is what the action added to the score
            before, self.state.scores[env] = self.state.scores[env], reward
            return {"observation": observation, "reward": reward - before, "score": reward, "done": done}
        if name == "webshop":
            return {"state": observation, "reward": reward, "done": done, "info": None}
        return {"observation": observation, "reward": reward, "done": done} | extra

    def _send(self, status: int, body: Any) -> None:
        self._raw(status, b"Internal Server Error" if body is None and status == 500 else json.dumps(body).encode())

    def _raw(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has disconnected
            super().handle()


class Talkative(Handler):
    def log_message(self, *arguments: object) -> None:
        # One write a line: requests are answered by threads, and print writes word by word.
        os.write(sys.stderr.fileno(), f"{self.command} {self.path}\n".encode())


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@contextmanager
def serving(name: str, dialect: str = "A", state: State | None = None) -> Iterator[tuple[str, State]]:
    """(address, state) of a server of one environment; pass a `state` for faults from the start."""
    state = state or State(name, dialect)
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"state": state}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", state
    finally:
        state.release.set()
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    bound = type("Bound", (Talkative,), {"state": State(sys.argv[1], "A")})
    Server((sys.argv[3], int(sys.argv[2])), bound).serve_forever()
