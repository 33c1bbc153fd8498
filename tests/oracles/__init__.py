"""Formulas once more, in float64 numpy and independent of the code that they judge: one file for each family."""
