"""Recipes on the data themselves: how hard they are to learn from, and which are worth it."""
