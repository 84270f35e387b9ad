"""The launch agents of two nodes: their ranks connect at one address, and a failed rank ends its own agent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icrl_megatron.distributed import net
from icrl_megatron.launch.agent import AgentShare, _bound

pytestmark = pytest.mark.dist

PROGRAM = """
import datetime, os, sys
import torch
import torch.distributed as dist
from icrl_megatron.distributed import rendezvous
from icrl_megatron.distributed.process import run_rank

def main():
    limit = datetime.timedelta(seconds=60)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for phase in range(2):  # a warm start, then training
        dist.init_process_group("gloo", store=rendezvous.store(limit), rank=rank, world_size=world, timeout=limit)
        total = torch.tensor([10 ** rank])
        dist.all_reduce(total)
        dist.destroy_process_group()
        line = f"phase {phase}, rank {rank} of {world}, {os.environ['LOCAL_RANK']} here: {total.item()}\\n"
        os.write(1, line.encode())  # one write per line: with PYTHONUNBUFFERED, print makes two
    if "fail" in sys.argv and rank == world - 1:
        raise RuntimeError("the test failed on purpose")
    return 0

if __name__ == "__main__":
    run_rank(main)
"""


def agents(folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    (folder / "program.py").write_text(PROGRAM)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "icrl_megatron.launch.agent", "--nnodes=2", "--nproc-per-node=2"]
    command += [f"--master-port={net.free_port()}", "--master-addr=127.0.0.1"]
    return [
        subprocess.Popen(
            [*command, f"--node-rank={node}", "-m", "program", *words],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (1, 0)  # the first node may start last
    ]


def test_ranks_of_two_nodes_connect_in_every_phase(tmp_path: Path) -> None:
    started = agents(tmp_path)
    ended = [agent.communicate(timeout=120) for agent in started]
    assert [agent.returncode for agent in started] == [0, 0], ended
    said = sorted(line for out, _ in ended for line in out.splitlines())
    assert said == [f"phase {p}, rank {r} of 4, {r % 2} here: 1111" for p in range(2) for r in range(4)]


def test_failed_rank_ends_the_ranks_of_its_node(tmp_path: Path) -> None:
    begun = time.monotonic()
    second, first = agents(tmp_path, "fail")
    _, err = second.communicate(timeout=120)
    first.communicate(timeout=120)
    assert (second.returncode, first.returncode) == (1, 0)
    assert "RuntimeError: the test failed on purpose" in err
    assert "error: rank 3 failed with exit code 1; its messages are above" in err
    assert time.monotonic() - begun < 60


def test_store_of_a_single_machine_is_bound_to_loopback() -> None:
    found = _bound(AgentShare.parse(["--nproc-per-node=2", "-m", "x"]))
    assert found is not None
    with found:
        assert found.getsockname()[0] == "127.0.0.1" and found.getsockname()[1] > 0
    assert _bound(AgentShare.parse(["--nproc-per-node=1", "-m", "x"])) is None  # one rank needs no store
    many = ["--nnodes=2", "--nproc-per-node=1", "--master-port=1234", "--node-rank=1", "-m", "x"]
    assert _bound(AgentShare.parse(many)) is None  # only the first node has the store


def test_foreign_master_address_gives_one_message(tmp_path: Path) -> None:
    words = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=192.0.2.1", "--master-port=20001", "-m", "x"]
    done = subprocess.run(
        [sys.executable, "-m", "icrl_megatron.launch.agent", *words],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: rank 0 cannot listen on 192.0.2.1:20001")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words", [["-m", "x"], ["--nproc-per-node=0", "-m", "x"], ["--nproc-per-node=1", "--nnodes=2", "-m", "x"]]
)
def test_invalid_agent_arguments_are_rejected(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        AgentShare.parse(words)
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err
