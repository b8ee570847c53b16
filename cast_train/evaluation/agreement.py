"""How far a model's next-token distributions are from its dense teacher's."""

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 23
"""Logits of the teacher, and of each intermediate, that exist at once: 32 MiB of float32."""


@torch.no_grad()
def divergence(logits: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> tuple[Tensor, Tensor]:
    """Compare every position's distribution with the teacher's, whose logits are made a chunk of positions at a time.

    Args:
        logits: [tokens, vocab], the student's.
        teacher_hidden: [tokens, hidden], the teacher's last hidden states (after the final norm).
        teacher_head: [vocab, hidden], the teacher's lm_head weight.

    Returns:
        KL(teacher || student) in nats, [tokens] float32, and whether both prefer the same token, [tokens] bool.
    """
    rows = max(1, CHUNK_LOGITS // teacher_head.shape[0])
    kl, same = [], []
    for student, hidden in zip(logits.split(rows), teacher_hidden.split(rows), strict=True):
        teacher = torch.nn.functional.linear(hidden, teacher_head).float()
        same.append(teacher.argmax(1) == student.argmax(1))
        log_p = teacher.log_softmax(1)
        log_q = student.float().log_softmax(1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(1))
    return torch.cat(kl), torch.cat(same)
