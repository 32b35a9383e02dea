"""The machine: atomic files, memory readings, and byte counts in words. Standard library only."""
