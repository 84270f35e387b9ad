"""`icrl env check URL`: identifies a server by playing the first step of an episode on it."""

from __future__ import annotations

import asyncio
import time

from rich.console import Console
from rich.text import Text

from icrl_megatron.tasks import agentgym_dialects as dialects
from icrl_megatron.tasks.agentgym import examine
from icrl_megatron.tasks.base import BadAnswer, EnvironmentFailure
from icrl_megatron.tasks.servers import Pool, Refused
from icrl_megatron.utils.console import PlainConsole, text
from icrl_megatron.utils.errors import ConfigError


def check(url: str, kind: str, task: int, timeout_s: float, console: Console | None = None) -> int:
    """Prints what the server is and returns 0. Raises ConfigError if it is down or of no known kind."""
    if kind and kind not in dialects.NAMES:
        raise ConfigError(f"--kind={kind}: choose one of {', '.join(dialects.NAMES)}")
    out = console or PlainConsole()
    begun = time.perf_counter()
    tried = {}
    _require_up(url, timeout_s)
    for name in [kind] if kind else dialects.NAMES:
        try:
            dialect, first, then = asyncio.run(examine(name, url, task, timeout_s))
            # Dialect B has the same fields for all environments.
            known = name if kind or dialect == "A" else "an environment that does not say which it is"
        except EnvironmentFailure as error:
            tried[name] = str(error)
            continue
        out.print(Text.assemble(text(f"{url} is a server of "), (known, "bold"), f", dialect {dialect}"))
        out.print(f"  first observation  {_cut(first)!r}")
        out.print(f"  after one action   {_cut(then.observation)!r}")
        out.print(f"  reward {then.reward:g}, done {then.done}, {time.perf_counter() - begun:.2f} s in all")
        return 0
    listed = "\n  ".join(f"{name}: {error}" for name, error in tried.items())
    raise ConfigError(f"{url} answers, but not as {kind or 'any environment that is known'}:\n  {listed}")


def _require_up(url: str, timeout_s: float) -> None:
    pool = Pool([url], timeout_s)

    async def ask() -> None:
        try:
            await pool.call(pool.servers[0], "GET", "/")
        except (Refused, BadAnswer):
            return  # it answered

    try:
        asyncio.run(ask())
    except EnvironmentFailure as error:
        raise ConfigError(f"{error} Start it, or correct the address") from error


def _cut(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:160]}..."
