"""The commands of docs/AGENTS.md, from a bare model to an agent with its own tool, with a tiny model and few steps."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import byte_model
import pytest
from local_servers import Handler, threaded
from transformers import AutoModelForCausalLM
from whole_runs import batch, rows

pytest.importorskip("math_verify")
pytest.importorskip("mcp")

PAGE = Path(__file__).parents[2] / "docs" / "AGENTS.md"
HEADING = "## From a bare model to an agent with your own tools\n"
ON_CPU = (
    "launch.device=cpu", "launch.ranks=1", "actor.tensor_parallel=1", "actor.sequence_parallel=false",
    "actor.precision=fp32", "rollout.max_turn_tokens=24", "rollout.max_critique_tokens=24",
)  # fmt: skip
TINY = {
    "distill": ("tasks.limit=6", "distill.attempts=1"),
    "sft": (*ON_CPU[:2], "warm_start.episodes_per_step=2", "warm_start.epochs=1"),
    "train": (
        *ON_CPU, "steps=1", "rollout.tasks_per_step=2", "rollout.episodes_per_task=2", "rollout.max_turns=2",
        "algo.on_no_signal=train", "algo.max_resamples=0", "eval.problems=2", "eval.control_problems=0",
    ),
    "eval": ("--problems=2",),
}  # fmt: skip
"""Added to the commands of the page, and nothing else is changed."""
RECORDS = """#!{python}
import json, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


def reply_of(body: dict) -> str:
    """What a good model would say in its role."""
    prompt, brief = (message["content"] for message in body["messages"][:2])
    items = re.search(r"How many (\w+) and (\w+)", brief)
    assert items is not None
    if "You plan" in prompt:
        return "<plan>" + "\n".join(f"worker: count {item}" for item in items.groups()) + "</plan>"
    if "You do one job" in prompt:
        item = brief.partition("Your job:\ncount ")[2].partition("\n")[0]
        seen = re.search(r"observation\]\s*(\d+)", brief)
        call = json.dumps({"name": "stock", "arguments": {"item": item}})
        return f"{item}: {seen[1]}" if seen else f"<tool_call>{call}</tool_call>"
    if "You judge" in prompt:
        return "enough"
    if "You answer" in prompt:
        counted = re.findall(r": (\d+)", brief)
        return f"<answer>{sum(map(int, counted))}</answer>"
    return "<double_check>4, both were counted</double_check>"


class Model(Handler):
    """An OpenAI-compatible endpoint."""

    def do_POST(self) -> None:
        text = reply_of(json.loads(self.body()))
        usage = {"prompt_tokens": 7, "completion_tokens": 3}
        self.send_json({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


@pytest.fixture
def endpoint() -> Iterator[str]:
    with threaded(Model) as url:
        yield f"{url}/v1"


def commands_of_the_page(folder: Path) -> list[list[str]]:
    """Runs the page's shell in `folder`, where `icrl` writes down how it is called."""
    section = PAGE.read_text(encoding="utf-8").split(HEADING)[1].split("\n## ")[0]
    script = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    program, calls = folder / "bin" / "icrl", folder / "calls.jsonl"
    program.parent.mkdir()
    program.write_text(RECORDS.format(python=sys.executable, calls=str(calls)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    subprocess.run(["bash", "-euc", script], cwd=folder, env=environment, check=True, timeout=60)
    return [json.loads(line) for line in calls.read_text().splitlines()]


def test_the_page_leads_from_model_to_agent(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = commands_of_the_page(tmp_path)
    assert [command[0] for command in commands] == ["distill", "sft", "train", "eval"]
    model = byte_model.build(tmp_path / "models/Qwen3-4B", positions=16384)
    byte_model.use_template(model, "qwen3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    TINY["distill"] += (f"distill.endpoint.url={endpoint}",)
    ended = batch(tmp_path, {command[0]: [*command, *TINY[command[0]]] for command in commands})
    for name, how in ended.items():
        assert how.code == 0, f"{name}: {how.error}"
    traces = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    assert 3 <= len(traces) <= 6 and all('"stock"' in row["tools"] for row in traces)
    assert rows(tmp_path / "runs/traces/warm_start") and rows(tmp_path / "runs/agent")[-1]["step"] == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/agent/hf")
    assert json.loads((tmp_path / "runs/agent/eval/eval.json").read_text())
