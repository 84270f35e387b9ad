"""The trainer's side of an asynchronous run: what it tells a rollout process that was restarted."""

from __future__ import annotations

from collections.abc import Callable

from ladder import ladder

from icrl_megatron.data.curriculum import Curriculum
from icrl_megatron.data.sampler import TaskSampler
from icrl_megatron.engines.rank import ONE_RANK, Share
from icrl_megatron.rollout.async_source import AsyncSource, Order
from icrl_megatron.rollout.messages import (
    Begin,
    FromService,
    GroupEnded,
    Heartbeat,
    JobResult,
    Probed,
    RunJob,
    Save,
    SavedGroups,
    ToService,
)
from icrl_megatron.rollout.open_group import OpenGroup
from icrl_megatron.rollout.played import Gather, RolloutRequest
from icrl_megatron.rollout.probe import Probe
from icrl_megatron.rollout.speakers import Seeds
from icrl_megatron.settings.task_schema import TaskSource
from icrl_megatron.types import Completion, Task, id_array, logprob_array
from icrl_megatron.utils.progress import Progress


def probed(version: int, task: Task) -> Probed:
    reply = Completion(id_array((5, 6)), logprob_array((-1.0, -2.0)), "length", version)
    return Probed(version, Probe(task, (3, 4)).answered([reply, reply]))


class Process:
    """Ends groups at once, except the `slow` ones until it is restarted."""

    def __init__(self, slow: frozenset[int] = frozenset()) -> None:
        self.slow, self.said = slow, list[ToService]()
        self.messages, self.died, self.restarts = list[FromService](), "", 0
        self.dies_after_job = self.asleep = False
        self.late = list[Probed]()

    def send(self, message: ToService) -> None:
        self.said.append(message)
        if isinstance(message, Begin):
            self.messages += [self.ended(of) for of in message.groups if not of.ended and of.number not in self.slow]
        elif isinstance(message, RunJob):
            self.messages.append(JobResult(len(self.of(RunJob))))
            self.died = "It died." if self.dies_after_job and not self.restarts else ""

    def ended(self, of: OpenGroup) -> GroupEnded:
        episodes = (probed(9, of.task).episodes[0],)
        return GroupEnded(of.number, of.task.task_id, of.version if of.version is not None else 9, episodes, 0)

    def of(self, kind: type[ToService]) -> list[ToService]:
        return [one for one in self.said if isinstance(one, kind)]

    def take(self) -> list[FromService]:
        taken, self.messages = self.messages, []
        return taken

    def take_counters(self) -> Heartbeat:
        return Heartbeat()

    def lost(self) -> str:
        return "" if self.messages else self.died

    def needs_weights(self) -> bool:
        return False

    def restart(self) -> None:
        self.died, self.restarts, self.slow = "", self.restarts + 1, frozenset()

    def wait_ready(self) -> None: ...

    def wait_for(self, kind: type[FromService], timeout_s: float) -> FromService | None:
        return self.late.pop(0) if self.late and kind is Probed else None


def source(
    process: Process | None,
    task: Callable[[int], Task] = lambda n: ladder(str(n), 3),
    share: Share = ONE_RANK,
    gather: Gather = lambda mine: [mine],
) -> AsyncSource:
    order = Order(task, 2, 100, 1, lambda step: 20)
    quiet = Progress(enabled=False)
    return AsyncSource(process, share, order, 1, lambda: 9, lambda stale: None, gather, quiet, lambda: False)  # type: ignore[arg-type]


def request(step: int) -> RolloutRequest:
    return RolloutRequest([], 1, Seeds(0, step), 1, needed=2)


def test_a_restarted_process_begins_groups_with_the_current_version_and_not_with_its_first_one() -> None:
    """It would report version 0 for them, and drop them all when the weights arrive."""
    process = Process(slow=frozenset((0, 2, 4, 5)))
    playing = source(process)
    assert playing.play(request(0)).behind == (0, 0)
    process.died = "It died."
    assert [header.task.task_id for header in playing.play(request(1)).headers] == ["ladder/0", "ladder/2"]
    again = {of.number: of for of in process.of(Begin)[-1].groups}  # type: ignore[union-attr]
    assert {n: (of.version, of.ended) for n, of in again.items()} == {
        0: (9, False), 1: (9, True), 2: (9, False), 3: (9, True), 4: (9, False), 5: (9, False),
    }  # fmt: skip


def test_a_job_that_has_its_result_is_not_run_again() -> None:
    """Its second result would be an answer that nobody waits for."""
    process, others = Process(), iter([False, True])
    process.dies_after_job = True

    def gather(mine: object) -> list[object]:
        found, failed = mine  # type: ignore[misc]
        return [mine, ((found[0], next(others)), failed)]  # another rank's job takes longer

    playing = source(process, share=Share(0, 2), gather=gather)
    assert playing.run(lambda setup, speakers_for: None) == 1  # type: ignore[arg-type, return-value]
    assert (process.restarts, len(process.of(RunJob))) == (1, 1)


def test_a_late_answer_to_a_checkpoint_is_ignored() -> None:
    process = Process()
    playing = source(process)
    lines = playing.unfinished()
    assert lines() == []
    playing.play(request(0))
    assert len(lines()) == 1 + 4 and process.of(Save)
    process.messages.append(SavedGroups(()))
    assert len(playing.play(request(1)).headers) == 2


def test_a_step_takes_probes_of_its_own_version_only() -> None:
    process, task = Process(), ladder("0", 3)
    playing = source(process, share=Share(1, 2))
    process.late += [probed(8, task), probed(9, task)]
    assert playing.probes().headers == (), "no group has ended, so the process has no prompt, and nothing is waited for"
    process.messages += [probed(8, task), process.ended(OpenGroup(1, task, 20))]
    playing._receive()
    for _ in range(2):  # the second time it has arrived already
        found = playing.probes().episodes
        assert [(of.index, of.attempts[0].turns[0].completion.weight_version) for of in found] == [(8, 9), (9, 9)]
    process.messages.append(probed(8, task))
    playing._receive()
    assert playing.probes().headers == playing.probes().episodes == ()
    assert source(None, share=Share(None, 2)).probes().headers == ()


def test_ranks_draw_the_same_tasks_while_a_curriculum_changes() -> None:
    tasks = [ladder(str(n), 3) for n in range(40)]
    drawn = []
    for process in (Process(), None):
        curriculum = Curriculum(0.1)
        sampler = TaskSampler([TaskSource("ladder")], {"ladder": tasks}, 0, curriculum)
        steps = dict[int, list[Task]]()

        def task(n: int, sampler: TaskSampler = sampler, steps: dict[int, list[Task]] = steps) -> Task:
            return steps.setdefault(n // 2, sampler.draw(n // 2, 0, 2))[n % 2]

        playing = source(process, task, Share(None if process is None else 0, 1))
        playing._begun = 0
        playing._begin(4)
        curriculum.observe({one.task_id: 1.0 for one in tasks[:20]})
        drawn.append([task(n) for n in range(4)])
    assert drawn[0] == drawn[1]


def test_drawing_ahead_does_not_begin_again_at_the_first_slot() -> None:
    tasks = [ladder(str(n), 3) for n in range(7)]
    sampler = TaskSampler([TaskSource("ladder")], {"ladder": tasks}, 0)
    counted, slot = 0, sampler._slot

    def counting(number: int, taken: list[int]) -> tuple[int, int]:
        nonlocal counted
        counted += 1
        return slot(number, taken)

    sampler._slot = counting  # type: ignore[method-assign]
    ahead = {step + 4: sampler.draw(step + 4, 0, 3) for step in range(100) if sampler.draw(step, 0, 3)}
    assert counted < 100 * 3 * 6
    fresh = TaskSampler([TaskSource("ladder")], {"ladder": tasks}, 0)
    assert all(fresh.draw(step, 0, 3) == of for step, of in reversed(ahead.items()))
