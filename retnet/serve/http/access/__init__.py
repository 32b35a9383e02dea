"""Access: what every request passes before the application sees it, and what is written down about it."""
