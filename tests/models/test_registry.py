"""Names to constructors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from resnet_fast import models


def test_every_name_is_a_function_of_the_package() -> None:
    names = models.list_models()
    assert len(names) == len(set(names)) == 20
    for name in names:
        assert getattr(models, name).__name__ == name
        assert name in models.__all__


def test_patterns() -> None:
    assert models.list_models("resnext*") == ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
    assert models.list_models("nothing*") == []


def test_options_reach_the_constructor() -> None:
    with torch.device("meta"):
        assert models.create_model("resnet20", num_classes=3).fc.out_features == 3


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="resnet50"):
        models.create_model("resnet5O")


def test_models_need_neither_torchvision_nor_triton() -> None:
    code = (
        "import sys; sys.modules['torchvision'] = sys.modules['triton'] = None\n"
        "import resnet_fast.models as m, torch\n"
        "print(m.resnet20().eval()(torch.zeros(1, 3, 32, 32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[1, 10]" in done.stdout
