"""CPU seconds of a training step without generation: this trainer against TRL's GRPOTrainer, on a CPU.

    make .venv/.installed-bench
    python tools/bench_step.py --out benchmarks/step_cpu.json

Both train the same Hugging Face folder, a tiny Qwen3 (4 layers, hidden 128, vocabulary 8192, tied head), in float32
with AdamW, on the same 16 sequences: 2 prompts of 64 tokens with 8 completions of 64 each, canned, with fixed rewards.
One round of attempts is plain GRPO, so both compute the same update; the gradient norm and entropy of the first step
must agree. A step consists of:

- ours: episodes -> credit -> pack -> score -> train (forward, loss, backward, clipping, AdamW, all metrics and
  assertions) -> push of the weights to an engine that discards them. Scoring does nothing from the second step on.
- TRL's: one iteration of its training loop, with TRL's hook `rollout_func` returning the canned ids: fetching the
  rows, decoding and rewards, advantages, padding, `compute_loss`, backward, clipping, fused AdamW. `beta` 0,
  `num_iterations` 1, no second scoring pass, no gradient checkpointing, SDPA attention, no logging, nothing saved, and
  the micro-batch with the lowest cost. Without a GPU TRL's fused head scores every position (on a GPU, those of the
  completions, as ours does everywhere): `--prompt-tokens 8` shows how much of the difference is due to this.

Each peer is a separate, persistent process; they take turns of a few steps, so that load on the machine affects both
equally. The results are user plus system time of the process per step; the first turn (warm-up) is not counted.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import bench_schema
import typer
from bench_schema import Bar
from rich.console import Console
from rich.progress import track
from rich.table import Table

from icrl_megatron.settings.schema import Settings, TinyModel

PEERS = {"icrl": "this project", "trl": "TRL GRPOTrainer"}
BAR = 0.8
"""Maximum CPU seconds of ours, relative to TRL's."""
MODEL = TinyModel(layers=4, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=384)
VOCABULARY = 8192
PROMPTS, GENERATIONS = 2, 8
SEQUENCE_TOKENS, PROMPT_TOKENS = 128, 64
TRL_MICRO_BATCH = 2
"""TRL's micro-batch in sequences; its time per step is 1.58, 1.45, 1.38, 1.33 s at 16, 8, 4, 2."""
LEARNING_RATE = 1e-6
SPECIAL_TOKENS = 7
"""Lower ids are the tokenizer's special tokens; prompts and completions use only words."""
WARM_UP = 3
MAX_STEPS = 2_000
AGREEMENT = 1e-3
"""Relative; TRL adds 1e-4 to a group's standard deviation and we add 1e-6, which changes the advantages by 2e-4."""


@dataclass(frozen=True)
class Canned:
    """Canned results of generation: `completions[p][g]` with `rewards[g]` for prompt p."""

    prompts: list[tuple[int, ...]]
    completions: list[list[tuple[int, ...]]]
    rewards: list[float]


@dataclass(frozen=True)
class Turn:
    """Means per step over one turn."""

    cpu_seconds: float
    wall_seconds: float


def canned(prompt_tokens: int) -> Canned:
    rng = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(SPECIAL_TOKENS, VOCABULARY) for _ in range(count))

    return Canned(
        prompts=[ids(prompt_tokens) for _ in range(PROMPTS)],
        completions=[[ids(SEQUENCE_TOKENS - prompt_tokens) for _ in range(GENERATIONS)] for _ in range(PROMPTS)],
        rewards=[float(g % 3 == 0) for g in range(GENERATIONS)],
    )


class Turns:
    """A peer's side of the turns: reads a number of steps from stdin and writes a report of them."""

    def __init__(self) -> None:
        # Libraries also print to stdout, but only reports may go to the parent.
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.first_step: dict[str, float] = {}
        self.left = self.steps = 0
        self._wait()

    def another(self) -> bool:
        """Call after every step; at the end of a turn, waits for the next one. Returns False if there are no more."""
        self.left -= 1
        if self.left > 0:
            return True
        turn = Turn((_cpu_seconds() - self.cpu) / self.steps, (time.perf_counter() - self.wall) / self.steps)
        print(json.dumps({"turn": asdict(turn), "first_step": self.first_step}), file=self.out, flush=True)
        return self._wait()

    def _wait(self) -> bool:
        line = sys.stdin.readline()
        if not line:
            return False
        self.left = self.steps = int(line)
        self.cpu, self.wall = _cpu_seconds(), time.perf_counter()
        return True


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run_ours(folder: Path, data: Canned) -> None:
    from icrl_megatron.distributed import grid as grids
    from icrl_megatron.distributed import platform as device

    device.prepare("cpu")
    from icrl_megatron.actor.actor import Actor
    from icrl_megatron.algo.credit import credit
    from icrl_megatron.algo.headers import headers_of
    from icrl_megatron.algo.samples import tokens_of
    from icrl_megatron.data.packing import lay_out, pack
    from icrl_megatron.engines.sync import WeightSync
    from icrl_megatron.model.weights import Gatherer
    from icrl_megatron.rollout.fixed_sources import NoEngine

    settings = Settings()
    settings.actor.precision = "fp32"
    grids.single_process()
    grid = grids.build(settings)
    actor = Actor(settings, folder, grid)
    sync = WeightSync(Gatherer(actor.rows, grid), NoEngine())
    episodes = _episodes(data)
    by_id = {f"{e.task.task_id}#{e.index}": e for e in episodes}
    turns, more = Turns(), True
    while more:
        samples = credit(headers_of(episodes), settings.algo, train_critic=True).samples
        layout = lay_out(samples, settings.algo, micro_batch_tokens=settings.actor.micro_batch_tokens)
        whole = {s.sample_id: tokens_of(by_id[s.episode_id()], s.role, s.round, settings.algo) for s in samples}
        plan = pack(layout, whole)
        stats = actor.train(plan, actor.score(plan), LEARNING_RATE)
        sync.push()
        turns.first_step = turns.first_step or {"grad_norm": stats.grad_norm, "entropy": stats.metrics["entropy"]}
        more = turns.another()
    grids.shutdown()


def _episodes(data: Canned) -> list[Any]:
    from icrl_megatron.types import Attempt, Completion, Episode, Task
    from icrl_megatron.types import Turn as Spoken

    found = []
    for p, (prompt, completions) in enumerate(zip(data.prompts, data.completions, strict=True)):
        task = Task(f"bench/{p}", "bench", "train", "")
        for g, (ids, reward) in enumerate(zip(completions, data.rewards, strict=True)):
            spoken = Spoken(Completion(ids, (-9.0,) * len(ids), "length", 0), "", None, "", ())
            attempt = Attempt(0, prompt, prompt, (spoken,), reward, reward == 1.0, "", "length")
            found.append(Episode(task, g, (attempt,), ()))
    return found


def run_trl(folder: Path, data: Canned) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(ids) for ids in data.prompts]
    turns = Turns()

    def rollout(prompts: list[str], _: Any) -> dict[str, Any]:
        order = [texts.index(p) for p in prompts]
        assert order == sorted(order) and len(order) == PROMPTS * GENERATIONS
        completions = [list(ids) for of_prompt in data.completions for ids in of_prompt]
        return {"prompt_ids": [list(data.prompts[p]) for p in order], "completion_ids": completions, "logprobs": None}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return data.rewards * (len(completions) // GENERATIONS)

    class TakeTurns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = not turns.another()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            turns.first_step = turns.first_step or {name: logs[name] for name in ("grad_norm", "entropy")}

    trainer = GRPOTrainer(
        model=str(folder),
        reward_funcs=reward,
        args=GRPOConfig(**_trl_settings(folder.parent / "trl")),
        train_dataset=Dataset.from_dict({"prompt": texts * MAX_STEPS}),
        processing_class=tokenizer,
        rollout_func=rollout,
        callbacks=[TakeTurns()],
    )
    trainer.train()


def _trl_settings(out: Path) -> dict[str, Any]:
    """GRPOConfig's arguments: our algorithm's values, and TRL's fastest options."""
    ours = Settings()
    return {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
        "per_device_train_batch_size": TRL_MICRO_BATCH,
        "gradient_accumulation_steps": PROMPTS * GENERATIONS // TRL_MICRO_BATCH,
        "num_generations": GENERATIONS,
        "max_completion_length": SEQUENCE_TOKENS,
        "max_steps": MAX_STEPS,
        "shuffle_dataset": False,
        "loss_type": "grpo",
        "beta": 0.0,
        "num_iterations": 1,
        "epsilon": ours.algo.clip_low,
        "epsilon_high": ours.algo.clip_high,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": ours.optim.beta1,
        "adam_beta2": ours.optim.beta2,
        "weight_decay": ours.optim.weight_decay,
        "max_grad_norm": ours.optim.clip_grad,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_first_step": True,
        "logging_steps": MAX_STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


class Peer:
    """The parent's side of one peer's process."""

    def __init__(self, name: str, folder: Path, threads: int, prompt_tokens: int) -> None:
        self.name = name
        self.log = folder.parent / f"{name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, f"--peer={name}", f"--folder={folder}", f"--prompt-tokens={prompt_tokens}"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def take(self, steps: int) -> tuple[Turn, dict[str, float]]:
        """Runs `steps` steps: their cost and the first step's metrics. Raises RuntimeError if the peer fails."""
        stdin, stdout = self._pipes()
        print(steps, file=stdin, flush=True)
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed:\n{self.log.read_text()[-3000:]}")
        report = json.loads(line)
        return Turn(**report["turn"]), report["first_step"]

    def stop(self) -> None:
        stdin, _ = self._pipes()
        stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout


def _measure(rounds: int, steps: int, threads: int, prompt_tokens: int) -> dict[str, list[Turn]]:
    from icrl_megatron.model.tiny import build_tiny

    turns: dict[str, list[Turn]] = {name: [] for name in PEERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        build_tiny(folder, MODEL, [f"w{i}" for i in range(VOCABULARY - SPECIAL_TOKENS)], seed=0)
        peers = [Peer(name, folder, threads, prompt_tokens) for name in PEERS]
        try:
            _check_agreement(*(peer.take(WARM_UP)[1] for peer in peers))
            for round in track(range(rounds), description="measuring", console=Console(stderr=True)):
                # The peers alternate in going first.
                for peer in peers if round % 2 == 0 else peers[::-1]:
                    turns[peer.name].append(peer.take(steps)[0])
        finally:
            for peer in peers:
                peer.stop()
    return turns


def _check_agreement(ours: dict[str, float], theirs: dict[str, float]) -> None:
    for name, value in ours.items():
        if abs(theirs[name] - value) > AGREEMENT * abs(value):
            raise RuntimeError(f"the first steps differ in {name}: {value} here, {theirs[name]} in TRL")


def _report(turns: dict[str, list[Turn]]) -> dict[str, Any]:
    """Medians per step, the ratio of the medians and of each round, and the bar."""
    names = ("cpu_seconds", "wall_seconds")
    medians = {p: {n: statistics.median(getattr(t, n) for t in ts) for n in names} for p, ts in turns.items()}
    share = {n: medians["icrl"][n] / medians["trl"][n] for n in names}
    by_round = [a.cpu_seconds / b.cpu_seconds for a, b in zip(turns["icrl"], turns["trl"], strict=True)]
    return {
        "medians": medians,
        "step_as_share_of": {"trl": share},
        "share_by_round": {"trl": by_round},
        "bars": [Bar("CPU seconds of a step as a share of TRL's", share["cpu_seconds"], BAR)],
    }


def _print(report: dict[str, Any]) -> None:
    columns = ("", "CPU s per step", "wall s per step", "ours: CPU", "lowest", "highest", "bar")
    table = Table(*columns, title="step without generation, CPU, float32")
    for peer, text in PEERS.items():
        median = report["medians"][peer]
        cells = [text, f"{median['cpu_seconds']:.3f}", f"{median['wall_seconds']:.3f}"]
        if peer == "trl":
            by_round, (bar,) = report["share_by_round"]["trl"], report["bars"]
            cells.append(f"{report['step_as_share_of']['trl']['cpu_seconds']:.2f}")
            cells += [f"{min(by_round):.2f}", f"{max(by_round):.2f}"]
            cells.append(f"{bar.limit:g} {bar.verdict()}")
        table.add_row(*cells)
    Console().print(table)


def main(
    out: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("benchmarks/step_cpu.json"),
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each peer; medians are reported.")] = 9,
    steps: Annotated[int, typer.Option(min=1, help="Steps per turn.")] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, max=SEQUENCE_TOKENS - 1, help=f"Of each sequence's {SEQUENCE_TOKENS} tokens.")
    ] = PROMPT_TOKENS,
    peer: Annotated[str | None, typer.Option(hidden=True, help="Be this peer.")] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True, help="The model of that peer.")] = None,
) -> None:
    """Measures both and writes the medians; exits with 1 if the bar is missed, and with 2 without TRL."""
    if peer is not None and folder is not None:
        runs: dict[str, Callable[[Path, Canned], None]] = {"icrl": run_ours, "trl": run_trl}
        runs[peer](folder, canned(prompt_tokens))
        return
    bench_schema.require("bench", "trl", "accelerate", "datasets")
    turns = _measure(rounds, steps, threads, prompt_tokens)
    report = _report(turns)
    _print(report)
    packages = ("torch", "trl", "transformers", "accelerate", "datasets", "megatron-core", "numpy")
    shape = {
        "vocabulary": VOCABULARY,
        "sequences": PROMPTS * GENERATIONS,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": SEQUENCE_TOKENS - prompt_tokens,
    }
    about = bench_schema.about(packages)
    about |= {
        "machine": f"{about['machine']}, {threads} threads used",
        "shape": asdict(MODEL) | shape,
        "steps_per_turn": steps,
        "trl_micro_batch": TRL_MICRO_BATCH,
    }
    everything = {name: [asdict(t) for t in ts] for name, ts in turns.items()}
    bench_schema.write(out, "step", about | report | {"runs": everything})
    print(f"written to {out}")
    if not all(bar.held for bar in report["bars"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
