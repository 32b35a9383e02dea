"""The findings of `retnet doctor`.

finding.py       one finding: what was looked at, what was found, what to do about it
installation.py  Python, packages and extras, from metadata alone
child.py         runs the checks in a process of their own, which may crash or hang
probe.py         that process
checks.py        what needs PyTorch: devices, speed, and a self-check of the package
"""
