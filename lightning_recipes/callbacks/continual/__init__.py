"""Recipes for classes or tasks that come one after the other."""
