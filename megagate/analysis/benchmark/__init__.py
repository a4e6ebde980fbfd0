"""Measurements of speed and memory: processes driven in turns, paired ratios, and the rows of each table."""
