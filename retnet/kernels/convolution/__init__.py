"""The causal depthwise convolution over a few tokens, forward and backward."""
