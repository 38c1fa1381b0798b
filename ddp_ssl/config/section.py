"""The base of all sections of a config, and the types of their numbers."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

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


SCHEMES = ("s3", "gs", "https", "http")


def is_url(text: str | os.PathLike[str] | None) -> bool:
    """Whether this is an address and not a path."""
    return re.match("[a-z][a-z0-9+.-]*://", str(text)) is not None


def _as_path(text: str) -> str:
    if is_url(text):
        raise ValueError("an address; accepted: a path of this machine")
    path = os.path.expanduser(text)
    if "\0" in path:
        raise ValueError(f"a path cannot hold a zero byte, got {text!r}")
    longest = max(map(len, os.fsencode(path).split(b"/")))
    if longest > 255 or len(os.fsencode(path)) > 4000:
        what = f"a name of {longest}" if longest > 255 else f"{len(os.fsencode(path))}"
        raise ValueError(f"{what} bytes; accepted: 255 for a name, 4000 for the whole path")
    return path


def _as_url(text: str) -> str:
    """An address that may stand in a run folder and in logs; no message repeats it."""
    parts = urlsplit(text)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "an address with a password or a query (?...), which would stand in the run folder and "
            "in logs; accepted: the address alone, with credentials in the environment "
            "(AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...); in a pattern * or [0-9] "
            "in place of ?"
        )
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise ValueError(
            "an address that is not read; accepted: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or "
            "https://HOST/FOLDER"
        )
    return text


def _as_path_or_url(text: str) -> str:
    return _as_url(text) if is_url(text) else _as_path(text)


PathText = Annotated[str, AfterValidator(_as_path)]
"""A path as it was given, with `~` expanded."""
PlaceText = Annotated[str, AfterValidator(_as_path_or_url)]
"""The same, or the address of a folder in an object store."""


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
