"""Methods by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from models.methods.aid import AID
from models.methods.base import Method
from models.methods.fca import FCA
from models.methods.fvdm import FVDM
from models.methods.lct import LCT
from models.methods.svd import SVD
from models.methods.tic_ft import TICFT

METHODS: dict[str, type[Method]] = {method.name: method for method in (FVDM, LCT, TICFT, FCA, AID, SVD)}


def get_method(name: str, **params: Any) -> Method:
    """The method `name` with its parameters; ValueError for a name or a parameter it does not have."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    for key in params:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"method {name!r} has no parameter {key!r}; {hint}")
    return METHODS[name](**params)


def trained_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a model trained with `params`, some of which may not have existed then (`Method.before`)."""
    return {**(METHODS[name].before if name in METHODS else {}), **params}
