"""Papers as pieces that plug into a stock PyTorch Lightning Trainer."""

__version__ = "0.1.0"
