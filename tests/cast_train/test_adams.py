"""AdamS against Algorithm 1, written for one scalar at a time in Python's own floats."""

import copy
import io
import math
import random

import pytest
import torch
from torch import Tensor

import cast_train.masked_adam
from cast_train import AdamS, nm_mask
from cast_train.adams import DecayNorm, SecondMoment
from conversion.errors import InputError

BETAS, EPS = (0.9, 0.999), 1e-8
Matrix = list[list[float]]


def reference(
    weights: Matrix,
    grads: list[Matrix],
    lrs: list[float],
    decay: float,
    total_steps: int,
    decay_norm: str = "l1",
    second_moment: str = "update",
) -> Matrix:
    """Run Algorithm 1, or one of its ablations, for len(grads) steps, groups of four along the rows."""
    b1, b2 = BETAS
    weights = copy.deepcopy(weights)
    mu = [[0.0] * len(row) for row in weights]
    v = [[0.0] * len(row) for row in weights]
    masks: list[list[int]] = []
    for t, (grad, lr) in enumerate(zip(grads, lrs, strict=False)):
        if t % 10 == 0:
            masks = []
            for row in weights:
                masks.append([0] * len(row))
                for start in range(0, len(row), 4):
                    order = sorted(range(start, start + 4), key=lambda c: (-abs(row[c]), c))
                    for c in order[:2]:
                        masks[-1][c] = 1
        a = t / total_steps
        for r, row in enumerate(weights):
            for c, theta in enumerate(row):
                mu[r][c] = b1 * mu[r][c] + (1 - b1) * grad[r][c]
                pull = float((theta > 0) - (theta < 0)) if decay_norm == "l1" else theta
                tilde = mu[r][c] if masks[r][c] else (1 - a) * mu[r][c] + a * decay * pull
                squared = tilde if second_moment == "update" else grad[r][c]
                v[r][c] = b2 * v[r][c] + (1 - b2) * squared**2
                row[c] = theta - lr * (tilde / (1 - b1 ** (t + 1))) / (math.sqrt(v[r][c] / (1 - b2 ** (t + 1))) + EPS)
    return weights


def problem(rows: int, columns: int, steps: int, seed: int = 0) -> tuple[Matrix, list[Matrix], list[float]]:
    """Weights close enough to each other that masks change on the way, one exact zero, gradients, falling rates."""
    generator = random.Random(seed)
    weights = [[generator.gauss(0, 0.05) for _ in range(columns)] for _ in range(rows)]
    weights[0][1] = 0.0
    grads = [[[generator.gauss(0, 1e-3) for _ in range(columns)] for _ in range(rows)] for _ in range(steps)]
    return weights, grads, [1e-2 * (1 - t / steps) for t in range(steps)]


def run(optimizer: AdamS, parameters: list[Tensor], grads: list[list[Tensor]], lrs: list[float]) -> None:
    for step_grads, lr in zip(grads, lrs, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, grad in zip(parameters, step_grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()


def changed_masks(weights: Matrix, grads: list[Matrix], lrs: list[float], decay: float, total_steps: int) -> int:
    before = nm_mask(torch.tensor(weights, dtype=torch.float64))
    after = nm_mask(torch.tensor(reference(weights, grads[:20], lrs[:20], decay, total_steps), dtype=torch.float64))
    return int((before != after).sum())


@pytest.mark.parametrize("decay", [0.0, 4e-7, 1e-3, 1.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("total_steps", [25, 1000])
def test_follows_algorithm_1(decay: float, dtype: torch.dtype, tolerance: float, total_steps: int) -> None:
    weights, grads, lrs = problem(3, 16, 25)
    if decay < 1:  # so refreshes are part of the comparison; strong decay settles the first masks
        assert changed_masks(weights, grads, lrs, decay, total_steps) > 0
    parameter = torch.tensor(weights, dtype=dtype, requires_grad=True)
    optimizer = AdamS([{"params": [parameter], "sparse": True}], 1.0, BETAS, EPS, decay=decay, total_steps=total_steps)
    run(optimizer, [parameter], [[torch.tensor(grad, dtype=dtype)] for grad in grads], lrs)
    expected = torch.tensor(reference(weights, grads, lrs, decay, total_steps), dtype=torch.float64)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("decay_norm", "second_moment"), [("l2", "update"), ("l1", "gradient"), ("l2", "gradient")])
def test_ablations_differ_in_their_one_line(
    decay_norm: DecayNorm, second_moment: SecondMoment, dtype: torch.dtype, tolerance: float
) -> None:
    weights, grads, lrs = problem(3, 16, 25)
    parameter = torch.tensor(weights, dtype=dtype, requires_grad=True)
    optimizer = AdamS(
        [{"params": [parameter], "sparse": True}],
        1.0,
        BETAS,
        EPS,
        decay=1e-2,
        total_steps=25,
        decay_norm=decay_norm,
        second_moment=second_moment,
    )
    run(optimizer, [parameter], [[torch.tensor(grad, dtype=dtype)] for grad in grads], lrs)
    ablation, paper = (
        torch.tensor(reference(weights, grads, lrs, 1e-2, 25, *switches), dtype=torch.float64)
        for switches in ((decay_norm, second_moment), ("l1", "update"))
    )
    torch.testing.assert_close(parameter.detach().double(), ablation, rtol=0, atol=tolerance)
    assert (ablation - paper).abs().max() > 100 * tolerance


def test_masked_weights_shrink_and_kept_ones_stay() -> None:
    torch.manual_seed(0)
    parameter = torch.randn(8, 32).mul_(0.05).requires_grad_()
    mask = nm_mask(parameter)
    before = parameter.detach().clone()
    optimizer = AdamS([{"params": [parameter], "sparse": True}], 2e-3, decay=1e-3, total_steps=100)
    lrs = [2e-3 * (1 - t / 100) for t in range(100)]
    run(optimizer, [parameter], [[torch.zeros(8, 32)] for _ in lrs], lrs)
    assert torch.equal(parameter[mask], before[mask])
    assert parameter[~mask].abs().mean() < 0.1 * before[~mask].abs().mean()


def test_other_parameters_follow_adam() -> None:
    torch.manual_seed(0)
    start = torch.randn(5, 7)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer, adam = AdamS([ours], 1e-2, total_steps=30), torch.optim.Adam([theirs], 1e-2)
    for _ in range(30):
        ours.grad = torch.randn(5, 7) * 1e-2
        theirs.grad = ours.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert "mask" not in optimizer.state[ours]


def test_the_stored_momentum_never_sees_the_decay() -> None:
    parameter = torch.randn(2, 8).requires_grad_()
    optimizer = AdamS([{"params": [parameter], "sparse": True}], 1e-3, decay=10.0, total_steps=4)
    run(optimizer, [parameter], [[torch.zeros(2, 8)]] * 4, [1e-3] * 4)
    assert (optimizer.state[parameter]["exp_avg"] == 0).all()
    assert (optimizer.state[parameter]["exp_avg_sq"][~nm_mask(parameter)] > 0).all()


def test_transposed_weights_have_their_groups_along_the_first_axis() -> None:
    weights, grads, lrs = problem(6, 16, 25)
    rows = torch.tensor(weights).requires_grad_()
    columns = torch.tensor(weights).t().contiguous().requires_grad_()
    optimizer = AdamS(
        [{"params": [rows], "sparse": True}, {"params": [columns], "sparse": True, "transposed": True}],
        1.0,
        decay=1e-3,
        total_steps=25,
    )
    run(optimizer, [rows, columns], [[torch.tensor(g), torch.tensor(g).t().contiguous()] for g in grads], lrs)
    torch.testing.assert_close(columns.t(), rows, rtol=0, atol=1e-7)
    assert torch.equal(optimizer.state[columns]["mask"].t(), optimizer.state[rows]["mask"])


@pytest.mark.parametrize("bucket", [16, 100])
def test_buckets_do_not_change_the_result(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[Tensor]:
        torch.manual_seed(1)
        parameters = [torch.randn(shape).requires_grad_() for shape in [(5, 8), (3, 40), (4, 4)]]
        parameters.append(torch.randn(12, 8).t().requires_grad_())  # not contiguous
        optimizer = AdamS([{"params": parameters, "sparse": True}], 1e-2, decay=1e-3, total_steps=12)
        run(optimizer, parameters, [[torch.randn(p.shape) for p in parameters] for _ in range(12)], [1e-2] * 12)
        return parameters

    whole = trained()
    monkeypatch.setattr(cast_train.masked_adam, "_CPU_BUCKET", bucket)
    for pieces, expected in zip(trained(), whole, strict=True):
        torch.testing.assert_close(pieces, expected, rtol=0, atol=1e-6)


def test_masks_are_bool_refreshed_every_interval_and_flips_counted() -> None:
    parameter = torch.tensor([[4.0, 3.0, 2.0, 1.0]], requires_grad=True)
    optimizer = AdamS([{"params": [parameter], "sparse": True}], 0.0, total_steps=100)
    for step in range(11):
        if step == 5:
            parameter.data = torch.tensor([[4.0, 1.0, 2.0, 3.0]])  # seen at the refresh of step 10
        parameter.grad = torch.zeros(1, 4)
        optimizer.step()
        mask = optimizer.state[parameter]["mask"]
        assert mask.dtype == torch.bool
        assert mask.tolist() == [[True, step < 10, False, step >= 10]]
        assert optimizer.mask_flips == (2 if step == 10 else 0)
    parameter.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    optimizer.refresh_masks()
    assert optimizer.state[parameter]["mask"].tolist() == [[False, False, True, True]]


def test_state_survives_saving_bit_for_bit() -> None:
    weights, grads, lrs = problem(4, 16, 24)
    tensors = [[torch.tensor(grad)] for grad in grads]

    def start() -> tuple[Tensor, AdamS]:
        parameter = torch.tensor(weights, requires_grad=True)
        return parameter, AdamS([{"params": [parameter], "sparse": True}], 1.0, decay=1e-3, total_steps=24)

    whole, optimizer = start()
    run(optimizer, [whole], tensors, lrs)
    first, optimizer = start()
    run(optimizer, [first], tensors[:13], lrs[:13])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second, resumed = start()
    second.data.copy_(first.detach())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[second]["mask"].dtype == torch.bool
    run(resumed, [second], tensors[13:], lrs[13:])
    assert torch.equal(second, whole)


def test_refuses_the_state_of_another_ramp() -> None:
    parameter = torch.zeros(1, 4, requires_grad=True)
    saved = AdamS([parameter], 1e-3, total_steps=100).state_dict()
    with pytest.raises(InputError, match="100 steps, not of 200"):
        AdamS([parameter], 1e-3, total_steps=200).load_state_dict(saved)


def test_refuses_what_it_cannot_train() -> None:
    with pytest.raises(InputError, match="bfloat16"):
        AdamS([torch.zeros(1, 4, dtype=torch.bfloat16, requires_grad=True)], 1e-3, total_steps=1)
    with pytest.raises(InputError, match="divisible by 4"):
        AdamS([{"params": [torch.zeros(4, 6, requires_grad=True)], "sparse": True}], 1e-3, total_steps=1)
    with pytest.raises(InputError, match="total_steps"):
        AdamS([torch.zeros(4, requires_grad=True)], 1e-3, total_steps=0)
    with pytest.raises(InputError, match="l1 or l2"):
        AdamS([torch.zeros(4, requires_grad=True)], 1e-3, total_steps=1, decay_norm="l3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="decay"):
        AdamS([torch.zeros(4, requires_grad=True)], 1e-3, decay=-1.0, total_steps=1)


def test_stops_where_the_ramp_ends() -> None:
    parameter = torch.zeros(1, 4, requires_grad=True)
    parameter.grad = torch.zeros(1, 4)
    optimizer = AdamS([parameter], 1e-3, total_steps=2)
    optimizer.step()
    optimizer.step()
    with pytest.raises(InputError, match="2 steps"):
        optimizer.step()


def test_leaves_parameters_without_gradient_alone() -> None:
    idle, busy = torch.ones(1, 4, requires_grad=True), torch.ones(1, 4, requires_grad=True)
    optimizer = AdamS([{"params": [idle, busy], "sparse": True}], 1e-2, total_steps=2)
    busy.grad = torch.ones(1, 4)
    optimizer.step()
    assert (idle == 1).all()
    assert (busy != 1).any()
