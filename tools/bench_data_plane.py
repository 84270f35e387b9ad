"""What a rank holds, sends and computes of a step's episodes: a model of many ranks, and real ranks that confirm it.

    python tools/bench_data_plane.py model [--ranks 1024] [--tokens 200000000] [--tensor 8]
    python tools/bench_data_plane.py ranks [--ranks 32] [--tokens 2000000] [--tensor 2] [--pipeline 2]

Episodes have one or two attempts and a critique; lengths are lognormal up to 16,384 tokens. `model` runs the code of
one rank on the headers of all ranks, and computes the bytes of its tokens; no token exists. `ranks` plays the same
step with random tokens on gloo ranks on this machine and measures the bytes that each rank holds (tracemalloc) and
hands to the collectives, next to the model's. Both print JSON. Exits with 1 if a measured number of bytes is more than
10 % from the model's, or if a rank holds more than 1.25 times its share and 64 MiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

for _part in (".", "kernels", "recipes"):  # without an installation too
    sys.path.insert(0, str(Path(__file__).parents[1] / _part))

import bench_schema  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from bench_schema import Bar  # noqa: E402

from icrl_megatron.algo.credit import CreditReport, credit  # noqa: E402
from icrl_megatron.algo.headers import (  # noqa: E402
    AttemptHeader,
    CritiqueHeader,
    EpisodeHeader,
    decode,
    encode,
)
from icrl_megatron.algo.samples import tokens_of  # noqa: E402
from icrl_megatron.data.delivery import deliver, readers, send_back, sizes_of  # noqa: E402
from icrl_megatron.data.packing import SampleLayout, lay_out, pack  # noqa: E402
from icrl_megatron.distributed import exchange  # noqa: E402
from icrl_megatron.distributed.grid import Grid, gather_objects  # noqa: E402
from icrl_megatron.settings.schema import AlgoSettings  # noqa: E402
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Sample, SampleTokens, Task, Turn  # noqa: E402

LONGEST, MEDIAN, SPREAD = 16_384, 1_600.0, 1.0
GROUP = 8
PROMPT, CRITIQUE = 400, 256
MICRO_BATCH_TOKENS = 32_768
TOLERANCE, SHARES, SPARE, SECONDS = 0.10, 1.25, 64 << 20, 2.0
PER_TOKEN = 8
"""Bytes that a rank keeps of a token of its own episodes: id and log-prob."""
PER_PACKED, PER_LOSS = 16, 38
"""Bytes of a token and, in addition, of a loss token in a micro-batch."""
OBJECTS = 2_400
"""Bytes of the Python objects around the arrays of an attempt of two turns and its critique."""


@dataclass(frozen=True)
class Step:
    """The headers of all episodes, and the tasks in order."""

    headers: tuple[EpisodeHeader, ...]
    tasks: tuple[Task, ...]


@dataclass
class Measured:
    """Bytes, counts and CPU seconds of one rank. On a shared machine, wall-clock seconds would say nothing."""

    ranks: int
    samples: int = 0
    tokens: int = 0
    headers: int = 0
    """Encoded, of all ranks."""
    played: int = 0
    """Sequences of its own episodes."""
    trained: int = 0
    """Sequences of its replica's samples."""
    packed: int = 0
    """Micro-batches of one plan of its replica."""
    sent: int = 0
    """Handed to collectives that move tokens."""
    headers_held: int = 0
    """Decoded headers and credited samples of all ranks, as Python objects."""
    held: int = 0
    """Headers, sequences and micro-batches at once."""
    peak: int = 0
    """The largest at any time, with what credit needs meanwhile and the buffers of the exchange."""
    headers_s: float = 0.0
    credit_s: float = 0.0
    layout_s: float = 0.0
    delivery_s: float = 0.0


@dataclass(frozen=True)
class Planned:
    """What a rank keeps of the headers during a step."""

    headers: list[EpisodeHeader]
    report: CreditReport
    layout: SampleLayout


def step_of(ranks: int, tokens: int, seed: int = 0) -> Step:
    """Groups of episodes, round-robin over the ranks, until their samples have `tokens` tokens."""
    draw, headers, tasks, total = np.random.default_rng(seed), list[EpisodeHeader](), list[Task](), 0
    while total < tokens:
        task = Task(f"bench/train/{len(tasks)}", "bench", "train", "p" * 200)
        for index in range(GROUP):
            made = _header(task, index, len(tasks) % ranks, draw)
            headers.append(made)
            total += sum(a.prompt_tokens + a.response_tokens for a in made.attempts)
            total += sum(c.prompt_tokens + c.generated_tokens for c in made.critiques)
        tasks.append(task)
    return Step(tuple(headers), tuple(tasks))


def _header(task: Task, index: int, rank: int, draw: np.random.Generator) -> EpisodeHeader:
    attempts, critiques = list[AttemptHeader](), list[CritiqueHeader]()
    for round in range(2):
        response = int(np.clip(draw.lognormal(np.log(MEDIAN), SPREAD), 8, LONGEST - PROMPT - CRITIQUE))
        success = bool(draw.random() < 0.4)
        prompt, generated = PROMPT + CRITIQUE * round, max(1, response * 3 // 4)
        counts = round, prompt, PROMPT, generated, response - generated, 2, 0, 0
        attempts.append(AttemptHeader(*counts, float(success), (-float(generated), 0.0), "done", success, round == 0))
        if success or round == 1:
            break
        critiques.append(CritiqueHeader(round, min(LONGEST - CRITIQUE, PROMPT + response), CRITIQUE))
    return EpisodeHeader(task, index, tuple(attempts), tuple(critiques), rank)


def episode_of(header: EpisodeHeader) -> Episode:
    """An episode with random tokens and the header's lengths."""
    draw = np.random.default_rng(abs(hash((header.task.task_id, header.index))))

    def ids(count: int) -> Any:
        return draw.integers(0, 150_000, count, dtype=np.int32)

    plain, attempts, critiques = ids(PROMPT), list[Attempt](), list[Critique]()
    for of in header.attempts:
        first = of.generated_tokens // 2
        turns = []
        for count, seen in ((first, of.observation_tokens), (of.generated_tokens - first, 0)):
            done = Completion(ids(count), np.full(count, -1.0, dtype=np.float32), "stop", 0)
            turns.append(Turn(done, "", "go", "", ids(seen)))
        prompt = plain if of.round == 0 else np.concatenate([plain, ids(of.prompt_tokens - PROMPT)])
        outcome = of.outcome, of.success, "", of.stop_reason
        attempts.append(Attempt(of.round, prompt, plain, tuple(turns), *outcome))
    for of_critique in header.critiques:
        count = of_critique.generated_tokens
        done = Completion(ids(count), np.full(count, -1.0, dtype=np.float32), "stop", 0)
        critiques.append(Critique(of_critique.round, ids(of_critique.prompt_tokens), done, ""))
    return Episode(header.task, header.index, tuple(attempts), tuple(critiques))


def grid_of(rank: int, world: int, tensor: int, pipeline: int, group: Any = None) -> Grid:
    data = world // (tensor * pipeline)
    return Grid(
        rank, world, tensor, rank % tensor, pipeline, rank // (tensor * data), data, rank // tensor % data, group
    )


def planned(grid: Grid, blobs: list[bytes], tasks: tuple[Task, ...], found: Measured) -> Planned:
    """What every rank computes from the headers of all ranks: the code of a step, with its times."""
    begun = time.process_time()
    headers = [header for rank, blob in enumerate(blobs) for header in decode(blob, tasks, rank)]
    found.headers_s += time.process_time() - begun
    begun = time.process_time()
    report = credit(headers, AlgoSettings(), True)
    found.credit_s = time.process_time() - begun
    begun = time.process_time()
    layout = lay_out(
        report.samples,
        AlgoSettings(),
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        replica=grid.data_rank,
        replicas=grid.data,
    )
    found.layout_s = time.process_time() - begun
    found.samples, found.headers = len(layout.samples), sum(map(len, blobs))
    found.tokens = sum(s.train_prompt_tokens + s.response_tokens for s in layout.samples)
    return Planned(headers, report, layout)


def predict(grid: Grid, step: Step, layout: SampleLayout, found: Measured) -> None:
    """The bytes of this rank's tokens, from the headers."""
    mine = [header for header in step.headers if header.rank == grid.rank]
    found.played = sum(map(_bytes_played, mine))
    sizes = sizes_of(layout.samples)
    own = layout.replica_S == grid.data_rank
    found.trained = int(sizes[own].sum())
    trained = [s for s, ours in zip(layout.samples, own.tolist(), strict=True) if ours]
    read = sum(s.train_prompt_tokens + s.response_tokens for s in trained)
    found.packed = PER_PACKED * read + PER_LOSS * sum(s.loss_tokens for s in trained)
    source = np.array([s.rank for s in layout.samples])
    target = readers(grid, source, layout.replica_S)
    moved = int(sizes[(source == grid.rank) & (target != grid.rank)].sum())
    found.sent = moved + (grid.tensor * grid.pipeline - 1) * int(sizes[target == grid.rank].sum())


def _bytes_played(header: EpisodeHeader) -> int:
    prompts = sum(a.prompt_tokens + (a.plain_prompt_tokens if a.round == 0 else 0) for a in header.attempts) - PROMPT
    observed = sum(a.observation_tokens for a in header.attempts)
    critics = sum(c.prompt_tokens for c in header.critiques)
    tokens = 4 * (prompts + observed + critics) + PER_TOKEN * header.generated_tokens()
    return tokens + OBJECTS * len(header.attempts)


def model(options: argparse.Namespace) -> dict[str, Any]:
    """One rank of many: all of its code on headers, with the bytes of its tokens computed."""
    step = step_of(options.ranks, options.tokens)
    by_rank: dict[int, list[EpisodeHeader]] = defaultdict(list)
    for header in step.headers:
        by_rank[header.rank].append(header)
    grid, found = grid_of(options.ranks // 2, options.ranks, options.tensor, options.pipeline), Measured(options.ranks)
    begun = time.process_time()
    encode(by_rank[grid.rank], step.tasks)
    found.headers_s = time.process_time() - begun
    blobs = [encode(by_rank[rank], step.tasks) for rank in range(options.ranks)]
    planned(grid, blobs, step.tasks, found)  # timed without tracemalloc
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    kept = planned(grid, blobs, step.tasks, Measured(options.ranks))
    after, planning = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    samples = kept.layout.samples
    source = np.array([s.rank for s in samples], dtype=np.int64)
    exchange.Transfers(source, readers(grid, source, kept.layout.replica_S), sizes_of(samples)).rounds()
    moving = tracemalloc.get_traced_memory()[1] + exchange.PIECE_BYTES * (2 + grid.tensor * grid.pipeline)
    tracemalloc.stop()
    found.headers_held = after - before
    predict(grid, step, kept.layout, found)
    sequences = found.played + found.trained
    found.held = found.headers_held + sequences + found.packed
    found.peak = max(max(planning, moving) - before + sequences, found.held)
    return asdict(found)


def ranks(options: argparse.Namespace) -> dict[str, Any]:
    """Real gloo ranks on this machine; the largest relative error of the model over all ranks."""
    step = step_of(options.ranks, options.tokens)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="icrl_plane_") as folder:
        started = [
            context.Process(target=_rank, args=(rank, options, step, Path(folder))) for rank in range(options.ranks)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(options.timeout_s)
        if any(process.exitcode != 0 for process in started):
            for process in started:
                process.kill()
            raise SystemExit(f"ranks ended with {[process.exitcode for process in started]}")
        pairs = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(options.ranks)]
    names = ("played", "trained", "packed", "sent")
    errors = {n: max(abs(m[n] - p[n]) / max(1, p[n]) for m, p in pairs) for n in names}
    largest = {n: max(m[n] for m, _ in pairs) for n in (*names, "headers_held", "held", "peak", "delivery_s")}
    share = max(m["played"] + m["trained"] for m, _ in pairs)
    return {
        "ranks": options.ranks,
        "samples": pairs[0][0]["samples"],
        "tokens": pairs[0][0]["tokens"],
        "errors": errors,
        "largest": largest,
        "over_share": max(m["peak"] - SHARES * (m["played"] + m["trained"]) for m, _ in pairs),
        "largest_share": share,
    }


def _rank(rank: int, options: argparse.Namespace, step: Step, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "rendezvous"), options.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.ranks)
    grid = grid_of(rank, options.ranks, options.tensor, options.pipeline, dist.group.WORLD)
    found, wanted = Measured(options.ranks), Measured(options.ranks)
    handed = _counting()
    tracemalloc.start()
    begin = tracemalloc.get_traced_memory()[0]
    mine = [header for header in step.headers if header.rank == rank]
    episodes = {f"{h.task.task_id}#{h.index}": episode_of(h) for h in mine}
    found.played = tracemalloc.get_traced_memory()[0] - begin
    begun = time.process_time()
    blobs = gather_objects(grid, encode(mine, step.tasks))
    found.headers_s = time.process_time() - begun
    before = tracemalloc.get_traced_memory()[0]
    kept = planned(grid, blobs, step.tasks, found)
    layout = kept.layout
    del blobs
    gc.collect()
    found.headers_held = tracemalloc.get_traced_memory()[0] - before

    def tokens(sample: Sample) -> SampleTokens:
        return tokens_of(episodes[sample.episode_id()], sample.role, sample.round, AlgoSettings())

    before, begun = tracemalloc.get_traced_memory()[0], time.process_time()
    delivered = deliver(grid, layout, tokens)
    found.delivery_s = time.process_time() - begun
    # Arrived bytes are torch's, which tracemalloc does not see: the arrays say how many there are.
    found.trained = sum(map(_held_by, delivered.values()))
    found.sent = sum(handed)
    plan = pack(layout, delivered)
    batches = [batch for update in plan.updates for batch in update]
    found.packed = sum(array.nbytes for batch in batches for array in vars(batch).values())
    found.held = found.headers_held + found.played + found.trained + found.packed
    found.peak = tracemalloc.get_traced_memory()[1] - begin + found.trained
    predict(grid, step, layout, wanted)
    _check(grid, step, layout, delivered)
    (folder / f"{rank}.json").write_text(json.dumps([asdict(found), asdict(wanted)]))
    dist.barrier()
    dist.destroy_process_group()


def _check(grid: Grid, step: Step, layout: SampleLayout, delivered: dict[str, SampleTokens]) -> None:
    """Every sequence has arrived on every rank of its replica as it was played, and weights return to the player."""
    own = [s for s, r in zip(layout.samples, layout.replica_S.tolist(), strict=True) if r == grid.data_rank]
    assert {s.sample_id for s in own} == set(delivered), "other samples arrived than the layout says"
    headers = {f"{header.task.task_id}#{header.index}": header for header in step.headers}
    for sample in own:
        played = episode_of(headers[sample.episode_id()])
        assert delivered[sample.sample_id] == tokens_of(played, sample.role, sample.round, AlgoSettings())
    reports = grid.rank == grid.scoring_rank(grid.data_rank)
    found = send_back(grid, layout, {s.sample_id: _weights(s) for s in own if s.calibrated and reports})
    assert found == {s.sample_id: _weights(s) for s in layout.samples if s.calibrated and s.rank == grid.rank}


def _weights(sample: Sample) -> tuple[float, ...]:
    return tuple(round(i % 97 / 97, 4) for i in range(sample.loss_tokens))


def _held_by(tokens: SampleTokens) -> int:
    arrays = [tokens.behaviour_prompt_ids, tokens.response_ids, tokens.loss_mask, tokens.rollout_logprobs]
    same = np.shares_memory(tokens.behaviour_prompt_ids, tokens.train_prompt_ids)
    return sum(a.nbytes for a in arrays) + (0 if same else tokens.train_prompt_ids.nbytes)


def _counting() -> list[int]:
    """The bytes that each exchange of tokens hands over, from now on."""
    handed: list[int] = []
    move = dist.all_to_all_single

    def counted(output: torch.Tensor, data: torch.Tensor, *rest: Any, **options: Any) -> Any:
        handed.append(data.numel())
        return move(output, data, *rest, **options)

    dist.all_to_all_single = counted
    return handed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "ranks"))
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int)
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    options = parser.parse_args()
    small = options.what == "ranks"
    options.ranks = options.ranks or (32 if small else 1024)
    options.tokens = options.tokens or (2_000_000 if small else 200_000_000)
    options.pipeline = options.pipeline or (2 if small else 1)
    if options.ranks % (options.tensor * options.pipeline):
        parser.error(f"--ranks {options.ranks} is no multiple of --tensor {options.tensor} x --pipeline")
    found = ranks(options) if small else model(options)
    print(json.dumps(found, indent=1))
    if small:
        over = found["over_share"] - SPARE
        bars = [Bar(f"{name}, off by", value, TOLERANCE) for name, value in found["errors"].items()]
    else:
        over = found["peak"] - SHARES * (found["played"] + found["trained"]) - SPARE
        seconds = found["headers_s"] + found["credit_s"] + found["layout_s"]
        bars = [Bar("headers, credit, balance and packing, CPU s", seconds, SECONDS)]
    bars.append(Bar("bytes of a rank above its limit", over, 0.0))
    if options.out:
        numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
        report = bench_schema.about() | {"medians": {options.what: numbers}, "bars": bars}
        bench_schema.write(options.out, "data_plane", report)
    for bar in bars:
        print(bar.line(), file=sys.stderr)
    return int(not all(bar.held for bar in bars))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
