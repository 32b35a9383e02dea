"""`Section`: the base class of every mapping in a stack file."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from . import unsupported

# EulerStack leaves keys with the prefix `vendor.` to the program that reads the file. This prefix is ours.
OURS = "vendor.retnet."
RESERVED_PREFIXES = ("experimental.", "future.", "vendor.")


class Section(BaseModel):
    """A mapping of the file. Closed: a key is a field, one of `UNSUPPORTED`, reserved, or an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, populate_by_name=True)

    ALSO_CALLED: ClassVar[Mapping[str, str]] = {}  # other words for keys of ours, which the error of such a key names
    UNSUPPORTED: ClassVar[unsupported.Keys] = {}
    UNSUPPORTED_VALUES: ClassVar[unsupported.Values] = {}

    @classmethod
    def keys(cls) -> dict[str, Any]:
        """The keys as the file spells them, with the type of each."""
        return {info.alias or name: info.annotation for name, info in cls.model_fields.items()}
