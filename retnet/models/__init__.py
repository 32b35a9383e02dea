"""Models: configuration, language model, states, costs, decoding, converters, and the Hugging Face classes."""
