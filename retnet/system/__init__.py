"""The machine: atomic files, JSON, memory readings, and byte counts in words. Standard library only."""
