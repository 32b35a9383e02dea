"""The causal depthwise convolution over a few tokens, forward and backward."""

from retnet.system.extras import require

require("triton", "A GPU kernel")
