"""Every rule below conf/optim, by the formula of its paper in float64, and what the engine asks of it."""

from __future__ import annotations

import functools
import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.cli import instantiate
from tests.tiny import ROOT
from train.optim.base import Groups, Rule

CHOICES = sorted(path.stem for path in (ROOT / "conf/optim").glob("*.yaml"))
ROLES = ("hidden", "embedding", "head", "vector")
MULTIPLIERS = [
    (1.0, 0.3, 0.7, 0.5, 0.2),
    (0.0, 1.0, 0.4, 0.6, 0.1),
]  # of the schedule; 0 is an end of a warm-up
RATE, DECAY = 0.05, 0.4

# A step of an algorithm: (parameter, gradient, learning rate) -> parameter, all in float64.
Formula = Callable[[Tensor, Tensor, float], Tensor]


def adamw(rule: Any, decay: float) -> Formula:
    """Algorithm 2 of 1711.05101."""
    (beta1, beta2), eps = rule.betas, rule.eps
    m = v = t = 0

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal m, v, t
        t += 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        return p - rate * (update + decay * p)

    return step


def nadam(rule: Any, decay: float) -> Formula:
    """The algorithm of Dozat's paper with mu_t = beta1."""
    (beta1, beta2), eps = rule.betas, rule.eps
    m = v = t = 0

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal m, v, t
        t += 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        nesterov = beta1 * m / (1 - beta1 ** (t + 1)) + (1 - beta1) * g / (1 - beta1**t)
        return p - rate * (nesterov / ((v / (1 - beta2**t)).sqrt() + eps) + decay * p)

    return step


def rmsprop(rule: Any, decay: float) -> Formula:
    """Equations 38 and 40 of 1308.0850 without its mean of gradients; decay as a part of the loss."""
    n = delta = 0

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal n, delta
        g = g + decay * p
        n = rule.alpha * n + (1 - rule.alpha) * g**2
        delta = rule.momentum * delta + g / (n.sqrt() + rule.eps)
        return p - rate * delta

    return step


def sgd(rule: Any, decay: float) -> Formula:
    """Polyak's momentum, or with `nesterov` the gradient's step after it."""
    velocity = 0

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal velocity
        g = g + decay * p
        velocity = rule.momentum * velocity + g
        return p - rate * (g + rule.momentum * velocity if rule.nesterov else velocity)

    return step


def lion(rule: Any, decay: float) -> Formula:
    """Algorithm 2 of 2302.06675."""
    beta1, beta2 = rule.betas
    m = 0

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal m
        c, m = beta1 * m + (1 - beta1) * g, beta2 * m + (1 - beta2) * g
        return p - rate * (torch.sign(c) + decay * p)

    return step


def adabound(rule: Any, decay: float) -> Formula:
    """Algorithm 2 of 1902.09843 with the authors' bounds, corrected moments and no division by sqrt(t)."""
    beta1, beta2 = rule.betas
    m = v = t = 0

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal m, v, t
        t += 1
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        final = rule.final_learning_rate * rate / rule.learning_rate
        lower, upper = final * (1 - 1 / (rule.gamma * t + 1)), final * (1 + 1 / (rule.gamma * t))
        denominator = (v + 1e-15).sqrt() + rule.eps  # the first summand is the library's
        size = rate * (1 - beta2**t) ** 0.5 / (1 - beta1**t) / denominator
        return p - size.clamp(lower, upper) * m - rate * decay * p

    return step


def schedule_free(rule: Any, decay: float) -> Formula:
    """Algorithm 1 of 2405.15682, the second moment corrected in the denominator."""
    (beta1, beta2), eps = rule.betas, rule.eps
    x = z = torch.empty(0)
    v: Any = 0
    t, peak, total = 0, 0.0, 0.0

    def step(y: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal x, z, v, t, peak, total
        if t == 0:
            x = z = y
        t += 1
        v = beta2 * v + (1 - beta2) * g**2
        z = z - rate * (g / ((v / (1 - beta2**t)).sqrt() + eps) + decay * y)
        peak = max(peak, rate)
        total += peak**2
        c = peak**2 / total if total else 0.0
        x = (1 - c) * x + c * z
        return (1 - beta1) * z + beta1 * x

    return step


def adafactor(rule: Any, decay: float) -> Formula:
    """Algorithms 4 and 5 of 1804.04235, with the learning rate in the place of its 1e-2."""
    t = 0
    rows = columns = v = torch.zeros(1, dtype=torch.float64)

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal t, rows, columns, v
        t += 1
        beta = 1 - t**rule.beta2_decay
        square = g**2 + 1e-30
        if g.dim() == 2:
            rows = beta * rows + (1 - beta) * square.sum(1, keepdim=True)
            columns = beta * columns + (1 - beta) * square.sum(0, keepdim=True)
            v = rows * columns / rows.sum()
        else:
            v = beta * v + (1 - beta) * square
        u = g / v.sqrt()
        u = u / max(1.0, rms(u) / rule.clip)
        return p - max(rule.smallest_scale, rms(p)) * min(rate, t**-0.5) * u - rate * decay * p

    return step


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def muon(rule: Any, decay: float) -> Formula:
    """Algorithm of 2502.16982, section 2.2; all but matrices by AdamW."""
    otherwise = adamw(rule, decay)
    buffer: Any = 0

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal buffer
        if p.dim() < 2:
            return otherwise(p, g, rate)
        buffer = rule.momentum * buffer + g
        x = g + rule.momentum * buffer if rule.nesterov else buffer
        x = x / x.norm()
        for _ in range(rule.iterations):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        rows, columns = p.shape
        scale = 0.2 * max(rows, columns) ** 0.5
        if rule.adjust == "original":
            scale = max(1.0, rows / columns) ** 0.5
        return p - rate * (scale * x + decay * p)

    return step


def soap(rule: Any, decay: float) -> Formula:
    """Algorithms 3 and 4 of 2409.11321. As in the authors' code, the first gradient only begins the
    statistics, decay follows the step, and directions are ordered before they are made orthogonal."""
    (beta1, beta2), eps = rule.betas, rule.eps
    m: Any = 0
    v: Any = 0
    t = -1
    statistics: list[Tensor] = []
    bases: list[Tensor] = []

    def turn(x: Tensor, there: bool) -> Tensor:
        left, right = bases if there else [q.T for q in bases]
        return left.T @ x @ right

    def count(g: Tensor) -> None:
        for index, outer in enumerate((g @ g.T, g.T @ g)):
            statistics[index] = beta2 * statistics[index] + (1 - beta2) * outer

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal m, v, t
        t += 1
        matrix = p.dim() == 2
        own = [size <= rule.max_precondition_dim for size in p.shape]
        if t == 0:
            if matrix:
                statistics[:] = [torch.zeros(size, size, dtype=p.dtype) for size in p.shape]
                count(g)
                bases[:] = [torch.linalg.eigh(s)[1].flip(1) for s in statistics]
                bases[:] = [
                    b if turned else torch.eye(len(b)).double() for b, turned in zip(bases, own, strict=True)
                ]
            return p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (turn(g, True) if matrix else g) ** 2
        update = (turn(m, True) if matrix else m) / (v.sqrt() + eps)
        update = turn(update, False) if matrix else update
        p = p - rate * (1 - beta2**t) ** 0.5 / (1 - beta1**t) * update
        p = p - rate * decay * p
        if matrix:
            count(g)
        if matrix and t % rule.precondition_frequency == 0:
            for index in (index for index in (0, 1) if own[index]):
                product = statistics[index] @ bases[index]
                order = (bases[index] * product).sum(0).argsort(descending=True)
                v = v.index_select(index, order)
                bases[index] = torch.linalg.qr(product[:, order])[0]
        return p

    return step


def shampoo(rule: Any, decay: float) -> Formula:
    """Algorithm 1 of 1802.09568 on averages, by blocks, with Adam's length (2309.06497, section 3)."""
    (beta1, beta2), eps = rule.betas, rule.eps
    t = 0
    state: dict[Any, Any] = {}

    def root(s: Tensor, power: float) -> Tensor:
        values, vectors = torch.linalg.eigh(s)
        return vectors @ torch.diag((values + 2 * rule.matrix_eps) ** power) @ vectors.T

    def direction(key: Any, g: Tensor) -> Tensor:
        m, v, left, right, roots = state.get(key, (0, 0, 0, 0, None))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        left, right = beta2 * left + (1 - beta2) * g @ g.T, beta2 * right + (1 - beta2) * g.T @ g
        if roots is None or t % rule.precondition_frequency == 0:
            matrix = key is not None
            roots = (
                (root(left, -0.25), root(right, -0.25))
                if matrix
                else (root(left, -0.5), torch.eye(1).double())
            )
        state[key] = m, v, left, right, roots
        graft = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        update = roots[0] @ m @ roots[1]
        return update * graft.norm() / update.norm()

    def step(p: Tensor, g: Tensor, rate: float) -> Tensor:
        nonlocal t
        t += 1
        if p.dim() < 2:
            assert len(p) <= rule.block
            update = direction(None, g[:, None])[:, 0]
        else:
            lines = [
                torch.cat([direction((i, j), b) for j, b in enumerate(line.split(rule.block, 1))], 1)
                for i, line in enumerate(g.split(rule.block, 0))
            ]
            update = torch.cat(lines)
        return p - rate * (update + decay * p)

    return step


# By name: the formula, and settings for which all of it counts within five steps on a small matrix.
FORMULAS: dict[str, tuple[Callable[[Any, float], Formula], list[dict[str, Any]]]] = {
    "adabound": (adabound, [{"gamma": 0.5}, {"gamma": 0.5, "final_learning_rate": 1e-3}]),
    "adafactor": (adafactor, [{}, {"smallest_scale": 5.0}]),
    "adamw": (adamw, [{}]),
    "lion": (lion, [{}]),
    "muon": (muon, [{}, {"adjust": "original", "nesterov": False}]),
    "nadam": (nadam, [{}]),
    "rmsprop": (rmsprop, [{}, {"momentum": 0.8}]),
    "schedule-free": (schedule_free, [{}, {"betas": [0.5, 0.9]}]),
    "sgd": (sgd, [{}, {"nesterov": True}, {"momentum": 0.0}]),
    "shampoo": (shampoo, [{"block": 5, "precondition_frequency": 2, "matrix_eps": 1e-3}]),
    "soap": (soap, [{"precondition_frequency": 2, "max_precondition_dim": 5}]),
}


@functools.cache
def node_of(choice: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=[f"optim={choice}"]).optim


def rule_of(choice: str, **settings: Any) -> Rule:
    return instantiate(OmegaConf.merge(node_of(choice), settings), "optim")


def lively(choice: str) -> Rule:
    return rule_of(choice, **FORMULAS[choice][1][0])


def tensors(*shapes: Sequence[int], scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=generator) for shape in shapes]


def optimizers(rule: Rule, groups: Callable[[], Groups]) -> Iterator[torch.optim.Optimizer]:
    """All that a rule can build and that is stepped, each over groups of its own."""
    if not all(rule.takes_whole(role) for role in ROLES):
        yield rule(groups(), offload=False)
    if rule.takes_whole("hidden"):
        yield rule.whole(groups())


def matrices() -> Groups:
    """Groups of a matrix each, one with a learning rate of its own."""
    first, second = (torch.nn.Parameter(p) for p in tensors((6, 4), (4, 4)))
    return [
        {"params": [first], "weight_decay": DECAY, "name": "one", "whole": True},
        {"params": [second], "weight_decay": 0.0, "lr": 3 * RATE, "own": [1, 2]},
    ]


def give_gradients(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        for index, p in enumerate(group["params"]):
            p.grad = tensors(p.shape, seed=100 * step + 10 * p.shape[0] + index)[0]


def walk(optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    """The parameters after these steps, at learning rates that change with them."""
    for step in steps:
        give_gradients(optimizer, step)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_every_rule_has_a_formula() -> None:
    assert set(FORMULAS) == set(CHOICES)


@pytest.mark.parametrize("multipliers", MULTIPLIERS)
@pytest.mark.parametrize("size", [1.0, 1e-4])  # of gradients: they are small in a language model
@pytest.mark.parametrize(
    ("choice", "settings"),
    [(choice, one) for choice, (_, settings) in FORMULAS.items() for one in settings],
    ids=str,
)
def test_five_steps_are_those_of_the_paper(
    choice: str, settings: dict[str, Any], size: float, multipliers: Sequence[float]
) -> None:
    if choice == "shampoo":
        settings = {**settings, "matrix_eps": settings["matrix_eps"] * size**2}
    rule = rule_of(choice, learning_rate=RATE, **settings)
    formula, _ = FORMULAS[choice]
    shapes, rates, decays = [(4, 4), (7, 5), (5,)], (RATE, 3 * RATE, 2 * RATE), (DECAY, DECAY, 0.0)
    start = tensors(*shapes)
    gradients = [tensors(*shapes, scale=size, seed=step) for step in range(1, 6)]

    expected = []
    for index, (rate, decay) in enumerate(zip(rates, decays, strict=True)):
        step = formula(rule, decay)
        p = start[index].double()
        for multiplier, all_of_step in zip(multipliers, gradients, strict=True):
            p = step(p, all_of_step[index].double(), rate * multiplier)
        expected.append(p)

    parameters = [torch.nn.Parameter(p.clone()) for p in start]
    groups: Groups = [
        {"params": [p], "weight_decay": decay, "lr": rate}
        for p, rate, decay in zip(parameters, rates, decays, strict=True)
    ]
    whole = [rule.takes_whole("vector" if p.dim() < 2 else "hidden") for p in parameters]
    built: list[torch.optim.Optimizer] = []
    if any(whole):
        built.append(rule.whole([g for g, one in zip(groups, whole, strict=True) if one]))
    if not all(whole):
        built.append(rule([g for g, one in zip(groups, whole, strict=True) if not one], offload=False))
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in built]
    for multiplier, all_of_step in zip(multipliers, gradients, strict=True):
        for p, g in zip(parameters, all_of_step, strict=True):
            p.grad = g.clone()
        for optimizer, own in zip(built, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = peak * multiplier
            optimizer.step()

    for p, begin, end in zip(parameters, start, expected, strict=True):
        moved = (end - begin).norm()
        # Newton's iterations are in bf16.
        tolerance = 5e-2 if choice == "muon" and p.dim() == 2 else 1e-5
        assert (p.detach().double() - end).norm() <= tolerance * moved + 1e-7 * end.norm()
        # The steps of the others are as long as their gradients.
        assert moved > 1e-2 * begin.norm() or choice in ("adabound", "sgd")


@pytest.mark.parametrize("choice", CHOICES)
def test_groups_are_left_to_their_owner(choice: str) -> None:
    rule = rule_of(choice, learning_rate=RATE)
    given = matrices()
    before = [dict(group) for group in given]
    for optimizer in optimizers(rule, lambda: given):
        first, second = optimizer.param_groups
        assert (first["lr"], second["lr"]) == (RATE, 3 * RATE)
        give_gradients(optimizer, 1)
        optimizer.step()
        assert (first["name"], first["whole"], second["own"]) == ("one", True, [1, 2])
        assert (first["weight_decay"], second["weight_decay"]) == (DECAY, 0.0)
        assert (first["lr"], second["lr"]) == (RATE, 3 * RATE)
    assert given == before


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_changes_of_its_groups_the_counters_alone(choice: str) -> None:
    rule = lively(choice)
    counted = []
    for optimizer in optimizers(rule, matrices):
        before = [dict(group) for group in optimizer.param_groups]
        walk(optimizer, range(1))
        for old, new in zip(before, optimizer.param_groups, strict=True):
            assert set(old) == set(new)
            counted.append({key for key in old if key not in ("params", "lr") and old[key] != new[key]})
    assert set(rule.counters) in counted
    assert all(keys <= set(rule.counters) for keys in counted)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_at_rate_zero_is_forgotten_with_the_state_and_the_counters(choice: str) -> None:
    """In half precision without ZeRO, DeepSpeed takes one with gradients of zero to allocate the state."""
    rule = lively(choice)
    for expected, optimizer in zip(optimizers(rule, matrices), optimizers(rule, matrices), strict=True):
        before = [dict(group) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            group["params"][0].grad = torch.zeros_like(group["params"][0])
        optimizer.step()
        optimizer.state.clear()
        for group, old in zip(optimizer.param_groups, before, strict=True):
            group.update(old)
        assert_same(walk(optimizer, range(4)), walk(expected, range(4)))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_saved_state_is_plain_and_goes_on_bit_for_bit(choice: str) -> None:
    rule = lively(choice)
    for optimizer, fresh in zip(optimizers(rule, matrices), optimizers(rule, matrices), strict=True):
        weights = walk(optimizer, range(5))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            for group, weight in zip(fresh.param_groups, weights, strict=True):
                group["params"][0].copy_(weight)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert_same(walk(fresh, range(5, 10)), walk(optimizer, range(5, 10)))


@pytest.mark.parametrize("choice", CHOICES)
def test_groups_can_be_stepped_one_by_one(choice: str) -> None:
    """As ZeRO 1 and 2 do, in whose steps every group is the first and only one."""
    rule = lively(choice)
    for together, apart in zip(optimizers(rule, matrices), optimizers(rule, matrices), strict=True):
        expected = walk(together, range(3))
        groups, found = apart.param_groups, []
        for group in groups:
            apart.param_groups = [group]
            found += walk(apart, range(3))
        apart.param_groups = groups
        assert_same(found, expected)


@pytest.mark.parametrize("choice", [c for c in CHOICES if not rule_of(c).takes_whole("vector")])
def test_what_is_not_whole_may_be_flat_and_cut_anywhere(choice: str) -> None:
    def built(parts: Sequence[Tensor]) -> torch.optim.Optimizer:
        parameters = [torch.nn.Parameter(part.clone()) for part in parts]
        return lively(choice)([{"params": parameters, "weight_decay": DECAY}], offload=False)

    first, second = tensors((3, 5), (4, 4))
    flat = torch.cat([first.flatten(), second.flatten()])
    whole, parts = built([first, second]), built(flat.split([20, 11]))
    for step in range(1, 5):
        gradients = tensors((3, 5), (4, 4), seed=step)
        cut = torch.cat([g.flatten() for g in gradients]).split([20, 11])
        for optimizer, own in ((whole, gradients), (parts, cut)):
            for p, g in zip(optimizer.param_groups[0]["params"], own, strict=True):
                p.grad = g.clone()
            optimizer.step()
    one, other = (
        torch.cat([p.detach().flatten() for p in optimizer.param_groups[0]["params"]])
        for optimizer in (whole, parts)
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("choice", ["adafactor", "shampoo", "soap"])
def test_what_holds_the_groups_of_whole_parameters_has_no_settings_and_no_step(choice: str) -> None:
    optimizer = rule_of(choice, learning_rate=RATE)(matrices(), offload=False)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"]) == (RATE, 3 * RATE)
    assert set(first) == {"params", "weight_decay", "lr", "name", "whole"}
    with pytest.raises(NotImplementedError):
        optimizer.step()


def test_roles() -> None:
    taken = {choice: [role for role in ROLES if rule_of(choice).takes_whole(role)] for choice in CHOICES}
    every = list(ROLES)
    wholes = {"adafactor": every, "muon": ["hidden"], "shampoo": every, "soap": every}
    assert taken == {choice: wholes.get(choice, []) for choice in CHOICES}
    for choice in set(CHOICES) - set(wholes):
        with pytest.raises(NotImplementedError):
            rule_of(choice).whole(matrices())


@pytest.mark.parametrize("choice", ["adafactor", "muon", "shampoo", "soap"])
def test_a_rank_may_own_nothing_of_a_group(choice: str) -> None:
    rule = lively(choice)
    without = matrices()
    without[0]["params"] = []
    optimizer, whole = rule.whole(without), rule.whole(matrices())
    assert_same(walk(optimizer, range(3)), walk(whole, range(3))[1:])
    # So that whoever owns the parameter next goes on with the same count.
    for key in rule.counters:
        assert [group[key] for group in optimizer.param_groups] == [3, 3]


def test_muon_steps_have_adamws_length_in_every_shape() -> None:
    shapes = [(32, 32), (64, 16), (16, 64)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    groups: Groups = [{"params": parameters, "weight_decay": 0.0, "eps": 1e-8}]
    optimizer = rule_of("muon", learning_rate=1.0).whole(groups)
    for p, g in zip(parameters, tensors(*shapes), strict=True):
        p.grad = g
    optimizer.step()
    assert all(0.15 < rms(p.detach()) < 0.25 for p in parameters)  # 0.2 is what was measured of AdamW


def test_schedule_free_evaluates_the_average_of_what_it_steps() -> None:
    rule = rule_of("schedule-free")
    assert rule.averages
    assert not any(rule_of(choice).averages for choice in CHOICES if choice != "schedule-free")
    (p,) = (torch.nn.Parameter(p) for p in tensors((4, 4)))
    optimizer: Any = rule([{"params": [p], "weight_decay": DECAY}], offload=False)
    stepped = []
    for step in range(1, 5):
        give_gradients(optimizer, step)
        optimizer.step()
        stepped.append(optimizer.state[p]["z"].clone())
    weights = p.detach().clone()
    rule.average(weights, optimizer.state[p], optimizer.param_groups[0])
    torch.testing.assert_close(weights, torch.stack(stepped).mean(0))
    optimizer.eval()
    assert weights.equal(p.detach())


def test_schedule_free_before_the_first_step_evaluates_what_it_steps() -> None:
    weights = torch.ones(3)
    rule_of("schedule-free").average(weights, {}, {})
    assert weights.equal(torch.ones(3))


@pytest.mark.parametrize("choice", CHOICES)
def test_the_yaml_says_what_the_class_defaults_to(choice: str) -> None:
    node: Any = OmegaConf.to_container(node_of(choice))
    assert node.pop("_target_") and node.pop("learning_rate")
    parameters = inspect.signature(type(rule_of(choice))).parameters
    defaults = {name: one.default for name, one in parameters.items() if one.default is not one.empty}
    assert {**defaults, "betas": list(defaults.get("betas", []))} == {"betas": [], **node}


@pytest.mark.parametrize(
    ("choice", "settings", "message"),
    [
        *((choice, {"learning_rate": 0.0}, "learning_rate: 0.0 is not positive") for choice in CHOICES),
        *((choice, {"weight_decay": -1.0}, "weight_decay: -1.0 is negative") for choice in CHOICES),
        ("adabound", {"betas": [0.9, 1.0]}, "betas: [0.9, 1.0] are not"),
        ("adabound", {"eps": -1.0}, "eps: -1.0 is negative"),
        ("adabound", {"final_learning_rate": 0.0}, "final_learning_rate: 0.0 is not positive"),
        ("adabound", {"gamma": -1e-3}, "gamma: -0.001 is not positive"),
        ("adafactor", {"beta2_decay": 0.8}, "beta2_decay: 0.8 is above 0"),
        ("adafactor", {"clip": 0.5}, "clip: 0.5 is below 1"),
        ("adafactor", {"smallest_scale": -1.0}, "smallest_scale: -1.0 is negative"),
        ("lion", {"betas": [0.9]}, "betas: [0.9] are not"),
        ("muon", {"adjust": "rms"}, "adjust: 'rms' is unknown"),
        ("muon", {"betas": [2.0, 0.9]}, "betas: [2.0, 0.9] are not"),
        ("muon", {"iterations": 0}, "iterations: 0 is below 1"),
        ("muon", {"iterations": 100}, "iterations: 100 is above 99"),
        ("muon", {"momentum": 1.0}, "momentum: 1.0 is not a number from 0 to below 1"),
        ("nadam", {"eps": -1e-8}, "eps: -1e-08 is negative"),
        ("rmsprop", {"alpha": 1.0}, "alpha: 1.0 is not a number"),
        ("rmsprop", {"eps": -1.0}, "eps: -1.0 is negative"),
        ("rmsprop", {"momentum": -0.1}, "momentum: -0.1 is not a number"),
        ("schedule-free", {"betas": [0.0, 0.99]}, "betas: the first is 0"),
        ("schedule-free", {"betas": [0.9, -0.1]}, "betas: [0.9, -0.1] are not"),
        ("sgd", {"momentum": 1.5}, "momentum: 1.5 is not a number"),
        ("sgd", {"momentum": 0.0, "nesterov": True}, "nesterov: needs momentum"),
        ("shampoo", {"block": 0}, "block: 0 is below 1"),
        ("shampoo", {"matrix_eps": 0.0}, "matrix_eps: 0.0 is not positive"),
        ("shampoo", {"precondition_frequency": 0}, "precondition_frequency: 0 is below 1"),
        ("soap", {"max_precondition_dim": 0}, "max_precondition_dim: 0 is below 1"),
        ("soap", {"precondition_frequency": -1}, "precondition_frequency: -1 is below 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(choice: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        rule_of(choice, **settings)
    assert str(caught.value).startswith(f"optim.{message}")
    assert "; " in str(caught.value) and "\n" not in str(caught.value)
