"""Iterative PPO: align language models to the outcome of a multi-turn conversation."""

__version__ = "0.1.0"
