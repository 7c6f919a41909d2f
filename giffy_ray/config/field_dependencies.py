"""Fields that have an effect only for certain values of another field.

Training rejects such a field where it has no effect, and a search rejects it in its space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Requirement(NamedTuple):
    """The condition on `field` under which another field has an effect."""

    field: str
    is_met: Callable[[Any], bool]
    description: str  # of the accepted values, for messages


# A requirement on a field that the model does not have is ignored.
REQUIREMENTS: dict[str, Requirement] = {
    "data.augment.pan": Requirement("data.augment.crop", lambda crop: crop < 1, "below 1"),
    "data.segments.shortest_s": Requirement("data.segments.frames", bool, "above 0"),
    "data.segments.frame_times": Requirement("data.segments.frames", bool, "above 0"),
    "data.cache_max_gb": Requirement("data.cache_decoded", bool, "true"),
    "model.image_batch_statistics": Requirement("model.batch_norm", bool, "true"),
    "model.real_label": Requirement("model.adversarial_loss", lambda loss: loss == "logistic", "logistic"),
    "model.adversarial_from_step": Requirement("model.adversarial_weight", bool, "above 0"),
    "model.discriminator_widths": Requirement("model.adversarial_weight", bool, "above 0"),
    "model.kl_weight": Requirement("model.posterior_fraction", bool, "above 0"),
    "model.kl_warmup_steps": Requirement("model.kl_weight", bool, "above 0"),
    "model.free_nats": Requirement("model.kl_weight", bool, "above 0"),
    "speed.sync_batch_norm": Requirement("model.batch_norm", bool, "true"),
}


def find_inactive_fields(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Finds fields that are set but have no effect.

    A field is set if its value differs from its default and does not turn the feature off.

    Args:
        fields: Value of each dotted field of an experiment.
        defaults: The defaults for the same kind of model.

    Yields:
        The field, the field that it depends on, and a description of the values for which it has an effect.
    """
    for name, requirement in REQUIREMENTS.items():
        is_set = requirement.field in fields and bool(fields.get(name)) and fields[name] != defaults[name]
        if is_set and not requirement.is_met(fields[requirement.field]):
            yield name, requirement.field, requirement.description
