"""The base of all sections of a config, and the types of their numbers."""

from __future__ import annotations

import os
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1)]
Channels = tuple[float, float, float]
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
