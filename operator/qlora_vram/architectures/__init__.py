"""Descriptions of the model families whose facts follow from config.json alone. Data, checked against transformers."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_vram.architectures import fused, mixtures, split
from qlora_vram.architectures.layout import Experts, Family, Linear, Norm

__all__ = ["FAMILIES", "Experts", "Family", "Linear", "Norm"]

FAMILIES: Mapping[str, Family] = {**split.FAMILIES, **fused.FAMILIES, **mixtures.FAMILIES}
"""By model type, as config.json and transformers name it."""
