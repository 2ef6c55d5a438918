"""Recipes that put small parts into a network, or train a few of its numbers: factors, entries, singular values."""
