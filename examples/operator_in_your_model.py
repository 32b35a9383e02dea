"""The retention operator in a module of your own: a forecaster that trains on whole signals and runs on live ones.

Run it: python examples/operator_in_your_model.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from retnet import retention
from retnet.ops.decay import paper_log_decay


class Forecaster(nn.Module):
    """signal [B, T, 1], state [B, H, D/H, D/H] -> (forecast of each next sample [B, T, 1], state)."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.read, self.qkv = heads, nn.Linear(1, width), nn.Linear(width, 3 * width)
        self.out, self.write = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, signal, state=None):
        x = self.read(signal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # each [B, T, H, D/H]
        y, state = retention(q, k, v, paper_log_decay(self.heads).to(x.device), state=state)
        y = self.out(F.layer_norm(y, y.shape[-1:]).flatten(-2))  # a norm per head, as in Eq. 8 of the paper
        return self.write(F.gelu(x + y)), state


def signals(count, length, seed):
    """Noisy sines: [count, length, 1]."""
    generator = torch.Generator().manual_seed(seed)
    period, phase = 8 + 24 * torch.rand(2, count, 1, generator=generator)
    clean = torch.sin(2 * torch.pi * (torch.arange(length) + phase) / period)
    return (clean + 0.2 * torch.randn(count, length, generator=generator))[..., None]


def main(steps=100):
    torch.manual_seed(0)
    model, losses = Forecaster(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = signals(16, 129, seed=step)
        loss = F.mse_loss(model(batch[:, :-1])[0], batch[:, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"mean squared error: {losses[0]:.2f} before training, {losses[-1]:.2f} after it (the noise alone is 0.04)")
    live, state = signals(1, 300, seed=steps), None
    with torch.no_grad():
        at_once, _ = model(live)
        for t, sample in enumerate(live.split(1, dim=1)):
            forecast, state = model(sample, state)
            torch.testing.assert_close(forecast[:, 0], at_once[:, t], rtol=1e-4, atol=1e-5)
    print(f"one sample at a time gives the same forecasts, with a state of {list(state.shape)}")


if __name__ == "__main__":
    main()
