"""The method in pure PyTorch: losses, samplers, bands and metrics. Knows neither Ray nor MLflow."""
