"""Calls reward functions in a separate process: `python -m icrl_megatron.tasks.reward_worker REWARDS`.

REWARDS is JSON: the functions with their weights, and their range. Reads one JSON job per line and writes one JSON
verdict per line. Deadlines are the parent's: it kills a process that does not answer (`tasks/user_reward.py`).
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from icrl_megatron.tasks.line_worker import own_streams
from icrl_megatron.tasks.reward_call import Graded, RewardRaised, WeighedReward, WrongReward, total
from icrl_megatron.utils.errors import ConfigError
from icrl_megatron.utils.parent_watch import PARENT_ENV, die_with_parent
from icrl_megatron.utils.user_code import load

IMPORT: dict[str, Any] = {"import": True}
"""The first job. Not a part of starting, so that an error of the user's code is an answer."""


def main(given: str) -> None:
    asked, answers = own_streams()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    settings = json.loads(given)
    rewards: list[WeighedReward] = []
    for line in asked:
        job, verdict = json.loads(line), {}
        try:
            if job == IMPORT:
                rewards = [WeighedReward(name, load(name, "reward"), weight) for name, weight in settings["rewards"]]
            else:
                found = total(rewards, Graded(**job), settings["low"], settings["high"], settings["several"])
                verdict = {"reward": found.value, "measures": found.measures}
        except WrongReward as error:
            verdict = {"wrong": str(error)}
        except (RewardRaised, ConfigError) as error:
            verdict = {"raised": str(error)}
        print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    os.environ.pop(PARENT_ENV, None)  # it names the parent of the process that started this one
    die_with_parent()
    main(sys.argv[1])
