"""A multi-agent system at work: a planner gives jobs to agents with tools, a reflector judges what they found, an
answerer suggests an answer, a verifier checks it, and either starts another plan.

    plan -> jobs (calls and observations, then a report) -> reflection? -> suggested answer -> check? -> answer

If the environment is a user who says more after the answer, the same begins again. If it ends with a call, there is no
answer.

Calls and the answer go to the task set's own environment and tools. Every agent sees only its brief; what it has seen
is recorded with each event (`events.py`), so that `linear.py` can order the events without inventing knowledge.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from icrl_megatron.agents.formats import FinalAnswer, Malformed, Qwen3, ToolCalls, harmless
from icrl_megatron.agents.tools import ToolCall
from icrl_megatron.distill import roles
from icrl_megatron.distill.environments import with_tools
from icrl_megatron.distill.events import Event, Failed, Run
from icrl_megatron.distill.roles import AgentJob, AgentReply, Brief, Member, Note, Unreadable
from icrl_megatron.distill.timing import AttemptClock
from icrl_megatron.distill.trajectory import USER, SegmentKind, Tokens
from icrl_megatron.rollout.checked_environment import CheckedEnvironment
from icrl_megatron.settings.distill_schema import DistillSettings
from icrl_megatron.settings.rollout_schema import RolloutSettings
from icrl_megatron.tasks.base import Environment, Opening, ReadsCalls, sendable
from icrl_megatron.types import Task
from icrl_megatron.utils.endpoint import EndpointError
from icrl_megatron.utils.errors import EnvironmentFailure

T = TypeVar("T")
REPORT = "report"
_SAID = (roles.ANSWER, USER)
"""Tags of a conversation with the user, which every agent reads."""


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first error itself; the other tasks are then cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


@dataclass(frozen=True)
class System:
    """A team with its settings. Plays any number of attempts at the same time."""

    team: Mapping[str, Member]
    """By name: the four of `roles.ROLES`, and agents with tools."""
    environment: Callable[[Task], Environment]
    settings: DistillSettings = field(default_factory=DistillSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    seed: int = 0

    async def play(self, task: Task, attempt: int) -> Run | Failed:
        """One attempt. Raises ConfigError for a task without tools."""
        try:
            playing = _Attempt(self, task, attempt)
            async with asyncio.timeout(self.settings.task_timeout_s):
                return await playing.play()
        except TimeoutError:
            return Failed(task.task_id, attempt, "time", f"not finished within {self.settings.task_timeout_s:g} s")
        except EndpointError as error:
            return Failed(task.task_id, attempt, "endpoint", f"An agent {error}")
        except EnvironmentFailure as error:
            return Failed(task.task_id, attempt, "environment", str(error))
        except Unreadable as error:
            return Failed(task.task_id, attempt, "unreadable", str(error), playing.unanswered())


async def play_all(
    system: System, jobs: Iterable[tuple[Task, int]], concurrency: int, done: Callable[[Run | Failed], None]
) -> None:
    """Plays (task, attempt) pairs, at most `concurrency` at a time, and passes each result to `done` as it comes.
    Raises what `System.play` and `done` raise; the other attempts are then cancelled."""
    left = iter(jobs)

    async def work() -> None:
        for task, attempt in left:
            done(await system.play(task, attempt))

    async with together() as group:
        for _ in range(concurrency):
            group.create_task(work())


class _OverError(Exception):
    """The environment ended with a call."""


class _Attempt:
    """The state of one attempt."""

    def __init__(self, system: System, task: Task, attempt: int) -> None:
        self._system, self._settings, self._task, self._attempt = system, system.settings, task, attempt
        self._environment = CheckedEnvironment(
            task, self._opened, system.rollout.environment_timeout_s, system.rollout.max_observation_bytes
        )
        self._calls_left = self._environment.max_turns - 1  # one turn is the answer's
        self._opening = Opening("")
        self._events, self._notes = list[Event](), list[Note]()
        self._spent, self._uncounted, self._unreadable, self._threads = dict[str, Tokens](), 0, 0, 0
        self._team = {name: m.about for name, m in system.team.items() if name not in roles.ROLES}
        self._over = False
        self._answers, self._one_at_a_time = dict[str, str](), asyncio.Lock()
        self._clock = AttemptClock()

    def _opened(self, task: Task) -> ReadsCalls:
        self._inner = with_tools(self._system.environment(task), task)
        return self._inner

    async def play(self) -> Run:
        self._opening = await self._environment.reset()
        try:
            while not await self._told(await self._suggested()):
                pass
        except _OverError:
            pass
        return self._run(self._environment.success())

    async def _suggested(self) -> str:
        """What the team answers to all that the user has said."""
        for number in range(1, self._settings.rounds + 1):
            last = number == self._settings.rounds
            plan = await self._plan()
            for stage in plan.stages:
                await self._stage(stage)
            if not last and await self._said(roles.REFLECTOR, roles.REFLECTION, roles.read_reflection):
                continue
            suggestion = await self._said(roles.ANSWERER, roles.SUGGESTION, self._answer)
            check = "" if last else await self._said(roles.VERIFIER, roles.CHECK, roles.read_check)
            if not check or (roles.score_of(check) or 0) >= roles.GOOD_SCORE:
                break
        return suggestion

    async def _plan(self) -> roles.TeamPlan:
        brief = self._brief(roles.PLANNER, notes=tuple(self._notes), team=self._team)
        plan, thread = await self._ask(brief, lambda text: roles.read_plan(text, self._team))
        self._note(roles.PLANNER, roles.PLAN, self._say(brief, roles.PLAN, "text", plan.text, thread))
        return plan

    async def _stage(self, jobs: tuple[AgentJob, ...]) -> None:
        """Runs jobs at the same time. Their reports become known to the others together, in the plan's order."""
        threads = [self._thread() for _ in jobs]
        reports = tuple(note for note in self._notes if note.tag in (REPORT, *_SAID))
        plan = next(note for note in reversed(self._notes) if note.tag == roles.PLAN)
        briefs = [self._brief(job.agent, job=job.text, notes=reports) for job in jobs]
        async with together() as group:
            asked = zip(briefs, threads, strict=True)
            running = [group.create_task(self._job(brief, plan.event, thread)) for brief, thread in asked]
        for job, task in zip(jobs, running, strict=True):
            self._note(job.agent, REPORT, task.result())

    async def _job(self, brief: Brief, plan: int, thread: int) -> int:
        """Returns the event of the report."""
        own, specs = self._system.team[brief.agent].tools, self._inner.specs
        brief = replace(brief, tools=tuple(spec for spec in specs if not own or spec.name in own))
        made = 0
        while True:
            brief = replace(brief, may_call=made < self._settings.job_calls and self._calls_left > 0)
            found, _ = await self._ask(brief, partial(self._action, brief), thread, plan)
            if isinstance(found, str):
                return self._say(brief, roles.THINK, "text", found, thread, plan)
            for call in found.calls:
                if made < self._settings.job_calls and self._calls_left > 0:
                    brief, made = await self._call(brief, call, thread, plan), made + 1

    async def _call(self, brief: Brief, call: ToolCall, thread: int, plan: int) -> Brief:
        """Makes a call. Returns the brief with its answer. A tool with a state answers one call after the other, in the
        order of their events, because each answer depends on the calls before. Raises _OverError if the environment
        ended with it."""
        self._calls_left -= 1
        async with self._one_at_a_time if call.name in self._inner.stateful else nullcontext():
            asked = self._say(brief, call.name, "call", "", thread, plan, call)
            text = await self._observed(brief, call)
            self._events.append(Event(brief.agent, call.name, "observation", text, (asked,), thread))
        written = Note(asked, brief.agent, "call", call.key())
        if self._over:
            raise _OverError
        observed = Note(len(self._events) - 1, brief.agent, "observation", text)
        return replace(brief, own=(*brief.own, written, observed))

    async def _observed(self, brief: Brief, call: ToolCall) -> str:
        """The answer to a call. One that another agent has had is given again here: the environment would tell an agent
        that repeats calls to stop, and this one does not repeat its own."""
        key = call.key()
        own = any(note.text == key for note in brief.own)
        if key in self._answers and call.name not in self._inner.stateful and not own:
            return self._answers[key]
        step = await self._environment.step(self._inner.form.render(ToolCalls((call,))))
        text, self._over = step.observations[0].text, step.done
        self._answers.setdefault(key, text)
        return text

    async def _said(self, agent: str, tag: str, read: Callable[[str], str]) -> str:
        """What a role says; empty text is nothing, and no event."""
        tags = {roles.REFLECTOR: (roles.PLAN, REPORT), roles.ANSWERER: (REPORT, roles.CHECK)}
        notes = tuple(n for n in self._notes if n.tag in (*_SAID, *tags.get(agent, (REPORT, roles.SUGGESTION))))
        brief = self._brief(agent, notes=notes)
        text, thread = await self._ask(brief, read)
        if text:
            self._note(agent, tag, self._say(brief, tag, "text", text, thread))
        return text

    async def _told(self, answer: str) -> bool:
        """Gives the answer to the environment. Returns whether that ends the attempt; if not, a user has said more."""
        said = next(n for n in reversed(self._notes) if n.tag == roles.SUGGESTION)
        known, thread = tuple(n.event for n in self._notes if n.event >= said.event), self._thread()
        self._events.append(Event(roles.ANSWERER, roles.ANSWER, "answer", answer, known, thread))
        self._note(roles.ANSWERER, roles.ANSWER, len(self._events) - 1)
        step = await self._environment.step(self._inner.form.render(FinalAnswer(answer)))
        self._calls_left -= 1
        if step.done or self._calls_left < 0:
            return True
        more = Event(USER, USER, "observation", step.observations[0].text, (len(self._events) - 1,), thread)
        self._events.append(more)
        self._note(USER, USER, len(self._events) - 1)
        return False

    def unanswered(self) -> Run:
        """The attempt as it is, without an answer. Calls that were under way have an empty answer."""
        answered = {event.knows[0] for event in self._events if event.kind == "observation"}
        for number, event in enumerate(tuple(self._events)):
            if event.kind == "call" and number not in answered:
                self._events.append(Event(event.agent, event.tag, "observation", "", (number,), event.thread))
        return self._run(correct=False)

    def _run(self, correct: bool) -> Run:
        return Run(
            self._task.task_id,
            self._attempt,
            self._opening.text,
            tuple(self._events),
            correct,
            {name: self._spent[name] for name in sorted(self._spent)},
            tuple(self._inner.specs),
            self._inner.stateful,
            self._uncounted,
            self._unreadable,
            self._opening.system,
            self._clock.read(),
        )

    async def _ask(
        self, brief: Brief, read: Callable[[str], T], thread: int | None = None, plan: int | None = None
    ) -> tuple[T, int]:
        """Asks until a reply can be read. Returns (what it says, the thread); its thinking is an event.

        Raises Unreadable after the last try, and EndpointError."""
        thread = self._thread() if thread is None else thread
        for number in range(self._settings.tries):
            seed = self._seed(thread, len(brief.own), number)
            with self._clock.waiting(brief.agent):
                reply = await self._system.team[brief.agent].agent.reply(replace(brief, seed=seed))
            self._account(brief.agent, reply)
            try:
                thinking, rest = roles.thought(sendable(reply.text))
                found = read(rest)
            except Unreadable as error:
                self._unreadable += 1
                brief = replace(brief, problem=str(error))
                continue
            if thinking:
                self._say(brief, roles.THINK, "text", thinking, thread, plan)
            return found, thread
        raise Unreadable(f"the {brief.agent}'s reply could not be read {self._settings.tries} times: {brief.problem}")

    def _action(self, brief: Brief, text: str) -> ToolCalls | str:
        """Calls that can be made as the model would make them, or a report. Raises Unreadable."""
        found = Qwen3(brief.tools).parse(text)
        if isinstance(found, Malformed) or found is None:
            raise Unreadable(found.problem if found else "the reply is empty")
        if isinstance(found, FinalAnswer):
            return found.text
        if not brief.may_call:
            raise Unreadable("no calls are left: write your report without a call")
        for call in found.calls:
            if call.name not in _names(brief):
                raise Unreadable(f"there is no tool {call.name[:50]!r}; your tools are {', '.join(_names(brief))}")
            if mistake := self._inner.mistake(call):
                raise Unreadable(mistake)
            if not self._renders(ToolCalls((call,)), call.written_arguments()):
                raise Unreadable(f"the arguments of {call.name} contain tags, or white space around them")
        return found

    def _answer(self, text: str) -> str:
        answer = roles.required(text, roles.ANSWER)
        if not self._renders(FinalAnswer(answer), answer):
            raise Unreadable("the answer contains tags")
        return answer

    def _renders(self, action: ToolCalls | FinalAnswer, text: str) -> bool:
        """Whether the task set's form can write the action: a model that reads a tag inside would stop there."""
        form = self._inner.form
        return not harmless(text, form.tags)[1] and form.parse(form.render(action)) == action

    def _brief(
        self, agent: str, notes: tuple[Note, ...], job: str = "", team: Mapping[str, str] | None = None
    ) -> Brief:
        return Brief(agent, self._opening.joined(), 0, job, notes, team=team or {})

    def _say(
        self,
        brief: Brief,
        tag: str,
        kind: SegmentKind,
        text: str,
        thread: int,
        plan: int | None = None,
        call: ToolCall | None = None,
    ) -> int:
        """Records an event of a brief's author, who has also read its own earlier events of the thread."""
        own = (number for number, event in enumerate(self._events) if event.thread == thread)
        read = {note.event for note in (*brief.notes, *brief.own)} | set(own) | ({plan} if plan is not None else set())
        self._events.append(Event(brief.agent, tag, kind, text, tuple(sorted(read)), thread, call))
        return len(self._events) - 1

    def _note(self, agent: str, tag: str, event: int) -> None:
        self._notes.append(Note(event, agent, tag, self._events[event].text))

    def _account(self, agent: str, reply: AgentReply) -> None:
        if reply.read is None or reply.written is None:
            self._uncounted += 1
        before = self._spent.get(agent, Tokens())
        self._spent[agent] = Tokens(before.read + (reply.read or 0), before.written + (reply.written or 0))

    def _thread(self) -> int:
        self._threads += 1
        return self._threads - 1

    def _seed(self, *place: int) -> int:
        text = f"{self._system.seed} {self._task.task_id} {self._attempt} {place}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def _names(brief: Brief) -> list[str]:
    return [spec.name for spec in brief.tools]
