"""Models: configuration, language model, states, costs, scoring, generation, converters and the Hugging Face face."""
