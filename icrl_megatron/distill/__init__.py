"""Trajectories of multi-agent systems, distilled into one model (Chain-of-Agents, arXiv 2508.13167)."""
