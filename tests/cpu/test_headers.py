"""Headers of episodes as bytes, and how the token sequences move by them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icrl_megatron.algo.headers import AttemptHeader, EpisodeHeader, decode, encode, headers_of
from icrl_megatron.data.delivery import packed, readers, sizes_of, unpacked
from icrl_megatron.distributed.exchange import Transfers
from icrl_megatron.distributed.grid import Grid
from icrl_megatron.telemetry.metrics import reply_entropy
from icrl_megatron.types import Attempt, Completion, Critique, Episode, Sample, SampleTokens, Task, Turn

TASKS = [Task(f"set/{i}", "set", "train", f"problem {i}") for i in range(2)]
KEPT = Task("set/9", "set", "train", "from the step before: ü")


def episode(task: Task, index: int, logprobs: list[float]) -> Episode:
    said = Completion(np.arange(len(logprobs)), np.array(logprobs), "stop", 3)
    turns = (Turn(said, "a", "go", "seen", (7, 8), cut_chars=3), Turn(said, "b", None, "", ()))
    first = Attempt(0, (1, 2), (1, 2), turns, 0.25, False, "it ended", "max_turns", measures=(("calls", 2.0),))
    second = Attempt(1, (1, 5, 2), (1, 2), turns[1:], 1.0, True, "", "done", 4, (("calls", 0.0), ("answered", 1.0)))
    return Episode(task, index, (first, second), (Critique(0, (4, 4, 4), said, "try left"),))


def test_headers_survive_the_way_to_another_rank() -> None:
    played = [episode(KEPT, 1, [-0.5]), episode(TASKS[1], 0, [-0.25, -1.0]), episode(TASKS[0], 2, [])]
    headers = headers_of(played, rank=5)
    assert tuple(decode(encode(headers, TASKS), TASKS, 5)) == headers
    first, second = headers[1].attempts
    counts = 0, 2, 2, 4, 2, 2, 1, 1
    assert first == AttemptHeader(*counts, 0.25, (-2.5, 0.0), "max_turns", False, True, (("calls", 2.0),))
    assert (second.response_tokens, second.read_tokens, second.cut_texts, second.same_prompt) == (2, 3, 1, False)
    assert headers[1].generated_tokens() == played[1].generated_tokens() == 8
    assert decode(encode((), TASKS), TASKS, 0) == []


@given(logprobs=st.lists(st.floats(-30, 0, width=32), min_size=1, max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_the_mean_log_prob_does_not_depend_on_how_the_tokens_are_split(logprobs: list[float], cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(logprobs)]
    parts = [logprobs[a:b] for a, b in pairwise(edges)]

    def entropy(of: list[list[float]]) -> float | None:
        turns = [(Turn(Completion(np.zeros(len(part)), part, "stop", 0), "", None, "", ()),) for part in of]
        attempts = [Attempt(0, (1,), (1,), turn, 0.0, False, "", "done") for turn in turns]
        return reply_entropy([EpisodeHeader.of(Episode(TASKS[0], 0, (attempt,), ())) for attempt in attempts])

    assert entropy(parts) == entropy([logprobs]) == entropy([[value] for value in reversed(logprobs)])


transfers = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 15)), min_size=1, max_size=60)


@given(moves=transfers, limit=st.integers(1, 20))
def test_no_rank_moves_more_than_the_limit_in_a_round(moves: list[tuple[int, int, int]], limit: int) -> None:
    source, target, size = np.array(moves, dtype=np.int64).T
    rounds = Transfers(source, target, size).rounds(limit)
    for ranks in (source, target):
        for number, rank in {*zip(rounds.tolist(), ranks.tolist(), strict=True)}:
            together = size[(rounds == number) & (ranks == rank)]
            assert together.sum() <= limit or np.count_nonzero(together) == 1
    for pair in {*zip(source.tolist(), target.tolist(), strict=True)}:
        of_pair = rounds[(source == pair[0]) & (target == pair[1])]
        assert (np.diff(of_pair) >= 0).all(), "transfers of a pair of ranks keep their order"
    if size.sum() <= limit:
        assert not rounds.any(), "one round is enough"


@pytest.mark.parametrize(("same", "response"), [(True, 5), (False, 5), (False, 8), (True, 1)])
def test_a_sample_is_its_sequences_end_to_end(same: bool, response: int) -> None:
    ids, plain = np.arange(3, dtype=np.int32), np.arange(3 if same else 2, dtype=np.int32)
    mask = np.arange(response) % 3 == 0
    logprobs = np.linspace(-2, 0, response, dtype=np.float32)
    stale = np.arange(response) % 2 == 1
    tokens = SampleTokens(ids, plain, np.arange(response, dtype=np.int32), mask, logprobs, stale)
    sample = Sample("t#0/0/attempt", "t", "attempt", 0, 3, len(plain), response, int(mask.sum()), same, False, 1.0)
    data = packed(sample, tokens)
    assert len(data) == sizes_of([sample])[0] and len(data) % 4 == 0
    assert unpacked(sample, data) == tokens


def test_a_replica_reads_what_it_played_and_its_ranks_take_turns_for_the_rest() -> None:
    grid = Grid(0, 8, 2, 0, 2, 0, 2, 0, None)
    assert [grid.replica_ranks(r) for r in (0, 1)] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert [grid.scoring_rank(r) for r in (0, 1)] == [4, 6]
    of_context = Grid(0, 16, 2, 0, 2, 0, 2, 0, None, context=2)
    assert [of_context.replica_ranks(r) for r in (0, 1)] == [(0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)]
    assert [of_context.scoring_rank(r) for r in (0, 1)] == [8, 12]
    source, replica = np.array([5, 0, 0, 0, 0, 7]), np.array([0, 1, 1, 1, 1, 0])
    assert readers(grid, source, replica).tolist() == [5, 3, 6, 7, 2, 1]


def test_tokens_reach_their_replica_once_and_weights_return() -> None:
    """Eight gloo ranks at TP 2 x PP 2 check every sequence that arrives, and the bytes that they hold and hand over."""
    tool = Path(__file__).parents[2] / "tools" / "bench_data_plane.py"
    command = [sys.executable, tool, "ranks", "--ranks", "8", "--tokens", "400000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["errors"]["sent"] == 0.0 and max(found["errors"].values()) <= 0.1
