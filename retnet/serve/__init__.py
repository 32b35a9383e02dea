"""Generation as a service would run it: many requests over one model, states that users own. No web framework."""
