"""The visual language of all pictures: colours of rivals, frames with titles, axes with units.

`palette` needs no other package; `frame` and `axes` import matplotlib (the extra `plots`).
"""
