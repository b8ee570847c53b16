"""What lm_head is applied to: for losses that make logits themselves, a few tokens at a time."""

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel


def before_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The last hidden states so that lm_head's weight makes the logits of them: Granite's are divided by a number."""
    scale: float = getattr(model.config, "logits_scaling", 1.0)
    return hidden if scale == 1 else hidden / scale


def last_hidden_state(model: PreTrainedModel, ids: Tensor, **places: Tensor) -> Tensor:
    """Return the hidden states [batch, length, hidden] that lm_head is applied to.

    `places` may be attention_mask and position_ids.
    """
    if isinstance(model, FSDPModule):  # gathers the parameters of what is called, so that must be all of the model
        outputs = model(input_ids=ids, **places, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        return before_head(model, outputs.hidden_states[-1])
    return before_head(model, model.base_model(input_ids=ids, **places, use_cache=False).last_hidden_state)
