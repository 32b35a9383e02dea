"""The HTTP server over one engine: OpenAI's API, sessions and a page."""

from retnet.system.extras import require

require("serve", "The server")
