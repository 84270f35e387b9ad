"""The SGLang launcher passes the API key so that no other process sees it; a fake SGLang reports what it received."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from icrl_megatron.engines import sglang_start
from icrl_megatron.engines.sglang_server import Server, ServerSpec
from icrl_megatron.settings.schema import EngineSettings

SLEEPING = """
import time

if __name__ == "__main__":
    print("it runs", flush=True)
    time.sleep(60)
"""
KEY = "-a-key-that-begins-with-a-dash"
LAUNCH_SERVER = """
import json, logging, os, sys
from multiprocessing import get_context
from pathlib import Path

def worker():
    print(json.dumps({"worker": sys.modules["__mp_main__"].__spec__.name}), flush=True)

if __name__ == "__main__":
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    log = logging.getLogger("sglang")
    log.info(f"server_args={sys.argv}")
    log.info("%s and %d", sys.argv, 3)
    log.info("%s alone", 7)
    print(json.dumps({
        "argv": sys.argv, "spec": __spec__.name, "environ": sorted(os.environ), "path": sys.path,
        "cmdline": Path("/proc/self/cmdline").read_bytes().decode().split("\\0")[:-1],
    }), flush=True)
    child = get_context("spawn").Process(target=worker)
    child.start()
    child.join()
"""


def fake_sglang(folder: Path, launch_server: str) -> None:
    package = folder / "sglang"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(launch_server)


def test_a_server_outlives_the_thread_that_asked_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout process restarts a server in a thread that may end (`asyncio.to_thread`)."""
    fake_sglang(tmp_path, SLEEPING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    log = tmp_path / "logs" / "sglang.log"
    server = Server(ServerSpec(tmp_path, EngineSettings(kind="sglang"), "fp32", 64, log, on_cpu=True))

    def start() -> None:
        server.start()
        deadline = time.monotonic() + 60
        while "it runs" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)

    asking = threading.Thread(target=start)
    asking.start()
    asking.join()
    assert "it runs" in log.read_text()
    time.sleep(0.5)
    assert server.alive()
    server.kill()
    assert not server.alive()


def test_api_key_is_in_no_command_line_and_no_log(tmp_path: Path) -> None:
    fake_sglang(tmp_path, LAUNCH_SERVER)
    done = subprocess.run(
        [sys.executable, sglang_start.__file__, "--model-path", "here"],
        env={"PYTHONPATH": str(tmp_path), sglang_start.KEY_ENV: KEY, "PATH": "/usr/bin:/bin"},
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reported = {name: value for line in done.stdout.splitlines() for name, value in json.loads(line).items()}
    assert reported["argv"][1:] == ["--model-path", "here", f"--api-key={KEY}"]
    # As with `python -m`, for the server and for the workers that it starts.
    assert reported["spec"] == reported["worker"] == "sglang.launch_server"
    assert sglang_start.KEY_ENV not in reported["environ"]
    assert KEY not in " ".join(reported["cmdline"]) and "here" in reported["cmdline"]
    assert str(Path(sglang_start.__file__).parent) not in reported["path"]  # that folder has a module named sglang
    assert KEY not in done.stderr
    assert "--api-key=***" in done.stderr and "and 3" in done.stderr and "7 alone" in done.stderr
