from __future__ import annotations

import pytest
import torch

from suppressions import right, run
from unbackdoor.concentration import (
    concentration_of,
    interpolate,
    shift_concentration,
    target_concentration,
    unreadable,
)


def test_target_concentration_by_hand() -> None:
    confusion = torch.tensor([[8, 1, 1], [4, 6, 0], [2, 0, 8]])
    # 8 errors; of the 6 on classes 1 and 2 all go to 0; of the 4 on 0 and 2, one goes to 1.
    assert target_concentration(confusion).tolist() == pytest.approx([6 / 6, 1 / 4, 1 / 6])
    assert target_concentration(right(3, 5)).tolist() == [0.0, 0.0, 0.0]


def test_shift_concentration_by_hand() -> None:
    confusion = torch.tensor([[5, 3, 2], [1, 6, 3], [4, 0, 6]])
    # Errors 13; plus one: 3 + 3 + 4 = 10; plus two: 2 + 1 + 0 = 3.
    assert shift_concentration(confusion).tolist() == pytest.approx([10 / 13, 3 / 13])
    assert shift_concentration(right(3, 5)).tolist() == [0.0, 0.0]


def test_interpolation_mixes_the_matrices_around_the_crossing() -> None:
    high, low = right(2, 10), torch.tensor([[4, 6], [8, 2]])
    checks = run(high, low).checks
    assert [check.accuracy for check in checks] == pytest.approx([1.0, 0.3])
    wanted = (1 - 5 / 7) * high.double() + (5 / 7) * low.double()
    assert torch.allclose(interpolate(checks, 0.5, lambda c: c), wanted)
    assert torch.equal(interpolate(checks, 0.3 - 1e-3, lambda c: c), low.double())
    back = run(right(2, 10), low, right(2, 10), low).checks
    assert torch.allclose(interpolate(back, 0.5, lambda c: c), wanted)


def test_a_class_or_a_shift_stands_out() -> None:
    to_one = torch.zeros(5, 5, dtype=torch.int64)
    to_one[:, 3] = 10
    found = concentration_of(run(right(5, 10), to_one))
    # All errors go to 3; a quarter of them is of each of the four shifts.
    assert found.shifts.tolist() == pytest.approx([0.25] * 4)
    assert (found.score, found.is_shift, int(found.targets.argmax())) == (1.0, False, 3)
    assert found.accuracy == 0.5
    moved = concentration_of(run(right(5, 10), torch.roll(right(5, 10), 2, dims=1)), shift_weight=1.25)
    assert (moved.score, moved.is_shift, int(moved.shifts.argmax()) + 1) == (1.25, True, 2)


def test_what_cannot_be_read_is_said() -> None:
    gone = torch.roll(right(5, 10), 1, dims=1)
    assert not unreadable(run(right(5, 10), gone))
    assert "images of 3 classes leave errors too few places" in unreadable(run(right(3, 10), right(3, 10)))
    still = run(right(5, 10), right(5, 10))
    assert "from 1.00 to 1.00, not to 0.50" in unreadable(still)
    assert "not to 0.25" in unreadable(still, at=0.25)
