"""Recipes that adapt a frozen network by small added parameters."""
