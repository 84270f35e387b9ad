"""What a batch job decides between its steps, and that its shell scripts are what Slurm and bash accept."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from commands import Done, python, run

from icrl_megatron.distributed.process import CONFIG_ERROR, HOPELESS, STOPPED
from icrl_megatron.launch import job
from icrl_megatron.launch.job import MAX_CRASHES, MAX_UNSAVED, Decision, JobState, Reached, decide, progress
from icrl_megatron.utils.step_names import step_name

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").iterdir())


def job_command(*words: str, **env: str) -> Done:
    return python("-m", "icrl_megatron.launch.job", *words, cwd=ROOT, env={**os.environ, **env})


def step_script(folder: Path, *overrides: str, **env: str) -> Done:
    """slurm/step.sh in a folder that is also its folder for logs and the first on its PATH."""
    names = {"PATH": f"{folder}:/usr/bin:/bin", "ICRL_LOGS": str(folder), "ICRL_EXIT_STOPPED": "75"} | env
    return run("bash", ROOT / "slurm" / "step.sh", "train", "quickstart", *overrides, cwd=folder, env=names)


def program(folder: Path, name: str, body: str) -> Path:
    """An executable bash script."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


CRASH, TIME_LIMIT = (None, 1, False), (None, 137, True)
STOP = ((STOPPED, ""), 0, True)
"""How a step ended: (the ranks' outcome, exit code, whether the job was told to stop)."""


def decisions(*ends: tuple[tuple[tuple[int, str] | None, int, bool], str, str]) -> list[Decision]:
    """What is decided after each of these steps: (how it ended, progress, newest checkpoint)."""
    found, state = [], JobState()
    for end, text, saved in ends:
        found.append(decide(*end, Reached(text, saved), state))
        state = found[-1].state
    return found


def actions(found: list[Decision]) -> list[str]:
    return [decision.action for decision in found]


@pytest.mark.parametrize("told_to_stop", [False, True])
def test_success_is_done_even_if_a_stop_was_requested(told_to_stop: bool) -> None:
    assert actions(decisions(((None, 0, told_to_stop), "-/4", "-/-"))) == ["done"]


def test_a_stopped_run_is_requeued_while_it_makes_progress_and_a_killed_one_while_it_saves() -> None:
    found = decisions(*((STOP, f"-/{step}", "-/-") for step in (4, 9, 9)))
    assert actions(found) == ["requeue", "requeue", "fail"]
    assert "time limit is too short" in found[-1].message
    killed = decisions(*((TIME_LIMIT, f"-/{step}", f"-/step_{step:06d}") for step in range(3 * MAX_UNSAVED)))
    assert set(actions(killed)) == {"requeue"}


def test_a_run_that_is_always_killed_before_it_saves_is_requeued_a_limited_number_of_times() -> None:
    found = decisions(*((TIME_LIMIT, f"-/{step % 2}", "-/step_000004") for step in range(MAX_UNSAVED)))
    assert actions(found) == ["requeue"] * (MAX_UNSAVED - 1) + ["fail"]
    assert "3 times without a checkpoint after -/step_000004" in found[-1].message
    assert found[-1].state.crashes == 0


def test_crashes_are_retried_with_growing_waits_and_a_limit() -> None:
    *retried, last = decisions(*((CRASH, f"-/{crash}", "-/-") for crash in range(MAX_CRASHES + 1)))
    assert actions(retried) == ["retry"] * MAX_CRASHES
    first = retried[0].wait_s
    assert [decision.wait_s for decision in retried] == [first, 2 * first, 4 * first]
    assert last.action == "fail" and f"crashed {MAX_CRASHES + 1} times" in last.message


def test_a_step_that_crashed_twice_is_not_retried() -> None:
    first, second = decisions((CRASH, "-/7", "-/-"), (CRASH, "-/7", "-/-"))
    assert (first.action, second.action) == ("retry", "fail")
    assert "crashed twice at -/7" in second.message


@pytest.mark.parametrize("code", [CONFIG_ERROR, HOPELESS])
def test_an_error_that_would_repeat_is_not_retried(code: int) -> None:
    (decision,) = decisions((((code, "actor.x: wrong"), 1, False), "-/-", "-/-"))
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
        done = job_command(*words, ICRL_BACK_OFF_S="2")
        assert done.returncode == 0
        said.append((done.stdout.strip(), done.stderr))
    assert [out for out, _ in said] == ["retry 2", "fail"]
    assert said[1][1].startswith("error: crashed twice")
    assert json.loads((tmp_path / "state" / "state.json").read_text())["crashes"] == 2


def test_a_job_with_another_number_of_ranks_than_the_recipe_prints_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", "train", "quickstart", f"run_dir={tmp_path}", "launch.ranks=4"]
    monkeypatch.setenv("ICRL_WORLD_SIZE", "4")
    job.main(words)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ICRL_WORLD_SIZE", "2")
    job.main(words)
    assert "note: quickstart is for 4 ranks (launch.ranks x launch.nodes), this job has 2" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_start_ranks_in_one_place(script: Path) -> None:
    run("bash", "-n", script, check=True)
    assert ("icrl_megatron.launch.agent" in script.read_text()) == (script.name == "step.sh")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_step_without_gpus_names_the_setting_for_ranks(tmp_path: Path) -> None:
    done = step_script(tmp_path, ICRL_PYTHON=sys.executable)
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
def test_a_step_reports_how_its_ranks_ended(outcome: str, ended: int, code: int, said: str, tmp_path: Path) -> None:
    """Under NeMo-Run, only the step itself reads the ranks' outcome file."""
    leave = f"echo '{outcome}' > \"$ICRL_OUTCOME\"" if outcome else "true"
    real = f'[[ "$*" != *"icrl_megatron.launch.job said"* ]] || exec {sys.executable} "$@"'
    fake = program(tmp_path, "python", f"{real}\n{leave}\nexit {ended}")
    done = step_script(tmp_path, ICRL_PYTHON=str(fake), ICRL_RANKS_PER_NODE="1", ICRL_HOME=str(ROOT))
    assert done.returncode == code, done.stderr
    assert said in done.stderr


def test_the_check_for_a_container_does_not_look_for_sglang_here(tmp_path: Path) -> None:
    for verb, code in (("check", 2), ("check-for-image", 0)):
        done = job_command(verb, "train", "rulebook_easy", "engine.kind=sglang", f"run_dir={tmp_path}")
        assert (done.returncode, "has no SGLang" in done.stderr) == (code, code == 2), done.stderr


def ranks(folder: Path, outcome: str, ended: int) -> Path:
    """A Python that runs all but the ranks' agent, in whose place it only leaves an outcome."""
    leave = f"echo '{outcome}' > \"$ICRL_OUTCOME\"" if outcome else "true"
    real = f'[[ "$*" != *icrl_megatron.launch.agent* ]] && exec {sys.executable} "$@"'
    return program(folder, "python", f"{real}\n{leave}\nexit {ended}")


class RequeuedStep:
    """slurm/step.sh as NeMo-Run's script runs it after each requeue, with ranks that only leave an outcome."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.commands = folder, folder / "scontrol.log"
        program(folder, "scontrol", f'echo "$*" >> {self.commands}')

    def run(self, restarts: int, outcome: str, ended: int) -> Done:
        fake = ranks(self.folder, outcome, ended)
        env = {"ICRL_PYTHON": str(fake), "ICRL_BACK_OFF_S": "0", "ICRL_RANKS_PER_NODE": "1", "ICRL_HOME": str(ROOT)}
        env |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "ICRL_LOGS": str(self.folder / "logs")}
        return step_script(self.folder, f"run_dir={self.folder / 'run'}", **env)


def test_a_requeued_step_that_crashed_twice_is_not_run_again(tmp_path: Path) -> None:
    step = RequeuedStep(tmp_path)
    assert step.run(0, "", 1).returncode == 1
    again = step.run(1, "", 1)
    assert again.returncode == 1
    assert "crash 1 of at most 3" in again.stderr
    assert not step.commands.exists()
    last = step.run(2, "", 0)  # the ranks would succeed, but are not started
    assert last.returncode == 1
    assert "error: crashed twice at -/-" in last.stderr
    assert step.commands.read_text() == "update JobId=7 Requeue=0\n"


def test_a_stopped_step_is_requeued_until_it_makes_no_progress(tmp_path: Path) -> None:
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


def test_a_wrong_setting_disables_requeueing(tmp_path: Path) -> None:
    step = RequeuedStep(tmp_path)
    done = step.run(0, '{"code": 2, "message": "actor.x=1: wrong"}', 1)
    assert (done.returncode, done.stderr) == (2, "error: actor.x=1: wrong\n")
    assert step.commands.read_text() == "update JobId=7 Requeue=0\n"


class BatchJob:
    """slurm/icrl_8b.sbatch with this machine's bash in place of Slurm, and ranks that only leave an outcome."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "logs" / "job.7"
        program(folder, "srun", 'while [[ $1 == --* ]]; do shift; done; echo run >> "$ICRL_LOGS/runs"; exec "$@"')
        program(folder, "squeue", "echo RUNNING")
        command = f"echo ' Command={ROOT}/slurm/icrl_8b.sbatch'"
        program(folder, "scontrol", f'[ "$1" = show ] && {command} || echo "$*" >> {folder}/scontrol.log')

    def run(self, restarts: int, outcome: str, ended: int) -> Done:
        """Each of its steps ends like this."""
        fake = ranks(self.folder, outcome, ended)
        env = {"PATH": f"{self.folder}:/usr/bin:/bin", "ICRL_PYTHON": str(fake), "ICRL_BACK_OFF_S": "0"}
        env |= {"ICRL_RANKS_PER_NODE": "2", "ICRL_LOGS": str(self.folder / "logs"), "RECIPE": "quickstart"}
        env |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_RESTART_COUNT": str(restarts)}
        env |= {"SLURM_SUBMIT_DIR": str(self.folder)}
        script = ROOT / "slurm" / "icrl_8b.sbatch"
        return run("bash", script, f"run_dir={self.folder / 'run'}", cwd=self.folder, env=env)

    def runs(self) -> int:
        return len((self.folder / "logs" / "runs").read_text().split())

    def requeued(self) -> int:
        log = self.folder / "scontrol.log"
        return log.read_text().split("\n").count("requeue 7") if log.exists() else 0


def test_a_job_runs_a_crashed_step_again_and_gives_up_where_it_crashes_twice(tmp_path: Path) -> None:
    batch = BatchJob(tmp_path)
    done = batch.run(0, "", 1)
    assert done.returncode == 1
    assert "crash 1 of at most 3, at -/- (code 1)" in done.stderr and "error: crashed twice at -/-" in done.stderr
    assert (batch.runs(), batch.requeued()) == (3, 0)  # the third one only decided
    by_hand = batch.run(1, "", 0)
    assert by_hand.returncode == 0, by_hand.stderr
    assert batch.runs() == 4


def test_a_stopped_job_is_requeued_and_one_with_a_wrong_setting_is_not(tmp_path: Path) -> None:
    batch = BatchJob(tmp_path)
    assert batch.run(0, '{"code": 3, "message": "stopped on request"}', 0).returncode == 0
    assert (batch.runs(), batch.requeued()) == (1, 1)
    wrong = batch.run(1, '{"code": 2, "message": "actor.x=1: wrong"}', 1)
    assert (wrong.returncode, wrong.stderr.count("error: actor.x=1: wrong")) == (2, 1)
    assert (batch.runs(), batch.requeued()) == (2, 1)


def test_a_job_that_is_killed_from_outside_goes_on_until_it_saves_nothing(tmp_path: Path) -> None:
    """A preemption or a failed node ends the batch script before it can say how its step ended."""
    batch = BatchJob(tmp_path)
    for restarts in range(4):
        done = batch.run(restarts, "", 0)
        assert done.returncode == (1 if restarts == 3 else 0), done.stderr
    assert "error: ended with 1 while stopping, 3 times without a checkpoint" in done.stderr


def test_a_step_finds_the_first_node_without_slurms_clients(tmp_path: Path) -> None:
    """No image has scontrol."""
    fake = program(tmp_path, "python", 'echo "$@ PYTHONPATH=$PYTHONPATH RANK=${RANK-none}"')
    env = {"ICRL_PYTHON": str(fake), "ICRL_RANKS_PER_NODE": "1"}
    env |= {"SLURM_NNODES": "4", "RANK": "7", "PYTHONPATH": "/image"}
    lists = {"node[0-3]": "node0", "rack[2-3]n[01,07-09],login": "rack2n01", "a,b,c,d": "a"}
    for nodes, first in lists.items():
        done = step_script(tmp_path, SLURM_JOB_NODELIST=nodes, **env)
        assert done.returncode == 0, done.stderr
        assert f"--master-addr={first} " in done.stdout
        assert f"PYTHONPATH={tmp_path}:{tmp_path}/kernels:{tmp_path}/recipes:/image RANK=none" in done.stdout


def test_a_step_that_gives_up_without_slurms_clients_leaves_a_file(tmp_path: Path) -> None:
    fake = program(tmp_path, "python", '[[ "$*" != *"job decide"* ]] || echo fail')
    program(tmp_path, "scontrol", "exit 127")
    env = {"ICRL_PYTHON": str(fake), "ICRL_RANKS_PER_NODE": "1", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}
    assert step_script(tmp_path, **env).returncode == 1
    assert (tmp_path / "job.12" / "given_up").read_text() == "1\n"


def test_files_of_an_earlier_job_with_the_same_id_are_removed(tmp_path: Path) -> None:
    left = [tmp_path / "job.12" / name for name in ("given_up", "state.json", "outcome.json", "ended")]
    left[0].parent.mkdir()
    for path in left:
        path.write_text('{"code": 3, "message": ""}')
    done = step_script(tmp_path, ICRL_PYTHON="true", ICRL_RANKS_PER_NODE="1", SLURM_JOB_ID="12")
    assert done.returncode == 0, done.stderr
    assert not any(path.exists() for path in left)
