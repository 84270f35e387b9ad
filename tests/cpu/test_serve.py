"""Environment servers of a run: real processes that are started, awaited, restarted after a crash, and stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sockets import listeners

from icrl_megatron.launch import servers as serve
from icrl_megatron.run.checks import validate
from icrl_megatron.run.resume import check_resume
from icrl_megatron.settings import loading as settings_module
from icrl_megatron.settings.schema import Settings
from icrl_megatron.tasks import agentgym
from icrl_megatron.tasks.registry import Catalogue
from icrl_megatron.utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
COMMAND = f"{sys.executable} {ROOT / 'tests' / 'agentgym_server.py'} alfworld {{port}} {{host}}"
SOURCE = "tasks.sources=[{name: alfworld, data: {train: ['0:4'], heldout: ['4:8']}}]"


def settings(command: str = COMMAND, *more: str) -> Settings:
    return settings_module.load("rulebook_easy", [SOURCE, f"tasks.sources.0.serve.command={command}", *more])


def until(happened: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


EARLIER: set[int] = set()
"""Child processes that belong to other tests, such as graders."""


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.pid not in EARLIER]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    EARLIER.clear()
    EARLIER.update(child.pid for child in children())
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_NUM_NODES", serve.SERVERS_ENV):
        monkeypatch.delenv(name, raising=False)
    yield
    assert children() == []


def test_servers_run_inside_the_block_and_are_not_saved_as_settings(tmp_path: Path) -> None:
    asked = settings(COMMAND, "tasks.sources.0.serve.count=2")
    validate(asked)  # contacts no server: none is running yet
    with serve.beside(asked, tmp_path / "logs") as told:
        (source,) = told.tasks.sources
        assert len(set(source.data.servers)) == 2
        task_set = Catalogue(told.tasks.sources).get("alfworld")
        assert isinstance(task_set, agentgym.AgentGym)
        task_set.check()
        assert asked.tasks.sources[0].data.servers == []
        assert len(children()) >= 3
    assert children() == []
    (log,) = (tmp_path / "logs").glob("servers.*/alfworld.1.log")
    assert "POST /reset" in log.read_text()  # each server was tested before the run got its address


def test_logs_of_an_earlier_process_with_the_same_pid_are_kept(tmp_path: Path) -> None:
    first = serve._new_folder(tmp_path / "logs")
    (first / "alfworld.0.log").write_text("why it failed")
    second = serve._new_folder(tmp_path / "logs")
    assert first != second and second.is_dir() and second.parent == first.parent
    assert (first / "alfworld.0.log").read_text() == "why it failed"


@pytest.mark.parametrize(
    ("host", "nodes", "warned"), [("{host}", "1", False), ("0.0.0.0", "1", True), ("{host}", "2", False)]
)
def test_warning_if_other_machines_can_reach_a_server_needlessly(
    host: str, nodes: str, warned: bool, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", nodes)
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    with serve.beside(settings(COMMAND.replace("{host}", host)), tmp_path / "logs"):
        addresses = {one.address for child in children() for one in listeners(child.pid)}
    assert addresses == {"127.0.0.1" if (host, nodes) == ("{host}", "1") else "0.0.0.0"}
    error = capfd.readouterr().err
    assert ("warning: the server of 'alfworld' listens on 0.0.0.0, which other machines can reach" in error) == warned


def test_running_servers_are_used_instead(tmp_path: Path) -> None:
    running = settings(COMMAND, "tasks.sources.0.data.servers=[http://host:1]")
    with serve.beside(running, tmp_path) as told:
        assert told is running
        assert children() == []


@pytest.mark.parametrize(
    ("command", "more", "parts"),
    [
        ("echo no such game >&2; exit 7 # {port}", [], ["ended with code 7", "ends with: no such game"]),
        ("sleep 60 # {port}", ["tasks.sources.0.serve.startup_timeout_s=0.5"], ["did not answer within 0.5 s"]),
        (COMMAND.replace("alfworld", "webshop"), [], ["'alfworld'", "icrl env check"]),
    ],
)
def test_failed_servers_show_their_last_output(command: str, more: list[str], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught, serve.beside(settings(command, *more), tmp_path):
        pass
    assert all(part in str(caught.value) for part in parts), caught.value


def test_port_in_use_is_rejected(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = f"tasks.sources.0.serve.port={other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"is in use on .*; set tasks.*serve\.port=0"):
            with serve.beside(settings(COMMAND, port), tmp_path):
                pass


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("serve.command=alfworld", "write {port} where the port belongs"),
        ("serve={port: 65535, count: 2}", "serve.port=65535: leave room for 2 ports"),
        ("serve.health=health", "must be a path"),
        ("name=rulebook_hard", "tasks.sources.0.serve.command: task set 'rulebook_hard' has no options: leave it out"),
    ],
)
def test_invalid_server_settings_are_rejected(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(settings(COMMAND, f"tasks.sources.0.{override}"))


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`python -m icrl_megatron.launch.servers`, started as by a job, and its folder."""
    words = ["train", "rulebook_easy", SOURCE, f"tasks.sources.0.serve.command={COMMAND}"]
    command = [sys.executable, "-m", "icrl_megatron.launch.servers", str(tmp_path / "served"), *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(lambda: (tmp_path / "served" / serve.ADDRESSES).exists() or process.poll() is not None)
    yield process, tmp_path / "served"
    process.terminate()
    process.communicate(timeout=30)


def url_of(folder: Path) -> str:
    return str(json.loads((folder / serve.ADDRESSES).read_text())["servers"]["alfworld"][0])


def answers(url: str) -> bool:
    return serve._answers(url)


def test_dead_server_is_restarted_at_its_address(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = started
    (server,) = psutil.Process(process.pid).children()
    server.kill()
    until(lambda: not answers(url_of(folder)), 5)
    until(lambda: answers(url_of(folder)))
    process.terminate()
    said = process.communicate(timeout=30)[1]
    assert "ended with code -9; restarting it (1 of 3)" in said


def test_servers_ignore_usr1_and_end_with_their_launcher(started: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = started
    for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children()):
        one.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    assert answers(url_of(folder))
    process.terminate()
    assert process.wait(timeout=30) == 0
    assert not answers(url_of(folder))


def test_ranks_use_their_servers(
    started: tuple[subprocess.Popen[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder = started
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(serve.SERVERS_ENV, str(folder))
    with serve.beside(settings(), tmp_path) as told:
        assert told.tasks.sources[0].data.servers == [url_of(folder)]
    assert answers(url_of(folder))  # they belong to the job, so the rank does not stop them


def test_ranks_without_started_servers_fail_with_a_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match=r"the servers were not started; use slurm/step\.sh"):
        with serve.beside(settings(), tmp_path):
            pass
    monkeypatch.setenv(serve.SERVERS_ENV, str(tmp_path))
    monkeypatch.setattr(serve, "GRACE_S", 0.0)
    with pytest.raises(ConfigError, match="no environment servers within 0 s"):
        with serve.beside(settings(COMMAND, "tasks.sources.0.serve.startup_timeout_s=0.1"), tmp_path):
            pass


def test_killed_launcher_leaves_no_server(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from icrl_megatron.launch import servers as serve\n"
        "from icrl_megatron.settings import loading as settings\n"
        f"asked = settings.load('rulebook_easy', [{SOURCE!r}, 'tasks.sources.0.serve.command=' + sys.argv[1]])\n"
        "with serve.beside(asked, Path('logs')) as told:\n"
        "    print(told.tasks.sources[0].data.servers[0], flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, COMMAND], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    tree = psutil.Process(process.pid).children(recursive=True)
    assert answers(url)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert psutil.wait_procs(tree, timeout=30)[1] == []


def test_server_settings_may_change_on_resume(tmp_path: Path) -> None:
    saved, now = settings(), settings("other {port}", "tasks.sources.0.data.servers=[http://host:1]")
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    check_resume(saved, now, tmp_path)
