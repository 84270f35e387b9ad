"""Games in ALFWorld's own domain and grammar, which its package has: households drawn here (`real_servers.py`).

The package has none of ALFWorld's games, whose download this machine may not reach. A household here has fewer things
than theirs, and the same kinds of receptacles, objects, tasks and actions.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RECEPTACLES = {
    "cabinet": ("Cabinet", 3, True),
    "countertop": ("CounterTop", 2, False),
    "desk": ("Desk", 1, False),
    "drawer": ("Drawer", 3, True),
    "fridge": ("Fridge", 1, True),
    "microwave": ("Microwave", 1, True),
    "shelf": ("Shelf", 2, False),
    "sinkbasin": ("SinkBasin", 1, False),
}
"""Name -> its type in the domain, how many there are, whether they can be closed."""
OBJECTS = ("apple", "bread", "egg", "mug", "plate", "potato", "tomato")
"""All can be cleaned, heated and cooled here."""
TARGETS = ("cabinet", "countertop", "desk", "drawer", "shelf")
WITH = {"clean": "sinkbasin 1", "hot": "microwave 1", "cool": "fridge 1"}
VERBS = {"clean": "clean", "hot": "heat", "cool": "cool"}
FACTS = {"clean": "isClean", "hot": "isHot", "cool": "isCool"}


@dataclass(frozen=True)
class Household:
    """A game's task, and the actions that solve it."""

    goal: str
    """As the game words it, without the final period."""
    problem: str
    """In PDDL."""
    solution: tuple[str, ...]


def write(folder: Path, count: int, seed: int = 0) -> dict[str, list[str]]:
    """Writes `count` games with different tasks below `folder`. Returns goal -> the actions that win it.

    Raises ModuleNotFoundError without alfworld."""
    found = importlib.util.find_spec("alfworld")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("alfworld")
    data = Path(next(iter(found.submodule_search_locations))) / "data"
    domain, grammar = ((data / name).read_text() for name in ("alfred.pddl", "alfred.twl2"))
    solutions = {}
    for number, household in enumerate(_drawn(count, seed)):
        game = {
            "pddl_domain": domain,
            "grammar": grammar.replace("UNKNOWN GOAL", household.goal),
            "pddl_problem": household.problem,
            "solvable": True,
        }
        path = folder / f"game_{number:03}" / "game.tw-pddl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(game))
        solutions[household.goal] = list(household.solution)
    return solutions


def _drawn(count: int, seed: int) -> Iterator[Household]:
    rng = random.Random(seed)
    tasks = [(state, o, r) for state in ("", *WITH) for o in OBJECTS for r in TARGETS]
    for state, wanted, target in rng.sample(tasks, count):
        yield _household(rng, state, wanted, target)


def _household(rng: random.Random, state: str, wanted: str, target: str) -> Household:
    places = [(name, i) for name, (_, many, _) in RECEPTACLES.items() for i in range(1, many + 1)]
    start = rng.choice([place for place in places if place[0] != target and place[0] not in ("fridge", "microwave")])
    others = [(other, rng.choice(places)) for other in OBJECTS if other != wanted]
    lines = [f"loc{i} - location" for i in range(len(places) + 1)]
    facts = [f"(atLocation agent1 loc{len(places)})", "(= (total-cost) 0)"]
    for i, (name, number) in enumerate(places):
        kind, _, closable = RECEPTACLES[name]
        thing = _id(name, number)
        lines.append(f"{thing} - receptacle")
        facts += [f"(receptacleAtLocation {thing} loc{i})", f"(receptacleType {thing} {kind}Type)"]
        facts += [f"(openable {thing})"] if closable else []
    for thing, (name, number) in [(wanted, start), *others]:
        where = _id(name, number)
        lines.append(f"{thing}_bar_0 - object")
        facts += [f"(objectType {thing}_bar_0 {thing.title()}Type)", f"(inReceptacle {thing}_bar_0 {where})"]
        facts += [f"(objectAtLocation {thing}_bar_0 loc{places.index((name, number))})"]
        facts += [f"({can} {thing}_bar_0)" for can in ("pickupable", "cleanable", "heatable", "coolable")]
    kinds = [kind for kind, _, _ in RECEPTACLES.values()]
    lines += [*(f"{kind}Type - rtype" for kind in kinds), *(f"{o.title()}Type - otype" for o in OBJECTS)]
    facts += [f"(canContain {kind}Type {o.title()}Type)" for kind in kinds for o in OBJECTS]
    changed = f"({FACTS[state]} ?o) " if state else ""
    goal = (
        f"(exists (?r - receptacle) (and (receptacleType ?r {RECEPTACLES[target][0]}Type) (exists (?o - object) "
        f"(and (objectType ?o {wanted.title()}Type) {changed}(inReceptacle ?o ?r)))))"
    )
    listed, known = "\n ".join(lines), "\n ".join(facts)
    problem = (
        f"(define (problem drawn) (:domain alfred)\n(:objects agent1 - agent\n {listed})\n(:init {known})\n"
        f"(:goal (and {goal}))\n(:metric minimize (total-cost)))\n"
    )
    words = f"put a {state} {wanted} in {target}" if state else f"put a {wanted} in {target}"
    return Household(words, problem, tuple(_solution(state, wanted, start, target)))


def _id(name: str, number: int) -> str:
    """The id of a receptacle. The game numbers things of a kind in the reverse order of their ids, and it calls a sink
    whose id has a basin a sinkbasin."""
    reverse = RECEPTACLES[name][1] - number
    return f"sink_bar_{reverse}_bar_sinkbasin" if name == "sinkbasin" else f"{name}_bar_{reverse}"


def _solution(state: str, wanted: str, start: tuple[str, int], target: str) -> Iterator[str]:
    first, last = f"{start[0]} {start[1]}", f"{target} 1"
    yield f"go to {first}"
    if RECEPTACLES[start[0]][2]:
        yield f"open {first}"
    yield f"take {wanted} 1 from {first}"
    if state:
        yield f"go to {WITH[state]}"
        yield f"{VERBS[state]} {wanted} 1 with {WITH[state]}"
    yield f"go to {last}"
    if RECEPTACLES[target][2]:
        yield f"open {last}"
    yield f"move {wanted} 1 to {last}"
