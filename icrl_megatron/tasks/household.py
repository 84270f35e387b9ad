"""Household: a small multi-turn text world. Fetch an object and put it on a surface within few turns.

    problem  "take apple put desk from bathroom"       (the goal, and the room in which the player starts)
    actions  go ROOM | open CONTAINER | take OBJECT | put SURFACE      (put also walks there)
    summary  "failed apple at murk"                   (where the object was, in a code that only the critic reads)

Every object has one home, the same in all problems, and every container is closed at the start. A solver that knows the
homes needs four turns (three from the right room). The limit is four, so blind search mostly fails.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icrl_megatron.tasks.base import StepResult
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

CONTAINERS = {
    "kitchen": ("fridge", "cupboard"),
    "bedroom": ("dresser", "wardrobe"),
    "office": ("drawer", "safe"),
    "bathroom": ("cabinet", "basket"),
}
SURFACES = ("counter", "bed", "desk", "shelf")
OBJECTS = (
    *("apple", "book", "candle", "cup", "hat", "key", "knife", "lamp"),
    *("letter", "mirror", "pen", "plate", "ring", "scarf", "soap", "towel"),
)
HINTS = ("murk", "lorn", "vash", "quil", "drim", "bosk", "trev", "nulp")
"""HINTS[i] is the code of the i-th container, in the order of `PLACES`."""
ROOMS = tuple(CONTAINERS)
PLACES = tuple(c for room in ROOMS for c in CONTAINERS[room])
ROOM_OF = {c: room for room in ROOMS for c in CONTAINERS[room]}
MAX_TURNS = 4
HOME_SEED = 11
CRITIC_ACCURACY = 0.4
STUBBORNNESS = 0.5
"""Share of the teacher's first searches that go to its wrong belief; the rest are uniform over the containers."""


def homes() -> dict[str, str]:
    """Object -> container: hidden, and the same in every problem. Each container is the home of two objects."""
    places = [*PLACES, *PLACES]
    random.Random(HOME_SEED).shuffle(places)
    return dict(zip(OBJECTS, places, strict=True))


HOMES = homes()


@dataclass(frozen=True)
class Goal:
    """A parsed problem."""

    thing: str
    surface: str
    start: str

    def text(self) -> str:
        return f"take {self.thing} put {self.surface} from {self.start}"

    @staticmethod
    def parse(problem: str) -> Goal:
        """Raises ConfigError if the text is not a Household problem."""
        words = problem.split()
        if len(words) == 6 and words[1] in OBJECTS and words[3] in SURFACES and words[5] in ROOMS:
            goal = Goal(words[1], words[3], words[5])
            if goal.text() == problem:
                return goal
        raise ConfigError(
            f"problem {problem!r} is not a Household problem of the form 'take OBJECT put SURFACE from ROOM'; "
            "take problems from TaskSet.problems()"
        )


class HouseholdEnvironment:
    """One problem: reward 1 once the object is on the surface, else 0. An invalid action costs a turn and returns the
    reason."""

    max_turns = MAX_TURNS

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._restart()

    def _restart(self) -> None:
        self._room = self._goal.start
        self._open: set[str] = set()
        self._where = dict(HOMES)
        self._held: str | None = None
        self._won = False

    async def reset(self) -> str:
        self._restart()
        return self._goal.text()

    def parse(self, reply: str) -> str | None:
        words = reply.split()
        targets = {"go": ROOMS, "open": PLACES, "take": OBJECTS, "put": SURFACES}
        if len(words) != 2 or words[1] not in targets.get(words[0], ()):
            return None
        return " ".join(words)

    def hint(self) -> str:
        return "invalid say go open take or put"

    async def step(self, action: str) -> StepResult:
        parsed = self.parse(action)
        if parsed is None:
            return StepResult(self.hint(), done=False)
        verb, target = parsed.split()
        act = {"go": self._go, "open": self._open_container, "take": self._take, "put": self._put}[verb]
        return StepResult(act(target), done=self._won)

    def _go(self, room: str) -> str:
        self._room = room
        return " ".join((room, "has", *CONTAINERS[room]))

    def _open_container(self, container: str) -> str:
        if ROOM_OF[container] != self._room:
            return f"invalid no {container} in {self._room}"
        self._open.add(container)
        inside = [thing for thing in OBJECTS if self._where.get(thing) == container]
        return " ".join((container, "has", *(inside or ["nothing"])))

    def _take(self, thing: str) -> str:
        if self._held is not None:
            return f"invalid holding {self._held}"
        place = self._where[thing]
        # A thing in a closed container and a thing in another room give the same message. A thing on a wrong surface
        # can always be taken back.
        if place in PLACES and (place not in self._open or ROOM_OF[place] != self._room):
            return f"invalid no {thing} in sight"
        self._held = thing
        del self._where[thing]
        return f"holding {thing}"

    def _put(self, surface: str) -> str:
        if self._held is None:
            return "invalid holding nothing"
        thing, self._held = self._held, None
        self._where[thing] = surface
        self._won = thing == self._goal.thing and surface == self._goal.surface
        return "" if self._won else f"{surface} has {thing}"

    def outcome(self) -> float:
        return 1.0 if self._won else 0.0

    def success(self) -> bool:
        return self._won

    def summary(self) -> str:
        if self._won:
            return "right"
        return f"failed {self._goal.thing} at {HINTS[PLACES.index(HOMES[self._goal.thing])]}"


class HouseholdTeacher:
    """Uses valid actions, searches at its wrong belief, follows advice, and reads the code correctly 40 % of the
    time."""

    def __init__(self, goal: Goal, rng: random.Random) -> None:
        self._goal = goal
        self._rng = rng
        home = PLACES.index(HOMES[goal.thing])
        # As regular as the homes and wrong for every object: three containers further, so in another room.
        self._belief = PLACES[(home + 3) % len(PLACES)]
        self._begin(None)

    def _begin(self, critique: str | None) -> None:
        self._plan: list[str] = []
        advised = [w for w in (critique or "").split() if w in PLACES]
        stubborn = self._rng.random() < STUBBORNNESS
        self._search(advised[-1] if advised else self._belief if stubborn else self._rng.choice(PLACES))

    def _search(self, place: str) -> None:
        # It takes the thing without checking that it is there. That check is the hardest step for a tiny model to
        # learn, and would change nothing because the turn limit allows only one search.
        self._plan += [f"go {ROOM_OF[place]}", f"open {place}", f"take {self._goal.thing}"]

    def act(self, observation: str, critique: str | None) -> str:
        if observation == self._goal.text():
            self._begin(critique)
        elif observation == f"holding {self._goal.thing}":
            self._plan.append(f"put {self._goal.surface}")
        elif not self._plan:
            self._search(self._rng.choice(PLACES))
        return self._plan.pop(0)

    def criticise(self, summary: str) -> str:
        place = PLACES[HINTS.index(summary.split()[-1])]
        if self._rng.random() >= CRITIC_ACCURACY:
            place = self._rng.choice([p for p in PLACES if p != place])
        return f"<critic> go {ROOM_OF[place]} open {place} </critic>"


class Household:
    """A `Teachable` task set. For each object, one surface is held out, from every room."""

    name = "household"

    def problems(self, split: Split) -> Sequence[Task]:
        rng = random.Random(HOME_SEED)
        held_out = {(thing, rng.choice(SURFACES)) for thing in OBJECTS}
        goals = [
            Goal(thing, surface, start)
            for thing in OBJECTS
            for surface in SURFACES
            for start in ROOMS
            if ((thing, surface) in held_out) == (split == "heldout")
        ]
        rng.shuffle(goals)
        return [Task(f"{self.name}/{split}/{i}", self.name, split, goal.text()) for i, goal in enumerate(goals)]

    def environment(self, task: Task) -> HouseholdEnvironment:
        return HouseholdEnvironment(Goal.parse(task.problem))

    def statement(self, task: Task) -> str:
        return task.problem

    def teacher(self, task: Task, rng: random.Random) -> HouseholdTeacher:
        return HouseholdTeacher(Goal.parse(task.problem), rng)

    def vocabulary(self) -> Iterator[str]:
        yield from (*ROOMS, *PLACES, *SURFACES, *OBJECTS, *HINTS)
        yield from ("put", "from", "go", "open", "take", "has", "nothing", "holding", "in", "no")
        yield from ("sight", "invalid", "say", "or", "failed", "at", "right", "<critic>", "</critic>")
