"""Triton kernels of retention, one stage a file. Only `retnet.ops` imports them, when a CUDA tensor arrives.

layout      where a segment starts: batches, packed sequences, masks
decay       products of decays inside a segment
states      the state at every segment's border
segment     what a segment reads from that state and from itself: outputs and the gradients of q, k, v
decay_grad  the gradient of log_decay
step        decoding: one or a few tokens, the state updated in place
tiles       block shapes by device, dtype and head size
walk        the fast path of Hopper GPUs: the state stays on chip (walk_kernel, walk_roles, walk_carry, walk_places)
chunkwise   the forward and backward passes made of these
"""
