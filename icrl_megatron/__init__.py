"""ICRL on Megatron-Core: one backbone that learns to solve, to criticise itself, and then to need no critic."""

__version__ = "0.1.0"
