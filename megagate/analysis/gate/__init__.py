"""What the gate of a trained model does: `tools/analyze.py`."""
