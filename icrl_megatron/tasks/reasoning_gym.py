"""Families of reasoning-gym by name: generated problems with their own scorers, which run in the grading processes.

    data.train   ["chain_sum:1000:1", "maze:200:1:2"]      family : problems : seed : level of its curriculum (optional)
    reply        any reasoning, its last <answer>...</answer>

Scorers give partial scores for garbage (0.01, some 0.25), so only a full score counts.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from icrl_megatron.agents.formats import last_tagged
from icrl_megatron.settings.task_sections import FamilyData
from icrl_megatron.tasks.datasets import content_hash, entries_of
from icrl_megatron.tasks.grader import Grader
from icrl_megatron.tasks.single_turn import AnswerCheck, Form, SingleTurnTasks, Verdict, of_answer
from icrl_megatron.types import Split, Task
from icrl_megatron.utils.errors import ConfigError

INSTRUCTION = "Think first, then give your final answer in exactly this form: <answer>the answer</answer>"


def _answer(reply: str) -> str | None:
    found = last_tagged(reply, "answer")
    return (found[1].strip() or None) if found else None


FORM = Form(_answer, hint="There is no answer between <answer> tags.", missing="There is no answer.")


class ReasoningGym(SingleTurnTasks):
    """A task set of the families of `tasks.sources[...].data`. Held-out problems are removed from training."""

    form = FORM
    data: FamilyData

    def load(self, split: Split) -> list[Task]:
        """Raises ConfigError on an unknown family or level, or if reasoning-gym is not installed."""
        held = {content_hash(_prompt(task)) for task in self.problems("heldout")} if split == "train" else set()
        return self._generate(split, held)

    def question(self, problem: dict[str, Any]) -> tuple[str, AnswerCheck]:
        made = {name: problem[name] for name in ("family", "count", "seed", "level", "index")}

        async def check(answer: str) -> Verdict:
            job = {"kind": "reasoning_gym", "answer": answer, **made}
            return of_answer(await self.grader.judge(job), answer, "answer")

        return f"{problem['prompt']}\n\n{INSTRUCTION}", check

    @cached_property
    def grader(self) -> Grader:
        return Grader(self.data.grading_workers, self.data.grading_timeout_s)

    def _generate(self, split: Split, seen: set[str]) -> list[Task]:
        tasks: list[Task] = []
        for text in entries_of(self.name, self.data, split, "families", "name some", "chain_sum:1000:1"):
            spec = parse(text)
            found = dataset(spec["family"], spec["count"], spec["seed"], spec["level"])
            for index in range(spec["count"]):
                prompt = str(found[index]["question"])
                # Small families generate duplicates.
                if content_hash(prompt) not in seen:
                    seen.add(content_hash(prompt))
                    problem = json.dumps({"prompt": prompt, "index": index, **spec})
                    tasks.append(
                        Task(f"{self.name}/{split}/{spec['family']}/{text}-{index}", self.name, split, problem)
                    )
        return tasks


def _prompt(task: Task) -> str:
    return str(json.loads(task.problem)["prompt"])


def parse(text: str) -> dict[str, Any]:
    """Splits `maze:200:1:2` into its parts. Raises ConfigError on anything else."""
    family, *numbers = text.split(":")
    if len(numbers) not in (2, 3) or not all(n.isdecimal() for n in numbers) or int(numbers[0]) < 1:
        raise ConfigError(
            f"{text!r} is not a family of reasoning-gym: write family:problems:seed or family:problems:seed:level"
        )
    count, seed, *level = (int(n) for n in numbers)
    return {"family": family, "count": count, "seed": seed, "level": level[0] if level else 0}


def dataset(family: str, count: int, seed: int, level: int) -> Any:
    """reasoning-gym's dataset; the same arguments give the same problems. Raises ConfigError as `load` does."""
    try:
        from reasoning_gym.factory import DATASETS, create_curriculum, create_dataset
    except ImportError as error:
        raise ConfigError(
            f"reasoning-gym cannot be imported ({error}); install it: pip install 'icrl-megatron[tasks]'"
        ) from error
    if family not in DATASETS:
        raise ConfigError(f"reasoning-gym has no family {family!r}; it has {', '.join(sorted(DATASETS))}")
    if level == 0:
        return create_dataset(family, size=count, seed=seed)
    try:
        curriculum = create_curriculum(family)
        highest = max((len(attribute.levels) - 1 for attribute in curriculum.attributes.values()), default=0)
        if level > highest:  # it would silently use the highest
            raise ValueError(f"the highest level is {highest}")
        curriculum.set_global_level(level)
        configuration = curriculum.generate_configuration({"size": count, "seed": seed})
    except ValueError as error:
        raise ConfigError(f"{family}:{count}:{seed}:{level}: reasoning-gym has no such level ({error})") from error
    return DATASETS[family][0](configuration)
