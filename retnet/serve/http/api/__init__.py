"""OpenAI's API: the fields that endpoints share, completions, and the text of outputs as responses and events."""
