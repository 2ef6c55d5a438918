"""Whether the papers' claims show: experiments of CPU size on real data, with a recipe and without it, over seeds.

``python -m benchmarks.claims`` runs them and writes the evidence that ``lightning-recipes show NAME`` prints;
``tests/claims`` asserts the same margins.
"""
