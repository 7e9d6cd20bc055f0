"""Test your own method: the contracts of this package as functions, and a network with a known backdoor.

Example:
    >>> from unbackdoor.testing import check_purifier
    >>> check_purifier(MyPurifier(epochs=2))  # raises AssertionError with what it got wrong

With pytest, one test a check:

    >>> @pytest.mark.parametrize("check", PURIFIER_CHECKS.values(), ids=PURIFIER_CHECKS)
    ... def test_my_purifier(check):
    ...     check(MyPurifier(epochs=2))
"""

from unbackdoor.testing.attacks import ATTACK_CHECKS as ATTACK_CHECKS
from unbackdoor.testing.attacks import check_attack as check_attack
from unbackdoor.testing.detectors import DETECTOR_CHECKS as DETECTOR_CHECKS
from unbackdoor.testing.detectors import check_detector as check_detector
from unbackdoor.testing.planted import PlantedBackdoor as PlantedBackdoor
from unbackdoor.testing.planted import planted_backdoor as planted_backdoor
from unbackdoor.testing.planted import planted_network as planted_network
from unbackdoor.testing.purifiers import PURIFIER_CHECKS as PURIFIER_CHECKS
from unbackdoor.testing.purifiers import check_purifier as check_purifier
from unbackdoor.testing.samples import SAMPLE_DETECTOR_CHECKS as SAMPLE_DETECTOR_CHECKS
from unbackdoor.testing.samples import check_sample_detector as check_sample_detector
