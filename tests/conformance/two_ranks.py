"""Trains every row of the table on two ranks and saves what each rank ended with: one launch for all rows.

Run by ``torchrun --nproc_per_node 2 two_ranks.py FOLDER``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from table import LIGHTNINGS_OWN, ROWS, train, weights


def main(folder: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for row in [*ROWS, LIGHTNINGS_OWN]:
        module, _ = train(row, rank=rank, world=world)
        torch.save(weights(module), Path(folder) / f"{row.name}.rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
