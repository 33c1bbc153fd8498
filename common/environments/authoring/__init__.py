"""What authors build environments from: typed functions, rows of a dataset, a reward function."""
