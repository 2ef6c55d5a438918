"""CKA against numbers worked out by hand, its definition written out, and what it must not mind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_recipes.core import similarity
from lightning_recipes.core.similarity import cka, cka_of_unrelated, full_precision, gram, linear_cka, u_centred

A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
B = torch.tensor([[1.0], [0.0], [-1.0], [0.0]])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_definition(a: Tensor, b: Tensor) -> float:
    """With H written out, in fp64."""
    n = len(a)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = (h @ (x.double() @ x.double().T) @ h for x in (a, b))  # noqa: E741
    return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


def unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Equation 5 of Song et al., term by term."""
    n = len(k)
    k, l = k - k.diag().diag(), l - l.diag().diag()  # noqa: E741
    one = torch.ones(n, dtype=k.dtype)
    terms = (
        (k @ l).trace() + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return terms / (n * (n - 3))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_card():
    """Of K * L, K * K and L * L the sums are 4, 8 and 4: CKA is 4 / sqrt(8 x 4)."""
    assert linear_cka(A, B).item() == pytest.approx(2**-0.5, abs=1e-6)
    assert linear_cka(A, A.square()).item() == pytest.approx(0.0, abs=1e-6)


def test_a_case_worked_out_by_hand():
    """Centred: a = (-1.5, -.5, .5, 1.5), b = (-1, -1, 1, 1). Of one feature each it is the squared correlation, .8."""
    a, b = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.0], [0.0], [2.0], [2.0]])
    assert linear_cka(a, b).item() == pytest.approx(4.0**2 / (5 * 4), abs=1e-6)


def test_the_debiased_numbers_by_hand():
    """Off the diagonal K of A is -1 at the pairs (0, 2) and (1, 3), else 0; L of B is -1 at (0, 2). n = 4.

    Rows of K sum to -1, all of it to -4: K* = K + 1/2 + 1/2 - 4/6 is -2/3 at both pairs and 1/3 elsewhere. L has rows
    -1, 0, -1, 0 and sum -2: L* is -1 + 1 - 1/3 = -1/3 at (0, 2), 0 + 0 - 1/3 at (1, 3) and 1/2 - 1/3 = 1/6 elsewhere,
    half of K*: debiased CKA is 1. The biased one is .707.
    """
    k = A @ A.T
    expected = torch.full((4, 4), 1 / 3).fill_diagonal_(0.0)
    for i, j in ((0, 2), (2, 0), (1, 3), (3, 1)):
        expected[i, j] = -2 / 3
    assert torch.allclose(u_centred(k), expected, atol=1e-6)
    assert torch.allclose(u_centred(B @ B.T), expected / 2, atol=1e-6)
    assert linear_cka(A, B, debiased=True).item() == pytest.approx(1.0, abs=1e-5)


def test_it_is_the_definition_with_h_written_out():
    a, b = randn(20, 7) + 3, randn(20, 3, 4, seed=1) * 5
    assert linear_cka(a, b).item() == pytest.approx(by_definition(a, b.flatten(1)), abs=1e-6)


def test_it_is_the_ratio_of_feature_covariances():
    a, b = randn(30, 5, dtype=torch.float64), randn(30, 8, seed=1, dtype=torch.float64)
    x, y = a - a.mean(0), b - b.mean(0)
    ratio = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert linear_cka(a, b).item() == pytest.approx(ratio.item(), abs=1e-12)


def test_the_debiased_one_is_that_of_song_et_al():
    a, b = randn(12, 5, dtype=torch.float64), randn(12, 8, seed=1, dtype=torch.float64) + 2
    k, l = a @ a.T, b @ b.T  # noqa: E741
    expected = unbiased_hsic(k, l) / (unbiased_hsic(k, k) * unbiased_hsic(l, l)).sqrt()
    assert linear_cka(a, b, debiased=True).item() == pytest.approx(expected.item(), abs=1e-9)
    assert torch.allclose(u_centred(k).sum(0), torch.zeros(12, dtype=torch.float64), atol=1e-12)


# -- what it does not mind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debiased", [False, True])
def test_rotation_scale_and_shift_do_not_matter_and_it_is_symmetric(debiased):
    a, b = randn(16, 6), randn(16, 9, seed=1)
    rotation = torch.linalg.qr(randn(6, 6, seed=2))[0]
    moved = 3e-2 * a @ rotation + randn(6, seed=3)
    assert linear_cka(a, moved, debiased).item() == pytest.approx(1.0, abs=1e-4)
    assert linear_cka(moved, b, debiased).item() == pytest.approx(linear_cka(a, b, debiased).item(), abs=1e-4)
    assert linear_cka(a, b, debiased).item() == pytest.approx(linear_cka(b, a, debiased).item(), abs=1e-6)


def test_maps_of_any_size_do_not_underflow_or_overflow():
    a, b = randn(16, 6), randn(16, 9, seed=1)
    expected = linear_cka(a, b).item()
    for scale in (1e-15, 1e15):
        assert linear_cka(a * scale, b).item() == pytest.approx(expected, rel=1e-5)


def test_a_large_mean_costs_no_digits():
    """In the Gram matrix of the map as it is the mean's square would drown everything."""
    a, b = randn(16, 6), randn(16, 9, seed=1)
    assert linear_cka(a + 100, b).item() == pytest.approx(by_definition(a + 100, b), abs=1e-5)


def test_a_constant_map_says_nothing_and_has_no_gradient():
    flat = torch.ones(8, 3).requires_grad_()
    nearly = (1 + 1e-5 * randn(8, 3)).requires_grad_()
    other = randn(8, 3).requires_grad_()
    for x in (flat, nearly, torch.zeros(8, 3, requires_grad=True)):
        assert not gram(x).varies
        for debiased in (False, True):
            value = linear_cka(x, other, debiased)
            assert value.item() == 0
            for gradient in torch.autograd.grad(value, [x, other]):
                assert torch.equal(gradient, torch.zeros(8, 3))
    assert gram(1 + 1e-2 * randn(8, 3)).varies


# -- its bias ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "p", "q"), [(16, 1000, 1000), (64, 512, 4096), (64, 32, 32), (4, 50, 50)])
def test_unrelated_maps_of_few_samples_look_alike_to_the_biased_estimator(n, p, q):
    biased, debiased = [], []
    for seed in range(20):
        a, b = randn(n, p, seed=2 * seed), randn(n, q, seed=2 * seed + 1)
        biased.append(linear_cka(a, b).item())
        debiased.append(linear_cka(a, b, debiased=True).item())
    assert sum(biased) / 20 == pytest.approx(cka_of_unrelated(n, p, q), abs=0.02)
    assert abs(sum(debiased) / 20) < (0.05 if n > 4 else 0.5)


def test_the_figures_of_the_docstring():
    assert cka_of_unrelated(16, 1000, 1000) == pytest.approx(0.984, abs=1e-3)
    assert cka_of_unrelated(64, 512, 4096) == pytest.approx(0.936, abs=1e-3)


# -- precision and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("debiased", [False, True])
def test_gradients_are_those_of_finite_differences(debiased):
    a, b = randn(6, 4, dtype=torch.float64) + 1, randn(6, 2, 2, seed=1, dtype=torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: linear_cka(a, b, debiased), (a, b))
    weights = randn(6, 6, seed=2, dtype=torch.float64)  # of a function that minds the scale and the mean
    assert torch.autograd.gradcheck(lambda a: (gram(a).matrix * weights).sum(), (a,))


def test_half_precision_maps_are_compared_in_fp32_under_autocast_too():
    a, b = (randn(16, 300, seed=s).bfloat16() + 4 for s in (0, 1))
    plain = linear_cka(a.float(), b.float())
    a = a.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = linear_cka(a, b)
        (gradient,) = torch.autograd.grad(value, a)
    assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert value.item() == plain.item()


@pytest.mark.parametrize("how", ["high", "medium", "tf32 of one backend", "default"])
def test_products_are_exact_and_the_settings_end_as_they_began(how, monkeypatch):
    """Also in the backward pass, which runs when the block that computed the value is over."""
    matmul, seen = torch.backends.cuda.matmul, []
    unit = similarity._unit

    def spy(*args):
        seen.append((matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return unit(*args)

    monkeypatch.setattr(similarity, "_unit", spy)
    torch.set_float32_matmul_precision("highest")
    try:
        if how == "tf32 of one backend":
            matmul.fp32_precision = "tf32"
        elif how != "default":
            torch.set_float32_matmul_precision(how)
        before = matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
        a = randn(16, 300).requires_grad_()
        linear_cka(a, randn(16, 300, seed=1)).backward()
        assert (matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision) == before
        if how in ("high", "medium"):
            assert torch.get_float32_matmul_precision() == how
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    assert seen == [("ieee", "ieee")] * 3


def test_an_error_inside_gives_the_settings_back():
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_is_kept_for_the_backward_pass_is_the_map_itself():
    """And no centred fp32 copy of it, which would double the memory of a network's maps."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = randn(8, 1000).requires_grad_()
        cka(gram(x), gram(randn(8, 50)))
    large = [t for t in kept if t.numel() >= 8 * 1000]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
