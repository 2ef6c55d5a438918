"""Recipes that regularise training by what its gradients, targets and features are made of."""
