"""The HTTP server over one engine: OpenAI's API, sessions and a page."""
