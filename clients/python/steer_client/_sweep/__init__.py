"""Sweeps: many prompts under many operators and strengths, from a plan to a table."""
