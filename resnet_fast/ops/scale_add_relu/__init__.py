"""scale_add_relu: op.py is the contract, eager.py the specification, the other modules are rooms."""
