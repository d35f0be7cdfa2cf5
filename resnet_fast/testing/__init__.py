"""What the tests and the benchmarks share: the tolerance law, real layer shapes, and which rooms can run here."""
