"""Self-distillation: eta * KL(teacher || student) + (1 - eta) * CE (CAST, Sec. IV-C, Eq. 13)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

# Logits in one chunk: on a CPU just below 32 MiB of float32, above which glibc faults in fresh pages each time.
_CPU_LOGITS = 6 << 20
ACCELERATOR_LOGITS = 1 << 27


@dataclass(frozen=True)
class DistillationLoss:
    """Scalars, means over the predicted tokens (0 if there is none), in nats. Only `loss` carries gradients."""

    loss: Tensor
    ce: Tensor
    kl: Tensor


@dataclass(frozen=True)
class TeacherTop:
    """A teacher's k most likely next tokens at each position, instead of the teacher.

    The KL term is then that between the distributions over those k tokens and "any other": never more than the true
    KL. Its gradient is that of a teacher who spreads the rest of its mass in the student's own proportions.

    Attributes:
        ids: [batch, length - 1, k] int64; log_probs: the same shape; tail: [batch, length - 1], log of the mass of all
            other tokens. Rounding is corrected: the mass is brought back to 1.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    *,
    eta: float = 1 / 3,
    temperature: float = 1.0,
    teacher_top: TeacherTop | None = None,
    chunk_tokens: int | None = None,
) -> DistillationLoss:
    """Compute the loss from hidden states, a chunk of tokens at a time, so that logits of all tokens never exist.

    With temperature T the KL term is T^2 * KL(softmax(teacher / T) || softmax(student / T)); the paper's T is 1.
    Gradients are made chunk by chunk in the forward pass, where the logits are at hand. Under autocast the products
    with the heads run in the autocast dtype; softmax and sums are always float32 (float64 for float64 inputs).

    Args:
        hidden: [batch, length, hidden], the student's last hidden states (after the final norm).
        head: [vocab, hidden], the student's lm_head weight, trainable or not, tied or not.
        labels: [batch, length] int64, unshifted: position i of `hidden` predicts labels[:, i+1]; -100 is left out.
        teacher_hidden: [batch, length, teacher hidden], or None for plain cross entropy (then eta is taken as 0).
        teacher_head: [vocab, teacher hidden].
        eta: weight of the KL term.
        temperature: T of the KL term.
        teacher_top: what is known of the teacher, in the place of its hidden states and head; temperature must be 1.
        chunk_tokens: tokens whose logits are held at once; default: as many as are fast on the device.
    """
    predicting = labels[:, 1:] != IGNORE_INDEX
    rows = hidden[:, :-1][predicting]
    targets = labels[:, 1:][predicting]
    teacher_rows = None if teacher_hidden is None else teacher_hidden[:, :-1][predicting].detach()
    if chunk_tokens is None:
        chunk_tokens = max(16, (_CPU_LOGITS if hidden.device.type == "cpu" else ACCELERATOR_LOGITS) // head.shape[0])
    loss, ce, kl = _ChunkedLoss.apply(
        rows,
        head,
        targets,
        teacher_rows,
        teacher_head,
        None if teacher_top is None else tuple(part[predicting] for part in normalised(teacher_top)),
        eta if teacher_hidden is not None or teacher_top is not None else 0.0,
        temperature,
        chunk_tokens,
    )
    return DistillationLoss(loss, ce, kl)


def normalised(top: TeacherTop) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, log-probs and tail of a teacher whose mass is 1."""
    log_probs, tail = top.log_probs.float(), top.tail.float()
    log_mass = torch.cat([log_probs, tail[..., None]], dim=-1).logsumexp(-1)
    return top.ids, log_probs - log_mass[..., None], tail - log_mass


class _ChunkedLoss(torch.autograd.Function):
    """(rows [T, H], head [V, H], targets [T], teacher rows [T, Ht], teacher head [V, Ht]) -> (loss, CE, KL).

    Or, in the place of the last two: (ids [T, k], log-probs [T, k], tail [T]).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher_rows: Tensor | None,
        teacher_head: Tensor | None,
        teacher_top: tuple[Tensor, Tensor, Tensor] | None,
        eta: float,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        accumulate = torch.float64 if rows.dtype == torch.float64 else torch.float32
        tokens = max(1, rows.shape[0])  # without any, all is zero
        wants_rows, wants_head = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows) if wants_rows else None
        grad_head = torch.zeros(head.shape, dtype=accumulate, device=head.device) if wants_head else None
        ce_sum = torch.zeros((), dtype=accumulate, device=rows.device)
        kl_sum = torch.zeros_like(ce_sum)
        with torch.autocast(device, enabled=False):
            head = head.to(dtype)
            if teacher_rows is not None and teacher_head is not None:
                teacher_head = teacher_head.to(dtype)
            for start in range(0, tokens, chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                x = rows[chunk].to(dtype)
                target = targets[chunk, None]
                logits = F.linear(x, head).to(accumulate)
                log_z = logits.logsumexp(1, keepdim=True)
                ce_sum += (log_z - logits.gather(1, target)).sum()
                teacher = None
                soft, soft_log_z = logits, log_z  # the student at the temperature of the KL term
                if teacher_rows is not None and teacher_head is not None:
                    teacher = F.linear(teacher_rows[chunk].to(dtype), teacher_head).to(accumulate)
                    if temperature != 1:
                        teacher.div_(temperature)
                        soft = logits / temperature
                        soft_log_z = soft.logsumexp(1, keepdim=True)
                    teacher_log_z = teacher.logsumexp(1, keepdim=True)
                    # KL = sum p_t (log p_t - log p_s), the normalisers taken out of the sum
                    margin = teacher - soft
                    teacher.sub_(teacher_log_z).exp_()
                    kl_sum += (margin.mul_(teacher).sum(1, keepdim=True) - teacher_log_z + soft_log_z).sum()
                    del margin
                elif teacher_top is not None:
                    ids, log_probs, tail = (part[chunk] for part in teacher_top)
                    probs = log_probs.to(accumulate).exp()
                    others = logits.scatter(1, ids, float("-inf"))
                    margin = tail.to(accumulate)[:, None] - others.logsumexp(1, keepdim=True)
                    kl_sum += (probs * (log_probs - logits.gather(1, ids) + log_z)).sum()
                    kl_sum += (tail.to(accumulate)[:, None].exp() * (margin + log_z)).sum()
                    teacher = others.add_(margin).exp_().scatter_(1, ids, probs)
                if grad_rows is None and grad_head is None:
                    continue
                # d loss / d logits = eta * T * (p_s - p_t) at temperature T + (1 - eta) * (p_s - onehot) at 1, over the
                # number of tokens
                grad = logits.sub_(log_z).exp_()
                if soft is not logits:
                    grad.mul_(1 - eta).add_(soft.sub_(soft_log_z).exp_(), alpha=eta * temperature)
                if teacher is not None:
                    grad.sub_(teacher, alpha=eta * temperature)
                grad.scatter_add_(1, target, torch.full_like(target, eta - 1, dtype=accumulate))
                grad = grad.div_(tokens).to(dtype)
                if grad_rows is not None:
                    grad_rows[chunk] = grad @ head
                if grad_head is not None:
                    grad_head += grad.t() @ x
        ctx.grads = (grad_rows, grad_head)
        ce, kl = ce_sum / tokens, kl_sum * (temperature**2 / tokens)
        ctx.mark_non_differentiable(ce, kl)
        return eta * kl + (1 - eta) * ce, ce, kl

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, grad_head = ctx.grads
        ctx.grads = None
        return (
            None if grad_rows is None else grad_rows * grad_outputs[0],
            None if grad_head is None else grad_head.mul_(grad_outputs[0]),
            *([None] * 7),
        )
