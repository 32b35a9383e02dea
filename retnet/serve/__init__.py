"""Serving: many requests over one model, with states that users can save, move and continue."""
