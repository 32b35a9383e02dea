"""Chunkwise retention for Hopper GPUs: the state stays on chip."""

from retnet.system.extras import require

require("triton", "A GPU kernel")
