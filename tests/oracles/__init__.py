"""Reference implementations of the formulas in float64 numpy, independent of the tested code; one file per family."""
