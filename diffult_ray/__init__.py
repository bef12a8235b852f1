"""DiffuLT and its ablations as resumable sweeps on Ray."""

__version__ = "0.1.0"
