"""`python -m benchmarks.gpu.training_correctness`: masks, AdamS and the loss on the accelerator against float64."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from cast_train.adams import AdamS
from cast_train.distillation import distillation_loss
from cast_train.mask import nm_mask

_STEPS, _LR, _DECAY = 40, 1e-3, 1e-2


def masks_differ(device: torch.device) -> float:
    """Return the part of mask bits that differ from the CPU's, over random weights with many ties."""
    weight = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).mul(4).round()
    return (nm_mask(weight.to(device)).cpu() != nm_mask(weight)).float().mean().item()


def adams_error(device: torch.device) -> float:
    """Return the largest difference of a weight from the float64 reference after all steps, in learning rates."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 256, generator=generator, dtype=torch.float64) * 0.05
    grads = torch.randn(_STEPS, 64, 256, generator=generator, dtype=torch.float64) * 1e-3
    weight = start.to(device, torch.float32).requires_grad_()
    optimizer = AdamS([{"params": [weight], "sparse": True}], lr=_LR, decay=_DECAY, total_steps=_STEPS)
    masks = []
    for grad in grads:
        weight.grad = grad.to(device, torch.float32)
        optimizer.step()
        masks.append(optimizer.state[weight]["mask"].cpu().clone())
    expected = reference(start, grads, masks)
    return ((weight.detach().cpu().double() - expected).abs().max() / _LR).item()


def reference(theta: Tensor, grads: Tensor, masks: list[Tensor]) -> Tensor:
    """Algorithm 1, written out; with the given masks, so that a near tie does not decide the comparison."""
    theta, mu, v = theta.clone(), torch.zeros_like(theta), torch.zeros_like(theta)
    for t, (grad, mask) in enumerate(zip(grads, masks, strict=True)):
        mu = 0.9 * mu + 0.1 * grad
        ramp = t / len(grads)
        mixed = torch.where(mask, mu, (1 - ramp) * mu + ramp * _DECAY * theta.sign())
        v = 0.999 * v + 0.001 * mixed**2
        theta = theta - _LR * (mixed / (1 - 0.9 ** (t + 1))) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
    return theta


def loss_errors(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative errors of the chunked loss and of its gradients (by norm) against float64 and autograd."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(2, 257, 128, generator=generator, dtype=torch.float64) for _ in range(2))
    head, teacher_head = (torch.randn(5003, 128, generator=generator, dtype=torch.float64) * 0.2 for _ in range(2))
    labels = torch.randint(5003, (2, 257), generator=generator)
    eta = 1 / 3

    inputs = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
    log_q = (inputs[0][:, :-1] @ inputs[1].t()).log_softmax(-1)
    log_p = (teacher[:, :-1] @ teacher_head.t()).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected = eta * kl - (1 - eta) * log_q.gather(-1, labels[:, 1:, None]).mean()
    expected_grads = torch.autograd.grad(expected, inputs)

    mine = [tensor.detach().to(device, torch.float32).requires_grad_() for tensor in inputs]
    others = [tensor.to(device, torch.float32) for tensor in (teacher, teacher_head)]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        losses = distillation_loss(mine[0], mine[1], labels.to(device), *others, eta=eta, chunk_tokens=100)
    grads = torch.autograd.grad(losses.loss, mine)
    worst = max(
        ((grad.cpu().double() - other).norm() / other.norm()).item()
        for grad, other in zip(grads, expected_grads, strict=True)
    )
    return abs(losses.loss.item() / expected.item() - 1), worst


def check(device: torch.device) -> dict[str, Any]:
    """Return each measured error with its limit, and whether all are within theirs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    errors = {
        "mask bits that differ": (masks_differ(device), 0.0),
        "AdamS, learning rates": (adams_error(device), 0.01),
    }
    for dtype, loss_limit, grad_limit in ((torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 3e-2)):
        loss, grads = loss_errors(device, dtype)
        name = str(dtype).removeprefix("torch.")
        errors[f"loss, {name}"] = (loss, loss_limit)
        errors[f"gradients of the loss, {name}"] = (grads, grad_limit)
    return {
        "ok": all(error <= limit for error, limit in errors.values()),
        "errors": {name: {"error": error, "limit": limit} for name, (error, limit) in errors.items()},
    }


def main(
    out: Annotated[Path | None, typer.Option("--json", help="Directory to write the result to.")] = None,
    device: Annotated[str, typer.Option(help="Device to check.")] = "cuda",
) -> None:
    """Exit with 1 if anything is off."""
    result = check(torch.device(device))
    print(json.dumps(result, indent=1))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "training-correctness.json").write_text(json.dumps(result, indent=1) + "\n")
    raise typer.Exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    typer.run(main)
