"""The shape of ``card.json``: cards may come from strangers, and a wrong type must end in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from unbackdoor.errors import InvalidInputError

Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Rate(BaseModel):
    value: Fraction | None
    low: Fraction
    high: Fraction
    successes: int = Field(ge=0)
    n: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.successes > self.n or self.low > self.high or (self.value is None) != (self.n == 0):
            raise ValueError("successes <= n, low <= high, and a value exactly if n > 0 are required")
        return self


class _Stealth(BaseModel):
    psnr_db: float | None
    ssim: float
    max_change: float


class _Validity(BaseModel):
    valid: bool = True
    problems: list[str] = []
    unchecked: list[str] = []
    clean_twin_accuracy: _Rate | None = None
    natural_floor: _Rate | None = None
    attack_success_float: _Rate | None = None
    decoy_accuracy: dict[str, _Rate] = {}
    stealth: _Stealth = Field(default=_Stealth(psnr_db=None, ssim=1.0, max_change=0.0))


class _Difference(BaseModel):
    here: Any
    paper: Any


class _Targeted(BaseModel):
    success_rate: Fraction


class _Job(BaseModel):
    arch: str = ""


class _Card(BaseModel):
    attack: str | None = None
    num_classes: int | None = Field(default=None, ge=1)
    sha256: str = ""
    metrics: dict[str, _Rate] = {}
    validity: _Validity = _Validity()
    files: dict[str, str] = {}
    job: _Job = _Job()
    label_rule: dict[str, Any] = {}
    differs_from_paper: dict[str, _Difference] = {}
    differs_from_mnp_recipe: dict[str, _Difference] = {}
    targeted: _Targeted | None = None
    poisoned: int = 0
    twin: str = ""
    command: str = ""


def check_card(card: dict[str, Any], path: Path) -> None:
    """Check the types of what a card says; keys that are absent or unknown are no error.

    Args:
        card: The JSON object.
        path: Where it was read, for the message.

    Raises:
        InvalidInputError: If a value has another type than ``unbackdoor attack`` writes.
    """
    try:
        _Card.model_validate(card)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidInputError(
            f"{path} is no sound model card: {where}: {first['msg']}; restore the file, or train the model "
            "again."
        ) from error
