"""Recipes that regularise training: noise, targets, a guide, and how often data are seen."""
