"""Triggers: pure functions from images to images."""

from unbackdoor.triggers.blend import BlendTrigger as BlendTrigger
from unbackdoor.triggers.files import load_trigger as load_trigger
from unbackdoor.triggers.files import save_trigger as save_trigger
from unbackdoor.triggers.patch import PatchTrigger as PatchTrigger
