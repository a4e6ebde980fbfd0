"""The learning-rate stability lab: variants of a model over a ladder of learning rates, paired by seed."""
