"""bn_act_max_pool2d: op.py is the contract, eager.py the specification, every other module one room."""
