"""A user's own table: rows with a target are what is known, rows without one are what is asked."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_recipes.datamodules.base import find, require


def read_csv(path: str) -> tuple[list[str], list[list[float]]]:
    """The columns' names from the first line, and the numbers; an empty cell is NaN.

    Raises:
        ValueError: for a cell that is no number, or a line of another length; names line and column.
    """
    with open(find(path), newline="", encoding="utf-8-sig") as file:
        lines = [line for line in csv.reader(file) if line]
    require(len(lines) > 1, "path", path, "a CSV file with a line of column names and lines of numbers")
    names, rows = [name.strip() for name in lines[0]], []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(names):
            raise ValueError(f"path={path!r}: line {number} has {len(line)} cells, the first has {len(names)}")
        rows.append([_number(cell, path, number, name) for cell, name in zip(line, names)])
    return names, rows


def _number(cell: str, path: str, line: int, column: str) -> float:
    text = cell.strip()
    if text.lower() in ("", "nan", "na", "?"):
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"path={path!r}: line {line}, column {column!r} is {cell!r}, no number; encode it or leave the column out"
            " with features="
        ) from None


class TableDataModule(LightningDataModule):
    """One table for prediction: its rows with a target are the context, those without are the queries.

    ``predict`` gets batches dict(x [n, F], row [n]) of the queries, `row` the place in the file; the context is in
    ``context``. Columns are taken as they are.

    Args:
        path: a CSV file with a header; an empty cell, NaN, NA or ? in the target's column makes a row a query.
        target: name of the target's column; None for the last.
        features: names of the columns to predict from; None for all others.
        queries: another CSV file with the queries (a target's column is not needed), beside those of the table.
        batch_size: queries at a time.

    Attributes:
        feature_names: columns that are predicted from.
        context: x float32 [n, F] and y float32 [n].
        query_rows: x float32 [m, F] of the queries.
    """

    def __init__(
        self,
        path: str,
        target: str | None = None,
        features: Sequence[str] | None = None,
        queries: str | None = None,
        batch_size: int = 1000,
    ) -> None:
        super().__init__()
        require(batch_size >= 1, "batch_size", batch_size, "an integer of at least 1")
        self.path, self.target, self.features, self.queries, self.batch_size = (
            path,
            target,
            features,
            queries,
            batch_size,
        )
        names, rows = read_csv(path)
        self.target_name = names[-1] if target is None else target
        require(self.target_name in names, "target", target, f"one of the columns {names}")
        self.feature_names = [n for n in names if n != self.target_name] if features is None else list(features)
        table = torch.tensor(rows, dtype=torch.float64)
        x, y = _columns(self.feature_names, names, table, path), table[:, names.index(self.target_name)]
        known = ~y.isnan()
        require(bool(known.any()), "path", path, f"a table with values in {self.target_name!r}: it has none")
        asked = [x[~known]]
        if queries is not None:
            more, values = read_csv(queries)
            asked.append(_columns(self.feature_names, more, torch.tensor(values, dtype=torch.float64), queries))
        self.context: tuple[Tensor, Tensor] = (x[known].float(), y[known].float())
        self.query_rows = torch.cat(asked).float()
        require(
            len(self.query_rows) > 0, "path", path, f"a table with an empty cell in {self.target_name!r}, to predict"
        )

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(_Queries(self.query_rows), batch_size=self.batch_size)


class _Queries(Dataset[dict[str, Any]]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "row": index}


def _columns(wanted: list[str], names: list[str], table: Tensor, path: str) -> Tensor:
    missing = [name for name in wanted if name not in names]
    require(not missing, "features", wanted, f"columns of {path!r} ({names}); there is no {missing}")
    x = table[:, [names.index(name) for name in wanted]]
    if x.isnan().any():
        row, column = x.isnan().nonzero()[0].tolist()
        raise ValueError(f"path={path!r}: {wanted[column]!r} is empty in row {row + 1} of the data; fill it in")
    return x
