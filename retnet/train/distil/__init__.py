"""Distillation: a Transformer's layers become retention, aligned to it layer by layer, then trained on its logits."""
