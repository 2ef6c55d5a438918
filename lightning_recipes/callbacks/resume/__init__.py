"""Recipes for runs that are interrupted and go on."""
