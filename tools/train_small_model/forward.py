"""One batch through the model: the loss to descend, and what to tell of it."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import InternVLForConditionalGeneration

from .dense import DenseHeads
from .packing import SKILLS, Batch, attention_mask


@dataclass
class Outcome:
    """What a batch gave; all of it stays on the device.

    ``skills`` is [skills + 1, 3]: answers, answers that are right to the last token, loss; ``eyes``
    is [heads, 2]: right classes, and how many there were to tell.
    """

    loss: torch.Tensor
    skills: torch.Tensor
    eyes: torch.Tensor


def look(model: InternVLForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    """Image tokens [pictures, tokens, width] of pictures [pictures, height, width, 3] in bytes."""
    pixel_values = images.permute(0, 3, 1, 2).to(model.dtype) / 127.5 - 1
    return model.model.get_image_features(pixel_values, return_dict=True).pooler_output


def hidden_states(
    model: InternVLForConditionalGeneration, batch: Batch, seen: torch.Tensor
) -> torch.Tensor:
    """The language model's last states where an answer's token is to be told."""
    ids = batch["ids"]
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == model.config.image_token_id)[..., None], seen)
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=attention_mask(batch, embeds.dtype),
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    return hidden.flatten(0, 1)[batch["at"]]


def outcome_of(
    model: InternVLForConditionalGeneration,
    heads: DenseHeads,
    batch: Batch,
    dense_weight: float,
    eyes_only: bool,
) -> Outcome:
    """Mean loss over the answers' tokens, and ``dense_weight`` times that of the dense heads."""
    seen = look(model, batch["images"])
    dense, eyes = heads(seen, model.get_input_embeddings().weight, batch["cells"])
    if eyes_only:
        return Outcome(dense, seen.new_zeros(len(SKILLS) + 1, 3, dtype=torch.float32), eyes)
    logits = model.lm_head(hidden_states(model, batch, seen)).float()
    wanted = batch["wanted"]
    each = cross_entropy(logits, wanted, ignore_index=-100, reduction="none")
    loss = each.sum() / (wanted >= 0).sum().clamp(min=1)
    wrong = ((logits.detach().argmax(-1) != wanted) & (wanted >= 0)).float()
    skills = _by_skill(batch, wrong, each.detach())
    return Outcome(loss + dense_weight * dense, skills, eyes)


def _by_skill(batch: Batch, wrong: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
    """Answers, right answers and loss of each skill; the last row is for what only fills up."""
    turn, skill = batch["turn"], batch["turn_skill"]
    wrongs = torch.zeros(len(skill), device=turn.device).index_add_(0, turn, wrong)
    losses = torch.zeros(len(skill), device=turn.device).index_add_(0, turn, each)
    told = torch.stack((torch.ones_like(losses), (wrongs == 0).float(), losses), dim=1)
    return torch.zeros(len(SKILLS) + 1, 3, device=turn.device).index_add_(0, skill, told)
