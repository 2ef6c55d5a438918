"""Recipes that decide what of a pre-trained network trains, when and how fast."""
