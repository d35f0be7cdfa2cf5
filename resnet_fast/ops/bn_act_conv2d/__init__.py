"""bn_act_conv2d: op.py is the contract, eager.py the specification; its parts run in the rooms of bn_act and conv2d."""
