"""Programs that other people wrote, as clients of `retnet serve` in a process of its own."""
