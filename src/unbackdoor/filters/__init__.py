"""Filters of any network: finding, masking, measuring and selecting them."""

from unbackdoor.filters.groups import FilterGroup as FilterGroup
from unbackdoor.filters.groups import FilterMap as FilterMap
from unbackdoor.filters.groups import find_filters as find_filters
from unbackdoor.filters.mask import FilterMask as FilterMask
