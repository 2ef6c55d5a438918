"""Recipes that choose, score or change what is trained on."""
