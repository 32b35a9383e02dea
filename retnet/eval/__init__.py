"""Evaluation: bits per byte beside compressors, perplexity, tasks, and agreement of the forms of retention."""
