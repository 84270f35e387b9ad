"""reasoning-gym families as tasks: reproducible problems, success only for full scores, scorers that raise."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("reasoning_gym", reason="the extra icrl-megatron[tasks] is not installed")

from icrl_megatron.settings.task_options import ReasoningGymSource
from icrl_megatron.settings.task_sections import FamilyData
from icrl_megatron.tasks import registry
from icrl_megatron.tasks.datasets import check_no_leak, content_hash, subset_of
from icrl_megatron.tasks.reasoning_gym import ReasoningGym, dataset
from icrl_megatron.utils.errors import ConfigError


def gym(train: list[str], heldout: list[str]) -> ReasoningGym:
    made = registry.of_source(ReasoningGymSource("reasoning_gym", data=FamilyData(train=train, heldout=heldout)))
    assert isinstance(made, ReasoningGym)
    return made


def test_problems_are_reproducible_unique_and_disjoint() -> None:
    one, other = (gym(["chain_sum:40:1", "gcd:20:1"], ["chain_sum:10:2"]) for _ in range(2))
    assert one.problems("train") == other.problems("train")
    train, heldout = one.problems("train"), one.problems("heldout")
    check_no_leak(train, heldout)
    prompts = [content_hash(json.loads(t.problem)["prompt"]) for t in (*train, *heldout)]
    assert len(set(prompts)) == len(prompts)
    assert {subset_of(t) for t in train} == {"reasoning_gym/chain_sum", "reasoning_gym/gcd"}


def test_heldout_problems_are_removed_from_training() -> None:
    same = gym(["chain_sum:30:1"], ["chain_sum:10:1"])
    assert len(same.problems("heldout")) == 10 and len(same.problems("train")) <= 20
    check_no_leak(same.problems("train"), same.problems("heldout"))


async def test_only_a_full_score_is_a_success() -> None:
    task_set = gym(["chain_sum:3:1", "countdown:2:1", "number_sorting:2:1:1"], ["gcd:1:1"])

    async def attempt(index: int, answer: str) -> bool:
        environment = task_set.environment(task_set.problems("train")[index])
        await environment.reset()
        action = environment.parse(f"hm <answer>no</answer> <answer> {answer} </answer>")
        assert action == answer
        assert (await environment.step(action)).done
        assert environment.outcome() == float(environment.success())
        return environment.success()

    right = str(dataset("chain_sum", 3, 1, 0)[0]["answer"])
    assert await attempt(0, right)
    for index, answer in [(0, f"{right}1"), (0, "nonsense"), (3, "1 +"), (3, "((("), (5, "import os")]:
        assert not await attempt(index, answer)
    environment = task_set.environment(task_set.problems("train")[0])
    assert environment.parse("<answer> </answer>") is None and environment.parse("7") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chain_sum", "not a family of reasoning-gym"),
        ("chain_sum:0:1", "not a family"),
        ("chain_summ:3:1", "has no family 'chain_summ'"),
        ("chain_sum:3:1:99", "no such level"),
    ],
)
def test_invalid_families_are_rejected(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gym([text], ["gcd:1:1"]).problems("train")
    with pytest.raises(ConfigError, match=r"data\.train"):
        gym([], ["gcd:1:1"]).problems("train")
