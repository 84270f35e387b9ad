"""What a batch job decides between its steps, and that its shell scripts are what Slurm and bash accept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from icrl_megatron.distributed.process import CONFIG_ERROR, HOPELESS, STOPPED
from icrl_megatron.engines.sglang_server import TESTED
from icrl_megatron.launch import job
from icrl_megatron.launch.job import MAX_CRASHES, MAX_UNSAVED, JobState, Reached, decide, progress
from icrl_megatron.utils.step_names import step_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").iterdir())


def at(text: str, saved: str = "-/-") -> Reached:
    return Reached(text, saved)


def test_success_is_done() -> None:
    assert decide(None, 0, False, at("-/4"), JobState()).action == "done"
    assert decide(None, 0, True, at("-/4"), JobState()).action == "done"  # it ended by itself before the signal came


def test_a_stop_is_requeued_as_long_as_the_run_gets_on() -> None:
    first = decide((STOPPED, ""), 0, True, at("-/4"), JobState())
    assert first.action == "requeue"
    assert decide((STOPPED, ""), 0, True, at("-/9"), first.state).action == "requeue"
    stuck = decide((STOPPED, ""), 0, True, at("-/4"), first.state)
    assert stuck.action == "fail"
    assert "time limit is too short" in stuck.message


def test_stops_that_cannot_save_are_not_requeued_for_ever() -> None:
    """Each gets to another step before it is killed, and none keeps anything."""
    state, actions = JobState(), []
    for step in range(MAX_UNSAVED):
        decision = decide(None, 137, True, at(f"-/{step % 2}", "-/step_000004"), state)
        actions.append(decision.action)
        state = decision.state
    assert actions == ["requeue"] * (MAX_UNSAVED - 1) + ["fail"]
    assert "3 times without a checkpoint after -/step_000004" in decision.message
    assert state.crashes == 0


def test_stops_that_cannot_save_are_requeued_while_checkpoints_are_written_between() -> None:
    state = JobState()
    for step in range(3 * MAX_UNSAVED):
        decision = decide(None, 137, True, at(f"-/{step}", f"-/step_{step:06d}"), state)
        assert decision.action == "requeue"
        state = decision.state


def test_crashes_are_retried_with_growing_waits_and_a_bound() -> None:
    state, waits = JobState(), []
    for crash in range(MAX_CRASHES):
        decision = decide(None, 1, False, at(f"-/{crash}"), state)
        assert decision.action == "retry"
        waits.append(decision.wait_s)
        state = decision.state
    assert waits == [waits[0], 2 * waits[0], 4 * waits[0]]
    last = decide(None, 1, False, at("-/99"), state)
    assert last.action == "fail"
    assert f"crashed {MAX_CRASHES + 1} times" in last.message


def test_the_same_step_is_not_tried_a_third_time() -> None:
    first = decide(None, 1, False, at("-/7"), JobState())
    second = decide(None, 1, False, at("-/7"), first.state)
    assert (first.action, second.action) == ("retry", "fail")
    assert "crashed twice at -/7" in second.message


def test_what_would_happen_again_is_never_retried() -> None:
    for code in (CONFIG_ERROR, HOPELESS):
        decision = decide((code, "actor.x: wrong"), 1, False, at("-/-"), JobState())
        assert (decision.action, decision.message) == ("fail", "actor.x: wrong")


def test_progress_is_the_last_whole_line(tmp_path: Path) -> None:
    assert progress(tmp_path) == Reached("-/-", "-/-")
    (tmp_path / "warm_start").mkdir()
    (tmp_path / "warm_start" / "metrics.jsonl").write_text('{"step": 12}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"step": 5, "los')
    for step in (999_999, 1_000_000, 1_000_002):
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
    for step in (999_999, 1_000_000):  # the last one was not finished
        (tmp_path / "checkpoints" / step_name(step) / "icrl.json").touch()
    assert progress(tmp_path) == Reached("12/4", "-/step_1000000")
    (tmp_path / "baseline_grpo").mkdir()
    assert progress(tmp_path) == Reached("12/4/baseline_grpo", "-/step_1000000/baseline_grpo/-/-")


def test_decisions_are_remembered(tmp_path: Path) -> None:
    words = ["decide", str(tmp_path / "outcome.json"), str(tmp_path / "state" / "state.json"), "1", "0"]
    words += ["train", "quickstart", f"run_dir={tmp_path}"]
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "icrl_megatron.launch.job", *words],
            cwd=ROOT, capture_output=True, text=True, check=True, timeout=60, env={"ICRL_BACK_OFF_S": "2"},
        )  # fmt: skip
        said.append((done.stdout.strip(), done.stderr))
    assert said[0][0] == "retry 2"
    assert said[1][0] == "fail"
    assert said[1][1].startswith("error: crashed twice")
    assert json.loads((tmp_path / "state" / "state.json").read_text())["crashes"] == 2


def test_another_number_of_ranks_than_the_recipe_s_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", "train", "quickstart", f"run_dir={tmp_path}", "launch.ranks=4"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    job.main(words)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    job.main(words)
    assert "note: quickstart is for 4 ranks (launch.ranks x launch.nodes), this job has 2" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_start_ranks_in_one_place(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    assert ("icrl_megatron.launch.agent" in script.read_text()) == (script.name == "step.sh")


def test_a_step_without_gpus_says_so(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "ICRL_PYTHON": sys.executable, "ICRL_LOGS": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "step.sh"), "train", "quickstart"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    assert done.returncode == 2
    assert "set ICRL_RANKS_PER_NODE to the number of ranks" in done.stderr


@pytest.mark.parametrize(
    ("outcome", "ended", "code", "said"),
    [
        ('{"code": 3, "message": "stopped on request"}', 0, 75, ""),
        ('{"code": 2, "message": "actor.x=1: wrong"}', 1, 2, "error: actor.x=1: wrong"),
        ('{"code": 1, "message": "step 3: nothing to learn"}', 1, 1, "error: step 3: nothing to learn"),
        (r'{"code": 2, "message": "it said \u001b]0;owned\u0007"}', 1, 2, r"error: it said \x1b]0;owned\x07"),
        ("", 1, 1, ""),
        ("", 0, 0, ""),
    ],
)
def test_a_step_alone_tells_how_its_ranks_ended(outcome: str, ended: int, code: int, said: str, tmp_path: Path) -> None:
    """Under NeMo-Run nobody reads what the ranks left but the step itself."""
    python = tmp_path / "python"
    leave = f"echo '{outcome}' > \"$ICRL_OUTCOME\"" if outcome else "true"
    real = f'[[ "$*" != *"icrl_megatron.launch.job said"* ]] || exec {sys.executable} "$@"'
    python.write_text(f"#!/bin/bash\n{real}\n{leave}\nexit {ended}\n")
    python.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "ICRL_PYTHON": str(python), "ICRL_RANKS_PER_NODE": "1", "ICRL_EXIT_STOPPED": "75"}
    env |= {"ICRL_HOME": str(ROOT), "ICRL_LOGS": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "step.sh"), "train", "quickstart"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stderr


def test_the_job_is_told_whether_servers_are_to_be_started(tmp_path: Path) -> None:
    words = ["check", "train", "rulebook_easy", f"run_dir={tmp_path}"]
    served = "tasks.sources=[{name: alfworld, data: {train: ['0:4'], heldout: ['4:8']}, serve: {command: 'x {port}'}}]"
    for more, said in (([], f"{tmp_path}\n"), ([served], f"{tmp_path}\nservers\n")):
        done = subprocess.run(
            [sys.executable, "-m", "icrl_megatron.launch.job", *words, *more],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, said), done.stderr


class RequeuedStep:
    """slurm/step.sh as NeMo-Run's script runs it again and again, with ranks that only leave an outcome."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands = folder / "scontrol.log"
        self._program("scontrol", f'echo "$*" >> {self.commands}')

    def _program(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(self, restarts: int, outcome: str, ended: int) -> subprocess.CompletedProcess[str]:
        leave = f"echo '{outcome}' > \"$ICRL_OUTCOME\"" if outcome else "true"
        real = f'[[ "$*" != *icrl_megatron.launch.agent* ]] && exec {sys.executable} "$@"'
        self._program("python", f"{real}\n{leave}\nexit {ended}")
        env = {
            "PATH": f"{self.folder}:/usr/bin:/bin", "ICRL_PYTHON": str(self.folder / "python"), "ICRL_BACK_OFF_S": "0",
            "ICRL_RANKS_PER_NODE": "1", "ICRL_EXIT_STOPPED": "75", "ICRL_LOGS": str(self.folder / "logs"),
            "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "ICRL_HOME": str(ROOT),
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(ROOT / "slurm" / "step.sh"), "train", "quickstart", f"run_dir={self.folder / 'run'}"],
            env=env, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip


def test_a_requeued_step_is_given_up_where_the_same_step_crashed_twice(tmp_path: Path) -> None:
    step = RequeuedStep(tmp_path)
    assert step.run(0, "", 1).returncode == 1
    again = step.run(1, "", 1)
    assert again.returncode == 1
    assert "crash 1 of at most 3" in again.stderr
    assert not step.commands.exists()
    last = step.run(2, "", 0)  # it would end well now, and is not tried
    assert last.returncode == 1
    assert "error: crashed twice at -/-" in last.stderr
    assert step.commands.read_text() == "update JobId=7 Requeue=0\n"


def test_a_requeued_step_goes_on_after_a_stop_unless_nothing_was_done_between(tmp_path: Path) -> None:
    step, stopped = RequeuedStep(tmp_path), '{"code": 3, "message": "stopped on request"}'
    (tmp_path / "run").mkdir()
    for restarts in range(3):
        done = step.run(restarts, stopped, 0)
        assert done.returncode == 75, done.stderr
        (tmp_path / "run" / "metrics.jsonl").write_text(f'{{"step": {restarts}}}\n')
    assert step.run(3, stopped, 0).returncode == 75
    stuck = step.run(4, stopped, 0)
    assert stuck.returncode == 1
    assert "error: stopped twice at -/2 without a step between" in stuck.stderr
    assert step.commands.read_text() == "update JobId=7 Requeue=0\n"


def test_a_wrong_setting_takes_the_right_to_be_requeued_away(tmp_path: Path) -> None:
    step = RequeuedStep(tmp_path)
    done = step.run(0, '{"code": 2, "message": "actor.x=1: wrong"}', 1)
    assert (done.returncode, done.stderr) == (2, "error: actor.x=1: wrong\n")
    assert step.commands.read_text() == "update JobId=7 Requeue=0\n"


def test_the_image_has_the_engine_that_is_accepted() -> None:
    (pinned,) = re.findall(r"^ARG SGLANG=(\S+)$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    assert pinned in TESTED


def test_a_step_names_the_first_node_without_slurms_clients(tmp_path: Path) -> None:
    """No image has scontrol."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$@ PYTHONPATH=$PYTHONPATH RANK=${RANK-none}"\n')
    python.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "ICRL_PYTHON": str(python), "ICRL_RANKS_PER_NODE": "1", "ICRL_SERVERS": "none"}
    env |= {"SLURM_NNODES": "4", "RANK": "7", "PYTHONPATH": "/image"}
    lists = {"node[0-3]": "node0", "rack[2-3]n[01,07-09],login": "rack2n01", "a,b,c,d": "a"}
    for nodes, first in lists.items():
        done = subprocess.run(
            ["bash", str(ROOT / "slurm" / "step.sh"), "train", "quickstart"],
            cwd=tmp_path, env={**env, "SLURM_JOB_NODELIST": nodes},
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        assert f"--master-addr={first} " in done.stdout
        assert f"PYTHONPATH={tmp_path}:{tmp_path}/kernels:{tmp_path}/recipes:/image RANK=none" in done.stdout


def test_a_step_that_gives_up_says_so_where_slurms_clients_do_not_work(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[[ "$*" != *"job decide"* ]] || echo fail\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\nexit 127\n")
    for program in (python, tmp_path / "scontrol"):
        program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ICRL_PYTHON": str(python), "ICRL_RANKS_PER_NODE": "1"}
    env |= {"ICRL_LOGS": str(tmp_path), "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "step.sh"), "train", "quickstart"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1
    assert (tmp_path / "given_up.12").exists()


def test_what_an_older_job_of_the_same_number_left_does_not_count(tmp_path: Path) -> None:
    left = [tmp_path / name for name in ("given_up.12", "job.12.json", "outcome.12.0.json")]
    for path in left:
        path.write_text('{"code": 3, "message": ""}')
    env = {"PATH": "/usr/bin:/bin", "ICRL_PYTHON": "true", "ICRL_RANKS_PER_NODE": "1", "ICRL_EXIT_STOPPED": "75"}
    env |= {"ICRL_LOGS": str(tmp_path), "SLURM_JOB_ID": "12"}
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "step.sh"), "train", "quickstart"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in left)
