"""What a model is worth: bits per byte on held-out text, beside compressors of the same text."""
