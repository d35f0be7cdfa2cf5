"""Operators, a folder each: the contract (op.py), the specification (eager.py) and the other rooms."""
