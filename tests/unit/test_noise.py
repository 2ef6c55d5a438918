"""Noise on many tensors at once; what it draws for one deviation of all is tested with GradientNoise."""

from __future__ import annotations

import pytest
import torch

from lightning_recipes.core.noise import add_noise_


def test_noise_of_one_deviation_a_tensor_is_the_same_draw_scaled():
    plain, scaled, on_device = ([torch.zeros(3), torch.zeros(2, 2)] for _ in range(3))
    add_noise_(plain, 1.0, "a", 1)
    add_noise_(scaled, [2.0, 0.5], "a", 1)
    add_noise_(on_device, [torch.tensor(2.0), 0.5], "a", 1)
    assert torch.equal(scaled[0], 2 * plain[0]) and torch.equal(scaled[1], plain[1] / 2)
    assert all(torch.equal(a, b) for a, b in zip(scaled, on_device, strict=True))


def test_each_tensor_needs_its_deviation():
    with pytest.raises(ValueError, match="shorter"):
        add_noise_([torch.zeros(2), torch.zeros(2)], [1.0], "a")


def test_tensors_of_several_kinds_keep_their_own_deviation():
    tensors = [torch.zeros(5000), torch.zeros(5000, dtype=torch.float64), torch.zeros(5000)]
    add_noise_(tensors, [1.0, 2.0, 3.0], "a")
    assert [t.std().item() for t in tensors] == pytest.approx([1, 2, 3], rel=0.04)
