"""Improvement steps: from a policy, prompts and a reward function to a candidate. Turns do not exist here."""
