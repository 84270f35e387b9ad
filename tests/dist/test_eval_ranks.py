"""`icrl eval` on several ranks: the results of one rank, one message per error, and a clean stop."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import psutil
import pytest
from whole_runs import icrl, signalled, start, when

from icrl_megatron.distributed.process import KILLED

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SERVER = Path(__file__).resolve().parents[1] / "agentgym_server.py"


def evaluated(model: Path, out: Path, *words: str) -> dict[str, object]:
    code, shown, err = icrl("eval", str(model), "--out", str(out), *words)
    assert code == 0, err
    assert shown.count("written to") == 1
    found: dict[str, object] = json.loads((out / "eval.json").read_text())
    del found["seconds"]  # of this call
    return found


def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of this test put their temporary files into the folder that is returned."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def model(finished_run: Path) -> Path:
    return finished_run / "hf"


def test_sampling_on_one_and_on_two_ranks_gives_the_same_numbers(model: Path, tmp_path: Path) -> None:
    words = ("--problems", "11", "--samples", "3", "--rounds", "2")
    found = [evaluated(model, tmp_path / f"on_{ranks}", *words, f"launch.ranks={ranks}") for ranks in (1, 2)]
    assert found[0] == found[1]
    assert len(found[0]["successes"]) == 11  # type: ignore[arg-type]
    greedy = evaluated(model, tmp_path / "greedy", "--problems", "11", "rollout.temperature=0")
    assert greedy["generated_tokens"] != found[0]["generated_tokens"]


def test_other_critic_and_environment_servers_on_two_ranks(model: Path, tmp_path: Path) -> None:
    options = ("--problems", "4", "--rounds", "2", "--critic", str(model.parent / "warm_start" / "hf"))
    source = "tasks.sources=[{name: alfworld, data: {train: ['0:4'], heldout: ['4:8']}}]"
    serve = f"tasks.sources.0.serve.command={sys.executable} {SERVER} alfworld {{port}} {{host}}"
    words = (*options, source, serve, "rollout.max_turns=2")
    found = [evaluated(model, tmp_path / f"on_{ranks}", *words, f"launch.ranks={ranks}") for ranks in (1, 2)]
    assert found[0] == found[1]
    (log,) = (tmp_path / "on_2" / "logs").glob("servers.*/alfworld.0.log")
    assert log.read_text().count("POST /create") > 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["engine.tensor_parallel=2"], "engine.tensor_parallel=2: engine.kind=local has only 1"),
        (["engine.kind=sglang", "engine.tensor_parallel=3"], "engine.tensor_parallel=3 does not divide the 2 ranks"),
        (["rollout.temperature=-1"], "rollout.temperature=-1"),
        (["rollout.temperature=0", "--samples", "2"], "greedy decoding gives the same reply every time"),
        (["--critic", "http://127.0.0.1:9/v1", "--rounds", "2"], "no OpenAI-compatible endpoint"),
        (["rollout.context_tokens=8", "--rounds", "2"], "problems are too long"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    temporary = own_temporary_folder(tmp_path, monkeypatch)
    code, _, err = icrl("eval", str(model), "--problems", "4", "launch.ranks=2", "--out", str(tmp_path / "out"), *words)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    kept = {path for path in temporary.glob("icrl_*") if str(path) not in err}
    assert not kept


def test_stop_ends_all_ranks_and_writes_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = own_temporary_folder(tmp_path, monkeypatch)
    words = ("--samples", "2000", "--rounds", "2", "launch.ranks=2", "--out", str(tmp_path / "out"))
    running = start("eval", str(model), *words)
    tree: list[psutil.Process] = []

    def both_play() -> bool:
        tree[:] = psutil.Process(running.pid).children(recursive=True)
        return sum(one.cpu_times().user > 6 for one in tree) == 2

    when(running, both_play)
    code, _, err = signalled(running, signal.SIGINT)
    assert code == KILLED, err
    assert "stopping: nothing is written" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not psutil.wait_procs(tree, timeout=10)[1]
    assert not list(temporary.glob("icrl_*"))
