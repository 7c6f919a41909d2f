"""Fields that act only with certain values of another field.

A training refuses such a field where it has no effect, and a search refuses to vary it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Field -> (the field that it needs, the values of that with which it acts, these in words). Where the experiment lacks
# one of the two, as the model is of another kind, there is nothing to say.
NEEDS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "data.augment.pan": ("data.augment.crop", lambda crop: crop < 1, "below 1"),
    "data.segments.shortest_s": ("data.segments.frames", bool, "above 0"),
    "data.segments.frame_times": ("data.segments.frames", bool, "above 0"),
    "data.cache_max_gb": ("data.cache_decoded", bool, "true"),
    "model.image_batch_statistics": ("model.batch_norm", bool, "true"),
    "model.real_label": ("model.adversarial_loss", lambda loss: loss == "logistic", "logistic"),
    "model.adversarial_from_step": ("model.adversarial_weight", bool, "above 0"),
    "model.discriminator_widths": ("model.adversarial_weight", bool, "above 0"),
    "model.kl_weight": ("model.posterior_fraction", bool, "above 0"),
    "model.kl_warmup_steps": ("model.kl_weight", bool, "above 0"),
    "model.free_nats": ("model.kl_weight", bool, "above 0"),
    "speed.sync_batch_norm": ("model.batch_norm", bool, "true"),
}


def without_effect(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(field, the field that it needs, the values of that in words) of each field that is set and does not act.

    Both mappings are {"section.field": value} of one kind of model; a field is set where it is not its default, and
    not what turns it off.
    """
    for name, (needed, acts, words) in NEEDS.items():
        is_set = needed in fields and bool(fields.get(name)) and fields[name] != defaults[name]
        if is_set and not acts(fields[needed]):
            yield name, needed, words
