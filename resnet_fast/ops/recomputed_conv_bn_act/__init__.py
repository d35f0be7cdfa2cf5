"""recomputed_conv_bn_act: op.py is the contract, eager.py the specification; its parts run in the rooms of others."""
