"""On PYTHONPATH, the last rank fails where the training loop is imported: a fault of one rank that others wait for."""

import importlib.abc
import os
import sys


class _Fault(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == "icrl_megatron.loop":
            raise RuntimeError(f"injected fault of rank {os.environ['RANK']}")


if "RANK" in os.environ and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
    sys.meta_path.insert(0, _Fault())
