"""resnet_fast: residual networks, faster."""
