"""Sends the values of each version to TensorBoard, wandb or mlflow (docs/tracking.md)."""
