"""On PYTHONPATH, rank 1 fails where the training loop is imported: a fault of one rank while the other waits for it."""

import importlib.abc
import os
import sys


class _Fault(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == "icrl_megatron.loop":
            raise RuntimeError("injected fault of rank 1")


if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, _Fault())
