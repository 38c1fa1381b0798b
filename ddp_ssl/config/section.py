"""The base of all sections of a config, and the types of their numbers."""

from __future__ import annotations

import os
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=100)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=8, le=4096)]
Temperature = Annotated[float, Field(ge=1 / 350)]
"""Of InfoNCE: below, exp(1 / temperature) is no float32."""
Seconds = Annotated[float, Field(gt=0, le=1e7)]
Channels = tuple[float, ...]
S = TypeVar("S", bound="Section")


def _as_path(text: str) -> str:
    path = os.path.expanduser(text)
    if "\0" in path:
        raise ValueError(f"a path cannot hold a zero byte, got {text!r}")
    longest = max(map(len, os.fsencode(path).split(b"/")))
    if longest > 255 or len(os.fsencode(path)) > 4000:
        what = f"a name of {longest}" if longest > 255 else f"{len(os.fsencode(path))}"
        raise ValueError(f"{what} bytes; accepted: 255 for a name, 4000 for the whole path")
    return path


PathText = Annotated[str, AfterValidator(_as_path)]
"""A path as it was given, with `~` expanded."""


class Section(BaseModel):
    """A frozen part of the tree. Unknown keys are errors; docstrings are the reference."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*")
    @classmethod
    def _is_moderate(cls, value: Any) -> Any:
        """Numbers that a float32 and an int32 hold, with room for products."""
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, int) and abs(number) >= 2**31:
                raise ValueError(f"a whole number below 2**31 is accepted, got {number:.3g}")
            if isinstance(number, float) and number and not 1e-30 <= abs(number) <= 1e30:
                raise ValueError(f"0 or a number from 1e-30 to 1e30 is accepted, got {number:g}")
        return value
