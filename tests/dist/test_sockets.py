"""What real runs listen on, as the kernel tells it, and what happens when pickles are written to all of it."""

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
from whole_runs import end, kill_tree, lines, start, train, when

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="the kernel's table of sockets is Linux's"),
]

PATIENCE = datetime.timedelta(seconds=5)


class Poison:
    """Its pickle makes the file `mark` in whoever unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def attack(targets: Iterable[Listener], mark: Path) -> int:
    """Writes poison to every target, raw and as a client of torch's store; returns how many of them were stores."""
    poison = pickle.dumps(Poison(mark))
    with ThreadPoolExecutor(64) as threads:
        return sum(threads.map(lambda one: _attack(one, poison), targets))


def _attack(target: Listener, poison: bytes) -> bool:
    for text in (poison, base64.b64encode(poison)):
        try:
            with socket.create_connection((target.address, target.port), timeout=1) as connection:
                connection.sendall(text)
        except OSError:
            pass
    try:
        store = dist.TCPStore(target.address, target.port, is_master=False, timeout=PATIENCE, wait_for_workers=False)
        for key in store.list_keys():  # torchrun's c10d rendezvous keeps its state like this
            store.set(key, base64.b64encode(poison).decode())
        return True
    except (RuntimeError, ValueError):  # it speaks something else
        return False


def test_the_attack_works_on_torchruns_own_rendezvous(tmp_path: Path) -> None:
    """Else the next test could not fail."""
    (tmp_path / "rank.py").write_text("import time; time.sleep(30)")
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["--local-addr=127.0.0.1", str(tmp_path / "rank.py")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    mark = tmp_path / "mark"
    try:
        with Watch(process.pid) as watch:
            when(process, lambda: mark.exists() or (attack(listeners(process.pid), mark) > 0 and mark.exists()))
        assert watch.beyond_loopback()
    finally:
        kill_tree(process)


def test_a_run_listens_on_loopback_only_and_unpickles_nothing(finished_run: Path, tmp_path: Path) -> None:
    folder, mark = tmp_path / "run", tmp_path / "mark"
    model = [f"model.path={finished_run / 'warm_start' / 'hf'}", "warm_start.steps=0"]
    running = start(*train(folder, *model, "launch.ranks=2", "steps=8"))
    with Watch(running.pid) as watch:
        when(running, lambda: lines(folder) >= 1)
        stores = 0
        while stores == 0 and running.poll() is None:  # a busy machine may answer the first attempt too late
            stores = attack(listeners(running.pid), mark)
        code, _, err = end(running)
    assert code == 0, err
    assert watch.samples > 20 and len(watch.found) > 2
    assert watch.beyond_loopback() == []
    assert stores == 1, "the ranks' store must have been attacked too"
    assert not mark.exists()


def test_an_evaluation_listens_on_loopback_only(finished_run: Path, tmp_path: Path) -> None:
    """Of a checkpoint, which is turned into a model by a process group of one, on two ranks."""
    words = [str(finished_run / "checkpoints"), "--problems", "4", "--rounds", "2", "launch.ranks=2"]
    words += ["--out", str(tmp_path)]
    running = start("eval", *words)
    with Watch(running.pid) as watch:
        code, _, err = end(running)
    assert code == 0, err
    assert watch.samples > 20
    assert watch.beyond_loopback() == []
