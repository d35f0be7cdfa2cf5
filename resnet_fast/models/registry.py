"""Names to constructors."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any

from torch import nn

from resnet_fast.models import cifar, resnet

_IMAGENET = [getattr(resnet, name) for name in resnet.ARCHITECTURES]
_CIFAR = [cifar.resnet20, cifar.resnet32, cifar.resnet44, cifar.resnet56, cifar.resnet110, cifar.resnet1202]
_PLAIN = [cifar.plain20, cifar.plain32, cifar.plain44, cifar.plain56]

#: Every network of the package by name.
MODELS: dict[str, Callable[..., nn.Module]] = {make.__name__: make for make in (*_IMAGENET, *_CIFAR, *_PLAIN)}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks, in the order of size within each family.

    Args:
        pattern: shell-style, such as "resnext*".
    """
    return [name for name in MODELS if fnmatch.fnmatchcase(name, pattern)]


def create_model(name: str, **options: Any) -> nn.Module:
    """Construct a network by name.

    Args:
        name: one of `list_models()`.
        options: the constructor's arguments (num_classes, zero_init_residual, ...).

    Raises:
        ValueError: an unknown name; the message has the nearest ones.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS) or list(MODELS)
        raise ValueError(f"create_model: no network is called {name!r}; there are {', '.join(near)}")
    return MODELS[name](**options)
