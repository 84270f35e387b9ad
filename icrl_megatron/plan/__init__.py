"""Memory and time of a run from its settings alone, before a GPU is asked for. Imports no torch (docs/PLANNER.md)."""
