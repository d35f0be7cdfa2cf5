"""bn_act_global_avg_pool2d: op.py is the contract, eager.py the specification, the other modules are rooms."""
