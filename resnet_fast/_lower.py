"""From a traced model to the one-call network of the compiled module."""

from __future__ import annotations

import json
import operator
import threading
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast import _choices, _native
from resnet_fast._plan import fold
from resnet_fast.convert import Report, Row
from resnet_fast.nn.program import AddReLU, Call, ConvBNAct, MaxPool, Program, Ref, resolve


class Unsupported(Exception):
    """The network has something the compiled module does not run; the message says what."""


def lower(root: nn.Module, program: Program, dtype: torch.dtype, device: torch.device, exact: bool) -> Network:
    """Build the network.

    Raises:
        Unsupported: with the reason.
    """
    raise Unsupported("the compiled module has no network executor")
