"""The faults of the chaos tests, and how a training run must react to each.

A fault takes a `Campaign` (a run that is interrupted repeatedly) and a seeded random generator. Afterwards the run may
have ended or not. Raises AssertionError if the run reacted incorrectly.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import whole_runs
from campaign import LIMIT_S, Apply, Campaign, Fault
from faulty_run import HANGING, WRONG_VALUES


def kill_everything(run: Campaign, rng: random.Random) -> None:
    """SIGKILL to the launcher and all ranks at once, as an out-of-memory killer or a power cut would."""
    run.wait_for_random_time(rng)
    run.kill()


def kill_one_rank(run: Campaign, rng: random.Random) -> None:
    """SIGKILL to one rank: the launcher ends the others, reports it and returns 1."""
    run.wait_for_random_time(rng)
    ranks = run.ranks()
    if not ranks:
        return kill_everything(run, rng)
    rng.choice(ranks).kill()
    code, err = run.end()
    assert code in (0, 1), (code, err)  # 0: the run had just ended
    assert code == 0 or "SIGKILL" in err, err
    return None


def kill_launcher(run: Campaign, rng: random.Random) -> None:
    """SIGKILL to the launcher only: its ranks must end with it."""
    run.wait_for_random_time(rng)
    below = run.tree()[1:]
    run.process.kill()
    run.process.wait(30)
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not alive, f"outlived the launcher: {alive}"


def stop_by(number: signal.Signals) -> Apply:
    def apply(run: Campaign, rng: random.Random) -> None:
        """A stop request: the run saves and ends with 3, and no completed step is repeated."""
        run.wait_for_random_time(rng)
        saved = run.saved()
        run.process.send_signal(number)
        code, err = run.end()
        if code == 0 or not run.listened:  # it ended by itself, or had no signal handlers yet
            return
        assert code == 3, (code, err)
        assert run.saved() >= saved
        assert run.saved() == run.last_step(), f"stopped at {run.last_step()}, saved {run.saved()}"

    return apply


def suspend(run: Campaign, rng: random.Random) -> None:
    """SIGSTOP to one process for a while, like an overloaded node: the run continues normally."""
    run.wait_for_random_time(rng)
    tree = run.tree()
    if not tree:
        return
    victim = rng.choice(tree)
    try:
        victim.suspend()
        time.sleep(rng.uniform(0.2, 2.0))
        victim.resume()
    except psutil.NoSuchProcess:
        return
    time.sleep(0.5)
    if run.process.poll() is not None:
        code, err = run.end()
        assert code == 0, (code, err)


def _take_all(descriptor: int, disk: Path, spare: int) -> None:
    """Leaves `spare` bytes of the disk. The run goes on writing, so what was free may be gone a moment later."""
    for _ in range(100):
        try:
            os.posix_fallocate(descriptor, 0, max(1, shutil.disk_usage(disk).free - spare))
            return
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    raise AssertionError("the disk's free space changed a hundred times")


def fill_disk(run: Campaign, rng: random.Random) -> None:
    """The run folder's file system becomes full: one line, exit code 2; with free space, the run resumes."""
    run.wait_for_random_time(rng)
    ballast = run.folder.parent / "ballast"
    spare = rng.choice([0, 4096, 65536])
    try:
        with ballast.open("wb") as file:
            _take_all(file.fileno(), run.folder.parent, spare)
        code, err = run.end()
        if code != 0:
            assert code == 2, (code, err[-1500:])
            assert "Traceback" not in err, err[-1500:]
            assert "rank" not in err.splitlines()[-1], err[-1500:]
    finally:
        ballast.unlink(missing_ok=True)


def damage_checkpoint(run: Campaign, rng: random.Random) -> None:
    """The newest checkpoint is damaged while the run is stopped: it falls back to the previous one."""
    run.wait_for_step(rng.randint(5, run.steps - 4))
    run.kill()
    steps = run.checkpoints()
    if len(steps) < 2:
        return
    newest = run.folder / "checkpoints" / steps[-1]
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size > 0)
    victim = rng.choice(files)
    how = rng.choice(["empty", "cut", "flip", "remove"])
    data = bytearray(victim.read_bytes())
    if how == "empty":
        victim.write_bytes(b"")
    elif how == "cut":
        victim.write_bytes(data[: rng.randrange(len(data))])
    elif how == "flip":
        for _ in range(8):
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        if bytes(data) == victim.read_bytes() and not any(data):
            victim.unlink()
    else:
        victim.unlink()
    run.damaged(steps[-1], f"{victim.relative_to(newest)} {how}")


def tear_metrics(run: Campaign, rng: random.Random) -> None:
    """The last line of metrics.jsonl is truncated, like after a crash of the machine."""
    run.wait_for_random_time(rng)
    run.kill()
    path = run.folder / "metrics.jsonl"
    if path.exists() and (data := path.read_bytes()):
        last = data.rstrip(b"\n").rfind(b"\n") + 1
        if len(data) - last > 4:
            path.write_bytes(data[: rng.randrange(last + 1, len(data) - 2)])


def second_run(run: Campaign, rng: random.Random) -> None:
    """The same command is started a second time: it is rejected, and the first run continues."""
    run.wait_for_random_time(rng)
    time.sleep(0.3)  # the first run takes its lock before it starts ranks
    while run.process.poll() is None and not (run.folder / ".job.lock").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    if run.process.poll() is not None:
        return
    code, _, err = whole_runs.icrl(*run.command)
    if run.process.poll() is None:
        assert code == 2, (code, err)
        assert "another run writes there" in err, err


def hang_one_rank(run: Campaign, rng: random.Random) -> None:
    """A rank is suspended permanently; nothing detects it, so the user kills and restarts the run."""
    run.wait_for_random_time(rng)
    if not (ranks := run.ranks()):
        return kill_everything(run, rng)
    rng.choice(ranks).suspend()
    run.process.send_signal(signal.SIGTERM)  # the suspended rank cannot react to the stop request
    time.sleep(rng.uniform(0.2, 1.0))
    run.kill()
    return None


def misbehave(kinds: tuple[str, ...]) -> Apply:
    def apply(run: Campaign, rng: random.Random) -> None:
        """One episode's environment hangs or returns wrong values: at most that episode is lost."""
        run.wait_for_random_time(rng)
        kind = rng.choice(kinds)
        token = run.faults / f"{kind}.{len(run.records)}"
        token.touch()
        run.wait(lambda: not token.exists(), LIMIT_S)
        run.records[-1].detail = kind if not token.exists() else ""
        token.unlink(missing_ok=True)
        row = run.last_row()
        run.wait(lambda: run.last_row() > row, LIMIT_S)
        assert run.running() or run.end()[0] == 0, run.end()

    return apply


def _no_mount() -> str:
    if os.geteuid() != 0:
        return "root, to mount a small tmpfs"
    return "" if shutil.which("mount") else "mount"


FAULTS = (
    Fault("SIGKILL, everything", kill_everything),
    Fault("SIGKILL, one rank", kill_one_rank),
    Fault("SIGKILL, the launcher", kill_launcher),
    Fault("SIGTERM", stop_by(signal.SIGTERM)),
    Fault("SIGUSR1", stop_by(signal.SIGUSR1)),
    Fault("SIGSTOP for a moment", suspend),
    Fault("SIGSTOP for good", hang_one_rank),
    Fault("full disk", fill_disk, _no_mount),
    Fault("damaged checkpoint", damage_checkpoint),
    Fault("torn metrics", tear_metrics),
    Fault("two runs in one folder", second_run),
)
ENVIRONMENT_FAULTS = (
    Fault("hanging environment", misbehave(HANGING)),
    Fault("wrong environment", misbehave(WRONG_VALUES)),
)


def mount_small_disk(folder: Path, mib: int) -> bool:
    """Mounts a tmpfs of `mib` MiB on `folder`; returns False if that is not possible."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0
