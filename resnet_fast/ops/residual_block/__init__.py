"""residual_block: a block of convolutions, norms and a shortcut in training, as one operator."""
