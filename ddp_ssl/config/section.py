"""The base of all sections of a config, and the types of their numbers."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1)]
Channels = tuple[float, float, float]
S = TypeVar("S", bound="Section")


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
