"""Recipes that watch a run and say what it is up to."""
