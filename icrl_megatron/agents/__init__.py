"""Tools that a model calls, and the text forms of calls and answers (Chain-of-Agents, arXiv 2508.13167)."""
