"""resnet_fast: residual networks, faster.

import resnet_fast
model = resnet_fast.convert(model)    # train and evaluate as before
frozen = resnet_fast.freeze(model)    # inference only
print(resnet_fast.explain(model))     # what runs fused, and what does not and why
"""

from importlib.metadata import PackageNotFoundError, version

from resnet_fast import functional, models, nn
from resnet_fast.backends import exact, use_backend
from resnet_fast.convert import convert, explain, restore
from resnet_fast.freeze import freeze
from resnet_fast.tune import tune

try:
    __version__ = version("resnet_fast")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+source"

__all__ = ["convert", "exact", "explain", "freeze", "functional", "models", "nn", "restore", "tune", "use_backend"]
