"""Data: readers of labelled images, draws and splits of them, batched augmentation."""

from unbackdoor.data.checks import CleanDraw as CleanDraw
from unbackdoor.data.checks import check_against_model as check_against_model
from unbackdoor.data.checks import clean_draw as clean_draw
from unbackdoor.data.readers import load_images as load_images
from unbackdoor.data.readers import load_samples as load_samples
from unbackdoor.data.splits import draw_balanced as draw_balanced
from unbackdoor.data.splits import split as split
