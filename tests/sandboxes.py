"""Whether this machine can make a sandbox, and the limits that tests give it."""

from __future__ import annotations

import pytest

from icrl_megatron.config import ConfigError
from icrl_megatron.tasks.sandbox import Limits, Sandbox

LIMITS = Limits(cpu_s=2.0, memory_bytes=256 << 20)


def why_not() -> str:
    """Why no sandbox can be made here; empty when one can."""
    try:
        Sandbox(LIMITS).check()
    except ConfigError as error:
        return str(error)
    return ""


REASON = why_not()
sandboxed = pytest.mark.skipif(bool(REASON), reason=REASON)
