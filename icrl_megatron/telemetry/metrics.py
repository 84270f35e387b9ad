"""What a step's episodes say about learning, as flat numbers. A name is left out where nothing was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from icrl_megatron.algo.credit import CreditReport
from icrl_megatron.algo.samples import critique_reward
from icrl_megatron.types import Attempt, DroppedEpisode, Episode

CRITIQUE_FREE = "success/critique_free"
"""Share of first attempts that succeeded: the solver alone, the number that counts."""
WITH_CRITIQUE = "success/with_critique"
"""Share of episodes that succeeded in any round."""
GENERATED = "tokens/generated"
"""Tokens that solver and critic generated in this step, of use or not: its cost."""
USED = "tokens/used"
"""Tokens of the episodes that the step trains on; partial rollouts bring some of them from the step before."""
HELDOUT = "heldout/critique_free"
"""Critique-free success on held-out problems."""

REPLY_ENTROPY = "attempt/entropy"
"""Mean -log pi of the tokens that the solver sampled, under the prompts it saw: an estimate of its entropy a token."""

HELDOUT_ATTEMPTS = "heldout/attempts"
"""How many held-out attempts of a task set were played to their end."""
EVALUATION_TOKENS = "tokens/evaluation"
"""Tokens that a held-out evaluation generated: none of them is in `GENERATED`, nor in tokens/generated_total."""
EVALUATION_TIME = "time/evaluation_s"
"""Seconds of a held-out evaluation: in no other phase of the step, nor in its tokens per second."""

Values = dict[str, list[float]]


def rollout_metrics(
    episodes: Sequence[Episode], dropped: Sequence[DroppedEpisode], report: CreditReport
) -> dict[str, float]:
    """Means over the episodes of one step; shares are in [0, 1], lengths in tokens.

    reward/<role>, reward/round_<k>, reward/overlong_penalty (of the samples that are trained), success/critique_free,
    success/with_critique, success/round_<k> (of the attempts of that round), success/source/<name> (critique-free),
    revision/gain (mean r(next) - r(this)), critique/tokens,
    task/<what the environment counted>,
    attempt/tokens, attempt/turns, attempt/lost_turns, attempt/stop_<reason>, tokens/used, episodes/*, groups/*,
    infrastructure/bad_answers and episodes/late (both among the episodes dropped), episodes/texts_cut (observations and
    summaries that were longer than allowed).
    """
    values: Values = defaultdict(list)
    for episode in episodes:
        _episode(episode, values)
    if (entropy := reply_entropy(episodes)) is not None:
        values[REPLY_ENTROPY].append(entropy)
    counts: dict[str, float] = {
        USED: sum(e.generated_tokens() for e in episodes),
        "episodes/played": len(episodes),
        "episodes/dropped": len(dropped),
        "episodes/late": sum(d.late for d in dropped),
        "episodes/texts_cut": sum(_cut_texts(attempt) for e in episodes for attempt in e.attempts),
        "episodes/too_long": sum(d.too_long for d in dropped),
        "infrastructure/bad_answers": sum(d.bad_answer for d in dropped),
        "groups/count": report.groups,
        "groups/dropped": report.dropped_groups,
        "samples/count": len(report.samples),
        "samples/dropped": report.dropped_samples,
    }
    if report.groups:
        counts["groups/flat_share"] = report.flat_groups / report.groups
    if report.samples:
        counts["samples/flat_share"] = sum(s.advantage == 0.0 for s in report.samples) / len(report.samples)
    if report.overlong_penalty is not None:
        counts["reward/overlong_penalty"] = report.overlong_penalty
    means = {name: sum(of) / len(of) for name, of in values.items()}
    return dict(sorted((means | {name: float(n) for name, n in counts.items()}).items()))


def _cut_texts(attempt: Attempt) -> int:
    return (attempt.summary_cut_chars > 0) + sum(turn.cut_chars > 0 for turn in attempt.turns)


def reply_entropy(episodes: Iterable[Episode]) -> float | None:
    """Mean -log pi of the solver's tokens, in nats; None where there is none."""
    turns = [turn for episode in episodes for attempt in episode.attempts for turn in attempt.turns]
    logprobs = [logprob for turn in turns for logprob in turn.completion.logprobs]
    return abs(sum(logprobs)) / len(logprobs) if logprobs else None  # no log-prob is above 0


def heldout_metrics(episodes: Iterable[Episode]) -> dict[str, float]:
    """Critique-free success and outcome on held-out problems, over all and by task set, from first attempts only; how
    many attempts of each task set these are means over, and what they cost in tokens."""
    values: Values = defaultdict(list)
    spent = 0
    for episode in episodes:
        spent += episode.generated_tokens()
        first = episode.attempts[0]
        values[HELDOUT].append(first.success)
        values[f"{HELDOUT}/{episode.task.source}"].append(first.success)
        values["heldout/reward"].append(first.outcome)
    found = {name: sum(of) / len(of) for name, of in sorted(values.items())}
    prefix = f"{HELDOUT}/"
    sizes = {
        f"{HELDOUT_ATTEMPTS}/{k.removeprefix(prefix)}": len(of) for k, of in values.items() if k.startswith(prefix)
    }
    cost = {EVALUATION_TOKENS: float(spent)} if values else {}
    return found | {name: float(size) for name, size in sorted(sizes.items())} | cost


def _episode(episode: Episode, values: Values) -> None:
    values[CRITIQUE_FREE].append(episode.attempts[0].success)
    values[f"success/source/{episode.task.source}"].append(episode.attempts[0].success)
    values[WITH_CRITIQUE].append(any(a.success for a in episode.attempts))
    for attempt in episode.attempts:
        _attempt(attempt, values)
    for critique in episode.critiques:
        this, following = episode.attempts[critique.round : critique.round + 2]
        values["reward/critique"].append(critique_reward(this, following))
        values["revision/gain"].append(following.outcome - this.outcome)
        values["critique/tokens"].append(len(critique.completion.ids))


def _attempt(attempt: Attempt, values: Values) -> None:
    role = "revision" if attempt.round else "attempt"
    values[f"reward/{role}"].append(attempt.outcome)
    values[f"reward/round_{attempt.round}"].append(attempt.outcome)
    values[f"success/round_{attempt.round}"].append(attempt.success)
    values["attempt/tokens"].append(sum(len(t.completion.ids) for t in attempt.turns))
    values["attempt/turns"].append(len(attempt.turns))
    values["attempt/lost_turns"].append(sum(t.action is None for t in attempt.turns))
    for reason in ("done", "max_turns", "repeated", "context", "length", "deadline"):
        values[f"attempt/stop_{reason}"].append(attempt.stop_reason == reason)
    for name, value in attempt.measures:
        values[f"task/{name}"].append(value)
