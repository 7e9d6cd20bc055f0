"""Purifiers: model and clean images to a new model, one file a paper."""

from unbackdoor.purify.mnp import MNP as MNP
