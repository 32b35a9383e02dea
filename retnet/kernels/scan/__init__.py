"""Mamba's selective scan, forward and backward."""

from retnet.system.extras import require

require("triton", "A GPU kernel")
