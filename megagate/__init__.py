"""megagate: gated-attention Mixture-of-Experts pretraining whose every layout is provably the same model."""

__version__ = "0.1.0"
