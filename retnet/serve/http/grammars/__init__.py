"""Grammars: forms that a text must have, compiled by llguidance and read by the engine as masks."""
