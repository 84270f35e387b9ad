"""Python as a tool: a program of the model runs in the sandbox, and the model observes what it printed."""

from __future__ import annotations

import asyncio

from icrl_megatron.agents.tools import Arguments, ToolFailure, ToolSpec
from icrl_megatron.tasks.base import EnvironmentFailure
from icrl_megatron.tasks.sandbox import OUTPUT_BYTES, Ran, Sandbox, SandboxLimits

SHOWN_CHARS = 1536
"""Of the output, and of an error (Chain-of-Agents' own limit, arXiv 2508.13167)."""


class Python:
    """Runs one program a call; nothing is kept between calls."""

    spec = ToolSpec.of_text(
        "python", "Runs a Python program and returns what it prints. Nothing is kept between calls.", "code"
    )

    def __init__(self, limits: SandboxLimits) -> None:
        """Raises ConfigError if there is no sandbox."""
        self.sandbox = Sandbox(limits)

    async def call(self, arguments: Arguments) -> str:
        try:
            ran = await asyncio.to_thread(self.sandbox.run, arguments["code"])
        except EnvironmentFailure as error:
            raise ToolFailure(str(error)) from error
        return _shown(ran, self.sandbox.limits)


def _shown(ran: Ran, limits: SandboxLimits) -> str:
    """The output, and what ended the program unless it ended by itself."""
    printed = _cut(ran.output.decode(errors="replace").strip())
    why = {
        "done": "",
        "failed": ran.errors.decode(errors="replace").strip()[-SHOWN_CHARS:] or "The program failed.",
        "cpu": f"The program was stopped: it used more than {limits.cpu_s:g} s of CPU time.",
        "clock": f"The program was stopped after {limits.clock_s:g} s.",
        "output": f"The program was stopped: it printed more than {OUTPUT_BYTES >> 20} MiB.",
    }[ran.end]
    return "\n".join(part for part in (printed, why) if part) or "The program printed nothing; use print()."


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}\n[... {len(text) - SHOWN_CHARS} characters cut]"
