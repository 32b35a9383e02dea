"""Kernels of a decode step: one or a few tokens per sequence."""

from retnet.system.extras import require

require("triton", "A GPU kernel")
