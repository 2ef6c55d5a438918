"""``lightning-recipes compare``: does a recipe help on your module and your data, and what does it cost?

The base and every recipe are trained on the same seeds and the same data order, each run in a process of its own, and
the differences are reported with what they may owe to chance.

``plan.py`` says what is to be run, ``run.py`` is one run, ``engines.py`` has them run here, on Ray or by SLURM,
``statistics.py`` does the sums, ``report.py`` and ``charts.py`` show them, ``command.py`` is the command.
"""
