"""SR-STE, AST and GMP step by step against their definitions, in float64 and with autograd's own straight-through."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cast_train import nm_mask
from cast_train.masked_adam import MaskedAdam
from cast_train.methods.ast import AstAdam
from cast_train.methods.gmp import GmpAdam
from cast_train.methods.srste import SrsteAdam

STEPS, LR, BETAS, EPS, DECAY = 30, 2e-2, (0.9, 0.95), 1e-8, 0.05


def problem(seed: int = 0) -> tuple[nn.Sequential, list[Tensor]]:
    """Two layers, and inputs for STEPS steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    return model, [torch.randn(20, 16, dtype=torch.float64) for _ in range(STEPS)]


def loss_of(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
    hidden = torch.tanh(F.linear(x, weights[0], biases[0]))
    return (F.linear(hidden, weights[1], biases[1]) - x[:, :8]).pow(2).mean()


def train(model: nn.Sequential, optimizer: MaskedAdam, inputs: list[Tensor]) -> list[float]:
    """Train as any loop would, and return the losses."""
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer.start()
    losses = []
    for x in inputs:
        loss = loss_of(weights, biases, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def groups(model: nn.Sequential, mask_interval: int) -> list[dict[str, object]]:
    sparse = {"params": [model[0].weight, model[2].weight], "sparse": True, "mask_interval": mask_interval}
    return [sparse, {"params": [model[0].bias, model[2].bias]}]


def reference(
    model: nn.Sequential, inputs: list[Tensor], mask_interval: int, decay_at: Callable[[int], float], in_momentum: bool
) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Train dense weights through masked ones; return losses, dense weights and masks.

    `in_momentum`: the decay is part of the gradient (SR-STE), not added to the momentum (AST).
    """
    weights = [layer.weight.detach().clone().requires_grad_() for layer in (model[0], model[2])]
    biases = [layer.bias.detach().clone().requires_grad_() for layer in (model[0], model[2])]
    moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in weights]
    adam = torch.optim.Adam(biases, LR, BETAS, EPS)
    losses = []
    for t, x in enumerate(inputs):
        if t % mask_interval == 0:
            masks = [nm_mask(w) for w in weights]
        through = [w + (w * m - w).detach() for w, m in zip(weights, masks, strict=True)]  # straight-through
        loss = loss_of(through, biases, x)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, weights + biases)
        for b, grad in zip(biases, grads[2:], strict=True):
            b.grad = grad
        adam.step()
        with torch.no_grad():
            for w, m, grad, (mu, v) in zip(weights, masks, grads, moments, strict=False):
                pull = decay_at(t) * (w * ~m)
                mu.mul_(BETAS[0]).add_((1 - BETAS[0]) * (grad + pull if in_momentum else grad))
                step = mu if in_momentum else mu + pull
                v.mul_(BETAS[1]).add_((1 - BETAS[1]) * (grad + pull if in_momentum else step) ** 2)
                corrected = (v / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS
                w -= LR * step / (1 - BETAS[0] ** (t + 1)) / corrected
    if len(inputs) % mask_interval == 0:
        masks = [nm_mask(w) for w in weights]
    return losses, weights, masks


def srste(model: nn.Sequential) -> SrsteAdam:
    return SrsteAdam(groups(model, 1), LR, BETAS, EPS, total_steps=STEPS, decay=DECAY)


def ast(model: nn.Sequential) -> AstAdam:
    return AstAdam(groups(model, 10), LR, BETAS, EPS, total_steps=STEPS, decay=DECAY, ramp_end=0.5)


@pytest.mark.parametrize(
    ("optimizer_of", "mask_interval", "decay_at", "in_momentum"),
    [(srste, 1, lambda t: DECAY, True), (ast, 10, lambda t: DECAY * min(1, t / 15), False)],
    ids=["srste", "ast"],
)
def test_trains_the_dense_weight_through_the_masked_one(
    optimizer_of: Callable[[nn.Sequential], MaskedAdam],
    mask_interval: int,
    decay_at: Callable[[int], float],
    in_momentum: bool,
) -> None:
    model, inputs = problem()
    losses, weights, masks = reference(copy.deepcopy(model), inputs, mask_interval, decay_at, in_momentum)
    first = [nm_mask(layer.weight) for layer in (model[0], model[2])]
    optimizer = optimizer_of(model)
    assert train(model, optimizer, inputs) == pytest.approx(losses, rel=1e-9)
    assert any((a != b).any() for a, b in zip(first, masks, strict=True))  # masks moved on the way
    for layer, dense, mask in zip((model[0], model[2]), weights, masks, strict=True):
        torch.testing.assert_close(optimizer.state[layer.weight]["dense"], dense.detach(), rtol=0, atol=1e-10)
        assert torch.equal(optimizer.state[layer.weight]["mask"], mask)
        torch.testing.assert_close(layer.weight, dense * mask, rtol=0, atol=1e-10)
    health = optimizer.health()
    total = sum((w * ~m).abs().sum().item() for w, m in zip(weights, masks, strict=True))
    assert health["masked"] == pytest.approx(total / sum(w.numel() / 2 for w in weights))


def test_masked_weights_can_come_back() -> None:
    """The mask follows the dense weights: what was masked first is kept where its gradient pulls it up."""
    weight = torch.tensor([[4.0, 3.0, 0.1, 0.05]], dtype=torch.float64, requires_grad=True)
    optimizer = SrsteAdam(
        [{"params": [weight], "sparse": True, "mask_interval": 1}], 0.5, BETAS, EPS, total_steps=9, decay=0.0
    )
    optimizer.start()
    assert weight.tolist() == [[4.0, 3.0, 0.0, 0.0]]
    for _ in range(8):
        weight.grad = torch.tensor([[0.0, 0.0, -1.0, 0.0]], dtype=torch.float64)
        optimizer.step()
    assert (weight != 0).tolist() == [[True, False, True, False]]


def test_the_first_step_masks_where_start_was_forgotten() -> None:
    model, inputs = problem()
    optimizer = srste(model)
    loss_of([model[0].weight, model[2].weight], [model[0].bias, model[2].bias], inputs[0]).backward()
    optimizer.step()
    assert ((model[0].weight.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_gmp_prunes_by_the_cubic_those_first_that_lose_least(transposed: bool) -> None:
    torch.manual_seed(0)
    start = torch.randn(6, 80, dtype=torch.float64)
    weight = (start.t().contiguous() if transposed else start.clone()).requires_grad_()
    group = {"params": [weight], "sparse": True, "transposed": transposed, "mask_interval": 4}
    optimizer = GmpAdam([group], 0.0, BETAS, EPS, total_steps=40, ramp_end=0.7, left=0.0)
    loss = start.abs().view(6, 20, 4).sort(2).values[..., :2].sum(2)
    before = torch.zeros(6, 20, dtype=torch.bool)
    for t in range(40):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        rows = weight.detach().t() if transposed else weight.detach()
        cut = (rows.reshape(6, 20, 4) != 0).sum(2) == 2
        last = min(28, t - t % 4)  # the refresh before; the last one ends the ramp
        due = 1.0 if last == 28 else 1 - (1 - last / 28) ** 3
        assert (cut.sum(1) == int(20 * due)).all()
        assert (cut | ~before).all()  # what was cut stays cut
        for row in range(6):
            if 0 < cut[row].sum() < 20:
                assert loss[row][cut[row]].max() <= loss[row][~cut[row]].min()
        assert optimizer.health()["pruned"] == pytest.approx(cut.double().mean().item())
        assert optimizer.health()["masked"] == pytest.approx(loss[~cut].sum().item() / 240)
        before = cut
    torch.testing.assert_close(rows, start * nm_mask(start))


def test_gmp_masks_are_monotone_and_cut_weights_stay_zero_in_training() -> None:
    model, inputs = problem()
    optimizer = GmpAdam(groups(model, 3), LR, BETAS, EPS, total_steps=STEPS, ramp_end=0.5, left=0.0)
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    allowed = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    for x in inputs:
        optimizer.zero_grad()
        loss_of(weights, biases, x).backward()
        optimizer.step()
        for i, w in enumerate(weights):
            mask = optimizer.state[w]["mask"]
            assert (allowed[i] | ~mask).all()
            assert (w[~mask] == 0).all()
            allowed[i] = mask.clone()
    for w in weights:
        assert ((w.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()


def test_gmp_clips_no_gradients_of_cut_weights() -> None:
    weight = torch.randn(4, 40, requires_grad=True)
    group = {"params": [weight], "sparse": True, "mask_interval": 1}
    optimizer = GmpAdam([group], 0.0, BETAS, EPS, total_steps=8, ramp_end=1.0, left=0.0)
    for step in range(4):
        weight.grad = torch.ones_like(weight)
        optimizer.mask_gradients()
        assert torch.equal(weight.grad, (weight != 0).float())
        assert weight.grad.all() == (step < 2)  # the first refresh finds nothing due
        optimizer.step()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_gmp_ends_fully_pruned_however_short_the_run(steps: int) -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    optimizer = GmpAdam(
        [{"params": [weight], "sparse": True}], 1e-2, BETAS, EPS, total_steps=steps, ramp_end=1.0, left=0.0
    )
    for _ in range(steps):
        weight.grad = torch.randn(4, 8)
        optimizer.step()
    assert ((weight.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()
