"""The machine underneath: atomic files, memory readings, byte sizes in words. Standard library only."""
