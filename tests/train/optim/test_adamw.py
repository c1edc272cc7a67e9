"""AdamW's settings and the optimizer they make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train.optim.adamw import AdamW


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0}, "optim.learning_rate: 0 is not positive"),
        ({"learning_rate": -1e-3}, "optim.learning_rate: -0.001 is not positive"),
        ({"learning_rate": float("nan")}, "optim.learning_rate: nan is not positive"),
        ({"betas": [0.9]}, "optim.betas: [0.9] are not two numbers"),
        ({"betas": [0.9, 1.0]}, "optim.betas: [0.9, 1.0] are not"),
        ({"betas": [-0.1, 0.9]}, "optim.betas: [-0.1, 0.9] are not"),
        ({"eps": -1}, "optim.eps: -1 is negative"),
        ({"weight_decay": -0.1}, "optim.weight_decay: -0.1 is negative"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        AdamW(**{"learning_rate": 1e-3, **settings})
    assert str(caught.value).startswith(message)
    assert "; give " in str(caught.value)


def test_the_settings_arrive_in_the_optimizer() -> None:
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2, 2))], "weight_decay": 0.3},
        {"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0},
    ]
    optimizer = AdamW(2e-3, betas=(0.8, 0.7), eps=1e-5)(groups, offload=False)
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.7), 1e-5)
        assert group["weight_decay"] == decay


def test_two_steps_by_hand() -> None:
    """Algorithm 2 of the paper on a single number with gradients 1 and -3."""
    rate, beta1, beta2, eps, decay = 0.1, 0.9, 0.99, 1e-8, 0.5
    parameter = torch.nn.Parameter(torch.tensor([[2.0]]))
    groups = [{"params": [parameter], "weight_decay": decay}]
    optimizer = AdamW(rate, (beta1, beta2), eps)(groups, offload=False)
    expected, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((1.0, -3.0), start=1):
        parameter.grad = torch.tensor([[gradient]])
        optimizer.step()
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        unbiased = first / (1 - beta1**step), second / (1 - beta2**step)
        expected -= rate * (unbiased[0] / (unbiased[1] ** 0.5 + eps) + decay * expected)
    assert parameter.item() == pytest.approx(expected, rel=1e-5)
