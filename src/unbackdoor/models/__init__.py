"""Architectures, normalisation, and the one place that opens model files."""

from unbackdoor.models.normalise import NormalisedModel as NormalisedModel
from unbackdoor.models.registry import ARCHITECTURES as ARCHITECTURES
from unbackdoor.models.registry import build as build
