"""Recipes for what training does badly by: adversaries, rare classes, biased pre-training; and the measures of it."""
