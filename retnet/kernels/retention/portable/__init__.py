"""Chunkwise retention in plain Triton: every argument, on every GPU that Triton supports."""

from retnet.system.extras import require

require("triton", "A GPU kernel")
