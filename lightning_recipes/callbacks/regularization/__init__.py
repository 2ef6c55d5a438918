"""Recipes that regularise training: noise, what is left out, targets, a guide, and how often data are seen."""
