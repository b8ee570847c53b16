"""sparsify and finalize on every family, and the trainer's loss against the model's own."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from cast_train import CastTrainer, finalize, nm_mask, sparsify
from cast_train.scaling import ScaledLinear
from cast_train.sparse_model import scope
from cast_train.trainer import parameter_groups, training_arguments
from conversion.errors import InputError
from conversion.families import family_of, in_scope
from tests.cast_train.tiny import FAMILIES, config
from tests.conversion.models import CONFIGS, make_model

LINEARS_PER_BLOCK = {"gpt2": 4, "opt": 6}


@pytest.mark.parametrize("family", FAMILIES)
def test_finalize_cuts_exactly_and_folds(family: str) -> None:
    model = make_model(CONFIGS[family], sparse=False)
    names = sorted(model.state_dict())
    ids = torch.randint(0, 97, (2, 11))
    sparsify(model, config())
    layers = dict(scope(model))
    assert len(layers) == 2 * LINEARS_PER_BLOCK.get(family, 7)
    assert all(isinstance(layer, ScaledLinear) for layer in layers.values())
    torch.manual_seed(1)
    for layer in layers.values():
        nn.init.uniform_(layer.scale, -2.0, 2.0)
        with torch.no_grad():  # what training leaves: masked weights that are zero but for the cut
            rows = layer.weight.t() if layer.transposed else layer.weight
            layer.weight.mul_(nm_mask(rows).t() if layer.transposed else nm_mask(rows))
            rows[0, :4] = -0.0
    before = model(ids).logits
    finalize(model)
    assert sorted(model.state_dict()) == names
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    stored = family_of(model.config.model_type)
    cut = 0
    for name, parameter in model.named_parameters():
        if in_scope(stored, name, parameter.shape):
            rows = parameter.t() if stored.transposed else parameter
            assert ((rows != 0).reshape(-1, 4).sum(1) <= 2).all()
            assert not (torch.signbit(rows) & (rows == 0)).any()
            cut += 1
    assert cut == len(layers)
    assert all(isinstance(module, nn.Linear | Conv1D) for _, module in scope(model))


def test_the_mask_is_of_the_weight_not_of_the_scaled_one() -> None:
    model = sparsify(make_model(CONFIGS["llama"], sparse=False), config(scaling_blocks=8))
    name, layer = next(iter(scope(model)))
    with torch.no_grad():
        layer.weight[0, :8] = torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0])
        layer.scale[0, 0] = 0.001
    finalize(model)
    weight = model.get_submodule(name).weight[0, :8]
    torch.testing.assert_close(weight[:4], torch.tensor([0.0, 0.0, 0.003, 0.004]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_embeddings", [True, False])
def test_parameter_groups_hold_everything_trainable_once(family: str, train_embeddings: bool) -> None:
    settings = config(train_embeddings=train_embeddings)
    model = sparsify(make_model(CONFIGS[family], sparse=False), settings)
    groups = parameter_groups(model, settings)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    assert model.get_input_embeddings().weight.requires_grad == train_embeddings
    in_groups = sum(len(group["params"]) for group in groups if group.get("sparse"))
    assert in_groups == len(list(scope(model)))
    assert all(bool(group.get("transposed")) == (family == "gpt2") for group in groups if group.get("sparse"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_of_the_models_own_logits(family: str, tmp_path: Path) -> None:
    student, teacher = (make_model(CONFIGS[family], sparse=False, seed=seed) for seed in (0, 1))
    ids = torch.randint(0, 97, (2, 12))
    log_p, log_q = (model(ids).logits[:, :-1].double().log_softmax(2).flatten(0, 1) for model in (student, teacher))
    ce = F.nll_loss(log_p, ids[:, 1:].flatten())
    kl = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    settings = config(eta=0.4)
    trainer = CastTrainer(sparsify(student, settings), settings, teacher, args=training_arguments(settings, tmp_path))
    losses = trainer.distillation(student, {"input_ids": ids})
    assert losses.ce.item() == pytest.approx(ce.item(), rel=1e-4)
    assert losses.kl.item() == pytest.approx(kl.item(), rel=1e-4)
    assert losses.loss.item() == pytest.approx(0.4 * kl.item() + 0.6 * ce.item(), rel=1e-4)
    losses.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_refuses_another_number_of_steps_than_the_ramp_has(tmp_path: Path) -> None:
    settings = config(steps=5)
    model = sparsify(make_model(CONFIGS["llama"], sparse=False), settings)
    trainer = CastTrainer(model, settings, args=training_arguments(settings, tmp_path))
    trainer.create_scheduler(5)
    with pytest.raises(InputError, match="6 steps and the config says 5"):
        trainer.create_scheduler(6)


def test_refuses_a_model_without_anything_to_prune() -> None:
    odd = CONFIGS["opt"].__class__(
        **{
            **CONFIGS["opt"].to_dict(),
            "hidden_size": 12,
            "ffn_dim": 12,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 12,
        }
    )
    with pytest.raises(InputError, match="multiple of 8"):
        sparsify(make_model(odd, sparse=False), config())
