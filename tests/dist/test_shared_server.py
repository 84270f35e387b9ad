"""Two real gloo ranks that share one server, like two GPUs with a server of TP 2: both get what the leader learns.

The server is a fake, because on a CPU the real one accepts buffers of only one rank. This file is also the program of
a rank; its arguments are rank, rendezvous file and output folder.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from icrl_megatron.distributed import platform
from icrl_megatron.distributed.grid import any_rank
from icrl_megatron.engines.protocol import EngineError, NoAnswerError
from icrl_megatron.engines.rank import Engines, Share
from icrl_megatron.engines.server_group import ServerGroup
from icrl_megatron.engines.sglang import Follower, SGLangEngine
from icrl_megatron.engines.sglang_checks import Checksums
from icrl_megatron.engines.sglang_weights import SharedMemory, WeightSender
from icrl_megatron.engines.sync import WeightSync
from icrl_megatron.model.shape import ModelShape
from icrl_megatron.run import build as wiring
from icrl_megatron.settings.schema import EngineSettings, Settings, TinyModel

WORLD = 2
LIMIT_S = 20.0
"""Limit of all waits between ranks."""
SLOW_S = 1.0
UNTIED = ModelShape.of_tiny(TinyModel(tie_embeddings=False))
SHAPES = {"model.embed_tokens.weight": (64, 2), "model.norm.weight": (4,)}
RELEASE, RESUME, CHECK = "/release_memory_occupation", "/resume_memory_occupation", "/weights_checker"


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(SHAPES.items())}


@dataclass
class Server:
    """Records requests; ends at requests of the path `dies_of`, and delays those of `slow_at`."""

    events: Path
    spec: object = field(default_factory=lambda: SimpleNamespace(on_engine_ranks=False))
    url: str = "http://server"
    up: bool = True
    dies_of: str = ""
    slow_at: str = ""
    starts: bool = True

    def alive(self) -> bool:
        return self.up

    def post(self, path: str, body: dict[str, Any], timeout: float) -> dict[str, Any]:
        if path == self.dies_of:
            self.up = False
            raise NoAnswerError("it died")
        if path == self.slow_at:
            time.sleep(SLOW_S)
        offered = len(body.get("serialized_named_tensors", ()))
        note(self.events, path + (f" of {offered}" if offered else ""))
        if path != CHECK:
            return {}
        checks = Checksums(WORLD, UNTIED)
        for name, tensor in tensors().items():
            checks.add(name, tensor)
        found = [{"parallelism_info": {"tp_rank": w}, "checksums": c} for w, c in enumerate(checks.expected)]
        return {"ranks": found}

    def log_end(self) -> str:
        return ""

    def kill(self) -> None:
        self.up = False

    def start(self) -> None:
        self.dies_of, self.up = "", True

    def wait_ready(self, tick: Callable[[], None] = lambda: None) -> None:
        if not self.starts:
            raise EngineError("the server was not ready in time")


def note(events: Path, what: str) -> None:
    with events.open("a", encoding="utf-8") as file:
        file.write(what + "\n")


@dataclass
class Rank:
    """One rank's engines and weight sync, as `engines.build` and `wiring.weight_sync` create them on GPUs."""

    number: int
    grid: Any
    events: Path
    server: Server
    engines: Engines
    sync: WeightSync

    @staticmethod
    def make(number: int, folder: Path, name: str) -> Rank:
        limit = datetime.timedelta(seconds=LIMIT_S)
        groups = [dist.new_group(list(range(WORLD)), backend="gloo", timeout=limit) for _ in range(2)]
        group = ServerGroup(groups[0], 0, LIMIT_S)
        grid = SimpleNamespace(rank=number, world=WORLD, host_group=groups[1])
        events, device = folder / f"{name}.events", torch.device("cpu")
        server = Server(events)
        settings = EngineSettings(kind="sglang", sync_timeout_s=LIMIT_S, tensor_parallel=WORLD)

        def memory(of: Server | None) -> SharedMemory:
            return SharedMemory(of, WORLD, groups[0], 0, LIMIT_S)  # type: ignore[arg-type]

        if number == 0:
            lead = SGLangEngine(server, settings, lambda: memory(server), SHAPES, torch.float32, device)  # type: ignore[arg-type]
            engines = Engines(lead, lead, None, Share(0, 1), True, group)
        else:
            follower = Follower(WeightSender(SHAPES, torch.float32, device, 1), memory(None))
            engines = Engines(follower, None, None, Share(None, 1), True, group)

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            for tensor in tensors().items():
                any_rank(grid, True)  # the ranks gather each tensor together
                yield tensor

        gatherer: Any = SimpleNamespace(stream=stream, grid=grid)
        sync = wiring.weight_sync(Settings(engine=settings), gatherer, engines, UNTIED)
        return Rank(number, grid, events, server, engines, sync)

    def recover(self) -> bool:
        """Like `EngineSource.play_with_recovery`; returns whether the engine of any rank was lost."""
        lost = any_rank(self.grid, bool(self.engines.lost()))
        if lost:
            self.sync.resend(self.engines.revive())
        return lost


def lost_in_a_rollout(rank: Rank) -> bool:
    rank.sync.push()
    any_rank(rank.grid, False)
    note(rank.events, f"rank {rank.number}")
    rank.server.up = False
    return rank.recover()


def cannot_be_revived(rank: Rank) -> bool:
    rank.server.up = rank.server.starts = False
    return rank.recover()


def lost_in_the_first_push(rank: Rank) -> bool:
    rank.server.dies_of = "/update_weights_from_tensor"
    rank.sync.push()
    note(rank.events, f"rank {rank.number}")
    any_rank(rank.grid, False)
    return rank.recover() and not rank.recover() and rank.sync.push() == 2


def sleeps_slowly(rank: Rank) -> bool:
    rank.sync.push()
    rank.server.slow_at = RELEASE
    rank.sync.sleep()
    note(rank.events, f"rank {rank.number} restores")
    return True


def wakes_with_a_slow_rank(rank: Rank) -> bool:
    rank.sync.push()
    rank.sync.sleep()
    if rank.number == 1:
        time.sleep(SLOW_S)
    note(rank.events, f"rank {rank.number} has released")
    rank.sync.push()
    return True


CASES = (lost_in_a_rollout, cannot_be_revived, lost_in_the_first_push, sleeps_slowly, wakes_with_a_slow_rank)


def rank_main(number: int, rendezvous: str, folder: Path) -> None:
    torch.set_num_threads(1)
    platform.prepare("cpu")
    limit = datetime.timedelta(seconds=LIMIT_S)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=WORLD, timeout=limit)
    results = {}
    for case in CASES:
        try:
            results[case.__name__] = str(case(Rank.make(number, folder, case.__name__)))
        except EngineError as error:
            results[case.__name__] = f"EngineError: {error}"
        (folder / f"{number}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@dataclass(frozen=True)
class Ran:
    folder: Path

    def results(self, case: Callable[[Rank], bool]) -> list[str]:
        return [json.loads((self.folder / f"{n}.json").read_text())[case.__name__] for n in range(WORLD)]

    def events(self, case: Callable[[Rank], bool]) -> list[str]:
        return (self.folder / f"{case.__name__}.events").read_text().splitlines()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("shared")
    run_ranks(__file__, WORLD, folder, timeout_s=180)
    return Ran(folder)


pytestmark = pytest.mark.dist


def test_both_ranks_send_weights_to_a_restarted_server(ran: Ran) -> None:
    assert ran.results(lost_in_a_rollout) == ["True", "True"]
    update = ["/begin_weight_update", f"/update_weights_from_tensor of {WORLD}", "/end_weight_update"]
    events = ran.events(lost_in_a_rollout)
    assert events[:3] == events[-3:] == update


def test_server_that_cannot_be_restarted_ends_both_ranks(ran: Ran) -> None:
    assert ran.results(cannot_be_revived) == ["EngineError: the server was not ready in time"] * 2


def test_checksums_are_compared_after_the_first_complete_sync(ran: Ran) -> None:
    """The server was lost in the first sync. Only the second, after its restart, is compared."""
    assert ran.results(lost_in_the_first_push) == ["True", "True"]
    events = ran.events(lost_in_the_first_push)
    assert events.count(CHECK) == 1
    assert CHECK not in events[: events.index("rank 0")]
    assert events.index(CHECK) < len(events) - 1 - events[::-1].index("/begin_weight_update")


def test_ranks_allocate_memory_only_after_the_server_released_it(ran: Ran) -> None:
    assert ran.results(sleeps_slowly) == ["True", "True"]
    events = ran.events(sleeps_slowly)
    assert sorted(events[-2:]) == ["rank 0 restores", "rank 1 restores"]
    assert RELEASE in events[:-2]


def test_server_allocates_memory_only_after_all_ranks_released_it(ran: Ran) -> None:
    assert ran.results(wakes_with_a_slow_rank) == ["True", "True"]
    events = ran.events(wakes_with_a_slow_rank)
    assert max(events.index(f"rank {n} has released") for n in range(WORLD)) < events.index(RESUME)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
