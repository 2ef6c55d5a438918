"""Recipes against adversaries, and the measures of it."""
