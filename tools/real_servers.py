"""Plays episodes with the real environment programs, through `icrl train` with the settings of a recipe.

    python tools/real_servers.py [NAME...] [--episodes 20] [--out real_servers]
        [--agentgym CHECKOUT] [--search-r1 CHECKOUT] [--servers-python PYTHON]

Per name, one step of the recipe without updates: its prompts, turns, rounds, thinking, parsers and limits are the
recipe's. The model is a tiny one with Qwen3's tokenizer and chat template, and a scripted engine plays in its place
(`real_players.py`). What else a machine without GPUs needs is in `CPU`, and printed. The last lines are a table, which
is also written to OUT/results.json; what is missing is named, with what gets it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from real_environments import ENVIRONMENTS, TIMEOUT_S, Machine, MissingError, Prepared
from real_players import PLANS_ENV
from rich.console import Console
from rich.table import Table

from icrl_megatron.telemetry.dumps import Rollouts
from icrl_megatron.telemetry.writer import METRICS_FILE, read_rows
from icrl_megatron.types import Episode

ROOT = Path(__file__).parents[1]
GROUP = 2
"""Episodes of a problem; two of them play it at the same time."""
CPU = (
    *("launch.device=cpu", "launch.ranks=1", "actor.precision=fp32", "actor.offload=none", "actor.recompute=none"),
    *("actor.tensor_parallel=1", "actor.sequence_parallel=false", "engine.tensor_parallel=1"),
    *("engine.kind=real_players:KIND", "debug.mode=rollout_only", "steps=1", "warm_start.epochs=null"),
    *("optim.warmup_steps=0", "algo.dynamic_sampling=false", "algo.max_resamples=0", "algo.on_no_signal=skip"),
    "eval.control_problems=0",
)
"""Besides the model, the data, and the number of problems and episodes."""
REFUSED = (
    *("Nothing happens", "Could not ", "Wrong item format", "No known action matches", "Ambiguous request"),
    "Your previous action is invalid",
)
"""How the environments begin an observation of an action that they refuse."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    recipe: str
    version: str
    finished: int = 0
    dropped: int = 0
    why_dropped: str = ""
    attempts: int = 0
    turns: float = 0.0
    """Mean of an attempt."""
    most_turns: int = 0
    first: int = 0
    """Episodes whose first attempt succeeded."""
    later: int = 0
    """Episodes solved after a critique."""
    reward: float = 0.0
    """Mean of the last attempts."""
    unread: int = 0
    """Replies without an action."""
    refused: int = 0
    """Actions that the environment refused."""
    stops: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    """Of the rollout."""
    failed: str = ""


def make_model(folder: Path) -> Path:
    """A tiny model with Qwen3's own tokenizer and chat template, and its vocabulary."""
    sys.path.insert(0, str(ROOT / "tests"))
    import qwen_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizers.build("qwen3")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 40_960}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(vocab_size=151_936, tie_word_embeddings=True, **shape, **heads, **ends)
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def play(name: str, prepared: Prepared, machine: Machine, model: Path) -> Row:
    """One step of the recipe: the episodes of a row."""
    plans = machine.folder / "plans.json"
    plans.write_text(json.dumps(prepared.plans), encoding="utf-8")
    run = machine.folder / "run"
    sizes = (f"rollout.tasks_per_step={machine.problems}", f"rollout.episodes_per_task={GROUP}")
    given = [f"run_dir={run}", f"model.path={model}", *CPU, *sizes, *prepared.changes]
    path = os.pathsep.join([str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", "from icrl_megatron.cli import main; main()", "train", prepared.recipe, *given]
    with _log(machine.folder / "train.log") as log:
        ended = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": path, PLANS_ENV: str(plans), "COLUMNS": "200"},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    said = (machine.folder / "train.log").read_text(errors="replace")
    blank = Row(name, prepared.recipe, prepared.version)
    if ended.returncode:
        return Row(**{**asdict(blank), "failed": f"code {ended.returncode}: ...{said[-400:]}"})
    return measured(blank, run, next((line.strip() for line in said.splitlines() if "episodes lost" in line), ""))


@contextlib.contextmanager
def _log(path: Path) -> Iterator[int]:
    with path.open("wb") as file:
        yield file.fileno()


def measured(row: Row, run: Path, why_dropped: str) -> Row:
    """The row of a run of one step, from its metrics and its episodes."""
    (metrics,) = [found for found in read_rows(run / METRICS_FILE) if "episodes/played" in found]
    episodes = Rollouts(run).episodes(1)
    attempts = [attempt for episode in episodes for attempt in episode.attempts]
    turns = [turn for attempt in attempts for turn in attempt.turns]
    return Row(
        row.name,
        row.recipe,
        row.version,
        finished=len(episodes),
        dropped=int(metrics["episodes/dropped"]),
        why_dropped=why_dropped,
        attempts=len(attempts),
        turns=round(len(turns) / max(1, len(attempts)), 1),
        most_turns=max((len(attempt.turns) for attempt in attempts), default=0),
        first=sum(episode.attempts[0].success for episode in episodes),
        later=sum(_solved_later(episode) for episode in episodes),
        reward=round(sum(episode.attempts[-1].outcome for episode in episodes) / max(1, len(episodes)), 2),
        unread=sum(turn.action is None for turn in turns),
        refused=sum(turn.action is not None and turn.observation.startswith(REFUSED) for turn in turns),
        stops=dict(Counter(attempt.stop_reason for attempt in attempts)),
        seconds=round(float(metrics["time/rollout_s"]), 1),
    )


def _solved_later(episode: Episode) -> bool:
    return episode.attempts[-1].success and not episode.attempts[0].success


def show(rows: Sequence[Row], missing: dict[str, str], console: Console) -> None:
    heads = ("environment", "server", "finished", "dropped", "attempts", "turns (most)", "solved 1st, later", "reward")
    table = Table(*heads, "no action", "refused", "ended by", "s", box=None, pad_edge=False)
    for row in rows:
        stops = ", ".join(f"{name} {count}" for name, count in sorted(row.stops.items()))
        table.add_row(
            *(row.name, row.version, str(row.finished), str(row.dropped), str(row.attempts)),
            *(f"{row.turns} ({row.most_turns})", f"{row.first}, {row.later}", f"{row.reward:.2f}"),
            *(str(row.unread), str(row.refused), row.failed or stops, f"{row.seconds}"),
        )
    console.print(table)
    for row in rows:
        if row.why_dropped:
            console.print(f"{row.name}: {row.why_dropped}", soft_wrap=True)
    for name, what in missing.items():
        console.print(f"{name}: not played. Missing: {what}", soft_wrap=True)


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help=f"Some of {', '.join(ENVIRONMENTS)}; all by default.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=GROUP, help="Of each environment; an even number.")] = 20,
    out: Annotated[Path, typer.Option(help="A new folder for everything that is written.")] = Path("real_servers"),
    agentgym: Annotated[Path | None, typer.Option(help="A checkout of AgentGym.")] = None,
    search_r1: Annotated[Path | None, typer.Option(help="A checkout of Search-R1.")] = None,
    servers_python: Annotated[str, typer.Option(help="Interpreter with the servers' packages.")] = sys.executable,
) -> None:
    """Plays the episodes and prints the table. Exits with code 1 if an environment that is here could not be played, or
    dropped an episode."""
    chosen = names or list(ENVIRONMENTS)
    if unknown := set(chosen) - set(ENVIRONMENTS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(ENVIRONMENTS)}")
    console = Console(width=max(200, Console().width))
    out.mkdir(parents=True, exist_ok=False)
    model = make_model(out.resolve() / "model")
    console.print(f"settings that differ from the recipes: {' '.join(CPU)}", soft_wrap=True)
    rows, missing = [], {}
    for name in chosen:
        folder = out.resolve() / name
        folder.mkdir()
        checkouts = [path.resolve() if path else None for path in (agentgym, search_r1)]
        machine = Machine(folder, servers_python, *checkouts, episodes // GROUP)
        begun = time.monotonic()
        try:
            rows.append(play(name, ENVIRONMENTS[name](machine), machine, model))
            console.print(f"{name}: {time.monotonic() - begun:.0f} s in all")
        except MissingError as error:
            missing[name] = str(error)
    show(rows, missing, console)
    result = {"rows": [asdict(row) for row in rows], "missing": missing, "changes": CPU}
    (out / "results.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    raise typer.Exit(int(any(row.failed or row.dropped for row in rows)))


if __name__ == "__main__":
    typer.run(main)
