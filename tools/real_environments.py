"""The environments that `real_servers.py` plays: what each needs here, and the settings that name it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import real_games
import real_search

from icrl_recipes.qwen3 import REQUEST_S

HELDOUT = 2
"""Held-out problems of each, evaluated before and after."""
TIMEOUT_S = 1800.0
JAVA_S = 300.0
"""For SciWorld's server to start a Java process, also on a machine that is busy with other programs."""
ALFWORLD, SEARCHQA, MULTIHOP = "qwen3_4b_alfworld_2xh100", "qwen3_4b_searchqa_4xh100", "coa_qwen3_8b_multihop_8xh100"
AGENTGYM = "git clone https://github.com/WooooDyy/AgentGym, and name it with --agentgym"
SEARCH_R1 = "git clone https://github.com/PeterGriffinJin/Search-R1, and name it with --search-r1"


@dataclass(frozen=True)
class Machine:
    """What the programs are run with."""

    folder: Path
    """Where everything is written."""
    python: str
    """The interpreter that has the servers' packages."""
    agentgym: Path | None
    search_r1: Path | None
    problems: int

    def lacks(self, *modules: str) -> str:
        """The modules that the servers' interpreter cannot import; empty if there are none."""
        names = [name for name in modules if not self._has(name)]
        return ", ".join(names)

    def _has(self, module: str) -> bool:
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        return subprocess.run([self.python, "-c", code], check=False).returncode == 0


@dataclass(frozen=True)
class Prepared:
    """An environment that can be played here."""

    recipe: str
    changes: tuple[str, ...]
    version: str
    plans: dict[str, list[str]] = field(default_factory=dict)


class MissingError(Exception):
    """Something that is not here; the message says what gets it."""


def alfworld(machine: Machine) -> Prepared:
    """In process, on households that are drawn here."""
    absent = [name for name in ("textworld", "alfworld", "fast_downward") if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingError(f"{', '.join(absent)}: pip install 'icrl-megatron[alfworld]'")
    games = machine.folder / "games"
    plans = real_games.write(games, machine.problems + HELDOUT)
    (games / "heldout").mkdir()
    for path in sorted(games.glob("game_*"))[-HELDOUT:]:
        path.rename(games / "heldout" / path.name)
    (games / "train").mkdir()
    for path in games.glob("game_*"):
        path.rename(games / "train" / path.name)
    return Prepared(
        ALFWORLD,
        (
            *("tasks.sources.0.serve.command=''", "tasks.sources.0.serve.count=1"),
            f"tasks.sources.0.data.train=[{games / 'train'}]",
            f"tasks.sources.0.data.heldout=[{games / 'heldout'}]",
        ),
        " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("alfworld", "textworld")),
        {f"Your task is to: {goal}.": actions for goal, actions in plans.items()},
    )


def textcraft(machine: Machine) -> Prepared:
    """AgentGym's server. `real_players` solves its tasks by the recipes that the prompt shows."""
    checkout = _agentgym(machine, "fastapi", "uvicorn", "gymnasium")
    command = _served(machine, checkout / "agentenv-textcraft", "agentenv_textcraft")
    return Prepared(ALFWORLD, (*_other("textcraft", command), *_ids(range(0, 10_000, 7), machine)), _revision(checkout))


def sciworld(machine: Machine) -> Prepared:
    """AgentGym's server. The package knows an action sequence for each of its tasks."""
    if shutil.which("java") is None:
        raise MissingError("Java, which scienceworld runs on: apt-get install default-jre-headless")
    checkout = _agentgym(machine, "fastapi", "uvicorn", "scienceworld")
    command = _served(machine, checkout / "agentenv-sciworld", "agentenv_sciworld")
    ids = range(0, 2120, 2120 // (machine.problems + HELDOUT))
    listed = subprocess.run(
        [machine.python, "-c", SOLUTIONS, json.dumps(list(ids)[: machine.problems + HELDOUT])],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    plans = json.loads(listed.stdout.splitlines()[-1])
    version = subprocess.run(
        [machine.python, "-c", "import importlib.metadata as m; print(m.version('scienceworld'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    changes = (
        *_other("sciworld", command),
        *_ids(ids, machine),
        "rollout.concurrency=4",  # a Java process each
        f"tasks.sources.0.data.request_timeout_s={JAVA_S:g}",
        f"rollout.environment_timeout_s={4 * JAVA_S + 50:g}",
    )
    return Prepared(ALFWORLD, changes, f"{_revision(checkout)}, scienceworld {version}", plans)


SOLUTIONS = """
import json, sys
from scienceworld import ScienceWorldEnv
without = {"5-1", "5-2", "9-1", "9-2", "9-3", "10-1", "10-2"}  # of AgentGym's numbering
env = ScienceWorldEnv()
games = [(n, i) for k, n in env.tasks.items() if k not in without for i in range(env.get_max_variations(n))]
found = {}
for number in json.loads(sys.argv[1]):
    env.load(*games[number], generateGoldPath=True)
    found[env.get_task_description()] = env.get_gold_action_sequence()
env.close()
print(json.dumps(found))
"""


def searchqa(machine: Machine) -> Prepared:
    """AgentGym's server, with its dense retriever in its own process."""
    checkout = _agentgym(machine, "fastapi", "uvicorn", "faiss", "torch", "transformers", "datasets")
    folder = _made_search(machine)
    command = f"{machine.python} {real_search.__file__} serve agentgym {folder} {{host}} {{port}} {checkout}"
    questions = min(machine.problems, real_search.QUESTIONS)
    changes = (
        f"tasks.sources.0.serve.command='{command}'",
        f"tasks.sources.0.data.train=[51713:{51713 + questions}]",
        f"tasks.sources.0.data.heldout=[0:{HELDOUT}]",
    )
    return Prepared(SEARCHQA, changes, f"{_revision(checkout)}, random encoder", _answers())


def retriever(machine: Machine) -> Prepared:
    """Search-R1's retrieval server under the recipe for multi-hop questions."""
    if machine.search_r1 is None:
        raise MissingError(f"Search-R1's program: {SEARCH_R1}")
    _require(machine, "fastapi", "uvicorn", "faiss", "torch", "transformers", "datasets")
    folder = _made_search(machine)
    command = f"{machine.python} {real_search.__file__} serve search-r1 {folder} {{host}} {{port}} {machine.search_r1}"
    changes = (f"tasks.sources.0.serve.command='{command}'", "tasks.sources.0.serve.count=1", *_asked(machine))
    return Prepared(MULTIHOP, changes, f"{_revision(machine.search_r1)}, random encoder", _answers())


def bm25(machine: Machine) -> Prepared:
    """The same recipe with its own server, `icrl serve-search`, in place of theirs."""
    if importlib.util.find_spec("bm25s") is None:
        raise MissingError("bm25s: pip install 'icrl-megatron[tasks]'")
    corpus = real_search.write_corpus(machine.folder)
    command = f"icrl serve-search {corpus} --host {{host}} --port {{port}}"
    changes = (f"tasks.sources.0.serve.command='{command}'", "tasks.sources.0.serve.count=1", *_asked(machine))
    return Prepared(MULTIHOP, changes, "this project", _answers())


ENVIRONMENTS: dict[str, Callable[[Machine], Prepared]] = {
    "alfworld": alfworld,
    "textcraft": textcraft,
    "sciworld": sciworld,
    "searchqa": searchqa,
    "retriever": retriever,
    "bm25": bm25,
}


def _agentgym(machine: Machine, *modules: str) -> Path:
    if machine.agentgym is None:
        raise MissingError(f"AgentGym's servers: {AGENTGYM}")
    _require(machine, *modules)
    return machine.agentgym


def _require(machine: Machine, *modules: str) -> None:
    if absent := machine.lacks(*modules):
        raise MissingError(f"{absent}: install them for {machine.python}, or name another with --servers-python")


def _served(machine: Machine, folder: Path, module: str) -> str:
    """The command of a server that reads files relative to its own folder. AgentGym's launchers do the same."""
    code = f'import uvicorn; uvicorn.run("{module}:app", host="{{host}}", port={{port}})'
    return f"cd {folder} && PYTHONHASHSEED=0 PYTHONPATH=. {machine.python} -c '{code}'"


def _other(name: str, command: str) -> tuple[str, ...]:
    """The recipe's settings on another environment of AgentGym, for which there is no recipe."""
    spelled = command.replace("'", "''")
    limit = f"tasks.sources.0.data.request_timeout_s={REQUEST_S:g}"  # the recipe's own, which a new name resets
    return (f"tasks.sources.0.name={name}", f"tasks.sources.0.serve.command='{spelled}'", limit)


def _ids(ids: Sequence[int], machine: Machine) -> tuple[str, ...]:
    """Settings of files with these ids, spread over the tasks."""
    changes = []
    for split, part in (("train", ids[: machine.problems]), ("heldout", ids[machine.problems :][:HELDOUT])):
        path = machine.folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"task_id": i}) + "\n" for i in part))
        changes.append(f"tasks.sources.0.data.{split}=[{path}]")
    return tuple(changes)


def _made_search(machine: Machine) -> Path:
    folder = machine.folder / "search"
    subprocess.run([machine.python, real_search.__file__, "make", folder], check=True, timeout=TIMEOUT_S)
    return folder


def _asked(machine: Machine) -> tuple[str, ...]:
    changes = []
    for split, asked in zip(("train", "heldout"), real_search.questions().values(), strict=True):
        path = machine.folder / f"{split}.jsonl"
        count = machine.problems if split == "train" else HELDOUT
        path.write_text("".join(json.dumps({"prompt": q, "label": a}) + "\n" for q, a in asked[:count]))
        changes.append(f"tasks.sources.0.data.{split}=[{path}]")
    return tuple(changes)


def _answers() -> dict[str, list[str]]:
    asked = [pair for pairs in real_search.questions().values() for pair in pairs]
    return {q: [f"<search>{q}</search>", f"<answer>{a}</answer>"] for q, a in asked}


def _revision(checkout: Path) -> str:
    git = ["git", "-C", str(checkout), "rev-parse", "--short=8", "HEAD"]
    found = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
    return f"{checkout.name} {found or '(no revision)'}"
