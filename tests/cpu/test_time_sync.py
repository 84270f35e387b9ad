"""The loader of tools/time_sync.py in a process of its own: it copies from a bucket that stays mapped."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from icrl_megatron.engines.sglang_weights import Bucket

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import time_sync

TOOLS = Path(time_sync.__file__).parent
CPU = torch.device("cpu")
SHAPES = {"a": (3, 5), "b": (7,)}
SERVER = """
import base64, pickle, sys
import torch
import kept_buckets

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("a", torch.zeros(3, 5))
        self.register_buffer("b", torch.zeros(7))
    def load_weights(self, named):
        for name, tensor in named:
            self.get_buffer(name).copy_(tensor)

model = Model()
for line in sys.stdin:
    loader, handle = line.split()
    getattr(kept_buckets, loader)(model, pickle.loads(base64.b64decode(handle)))
    mapped = [l.split()[0] for l in open("/proc/self/maps") if "/dev/shm/torch_" in l]
    print(",".join(mapped) or "none", float(model.a.sum()), float(model.b.sum()), flush=True)
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=TOOLS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture
def by_name() -> Iterator[None]:
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    yield
    mp.set_sharing_strategy(before)


def ask(server: subprocess.Popen[str], loader: str, bucket: Bucket, value: float) -> tuple[str, float, float]:
    """The mapped addresses and the sums of the model's tensors after a bucket in which every weight is `value`."""
    bucket.clear()
    for name, shape in SHAPES.items():
        bucket.add(name, torch.full(shape, value))
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{loader} {base64.b64encode(time_sync.handle(bucket)).decode()}\n")
    server.stdin.flush()
    mapped, a, b = server.stdout.readline().split()
    return mapped, float(a), float(b)


@pytest.mark.usefixtures("by_name")
def test_a_kept_bucket_is_mapped_once_and_its_new_contents_are_read(server: subprocess.Popen[str]) -> None:
    first, second = Bucket(1 << 12, CPU), Bucket(1 << 12, CPU)
    mapped, *sums = ask(server, "load", first, 1.0)
    assert sums == [15.0, 7.0] and mapped.count("-") == 1
    assert ask(server, "load", first, 2.0) == (mapped, 30.0, 14.0)
    both, *sums = ask(server, "load", second, 3.0)
    assert sums == [45.0, 21.0] and both.count("-") == 2 and mapped in both.split(",")
    assert ask(server, "load", first, 4.0) == (both, 60.0, 28.0)
    assert ask(server, "forget", first, 5.0) == ("none", 60.0, 28.0)
    assert ask(server, "load", second, 6.0)[1:] == (90.0, 42.0)
