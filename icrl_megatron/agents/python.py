"""Python as a tool: each call runs a program in the sandbox (utils/sandbox.py).

With `keeps_state`, the variables of an episode's earlier calls exist in later ones. No process lives between calls:
the earlier calls that ended well run again first, without their output. So nothing is held while the model writes, and
an episode that is replayed from its calls reaches the same state. The costs: the limits of a call include the earlier
ones, and what depends on the clock may differ.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from icrl_megatron.agents.text import head, plain, tail
from icrl_megatron.agents.tools import Arguments, Tool, ToolFailure, ToolSpec
from icrl_megatron.utils.errors import EnvironmentFailure
from icrl_megatron.utils.sandbox import OUTPUT_BYTES, Ran, Sandbox, SandboxLimits

NO_OUTPUT = "The program printed nothing."
LOST = "The earlier calls could not be run again, so their variables are gone. This call did not run."
_CELLS = Path(__file__).with_name("python_cells.py")


@dataclass(frozen=True)
class PythonLimits:
    cpu_s: float = 5.0
    """CPU seconds. It sets the wall-clock limit (`SandboxLimits.clock_s`): keep `ToolLimits.call_s` above that."""
    memory_bytes: int = 512 << 20
    code_chars: int = 20_000
    output_chars: int = 8_000
    """Of what a program prints; the rest is left out, which is marked."""
    error_chars: int = 1_500
    """Of the end of a traceback."""


class Python:
    """Answers `code` with what it prints, the value of its last expression, and the end of its traceback.

    Raises ConfigError if the sandbox does not work on this machine.
    """

    def __init__(self, limits: PythonLimits, keeps_state: bool = False, processes: int = 0) -> None:
        """`processes`: programs that run at a time; 0 for one per CPU."""
        self.limits, self.keeps_state = limits, keeps_state
        kept = "Variables are kept between calls." if keeps_state else "Each call starts anew."
        self.spec = ToolSpec.of_text(
            "python",
            f"Runs Python code and answers what it prints. {kept} There is no network.",
            "code",
            maxLength=limits.code_chars,
        )
        self._sandbox = Sandbox(SandboxLimits(limits.cpu_s, limits.memory_bytes))
        self._sandbox.check()
        self._driver = _CELLS.read_text(encoding="utf-8")
        self._threads = ThreadPoolExecutor(processes or os.cpu_count() or 1, thread_name_prefix="python-tool")

    async def call(self, arguments: Arguments) -> str:
        return (await self.run(arguments["code"], ()))[0]

    def open(self) -> Tool:
        """This tool for one episode."""
        return _Notebook(self) if self.keeps_state else self

    async def run(self, code: str, earlier: tuple[str, ...]) -> tuple[str, str]:
        """What the model observes, and how the cell ended: ran, raised, lost (an earlier one failed) or stopped."""
        nonce = secrets.token_hex(16)
        request = json.dumps({"code": code, "earlier": earlier, "nonce": nonce, "seeded": self.keeps_state})
        program = f"REQUEST = {request!r}\n{self._driver}"
        try:
            ran = await asyncio.get_running_loop().run_in_executor(self._threads, self._sandbox.run, program)
        except (EnvironmentFailure, OSError) as error:
            raise ToolFailure(str(error)) from error
        return self._observed(ran, nonce)

    def _observed(self, ran: Ran, nonce: str) -> tuple[str, str]:
        errors, mark, end = ran.errors.decode(errors="replace").rpartition(f"\n{nonce} ")
        if not mark:  # it was stopped before it could write the mark
            errors, end = end, "stopped"
        elif end.strip() == "lost":
            return LOST, "lost"
        parts = (
            head(plain(ran.output.decode(errors="replace")).strip("\n"), self.limits.output_chars),
            tail(plain(errors).strip("\n"), self.limits.error_chars),
            self._stopped(ran) if end == "stopped" else "",
        )
        return "\n".join(part for part in parts if part) or NO_OUTPUT, end.strip()

    def _stopped(self, ran: Ran) -> str:
        reasons = {
            "cpu": f"Stopped: it used more than {self.limits.cpu_s:g} s of CPU time.",
            "clock": "Stopped: it took too long.",
            "output": f"Stopped: it printed more than {OUTPUT_BYTES >> 20} MiB.",
            "failed": "The program was ended.",
        }
        return reasons.get(ran.end, "The program ended before its last line.")


class _Notebook:
    """The Python tool of one episode: its earlier calls that ended well."""

    def __init__(self, tool: Python) -> None:
        self.spec, self._tool = tool.spec, tool
        self._cells: tuple[str, ...] = ()

    async def call(self, arguments: Arguments) -> str:
        code = arguments["code"]
        text, end = await self._tool.run(code, self._cells)
        if end == "ran":
            self._cells = (*self._cells, code)
        elif end == "lost":
            self._cells = ()
        return text
