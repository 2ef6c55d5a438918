"""SubGM on the paper's problem: a low-rank matrix from measurements with gross errors, its rank set far too high.

The network is the factorised matrix itself, trained by full-batch sub-gradient steps. The arms differ in the size of
the first factors, in their number of columns, in the loss and in the noise. `without` starts from factors of size 1, as
one would without the recipe, and takes the same steps (its own schedule for that size).
"""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from benchmarks.claims.findings import Finding, Metrics, Results, column, compare
from benchmarks.claims.training import seeded
from lightning_recipes.callbacks import SubGM
from lightning_recipes.datamodules import MatrixSensingDataModule
from lightning_recipes.modules import LowRankRecovery
from lightning_recipes.modules.low_rank_recovery import measure

RECIPE = "SubGM"
CLAIM = "From a small start the sub-gradient method finds the true matrix, however high its rank is set."
STEPS = 800
SETTING = (
    "20 x 20 matrix of rank 3, factors of 20 columns, 600 Gaussian measurements of which 10 % have outliers of std 10,"
    f" mean absolute error, {STEPS} full-batch steps; error is the Frobenius norm of X - X*, of which X* has 1.73;"
    " without: first factors of size 1. Rank: 1200 measurements, 30 % outliers, spectral start of size 1e-6; without: 3"
    " columns. Dense noise N(0, 1), size 1e-6: 4800 measurements; without: 1200. 40 x 40 matrix of rank 1, 400"
    " measurements"
)
SEEDS = 3
RANK = {"m": 1200, "outlier_prob": 0.3, "init_scale": 1e-6, "init": "spectral"}
DENSE = {"outlier_prob": 0.0, "noise_std": 1.0, "init_scale": 1e-6}
LARGE = {"d": 40, "r": 1, "m": 400}
ARMS: dict[str, dict[str, Any]] = {
    "without": {"init_scale": 1.0},
    "0.1": {"init_scale": 0.1},
    "0.01": {"init_scale": 0.01},
    "0.001": {"init_scale": 0.001},
    "squared": {"init_scale": 0.001, "loss": "mse"},
    "rank 3": {"rank": 3, **RANK},
    "rank 20": RANK,
    "dense 1200": {"m": 1200, **DENSE},
    "dense 4800": {"m": 4800, **DENSE},
    "large 1": {"init_scale": 1.0, **LARGE},
    "large 0.001": {"init_scale": 0.001, **LARGE},
    "large squared": {"init_scale": 0.001, "loss": "mse", **LARGE},
}
RISE = 1.25  # how much larger an error may be that does not depend on the rank


def run(
    seed: int,
    init_scale: float,
    d: int = 20,
    r: int = 3,
    m: int = 600,
    rank: int | None = None,
    outlier_prob: float = 0.1,
    noise_std: float = 0.0,
    init: str = "random",
    loss: str = "l1",
    steps: int = STEPS,
) -> Metrics:
    """Recover one matrix.

    Args:
        seed: of the matrix, the measurements and the first factors.
        init_scale, init: of SubGM.
        d, r, m, outlier_prob, noise_std: of MatrixSensingDataModule.
        rank, loss: of LowRankRecovery; a rank of None is d.

    Returns:
        ``error``, ||X - X*||_F; ``loss`` and ``true loss``, the mean absolute error of X and of X*.
    """
    with seeded(seed), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SubGM: the loss fell|batches of ")  # squared errors, and few measurements
        data = MatrixSensingDataModule(d, r, m, outlier_prob, noise_std=noise_std, passes=50, seed=seed)
        module = LowRankRecovery(d, rank, loss=loss)
        pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            callbacks=[SubGM(init_scale, init=init, log_spectrum=False, seed=seed)],
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, datamodule=data)
        with torch.no_grad():
            (a, y), x = data.measurements, module()
            return {
                "error": torch.linalg.norm(x - data.truth).item(),
                "loss": F.l1_loss(measure(a, x), y).item(),
                "true loss": F.l1_loss(measure(a, data.truth), y).item(),
            }


def check(results: Results) -> list[Finding]:
    """The card's bounds: on the means over seeds."""
    error = {arm: column(results, arm, "error")[0] for arm in results}
    findings = []

    def found(claim: str, with_arm: str, without_arm: str, margin: Any) -> None:
        if with_arm in error and without_arm in error:
            findings.append(compare(claim, "error", error[with_arm], error[without_arm], margin))

    for smaller, larger in (("0.1", "without"), ("0.01", "0.1"), ("0.001", "0.01")):
        found(f"The error falls with the size of the first factors, from {larger} to {smaller}".replace("without", "1"),
              smaller, larger, lambda w, wo: wo - w)  # fmt: skip
    found("It is below 5e-3 from factors of size 0.001", "0.001", "without", lambda w, wo: 5e-3 - w)
    found("It is above 0.1 from factors of size 1", "0.001", "without", lambda w, wo: wo - 0.1)
    found("Squared errors do not find it from the same small start: above 0.1", "0.001", "squared",
          lambda w, wo: wo - 0.1)  # fmt: skip
    found(f"The rank does not matter: 20 columns end at most {RISE:g} times as far off as 3", "rank 20", "rank 3",
          lambda w, wo: RISE * wo - w)  # fmt: skip
    found("With 20 columns and 30 % outliers the error is below 5e-3", "rank 20", "rank 3", lambda w, wo: 5e-3 - w)
    found("Under dense noise the error falls as measurements are added, to 3/4", "dense 4800", "dense 1200",
          lambda w, wo: 0.75 * wo - w)  # fmt: skip
    if "dense 1200" in results:
        loss, true = (column(results, "dense 1200", name)[0] for name in ("loss", "true loss"))
        findings.append(
            compare(
                "The truth is not the minimum: under dense noise the loss ends below its loss at X*",
                "mean absolute error",
                loss,
                true,
                lambda w, wo: wo - w,
            )
        )
    found("With more unknowns (820) than measurements (400) it is below 0.02 from factors of size 0.001", "large 0.001",
          "large 1", lambda w, wo: 0.02 - w)  # fmt: skip
    found("and above 1 from factors of size 1", "large 0.001", "large 1", lambda w, wo: wo - 1)
    found("and above 1 for squared errors", "large 0.001", "large squared", lambda w, wo: wo - 1)
    return findings
